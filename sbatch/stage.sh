# What a job of data preparation or evaluation does, given a command: it runs one stage of the work, and its task of it
# where it is part of an array. sbatch/*.sbatch source this; the jobs of cluster=slurm run it.

set -eo pipefail
source sbatch/env.sh
case $1 in *.py | -m) set -- python -u "$@" ;; esac
case " $* " in *" cluster="*) ;; *) set -- "$@" cluster=local ;; esac
if [ -n "$SLURM_ARRAY_TASK_ID" ]; then
  case " $* " in *" task="*) ;; *) set -- "$@" "task=$SLURM_ARRAY_TASK_ID" ;; esac
fi

# Near its end the job goes back into the queue; what is done is skipped then.
trap 'scontrol requeue "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}" || true' USR2
trap : TERM  # which Slurm sends to all processes: this one waits while the work ends in order
"$@" &
work=$!
wait $work && code=0 || code=$?  # which a signal ends early
while kill -0 $work 2>/dev/null; do wait $work && code=0 || code=$?; done
exit $code
