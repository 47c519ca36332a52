#!/usr/bin/env bash
# All checks, in one command: installs what it needs, then format, lints, unit and integration tests, dependencies,
# a little fuzzing, and the end-to-end cases on real mounts. Needs root (it mounts). Ends with the line `N passed, N failed`.
#   scripts/test.sh [--full] [CASE...]    with cases: builds, then runs only these end-to-end cases
#                                         --full: their long form (suites: hours)
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"
cd "$root"

# One profile for all, so that build scripts and macros are compiled once.
profile=--release
work=$root/target/e2e

clean_up() {
    local code=$?
    trap - EXIT INT TERM
    [ -z "${RUNNER:-}" ] || kill -TERM "$RUNNER" 2>/dev/null || true
    [ -z "${RUNNER:-}" ] || wait "$RUNNER" 2>/dev/null || true
    kill -TERM "$WATCHDOG" 2>/dev/null || true
    clean_below "$root/target"
    exit "$code"
}

# The advisories need a database from the network; the rest does not. Unreachable is said, not passed over in silence.
check_dependencies() {
    local deny out
    deny=$(tool cargo-deny 0.20.2 cargo-deny --debug)
    "$deny" --locked check licenses bans sources
    if out=$("$deny" --locked check advisories 2>&1); then
        echo "$out"
    elif grep -q 'failed to fetch advisory database' <<<"$out"; then
        echo "advisories: NOT CHECKED, their database cannot be fetched from here"
    else
        echo "$out"
        return 1
    fi
}

need_cargo
[ "$(id -u)" -eq 0 ] || fail "needs root: the tests mount file systems"
limit=4500
[[ " $* " != *" --full "* ]] || limit=43200
watchdog "${TEST_LIMIT:-$limit}" "$root/target"
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

step "packages"
"$root/scripts/install-deps.sh" test

step "the S3 server for the tests"
S3S_FS=${S3S_FS:-$("$root/scripts/s3.sh" path)}
export S3S_FS
# Where the store's contract suite looks for it.
mkdir -p target/tools/bin
ln -sf "$S3S_FS" target/tools/bin/s3s-fs

if [ $# -eq 0 ]; then
    step "format"
    cargo fmt --check
    step "lints"
    cargo clippy $profile --locked --all-targets --quiet -- -D warnings
    step "unit and integration tests"
    cargo test $profile --locked --quiet
    step "simulation, fresh seeds"
    EMBASSYFS_SIM_SECONDS=${SIM_SECONDS:-120} cargo test $profile --locked --quiet --test sim other_seeds -- --nocapture |
        grep -E '^in all|^test result'
    step "licences, bans, sources, advisories"
    check_dependencies
fi

step "the program"
cargo build $profile --locked --quiet
export EMBASSYFS=${EMBASSYFS:-$root/target/release/embassyfs}

if [ $# -eq 0 ]; then
    step "fuzzing"
    "$root/scripts/fuzz.sh"
fi

step "end-to-end cases (in $work)"
mkdir -p "$work"
# In the background, so that this shell can act on signals at once.
python3 -u tests/e2e/run.py "$@" &
RUNNER=$!
code=0
wait "$RUNNER" || code=$?
RUNNER=
[ $((SECONDS > 1800)) -eq 0 ] || echo "note: this took $((SECONDS / 60)) minutes"
exit "$code"
