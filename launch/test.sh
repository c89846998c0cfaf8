#!/usr/bin/env bash
# Checks everything CI checks, and stops at the first failure, so that it is the last thing on the screen.
# Arguments go to pytest: `bash launch/test.sh -k pages -x`, `bash launch/test.sh -m slow`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/setup_env.sh
source launch/setup_env.sh

check() {
    say "$1"
    shift
    "$@" || die "failed: $*"
}

# The versions of JAX differ between Python 3.11 (0.10) and 3.12 (0.11): the tests pass on both. The second
# environment is made beside the first one and the checks: each of them keeps one core busy.
python=$(choose_python)
if python_is "$python" 3.12; then other=3.11; else other=3.12; fi
background="" log=$(mktemp)
trap '[[ -z $background ]] || pkill -P "$background" 2>/dev/null || true; rm -f "$log"' EXIT
if other_python=$(find_python "$other"); then
    make_env ".venv-$other" "$other_python" test >"$log" 2>&1 &
    background=$!
else
    other_python=""
fi
set_up_env dev
main_python=$env_python
bin=${main_python%/python}

check "format" "$bin/ruff" format --check --quiet .
check "lint" "$bin/ruff" check --quiet .
check "types" "$bin/basedpyright" --pythonpath "$main_python"
check "import contracts" "$bin/lint-imports" --no-cache --no-logo

run_tests() {
    say "tests on $("$1" -c 'import platform, jax; print("Python", platform.python_version(), "with jax", jax.__version__)')"
    "$@"
}

# No line after pytest's own: it is the last one of a run that passed.
if [[ -z $other_python ]]; then
    say "tests on Python $other skipped: there is no Python $other on this machine"
    run_tests "$main_python" -m pytest --hypothesis-profile=ci "$@"
    exit
fi
status=0
wait "$background" || status=$?
cat "$log"
((status == 0)) || exit "$status"
# Both at once, for they wait much and two cores are usual; one is shown, the other's output follows. What takes
# long and does not depend on the versions runs on one of them.
run_tests "$main_python" -m pytest --hypothesis-profile=ci -m "not other_python" "$@" >"$log" 2>&1 &
background=$!
run_tests ".venv-$other/bin/python" -m pytest --hypothesis-profile=ci -m "not main_python" "$@" || status=$?
wait "$background" || status=$?
cat "$log"
exit "$status"
