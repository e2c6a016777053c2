#!/bin/bash
# data_prep/demo_chat, on each worker
job='/mnt/shared/nemo run/20260102-030405-peft-megatron_bridge-0a1b2c'
mark='[steps 20260102-030405-peft-megatron_bridge-0a1b2c]'
exec 2>&1
now() { date -u +%Y-%m-%dT%H:%M:%S+00:00; }
worker=${LEPTON_JOB_WORKER_INDEX:-0}
started=$(now)
export PYTHONPATH="$job/code${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

main() {
set -e
mkdir -p "$job/work" && cd "$job/work"
exec python -m steps.data_prep.demo_chat.step --config '/mnt/shared/nemo run/20260102-030405-peft-megatron_bridge-0a1b2c/config.yaml'
}

# Lepton's SIGTERM comes to this shell alone: it is passed on, and the step's own end waited for.
child= stopped=
trap 'stopped=1; again=1; [ -z "$child" ] || kill -TERM "$child" 2> /dev/null' TERM INT
main & child=$!
[ -z "$stopped" ] || kill -TERM "$child"
again=1
while [ -n "$again" ]; do
    again=
    wait "$child"
    code=$?
done

# What is on this storage cannot be read from outside; the log can. Its last lines are for `steps`, which hides them.
tell() { while IFS= read -r line || [ -n "$line" ]; do printf '%s %s %s\n' "$mark" "$1" "$line"; done; }
kind=exit end="$code $worker"
if [ "$code" != 0 ]; then
    # The first that fails by itself says why the job failed; the others are stopped then, or lose sight of it.
    [ -n "$stopped" ] && kind=stopped || (set -C; echo "$end" > "$job/failed") 2> /dev/null
    [ -s "$job/failed" ] && kind=exit end=$(cat "$job/failed")
fi
if [ "$worker" = 0 ]; then
    [ ! -f "$job/summary.json" ] || tell summary < "$job/summary.json"
    [ ! -f "$job/metrics.jsonl" ] || tell metrics < "$job/metrics.jsonl"
fi
echo "$end $started $(now)" | tell "$kind"
exit "$code"
