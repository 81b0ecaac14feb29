# Sourced by test_slurm.sh: a Slurm cluster of two nodes on this machine, with configuration, key, ports and state of
# its own in $folder, so that it meets no other cluster. Uses `step`, `skip` and `wait_for` of who sources it.

SLURM_CONF="$folder/slurm.conf"
export SLURM_CONF
daemons=()

# Debian's packages; they start nothing of their own as long as there is no /etc/slurm/slurm.conf, but for munge.
install_slurm() {
    local program missing=""
    ((EUID == 0)) || skip "Slurm's daemons start jobs as other users, for which this has to run as root"
    for program in munged slurmctld slurmd sbatch srun; do
        command -v "$program" >/dev/null || missing="$missing $program"
    done
    [[ -n "$missing" ]] || return 0
    command -v apt-get >/dev/null || skip "there is no$missing here, and no apt-get to install it"
    step "installing slurm-wlm and munge"
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -qq --no-install-recommends slurm-wlm munge; } >"$folder/apt.log" 2>&1 || {
        tail -n 5 "$folder/apt.log"
        skip "apt-get could not install slurm-wlm and munge"
    }
}

free_ports() {
    python - "$1" <<'PYTHON'
import socket
import sys

probes = [socket.socket() for _ in range(int(sys.argv[1]))]
for probe in probes:
    probe.bind(("", 0))
print(*(probe.getsockname()[1] for probe in probes))
PYTHON
}

# Nodes are named by addresses, because the first one's name is where torchrun's processes meet and has to be found.
# A stop may take a loaded machine longer than its time limit: OverTimeLimit, in minutes. What is asked of a job after
# its end has to be there still, which Slurm forgets after five minutes unless told otherwise: MinJobAge, in seconds.
start_cluster() {
    local ports host
    read -ra ports <<<"$(free_ports 3)"
    host="$(hostname -s)"
    mkdir "$folder/state"
    (umask 077 && head -c 1024 /dev/urandom >"$folder/munge.key")
    cat >"$SLURM_CONF" <<END
ClusterName=test_slurm
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool-%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
OverTimeLimit=3
MinJobAge=86400
KillWait=10
NodeName=127.0.0.1 NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[1]} CPUs=2 CoresPerSocket=2 State=UNKNOWN
NodeName=127.0.0.2 NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[2]} CPUs=2 CoresPerSocket=2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
END
    daemon munged --foreground --key-file="$folder/munge.key" --socket="$folder/munge.socket" --num-threads=1 \
        --pid-file="$folder/munged.pid" --seed-file="$folder/munged.seed" --log-file="$folder/munged.log"
    wait_for 20 "munged" test -S "$folder/munge.socket"
    daemon slurmctld -D
    daemon slurmd -D -N 127.0.0.1
    daemon slurmd -D -N 127.0.0.2
    wait_for 60 "two idle nodes" both_idle
}

daemon() {
    "$@" >>"$folder/$1.log" 2>&1 &
    daemons+=($!)
}

both_idle() { [[ "$(sinfo --noheader --Node --format=%t 2>/dev/null)" == $'idle\nidle' ]]; }

# Ends all jobs of the cluster, then its daemons.
stop_cluster() {
    local daemon
    ((${#daemons[@]})) || return 0
    timeout 10 scancel --full --signal=KILL --user="$(id -un)" 2>/dev/null || true
    timeout 10 scancel --user="$(id -un)" 2>/dev/null || true
    for ((i = 0; i < 60; i++)); do # a job's slurmstepd, with a socket there, would outlive slurmd
        compgen -G "$folder/spool-*/*_*.*" >/dev/null || break
        sleep 0.5
    done
    for daemon in "${daemons[@]}"; do
        kill "$daemon" 2>/dev/null || true
    done
    wait "${daemons[@]}" 2>/dev/null || true
}
