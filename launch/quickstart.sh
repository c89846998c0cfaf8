#!/usr/bin/env bash
# From a fresh clone to completions: makes the environment (once), then runs a batch job of real prompts
# on the model that comes with the project. Settings may be added, as in
# `bash launch/quickstart.sh --config.scheduler.max_requests=32`; for a job of your own see README.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/setup_env.sh
source launch/setup_env.sh

input=configs/demo_requests.jsonl
output=runs/quickstart.jsonl
metrics=runs/quickstart_metrics.json

for argument in "$@"; do
    [[ $argument == --config.* ]] || die "$argument: only settings (--config.…) may be added here; run" \
        "python -m launch.generate yourself for more (README.md)"
done
set_up_env ""

job=(-m launch.generate --config=configs/demo.py --input="$input" --output="$output" --metrics="$metrics")
# A job that finds its output complete has nothing to do, and this one is to be seen working.
job+=(--overwrite "$@")
mkdir -p runs
say "python ${job[*]}"
status=0
"$env_python" "${job[@]}" || status=$?
((status <= 1)) || exit "$status" # 1: complete, with failed requests

say "the first three of $output"
"$env_python" - "$input" "$output" <<'PY'
import json
import sys

requests, results = ([json.loads(line) for line in open(path)] for path in sys.argv[1:])
found = {result["custom_id"]: result["response"] for result in results}
for request in requests[:3]:
    prompt = request.get("body", request)["prompt"]
    response = found[request["custom_id"]]
    text = response["body"]["choices"][0]["text"] if response else "(failed)"
    print(f"[{request['custom_id']}] {prompt}{text}\n")
PY
exit "$status"
