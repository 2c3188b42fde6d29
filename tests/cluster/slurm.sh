#!/usr/bin/env bash
# A real SLURM on this machine alone: controller, two node daemons and munge on loopback, each node with two fake GPUs.
# Everything lives under one private folder; `down` takes all of it away again.
#
#   tests/cluster/slurm.sh up DIR [PID]     start; take down by itself when process PID is gone
#   tests/cluster/slurm.sh down DIR
#   tests/cluster/slurm.sh check            say what is missing; 0 when nothing is
#
# Needs root (slurmd starts jobs as their user) and the Debian packages slurm-wlm, slurm-client and munge. Memory limits
# are enforced by polling (OverMemoryKill), so that no cgroup is made and any kernel will do. The jobs' own srun reads the
# default configuration folder, because the executor drops SLURM_CONF; so `up` links three files into /etc/slurm.
set -euo pipefail
command=${1:-check}
LINKS="slurm.conf gres.conf cgroup.conf"

problem() {
    [ "$(id -u)" = 0 ] || { echo "it needs root: slurmd starts jobs as their user"; return; }
    for tool in slurmctld slurmd munged sbatch squeue; do
        command -v "$tool" > /dev/null ||
            { echo "$tool is missing: apt-get install --no-install-recommends slurm-wlm slurm-client munge"; return; }
    done
    for file in $LINKS; do
        [ ! -e "/etc/slurm/$file" ] || { echo "this machine has a SLURM of its own (/etc/slurm/$file)"; return; }
    done
    getent hosts "$(hostname -s)" > /dev/null || echo "the name of this host, $(hostname -s), does not resolve"
}

if [ "$command" = check ]; then
    found=$(problem)
    echo "${found:-ready}"
    [ -z "$found" ]
    exit
fi

mkdir -p "$2"
D=$(cd "$2" && pwd)

down() {
    export SLURM_CONF=$D/slurm.conf
    [ ! -s "$D/watcher.pid" ] || kill -- "-$(cat "$D/watcher.pid")" 2> /dev/null || true
    timeout 5 scancel --full --user=root 2> /dev/null || true
    for _ in $(seq 40); do
        [ -n "$(timeout 3 squeue --noheader 2> /dev/null || true)" ] || break
        sleep 0.25
    done
    pids=$(cat "$D"/{slurmctld,slurmd.one,slurmd.two,munged}.pid 2> /dev/null || true)
    for pid in $pids; do kill "$pid" 2> /dev/null || true; done
    for pid in $pids; do timeout 10 tail -s 0.1 --pid="$pid" -f /dev/null || kill -9 "$pid" 2> /dev/null || true; done
    unset SLURM_CONF
    for process in /proc/[0-9]*; do # what a job started and SLURM lost sight of
        if grep -qzxF "SLURM_CONF=$D/slurm.conf" "$process/environ" 2> /dev/null &&
            grep -qz '^SLURM_JOB_ID=' "$process/environ" 2> /dev/null; then
            kill -9 "${process#/proc/}" 2> /dev/null || true
        fi
    done
    for file in $LINKS; do
        case $(readlink "/etc/slurm/$file" || true) in "$D"/*) rm -f "/etc/slurm/$file" ;; esac
    done
    rm -f "$D"/fakegpu* "$D"/*.pid
    rm -rf "$D/munge" "$D/sock" "$D/state" "$D/spool"
}

if [ "$command" = down ]; then
    down
    exit
fi
[ "$command" = up ] || { echo "unknown command $command: up, down or check" >&2; exit 2; }

found=$(problem)
[ -z "$found" ] || { echo "slurm.sh: $found" >&2; exit 2; }
trap 'code=$?; [ $code = 0 ] || { tail -n 5 "$D"/log/*.log >&2 || true; down; }' EXIT

mkdir -p "$D"/{state,spool,munge,sock,log}
chmod 755 "$D" "$D/sock"
chmod 700 "$D/munge"
host=$(hostname -s)
cpus=$(nproc)
memory=$(awk '/MemTotal/ {print int($2 / 1024 * 0.9)}' /proc/meminfo)
read -r controller_port one_port two_port < <(python3 -c '
import socket
held = [socket.socket() for _ in range(3)]
[s.bind(("127.0.0.1", 0)) for s in held]
print(*(s.getsockname()[1] for s in held))')

# munge with its own socket and key: a munged of the machine is neither needed nor touched
dd if=/dev/urandom of="$D/munge/key" bs=1024 count=1 status=none
chmod 400 "$D/munge/key"
munged --force --num-threads=2 --key-file="$D/munge/key" --socket="$D/sock/munge.socket" --pid-file="$D/munged.pid" \
    --log-file="$D/log/munged.log" --seed-file="$D/munge/seed"

# slurmd wants a character device for a GPU: private copies of the null device
for gpu in 0 1; do mknod -m 666 "$D/fakegpu$gpu" c 1 3; done
echo "Name=gpu Type=fake File=$D/fakegpu[0-1]" > "$D/gres.conf"
echo "CgroupAutomount=no" > "$D/cgroup.conf"
cat > "$D/slurm.conf" << CONF
ClusterName=loopback
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$controller_port
AuthType=auth/munge
AuthInfo=socket=$D/sock/munge.socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$D/state
SlurmdSpoolDir=$D/spool/%n
SlurmctldPidFile=$D/slurmctld.pid
SlurmdPidFile=$D/slurmd.%n.pid
SlurmctldLogFile=$D/log/slurmctld.log
SlurmdLogFile=$D/log/slurmd.%n.log
MpiDefault=none
SwitchType=switch/none
ProctrackType=proctrack/pgid
TaskPlugin=task/none
ReturnToService=2
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
DefMemPerCPU=512
MessageTimeout=60
TCPTimeout=20
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$D/jobs.txt
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill,UsePss
MinJobAge=3600
KillWait=5
NodeName=one NodeHostname=$host NodeAddr=127.0.0.1 Port=$one_port CPUs=$cpus RealMemory=$memory Gres=gpu:fake:2
NodeName=two NodeHostname=$host NodeAddr=127.0.0.1 Port=$two_port CPUs=$cpus RealMemory=$memory Gres=gpu:fake:2
PartitionName=cpu Nodes=one,two Default=YES MaxTime=INFINITE
PartitionName=gpu Nodes=one,two MaxTime=INFINITE
CONF
mkdir -p /etc/slurm
for file in $LINKS; do ln -s "$D/$file" "/etc/slurm/$file"; done
export SLURM_CONF=$D/slurm.conf

# the daemons must not hold the pipes of whoever reads this script's output
slurmctld > /dev/null 2>&1 < /dev/null
for node in one two; do slurmd -N "$node" > /dev/null 2>&1 < /dev/null; done
for _ in $(seq 100); do
    states=$(timeout 3 sinfo --noheader --Node --format=%t --partition=gpu 2> /dev/null | sort -u || true)
    [ "$states" != idle ] || break
    sleep 0.1
done
[ "$states" = idle ] || { echo "slurm.sh: the nodes did not come up (${states:-no answer})" >&2; exit 1; }
if [ -n "${3:-}" ]; then
    setsid bash -c 'tail --pid="$1" -f /dev/null; rm -f "$2/watcher.pid"; exec "$0" down "$2"' \
        "$(readlink -f "$0")" "$3" "$D" > /dev/null 2>&1 < /dev/null &
    echo $! > "$D/watcher.pid"
fi
sinfo --Node --format='%N %t %c cpus %m MB %G'
