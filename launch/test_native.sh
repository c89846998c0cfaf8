#!/usr/bin/env bash
# Builds and tests the native code: the library with CMake, its test also under the address, undefined
# behaviour and thread sanitizers, then everything with Bazel where there is one. No network is needed.
# $PYTHON is the interpreter whose jaxlib has the headers (python3 if unset). Builds lie under build/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/setup_env.sh
source launch/setup_env.sh
python=$(command -v "${PYTHON:-python3}") || die "PYTHON=${PYTHON:-python3} does not run"
[[ $python == /* ]] || python=$PWD/$python # CMake and Bazel look from other folders

run_quietly() {
    local log=$1
    shift
    mkdir -p "$(dirname "$log")"
    "$@" >"$log" 2>&1 || {
        tail -n 30 "$log" >&2
        die "failed: $* (log: $log)"
    }
}

# Build in build/$1 with CMake, with $2 as the sanitizers, and run the native test.
test_with_cmake() {
    local folder=build/$1 sanitizer=$2
    say "native test, CMake, ${sanitizer:-no sanitizer}"
    run_quietly "$folder.log" cmake -S cpu_ops -B "$folder" -DPython_EXECUTABLE="$python" -DAPEX_SANITIZER="$sanitizer"
    run_quietly "$folder.log" cmake --build "$folder" --parallel "$(nproc)" ${sanitizer:+--target attention_test}
    "$folder/attention_test"
}

# Bazel up to 7 reads WORKSPACE. Debian's (bazel-bootstrap, 4.2) works without a network once the repositories
# that it would fetch are replaced: two by Debian's packages, two by stubs.
test_with_bazel() {
    local bazel stubs version debian=/usr/share/bazel/rules overrides=()
    if ! bazel=$(command -v bazel || command -v bazelisk); then
        say "Bazel build skipped: there is no bazel on this machine"
        return
    fi
    version=$("$bazel" --version)
    if [[ $version =~ bazel\ ([0-9]+) ]] && ((BASH_REMATCH[1] > 7)); then
        say "Bazel build skipped: this is $version, and WORKSPACE needs 7 or earlier"
        return
    fi
    if [[ -d $debian/java && -d $debian/proto ]]; then
        stubs=$PWD/build/bazel_stubs
        mkdir -p "$stubs/rules_cc/cc" "$stubs/remote_coverage_tools"
        touch "$stubs"/{rules_cc,remote_coverage_tools}/WORKSPACE "$stubs"/rules_cc/{,cc/}BUILD
        printf 'cc_%s = native.cc_%s\n' {library,binary,test,import,toolchain,toolchain_suite,proto_library}{,} |
            sort -u >"$stubs/rules_cc/cc/defs.bzl"
        printf 'filegroup(name = "coverage_report_generator", visibility = ["//visibility:public"])\n' \
            >"$stubs/remote_coverage_tools/BUILD"
        overrides=(
            "--override_repository=rules_cc=$stubs/rules_cc"
            "--override_repository=remote_coverage_tools=$stubs/remote_coverage_tools"
            "--override_repository=rules_java=$debian/java"
            "--override_repository=rules_proto=$debian/proto"
        )
    fi
    say "native test, $version"
    run_quietly build/bazel.log "$bazel" test //cpu_ops:all "${overrides[@]}" --repo_env=PYTHON="$python" \
        --symlink_prefix=/ --test_output=errors
    "$bazel" shutdown
}

test_with_cmake native ""
test_with_cmake native_address address,undefined
test_with_cmake native_thread thread
test_with_bazel
