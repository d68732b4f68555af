#!/usr/bin/env bash
# Measure the gain of compression with little memory and its cost with ample memory: SmolLM2-135M on a CPU.
# Usage: benchmarks/memory_bound_cpu.sh [short|ample|one|one-short] ; needs `make demo` or `python -m tools.fetch_model smollm2-135m` once.
set -euo pipefail
cd "$(dirname "$0")/.."
export VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-1}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
common=(.models/smollm2-135m --config stock --config kara:0.25 --prompt-len 64 --block-size 32 --enforce-eager
    --max-seconds 300)
case "${1:-short}" in
# 4 requests of 2,000 tokens take 4 * 63 blocks of 32 tokens; one more is vLLM's null block.
short) extra=(--concurrency 12 --num-requests 12 --output-len 1936 --num-gpu-blocks 253) ;;
# All 12 fit uncompressed.
ample) extra=(--concurrency 12 --num-requests 12 --output-len 960 --num-gpu-blocks 760) ;;
# One request at a time, in a large pool and in one that just holds it.
one) extra=(--output-len 1936 --num-gpu-blocks 760 --concurrency 1 --num-requests 1) ;;
one-short) extra=(--output-len 1936 --num-gpu-blocks 65 --concurrency 1 --num-requests 1) ;;
*) echo "short, ample, one or one-short?" >&2 && exit 2 ;;
esac
exec "${PYTHON:-.venv/bin/python}" -m kvllm bench throughput "${common[@]}" "${extra[@]}" \
    --json "benchmarks/results/cpu_${1:-short}.json" --plot "benchmarks/results/cpu_${1:-short}.png"
