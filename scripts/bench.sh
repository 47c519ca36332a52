#!/usr/bin/env bash
# Times EmbassyFS beside ext4 and gocryptfs, in one run on the same disk; table in target/bench/results.md, every
# number in target/bench/results.json. Needs root, about 10 GiB of disk, and a machine with nothing else to do.
#   scripts/bench.sh         all systems
#   scripts/bench.sh walk    EmbassyFS alone: finding and stat of a million files, and the daemon's memory meanwhile
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"
cd "$root"

[ "$(id -u)" -eq 0 ] || fail "needs root: it mounts, and drops the kernel's caches"
need_cargo
"$root/scripts/install-deps.sh" bench
if [ -z "${EMBASSYFS:-}" ]; then
    cargo build --release --locked --quiet
    export EMBASSYFS=$root/target/release/embassyfs
fi

clean_up() {
    local code=$?
    trap - EXIT
    kill -TERM "$WATCHDOG" 2>/dev/null || true
    clean_below "$root/target/bench"
    exit "$code"
}
mkdir -p target/bench
watchdog "${BENCH_LIMIT:-5400}" "$root/target/bench"
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
case ${1:-} in
    "") python3 -u scripts/bench/bench.py & ;;
    walk) python3 -u scripts/bench/walk.py & ;;
    *) fail "usage: bench.sh [walk]" ;;
esac
wait $!
