#!/usr/bin/env bash
# Measure what docs/results publishes of whole workloads, and of steady states on described cards.
#
#     bash launch/publish_benchmarks.sh [--trial] NAME...
#
# stand_in: every strategy on the demo model, one core as the device and the others as the host.
# paced_t4, paced_a10: a whole workload on a described card beside this machine's real CPU.
# paced_steady: both cards in a steady state, every strategy held to its bounds.
# frameworks: ragged requests through this engine, transformers and llama.cpp, two models (15 minutes,
#     and as long again to make the environments the first time).
# online_t4, online_a10: loads and latencies, all simulated: the same on any machine, noisy or not.
#
# The first takes 8 minutes of a quiet machine, the paced ones 12 each and up to 9 GiB of memory,
# the online ones 3. Runs are kept as they end; a part that fails does not keep the next from it.
# --trial: tiny sizes and files in runs/trial, to see in a few minutes that nothing is missing.
set -euo pipefail
cd "$(dirname "$0")/.."
source .venv/bin/activate

trial=
if [ "${1:-}" = --trial ]; then
    trial=yes
    shift
fi
folder=docs/results
if [ -n "$trial" ]; then folder=runs/trial; fi
schedules=device_only,asymmetric_pipelining,async_overlap,apex

size() { # what is published, what a trial takes
    if [ -n "$trial" ]; then echo "$2"; else echo "$1"; fi
}

compare() { # name, requests, prompt tokens, output tokens, of which model, how they are run...
    python -m launch.make_workload --set=uniform --num_requests="$2" --prompt_tokens="$3" \
        --output_tokens="$4" "$5" --output="runs/$1.jsonl"
    python -m launch.run_benchmark --workload="runs/$1.jsonl" \
        --output="$folder/benchmark_$1.json" "${@:6}"
}

described() { # name, card, config, MiB of KV cache there, requests, output tokens, the rest...
    compare "$1" "$5" 128 "$6" --vocab_size=128256 --device_profile="$2" \
        --config="configs/$3.py" --config.cache.device_bytes=$(($4 * 2 ** 20)) \
        --config.scheduler.max_host_requests=64 --strategies="$schedules" \
        --ttft_sec=10 --tpot_sec=0.5 "${@:7}"
}

paced() { # card, config, MiB, requests, output tokens
    described "paced_$1" "$1" "$2" "$3" "$(size "$4" 32)" "$(size "$5" 16)" --backend=paced \
        --repeats=2 --request_rates="$(size own,3 own,20)" --budget_sec=570
}

online() { # card, host, config, MiB, rates
    described "online_$1" "$1" "$3" "$4" "$(size 240 16)" "$(size 256 16)" --backend=simulated \
        --host_profile="$2" --request_rates="$5"
}

beside() { # name, model, requests, longest, whose token ids, frameworks
    python -m launch.make_workload --set=lmsys --num_requests="$(size "$3" 8)" --max_model_len="$4" \
        "$5" --output="runs/ragged_$1.jsonl"
    python -m launch.compare --workload="runs/ragged_$1.jsonl" --config=configs/default.py \
        --config.model.path="$2" --config.scheduler.strategy=device_only \
        --config.scheduler.max_requests=32 --frameworks="apex_jax,transformers$6" --repeats=2 \
        --output="$folder/frameworks_$1.json"
}

part() { # name
    case "$1" in
    stand_in)
        compare stand_in "$(size 96 12)" 96 "$(size 64 8)" --model=configs/demo_model \
            --config=configs/demo.py --config.device.platform=cpu --repeats=3 --budget_sec=400 \
            --strategies=device_only,full_offload,asymmetric_pipelining,async_overlap,staggered_2,passes_2,apex_paper,apex
        ;;
    paced_t4) paced t4 llama_3_2_3b 256 48 160 ;;
    paced_a10) paced a10 llama_3_1_8b 384 48 192 ;;
    paced_steady)
        python -m launch.paced_proof --output="$folder/paced_steady.json" $(size "" --smoke)
        ;;
    frameworks)
        of_demo="--model=configs/demo_model" all=,transformers_by_prompt,llama.cpp
        beside demo configs/demo_model 96 512 "$of_demo" "$all"
        beside demo_2048 configs/demo_model 96 2048 "$of_demo" "$all"
        [ -d runs/random_100m ] || python -m launch.make_random_model --output=runs/random_100m
        beside 100m runs/random_100m 48 256 --vocab_size=32000 ""
        ;;
    online_t4) online t4 paper_t4 llama_3_2_3b 512 own,1,1.5,2,3,4 ;;
    online_a10) online a10 paper_a10 llama_3_1_8b 1024 own,1,2,3,4,6 ;;
    *)
        echo "error: there is no part '$1'; see the head of launch/publish_benchmarks.sh" >&2
        return 2
        ;;
    esac
}

if [ $# -eq 1 ]; then
    part "$1"
elif [ $# -gt 1 ]; then
    status=0
    for name in "$@"; do # each in a shell of its own, which ends at its first error
        bash launch/publish_benchmarks.sh ${trial:+--trial} "$name" || status=1
    done
    exit $status
else
    echo "error: name what to measure; see the head of launch/publish_benchmarks.sh" >&2
    exit 2
fi
