#!/usr/bin/env bash
# Measure what docs/results publishes of whole workloads; one name a call.
#
#     bash launch/publish_benchmarks.sh stand_in|paced_t4|paced_a10
#
# stand_in: every strategy on the demo model, one core as the device and the others as the host.
# paced_t4, paced_a10: a described card beside this machine's real CPU; up to 6 GiB of memory are taken.
# Wants a quiet machine: 10 minutes for the first, 45 for each of the others.
set -euo pipefail
cd "$(dirname "$0")/.."
source .venv/bin/activate

compare() { # name, workload, the rest as launch.run_benchmark takes it
    python -m launch.run_benchmark --workload="runs/$2.jsonl" --output="docs/results/benchmark_$1.json" \
        --repeats=3 --budget_sec=3600 "${@:3}"
}

paced() { # card, config, requests, MiB of KV cache on the card, rates
    python -m launch.make_workload --set=uniform --prompt_tokens=128 --output_tokens=512 \
        --num_requests="$3" --vocab_size=128256 --output="runs/paced_$1.jsonl"
    compare "paced_$1" "paced_$1" --backend=paced --device_profile="$1" --config="configs/$2.py" \
        --config.cache.device_bytes=$(($4 * 2 ** 20)) --config.scheduler.max_host_requests=64 \
        --strategies=device_only,asymmetric_pipelining,async_overlap,apex \
        --request_rates="$5" --ttft_sec=10 --tpot_sec=0.5
}

case "${1:-}" in
stand_in)
    python -m launch.make_workload --set=uniform --prompt_tokens=96 --output_tokens=64 \
        --num_requests=128 --model=configs/demo_model --output=runs/demo_uniform.jsonl
    compare stand_in demo_uniform --config=configs/demo.py --config.device.platform=cpu \
        --strategies=device_only,full_offload,asymmetric_pipelining,async_overlap,staggered_2,passes_2,apex_paper,apex
    ;;
paced_t4)
    paced t4 llama_3_2_3b 32 512 own,0.5,1
    ;;
paced_a10)
    paced a10 llama_3_1_8b 64 1024 own,1,2
    ;;
*)
    echo "error: the argument is '${1:-}'; it must be stand_in, paced_t4 or paced_a10" >&2
    exit 2
    ;;
esac
