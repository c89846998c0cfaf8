#!/usr/bin/env bash
# Takes the published measurements of the host attention op anew, in runs of under four minutes each, and
# prints the table of cpu_ops/README.md. The machine should have nothing else to do: each row of the files
# says how much of a CPU others had. $PYTHON is the interpreter (.venv/bin/python if unset), with torch
# installed if torch is to be a peer; $GGML_DIR a ggml checkout built in its build/ folder, if ggml is to be
# one; arguments name the runs to take, all by default. $RUN is put before each command, such as a lock.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/setup_env.sh
source launch/setup_env.sh
python=${PYTHON:-.venv/bin/python}
[[ $python == /* ]] || python=$PWD/$python
results=docs/results/host_attention

declare -A runs=(
    [bfloat16_1_thread]="--dtypes=bfloat16 --threads=1"
    [bfloat16_2_threads]="--dtypes=bfloat16 --threads=2"
    [other_dtypes]="--dtypes=float16,float32 --cells=1024x8,4096x8 --nopeers"
    [groups_of_8]="--dtypes=bfloat16,float16 --shapes=llama_3_1_70b --cells=128x64,1024x8,4096x8,32768x1 --nopeers"
    [other_instruction_sets]="--dtypes=bfloat16 --isas=avx512,avx2,portable --cells=1024x8,4096x8 --nopeers"
)
(($#)) || set -- bfloat16_1_thread bfloat16_2_threads other_dtypes groups_of_8 other_instruction_sets

cmake -S cpu_ops -B build/native -DPython_EXECUTABLE="$python" -DGGML_DIR="${GGML_DIR-}" >/dev/null
cmake --build build/native --parallel "$(nproc)" --target attention_benchmark >/dev/null
for name; do
    [[ -n ${runs[$name]-} ]] || die "there is no run called $name, but ${!runs[*]}"
    say "$name"
    # shellcheck disable=SC2086  # both are lists of words
    ${RUN-} "$python" -m launch.bench_host_attention --native=build/native/attention_benchmark --budget_sec=200 \
        --output="$results/$name.json" ${runs[$name]}
done
"$python" -m launch.host_attention_table "$results"/*.json
