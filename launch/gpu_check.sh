#!/usr/bin/env bash
# Checks and measures everything that needs a GPU, in one command and within ten minutes, without network.
#
#     bash launch/gpu_check.sh            # results in docs/results/gpu_check, or in $OUT
#     bash launch/gpu_check.sh --smoke    # tiny sizes, on any machine: shows that it runs
#
# Every part has its own time limit and writes its own file as it goes; a part that fails, hangs or runs out of time
# loses nothing of the others. The last thing printed is a table of the parts, also in summary.json. Exit
# status: 0 if no part failed. Variables: OUT (folder of results), PYTHON (interpreter), TOTAL_SEC (limit of all).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

smoke=()
if [[ ${1:-} == --smoke ]]; then
    smoke=(--smoke)
elif [[ $# -gt 0 ]]; then
    echo "error: $1 is no option; there is only --smoke" >&2
    exit 2
fi
out=${OUT:-docs/results/gpu_check}
mkdir -p "$out" || exit 2
total_sec=${TOTAL_SEC:-585}
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
SECONDS=0

python=${PYTHON:-}
if [[ -z $python ]]; then
    for python in .venv/bin/python python3 python; do
        if command -v "$python" >/dev/null && "$python" -c "import jax, flax" 2>/dev/null; then break; fi
        python=""
    done
fi
if [[ -z $python ]]; then
    echo "error: no Python here imports jax and flax; name one with PYTHON=..." >&2
    exit 2
fi

names=() states=() seconds=() notes=() any_failed=0

record() { # name state seconds note
    names+=("$1") states+=("$2") seconds+=("$3") notes+=("$4")
    if [[ $2 == failed ]]; then any_failed=1; fi
    write_summary
}

write_summary() {
    local index separator=""
    {
        echo '{"parts": ['
        for index in "${!names[@]}"; do
            printf '%s {"part": "%s", "state": "%s", "seconds": %s, "note": "%s"}' "$separator" \
                "${names[index]}" "${states[index]}" "${seconds[index]}" "${notes[index]}"
            separator=$',\n'
        done
        printf '\n], "total_seconds": %s}\n' "$SECONDS"
    } >"$out/summary.json"
}

# Run a command for at most `limit` seconds, and no longer than is left of the whole. Status 77 means that it
# had nothing to do. Stopped by SIGINT first: Python then ends by an exception.
part() { # name limit command...
    local name=$1 limit=$2 start=$SECONDS left=$((total_sec - SECONDS)) status
    shift 2
    if ((left < 15)); then
        record "$name" skipped 0 "no time left"
        return
    fi
    if ((limit > left)); then limit=$left; fi
    printf '\n=== %s (at most %s s)\n' "$name" "$limit"
    timeout --signal=INT --kill-after=5 "$limit" "$@"
    status=$?
    case $status in
        0) record "$name" ok $((SECONDS - start)) "" ;;
        77) record "$name" skipped $((SECONDS - start)) "nothing to do; its file says why" ;;
        124 | 137) record "$name" failed $((SECONDS - start)) "stopped after $limit s; its file holds what was done" ;;
        *) record "$name" failed $((SECONDS - start)) "exit status $status" ;;
    esac
}

# The budget of a benchmark ends before its limit: it then says itself what it left out.
bench() { # script limit file arguments...
    local script=$1 limit=$2 file=$3
    shift 3
    part "${file%.json}" "$limit" "$python" -m "launch.$script" "--output=$out/$file" \
        "--budget_sec=$((limit - 12))" "${smoke[@]}" "$@"
}

# Without beartype the shape annotations are not executed; then pytest runs without that hook. A warning of a
# version not seen before must not cost a run on a rented machine: warnings are shown and do not fail.
tests() { # limit
    local options="-ra --strict-markers" select=(-m gpu)
    if "$python" -c "import beartype" 2>/dev/null; then
        options+=" --jaxtyping-packages=apex_jax,beartype.beartype"
    else
        echo "beartype is missing: the tests run without executing shape annotations"
    fi
    if ((${#smoke[@]})); then select=(-m "not gpu" -k sampling); fi
    part gpu_tests "$1" bash -o pipefail -c '"$@" 2>&1 | tee "$0"' "$out/gpu_tests.txt" \
        "$python" -m pytest -v tests/test_gpu.py "${select[@]}" -o "addopts=$options" \
        -o filterwarnings=default -p no:cacheprovider
}

# The host's attention op, unless it is installed or was built before.
build() { # limit
    if "$python" -c "from apex_jax.ops import native_library; native_library.load()" 2>/dev/null; then
        record build ok 0 "it was there"
        return
    fi
    part build "$1" bash -c 'cmake -S cpu_ops -B build/gpu_check -DPython_EXECUTABLE="$(command -v "$0")" &&
        cmake --build build/gpu_check --parallel --target apex_host_attention &&
        cp build/gpu_check/libapex_host_attention.so apex_jax/ops/' "$python"
}

build 60
part environment 30 "$python" -m launch.environment
tests 130
bench bench_strategies 190 strategies.json --config=configs/llama_3_1_8b.py --config.model.weights=dummy \
    --kv_gib=2,0.5,4 --host_requests=64 --prompt_tokens=500 --seconds=2 --repeats=1
bench bench_transfers 60 transfers.json
bench bench_dispatch 40 dispatch.json
bench bench_device 110 device_bfloat16.json --dtype=bfloat16 --kv_gib=8,2
bench bench_layers 60 layers.json
bench parity_report 60 parity.json --platform=gpu --dtypes=bfloat16,float16
# What only compares with others, or repeats what could differ in another dtype, comes last.
bench bench_device 50 device_float16.json --dtype=float16 --kv_gib=8 --rows=4,64
bench bench_reference 50 reference.json

echo
printf '%-20s %-8s %7s  %s\n' part state seconds note
for index in "${!names[@]}"; do
    printf '%-20s %-8s %7s  %s\n' "${names[index]}" "${states[index]}" "${seconds[index]}" "${notes[index]}"
done
echo "results in $out, $SECONDS s in all"
exit $any_failed
