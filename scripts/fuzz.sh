#!/usr/bin/env bash
# Coverage-guided fuzzing of everything that takes bytes from outside apart (libFuzzer; tests/fuzz).
#   scripts/fuzz.sh [--seconds N] [TARGET...]     all targets, or these, each for N seconds (default 4)
#   scripts/fuzz.sh --run TARGET FILE             one input again
# What is found is kept in target/fuzz/finds, and fails the run. Inputs that reach new code are kept in
# target/fuzz/corpus and are where the next run begins.
#
# Any stable compiler will do: cargo-fuzz is not needed. It would compile everything that the program stands on a second
# time; here only the program and the targets are instrumented (tests/fuzz/rustc.sh).
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"
cd "$root"

TARGETS="segment frame index torn checkpoint page tree delta key value superblock keyfile config control acl state"
# An input may take this long, in seconds, on a busy machine. (How much memory it may take: MEMORY_MAX in fuzz.rs.)
INPUT_SECONDS=10
# All that the fuzzer holds, in MiB, its corpus among it.
RSS_MIB=1024

fuzzer=$root/target/release/fuzz
work=$root/target/fuzz

build() {
    # The program's own lock file, so that the program is fuzzed with what it is built with; cargo adds the fuzzer's.
    cp Cargo.lock tests/fuzz/Cargo.lock
    CARGO_TARGET_DIR=$root/target RUSTC_WRAPPER=$root/tests/fuzz/rustc.sh \
        cargo build --release --quiet --manifest-path tests/fuzz/Cargo.toml
}

# one TARGET: fuzzes it and prints a line about it.
one() {
    local target=$1 log=$work/$1.log finds=$work/finds/$1 known=tests/fuzz/finds/$1
    mkdir -p "$work/corpus/$target" "$finds"
    local inputs=("$work/corpus/$target" "$work/seeds/$target")
    [ ! -d "$known" ] || inputs+=("$known")
    local code=0
    RUST_BACKTRACE=0 FUZZ_TARGET=$target "$fuzzer" -max_total_time="$seconds" -timeout=$INPUT_SECONDS -rss_limit_mb=$RSS_MIB \
        -artifact_prefix="$finds/" -print_final_stats=1 "${inputs[@]}" >"$log" 2>&1 || code=$?
    if [ "$code" -eq 0 ]; then
        awk -v target="$target" '
            / cov: / { for (i = 1; i < NF; i++) { if ($i == "cov:") cov = $(i + 1); if ($i == "corp:") corp = $(i + 1) } }
            /number_of_executed_units/ { runs = $2 }
            /peak_rss_mb/ { rss = $2 }
            END { split(corp, kept, "/")
                  printf "%-11s %10d executions, %5d places covered, %5d inputs kept, %4d MiB\n", target, runs, cov, kept[1], rss
                  exit runs == 0 }' "$log"
        return
    fi
    {
        echo "$target: FOUND (all of it in $log):"
        grep -E -A 3 'panicked at|ERROR: libFuzzer|makes it hold' "$log" | head -12 | sed 's/^/    /'
        sed -n "s|.*written to \($finds/.*\)|    again: scripts/fuzz.sh --run $target \1|p" "$log"
    } >&2
    return 1
}

need_cargo
seconds=4
case ${1:-} in
    --run)
        [ $# -eq 3 ] || fail "usage: fuzz.sh --run TARGET FILE"
        build
        FUZZ_TARGET=$2 exec "$fuzzer" -timeout=$INPUT_SECONDS -rss_limit_mb=$RSS_MIB "$3"
        ;;
    --seconds)
        seconds=${2:?how many seconds}
        shift 2
        ;;
esac
for target in "$@"; do
    case " $TARGETS " in *" $target "*) ;; *) fail "no target $target; there are: $TARGETS" ;; esac
done

build
mkdir -p "$work"
FUZZ_SEEDS=$work/seeds "$fuzzer" >"$work/seeds.log" 2>&1 || fail "no seeds: see $work/seeds.log"
export -f one
export fuzzer work seconds INPUT_SECONDS RSS_MIB
# shellcheck disable=SC2086
printf '%s\n' ${*:-$TARGETS} | xargs -P "$(nproc)" -I{} bash -euo pipefail -c 'one {}' ||
    fail "inputs that must not do what they do were found"
