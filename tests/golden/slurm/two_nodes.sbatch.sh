#!/bin/bash
#SBATCH --job-name=20260102-030405-peft-megatron_bridge-0a1b2c
#SBATCH --account=llm
#SBATCH --partition=backfill
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --time=12:00:00
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --no-requeue
#SBATCH --chdir=/lustre/ada/jobs/jobs/20260102-030405-peft-megatron_bridge-0a1b2c
#SBATCH --output=/lustre/ada/jobs/jobs/20260102-030405-peft-megatron_bridge-0a1b2c/log
#SBATCH --open-mode=append

# peft/megatron_bridge, job 20260102-030405-peft-megatron_bridge-0a1b2c
job=/lustre/ada/jobs/jobs/20260102-030405-peft-megatron_bridge-0a1b2c
fail() { echo "error: $1" >&2; exit 5; }
now() { date -u +%Y-%m-%dT%H:%M:%S+00:00; }
finish() {
    code=$?
    now > "$job/ended_at"
    echo "$code" > "$job/.exit_code" && mv "$job/.exit_code" "$job/exit_code"
}
# A directory that is not on this node must not be replaced by another, as Slurm does.
cd "$job/work" || fail "$job is not on $(hostname): remote_job_dir must be a directory that all nodes share"
trap finish EXIT
# Slurm ends the job (cancelled, time limit, …) and knows why: its word counts, not an exit code of ours.
trap 'trap - EXIT; exit 143' TERM
echo "$SLURM_JOB_ID" > "$job/slurm_job_id"
now > "$job/started_at"
secrets=/lustre/ada/jobs/secrets/20260102-030405-peft-megatron_bridge-0a1b2c
[ -f "$secrets" ] || fail "the job's secrets are gone ($secrets): submit it again"
. "$secrets" && rm "$secrets" || fail "the job's secrets cannot be read and removed ($secrets)"

export NCCL_DEBUG=INFO

# setup_lines of the profile
module load cuda/12.4

# Where the processes meet: the first node, by a name that resolves or else its address, and a port that nobody uses.
# The batch script runs on that node. Ports from 32768 on are given to outgoing connections at any time.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
getent hosts "$MASTER_ADDR" > /dev/null ||
    MASTER_ADDR=$(scontrol show node "$MASTER_ADDR" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
while
    MASTER_PORT=$((20000 + RANDOM % 12000))
    grep -qi ":$(printf '%04X' "$MASTER_PORT") " /proc/net/tcp /proc/net/tcp6 2> /dev/null
do :; done
export MASTER_ADDR MASTER_PORT

python=python3
container=()
image='nvcr.io#nvidia/nemo:25.11'
squash=/lustre/ada/jobs/squash/nvcr.io+nvidia+nemo=25.11.sqsh
[ ! -e "$squash" ] || image=$squash
if srun --help 2>&1 | grep -q -e --container-image; then
    python=python
    container=(
        "--container-image=$image"
        --container-mounts=/lustre/data:/data:ro,/lustre/ada/jobs:/lustre/ada/jobs
        --container-workdir=/lustre/ada/jobs/jobs/20260102-030405-peft-megatron_bridge-0a1b2c/work
        --container-env=NCCL_DEBUG,HF_TOKEN
    )
else
    echo "note: this Slurm has no pyxis: the job runs in the environment of its nodes, not in $image"
fi

srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --kill-on-bad-exit=1 --wait=60 --unbuffered --export=ALL "${container[@]}" bash "$job/run.sh" "$python"
code=$?
# srun tells the highest code, which is that of a node that was ended for the sake of another's.
[ "$code" = 0 ] || read -r code 2> /dev/null < "$job/.failure"
exit "$code"
