# THE SITE: what every job does on its first node before it starts the others. The one file that a new site edits.
# It travels with the code snapshot of a run, so an edit reaches only jobs that are submitted after it.

# Modules and virtual environments (the launcher puts its own Python first on PATH):
# module load cuda/12.4

# The network between nodes (see `ip link` and `ibstat`):
# export NCCL_SOCKET_IFNAME=ib0
# export NCCL_IB_HCA=mlx5

# Since Slurm 22.05, srun no longer takes over --cpus-per-task: without this every node's task gets one core.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}

# The first node of the job. Where compute nodes have no scontrol: this script runs on that very node.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" 2>/dev/null | sed -n 1p) || true
export MASTER_ADDR=${MASTER_ADDR:-${SLURMD_NODENAME:-$(hostname)}}
