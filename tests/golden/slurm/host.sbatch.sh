#!/bin/bash
#SBATCH --job-name=20260102-030405-peft-megatron_bridge-0a1b2c
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --no-requeue
#SBATCH --chdir=/home/ada/project/.steps/jobs/20260102-030405-peft-megatron_bridge-0a1b2c
#SBATCH --output=/home/ada/project/.steps/jobs/20260102-030405-peft-megatron_bridge-0a1b2c/log
#SBATCH --open-mode=append

# peft/megatron_bridge, job 20260102-030405-peft-megatron_bridge-0a1b2c
job=/home/ada/project/.steps/jobs/20260102-030405-peft-megatron_bridge-0a1b2c
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

python=/opt/python/bin/python3
container=()
echo "note: no container image: the job runs in the environment of its nodes"

srun --nodes=1 --ntasks=1 --ntasks-per-node=1 --kill-on-bad-exit=1 --wait=60 --unbuffered --export=ALL "${container[@]}" bash "$job/run.sh" "$python"
exit $?
