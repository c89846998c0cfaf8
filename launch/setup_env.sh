# shellcheck shell=bash
# Makes the project's virtual environments. Sourced by quickstart.sh and test.sh; does nothing by itself.
#
#   set_up_env EXTRA              makes or reuses the environment of a user (.venv, or $APEX_VENV), with a
#                                 Python of our choice (or $PYTHON); EXTRA is "" for a job, "dev" for the checks
#   make_env VENV PYTHON EXTRA    the same for another folder and interpreter
#
# Both leave the environment's interpreter in $env_python. An environment already active is not used, so
# that what works here works on every machine. A run that finds nothing changed installs nothing.

# Settings of the shell that would make another Python's packages visible in ours.
unset PYTHONPATH PYTHONHOME

say() { printf '==> %s\n' "$*"; }

die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# Succeed if interpreter $1 runs and is of version $2 (such as 3.12), or 3.11 and later if $2 is empty.
python_is() {
    "$1" - "${2-}" >/dev/null 2>&1 <<'PY'
import sys

version = "%d.%d" % sys.version_info[:2]
sys.exit(sys.argv[1] != version if sys.argv[1] else sys.version_info < (3, 11))
PY
}

has_venv() { "$1" -c 'import ensurepip, venv' >/dev/null 2>&1; }

# Print the interpreter to use: $PYTHON, or the first on the PATH that will do, the tested versions before others.
choose_python() {
    local candidate without_venv=""
    if [[ -n ${PYTHON-} ]]; then
        python_is "$PYTHON" || die "PYTHON=$PYTHON does not run or is older than 3.11"
        has_venv "$PYTHON" || die_without_venv "$PYTHON"
        printf '%s\n' "$PYTHON"
        return
    fi
    for candidate in python3.12 python3.11 python3 python3.13 python3.14 python; do
        # A name on the PATH may be a version manager's stub that does not run.
        python_is "$candidate" || continue
        if has_venv "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
        without_venv=${without_venv:-$candidate}
    done
    [[ -z $without_venv ]] || die_without_venv "$without_venv"
    die "no Python 3.11 or later on the PATH; install one (apt-get install python3 python3-venv) or set PYTHON"
}

# Print an interpreter of exactly version $1, on the PATH or among pyenv's; fail if there is none.
find_python() {
    local candidate
    for candidate in "python$1" python3 "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python; do
        if python_is "$candidate" "$1" && has_venv "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    return 1
}

die_without_venv() {
    local version
    version=$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    die "$1 cannot make virtual environments; on Debian and Ubuntu: apt-get install python$version-venv"
}

# Set $accelerator to the JAX extra that fits this machine (empty for the CPU) and $reason to why.
detect_accelerator() {
    local gpu name driver capability
    accelerator=""
    if ! command -v nvidia-smi >/dev/null; then
        reason="no NVIDIA GPU (nvidia-smi is not installed): JAX for the CPU"
        return
    fi
    if ! gpu=$(nvidia-smi --query-gpu=name,driver_version,compute_cap --format=csv,noheader 2>&1); then
        reason="no usable NVIDIA GPU (nvidia-smi: ${gpu%%$'\n'*}): JAX for the CPU"
        return
    fi
    IFS=, read -r name driver capability <<<"${gpu%%$'\n'*}"
    driver=${driver# } capability=${capability# }
    if [[ ! $driver =~ ^[0-9]+\. || ! $capability =~ ^[0-9]+\.[0-9]+$ ]]; then
        reason="no usable NVIDIA GPU (nvidia-smi: ${gpu%%$'\n'*}): JAX for the CPU"
    # The least drivers of CUDA 13 and 12; CUDA 13 also dropped GPUs older than Turing (7.5).
    elif ((${driver%%.*} >= 580 && ${capability/./} >= 75)); then
        accelerator=cuda13
        reason="$name, driver $driver (CUDA 13 needs 580 or later): JAX for CUDA 13"
    elif ((${driver%%.*} >= 525)); then
        accelerator=cuda12
        reason="$name (compute capability $capability), driver $driver (CUDA 12 needs 525 or later): JAX for CUDA 12"
    else
        reason="$name, but driver $driver is older than CUDA 12 needs (525): JAX for the CPU"
    fi
}

# Make or reuse the environment in folder $1 with interpreter $2 and extra $3.
make_env() {
    local venv=$1 python=$2 extra=$3 accelerator reason wanted log started megabytes
    [[ $venv == /* ]] || venv=$PWD/$venv
    env_python=$venv/bin/python
    detect_accelerator
    # What the environment depends on. Its own path and the checkout's are in it, for neither can move.
    wanted="$venv $PWD ${accelerator:-cpu} $(cat pyproject.toml requirements.txt cpu_ops/*.* | cksum)"
    say "$reason"
    if has_installed "$extra"; then
        say "$venv is up to date"
        return
    fi
    # Extras are added to what is there; anything else that changed starts the environment anew.
    if ! has_installed ""; then
        if [[ -e $venv && ! -e $venv/pyvenv.cfg && -n $(ls -A "$venv") ]]; then
            die "$venv exists and is no virtual environment; set APEX_VENV to another folder"
        fi
        say "making $venv with $("$python" -c 'import platform, sys; print("Python", platform.python_version(), f"({sys.executable})")')"
        "$python" -m venv --clear "$venv" || die "$python could not make $venv"
    fi
    log=$venv/pip.log started=$SECONDS
    # Measured on Linux x86-64.
    megabytes=200
    if [[ -n $extra ]]; then ((megabytes += 100)); fi
    if [[ -n $accelerator ]]; then ((megabytes += 2500)); fi
    say "installing packages (up to $megabytes MB to download the first time; log: $log)"
    if ! "$env_python" -m pip install --disable-pip-version-check --editable ".${extra:+[$extra]}" \
        ${accelerator:+"jax[$accelerator]"} >"$log" 2>&1; then
        grep '^ *ERROR: ' "$log" | tail -n 3 >&2
        if grep -q 'CMake Error\|: error: ' "$log"; then
            die "the host attention op (cpu_ops) could not be built. All the compiler said: $log"
        fi
        die "pip could not install the packages; is there a network (or a proxy to name in HTTPS_PROXY)? All it said: $log"
    fi
    say "installed in $((SECONDS - started)) s: $("$env_python" -m pip list --disable-pip-version-check --format freeze |
        grep -E '^(jax|jaxlib|flax|orbax-checkpoint|numpy)==' | paste -sd ' ' -)"
    if [[ -n $accelerator ]]; then check_gpu; fi
    printf '%s' "$wanted" | tee "$venv/.apex-installed-" >"$venv/.apex-installed-$extra"
}

# Succeed if the environment that make_env is at works and holds extra $1, installed from what is wanted now.
has_installed() {
    [[ $(cat "$venv/.apex-installed-$1" 2>/dev/null) == "$wanted" ]] && "$env_python" -c "" 2>/dev/null
}

# Say whether JAX finds the GPU that it was installed for.
check_gpu() {
    local answer
    if answer=$(XLA_PYTHON_CLIENT_PREALLOCATE=false "$env_python" -c 'import jax; print(jax.devices("gpu"))' 2>&1); then
        say "JAX finds ${answer##*$'\n'}"
    else
        say "warning: JAX does not find the GPU (${answer##*$'\n'}); jobs run on the CPU"
    fi
}

set_up_env() {
    local python
    python=$(choose_python)
    if ! command -v "${CXX:-c++}" >/dev/null && ! command -v g++ >/dev/null && ! command -v clang++ >/dev/null; then
        die "no C++ compiler found, and the host attention op needs one; on Debian and Ubuntu: apt-get install g++"
    fi
    make_env "${APEX_VENV:-.venv}" "$python" "$1"
}
