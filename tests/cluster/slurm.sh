#!/bin/bash
# A real Slurm of 4 nodes (2 CPUs and 6 GB each) with accounting on this one machine, for tests.
#   tests/cluster/slurm.sh up | down | status
# Everything it writes lies in HPC_MM_CLUSTER_DIR/slurm (default /var/tmp/hpc_mm-cluster/slurm), but for Slurm's fixed
# places: /etc/slurm/{slurm,slurmdbd}.conf, munge's key, and a line `127.0.0.1 node1 ...` in /etc/hosts.
# Partitions: main (no time limit), short (10 minutes) and urgent, whose jobs send those of the others back into the queue
# after a minute's grace. An array has at most 8 jobs, so that tests need few to have more. Debian, root. A Slurm that runs already is left alone, but for an older one of this script.
set -eu
cd "$(dirname "$0")"
source ./packages.sh
D=${HPC_MM_CLUSTER_DIR:-/var/tmp/hpc_mm-cluster}/slurm
NODES=4
HOST=$(hostname)

answers() { timeout 10 sinfo -h >/dev/null 2>&1; }

write_config() {  # into folder $1
  cat >"$1/slurmdbd.conf" <<C
# hpc_mm tests/cluster
AuthType=auth/munge
DbdHost=$HOST
DbdAddr=127.0.0.1
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=13306
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct_db
LogFile=$D/log/slurmdbd.log
PidFile=$D/slurmdbd.pid
C
  chmod 600 "$1/slurmdbd.conf"
  cat >"$1/slurm.conf" <<C
# hpc_mm tests/cluster
ClusterName=hpcmm
SlurmctldHost=$HOST(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
StateSaveLocation=$D/state
SlurmdSpoolDir=$D/spool/%n
SlurmctldLogFile=$D/log/slurmctld.log
SlurmdLogFile=$D/log/slurmd.%n.log
SlurmctldPidFile=$D/slurmctld.pid
SlurmdPidFile=$D/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1
ReturnToService=2
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/linux
KillWait=5
SlurmdParameters=config_overrides
MaxArraySize=8
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
NodeName=node[1-$NODES] NodeHostname=$HOST NodeAddr=127.0.0.1 Port=[17001-$((17000 + NODES))] CPUs=2 RealMemory=6000 State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP GraceTime=60
PartitionName=short Nodes=ALL MaxTime=00:10:00 State=UP GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=00:10:00 State=UP PriorityTier=10
C
}

start_munge() {
  munge -n >/dev/null 2>&1 && return
  mkdir -p /run/munge /var/log/munge /var/lib/munge
  [ -f /etc/munge/munge.key ] || /usr/sbin/mungekey -c
  chown -R munge:munge /run/munge /var/log/munge /var/lib/munge /etc/munge
  runuser -u munge -- /usr/sbin/munged --pid-file=/run/munge/munged.pid
  ln -sf /run/munge/munged.pid "$D/munged.pid"
}

start_accounting() {
  mkdir -p /run/mysqld
  chown mysql:mysql "$D/mysql" /run/mysqld
  mariadb-install-db --user=mysql --datadir="$D/mysql" >"$D/log/mariadb-install.log" 2>&1
  setsid mariadbd --user=mysql --datadir="$D/mysql" --socket="$D/mysql/sock" --pid-file="$D/mysql/mariadbd.pid" \
    --bind-address=127.0.0.1 --port=13306 --innodb-buffer-pool-size=64M >"$D/log/mariadb.log" 2>&1 </dev/null &
  for _ in $(seq 60); do mariadb-admin -S "$D/mysql/sock" ping >/dev/null 2>&1 && break; sleep 0.5; done
  mariadb -S "$D/mysql/sock" -e "create user if not exists slurm@'127.0.0.1' identified by 'slurm';
    create user if not exists slurm@localhost identified by 'slurm';
    grant all on slurm_acct_db.* to slurm@'127.0.0.1'; grant all on slurm_acct_db.* to slurm@localhost;"
  slurmdbd
  for _ in $(seq 60); do sacctmgr -n show cluster >/dev/null 2>&1 && break; sleep 0.5; done
  sacctmgr -n show cluster | grep -q hpcmm || sacctmgr -i add cluster hpcmm >/dev/null
}

outdated() {  # whether the Slurm that runs is of this script and this folder, with another configuration
  local new; new=$(mktemp -d)
  write_config "$new"
  grep -qx "StateSaveLocation=$D/state" /etc/slurm/slurm.conf && ! cmp -s "$new/slurm.conf" /etc/slurm/slurm.conf
}

up() {
  if command -v sinfo >/dev/null && answers; then
    outdated || { echo "Slurm runs already; left as it is"; return; }
    [ -z "$(squeue -h)" ] || { echo "Slurm runs with an older configuration, and has jobs: wait for them" >&2; exit 1; }
  fi
  if [ -f /etc/slurm/slurm.conf ] && ! grep -q 'hpc_mm tests/cluster' /etc/slurm/slurm.conf; then
    echo "/etc/slurm/slurm.conf is not of this script: this machine belongs to another Slurm; left as it is" >&2; exit 1
  fi
  [ "$(id -u)" = 0 ] || { echo "starting Slurm needs root" >&2; exit 1; }
  need slurm-wlm slurmdbd slurm-client munge mariadb-server
  down >/dev/null
  rm -rf "$D"
  mkdir -p "$D"/{state,log,spool,mysql}
  chmod 755 "$D"
  grep -q ' node1\b' /etc/hosts || echo "127.0.0.1 $(seq -f 'node%g' -s ' ' $NODES)" >>/etc/hosts
  write_config /etc/slurm
  start_munge
  start_accounting
  slurmctld
  for i in $(seq $NODES); do slurmd -N "node$i"; done
  for _ in $(seq 60); do [ "$(sinfo -h -p main -t idle -o %D 2>/dev/null)" = $NODES ] && break; sleep 0.5; done
  [ "$(sinfo -h -p main -t idle -o %D)" = $NODES ] || { echo "Slurm did not come up: see $D/log" >&2; exit 1; }
  echo "Slurm is up: $NODES nodes, logs in $D/log"
}

down() {
  [ -d "$D" ] || return 0
  if [ -f "$D/slurmctld.pid" ] && answers; then scancel --state=RUNNING --state=PENDING --user=root || true; sleep 1; fi
  stop_all "$D" slurmctld slurmd slurmdbd mariadbd munged
  echo "Slurm is down; its logs stay in $D/log"
}

case ${1:-} in
  up) up ;;
  down) down ;;
  status) answers && sinfo || { echo "Slurm does not run"; exit 1; } ;;
  *) sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
