#!/usr/bin/env bash
# All that only a GPU can show, in an hour on an H100 or H200: prints tables to paste.
#     benchmarks/gpu_day.sh            # on a GPU; with two, NCCL too
#     benchmarks/gpu_day.sh --small    # every line of it, on a CPU
set -euo pipefail
cd "$(dirname "$0")/.."
small=${1:-}
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
gpus=$(nvidia-smi -L 2>/dev/null | wc -l || true)
[ -n "$small" ] && gpus=2

echo "## Correctness: packed row and sampler against the plain model"
python benchmarks/gpu_check.py $small

echo "## Training: the offline world, one process and two"
steps=$([ -n "$small" ] && echo 2 || echo 20)
for n in 1 2; do
    [ "$n" -gt "$gpus" ] && echo "one GPU: NCCL is not tried" && continue
    torchrun --nproc_per_node="$n" grpo.py --preset toy --steps "$steps" --output_dir "$out/$n" \
        >"$out/$n.log" 2>&1 || { tail -20 "$out/$n.log"; exit 1; }
    echo "$n: $(tail -1 "$out/$n/metrics.jsonl")"
done

echo "## Speed: rollout and update against the naive path and the floors"
python benchmarks/gpu_step.py $small

echo "## What a decode step dispatches"
python benchmarks/decode_step.py

echo "## Memory, against --dry_run"
python benchmarks/gpu_memory.py $small
