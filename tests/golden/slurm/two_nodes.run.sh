#!/bin/bash
# peft/megatron_bridge, on each node
job=/lustre/ada/jobs/jobs/20260102-030405-peft-megatron_bridge-0a1b2c
python=$1
cd "$job/work" || { echo "error: $job is not in the container or on $(hostname)" >&2; exit 5; }
export PYTHONPATH="$job/code${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# The first node to fail tells the job's exit code. TERM is for the step; this script stays until that has ended.
trap 'code=$?; [ "$code" = 0 ] || (set -C; echo "$code" > "$job/.failure") 2> /dev/null' EXIT
trap : TERM
set -e
nvidia-smi -L
"$python" -m steps.runtime.torchrun --nnodes=2 --rdzv-backend=c10d --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT" --rdzv-id=20260102-030405-peft-megatron_bridge-0a1b2c --nproc-per-node=8 -m steps.peft.megatron_bridge.step --config /lustre/ada/jobs/jobs/20260102-030405-peft-megatron_bridge-0a1b2c/config.yaml
