#!/bin/bash
# peft/megatron_bridge, on each node
job=/home/ada/project/.steps/jobs/20260102-030405-peft-megatron_bridge-0a1b2c
python=$1
cd "$job/work" || { echo "error: $job is not in the container or on $(hostname)" >&2; exit 5; }
export PYTHONPATH="$job/code${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "$python" -m steps.peft.megatron_bridge.step --config /home/ada/project/.steps/jobs/20260102-030405-peft-megatron_bridge-0a1b2c/config.yaml
