#!/usr/bin/env bash
# Rehearses a failover: seven registers work at home, home dies, the embassy opens, checks and takes over all of them.
#   scripts/rehearsal.sh [--short] [--seed N]
# Home and embassy are two network namespaces of this machine, 35 ms apart; needs root. The report is printed, and lies
# in target/rehearsal/rehearsal-report/ for programs (report.json) and for people (report.md). Without --short it takes
# some minutes and a few gigabytes.
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

full=1
while [ $# -gt 0 ]; do
    case $1 in
        --short) full=0 ;;
        --seed) [ $# -ge 2 ] || fail "--seed wants a number"; export E2E_SEED=$2; shift ;;
        *) fail "usage: rehearsal.sh [--short] [--seed N]" ;;
    esac
    shift
done
[ "$(id -u)" -eq 0 ] || fail "network namespaces and mounts need root"
cd "$root"
scripts/install-deps.sh test
need_cargo
cargo build --release --quiet
export EMBASSYFS=${EMBASSYFS:-$root/target/release/embassyfs} E2E_DIR=$root/target/rehearsal E2E_FULL=$full
python3 tests/e2e/run.py rehearsal
cat "$E2E_DIR/rehearsal-report/report.md"
