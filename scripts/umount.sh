#!/usr/bin/env bash
# Commits, ships, unmounts a volume, and checks that the mount is gone. All words are those of 'embassyfs umount'.
set -euo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)

usage() {
    cat >&2 <<USAGE
usage: ${0##*/} [--timeout TIME] [--force] [--lazy] [--json] MOUNTPOINT

Exit code 5: unmounted, but data is still only in the state directory; the next mount ships it.
The program is taken from EMBASSYFS, target/release or PATH.
USAGE
    exit 2
}

find_program() {
    if [ -n "${EMBASSYFS:-}" ]; then
        printf '%s\n' "$EMBASSYFS"
    elif [ -x "$here/../target/release/embassyfs" ]; then
        printf '%s\n' "$here/../target/release/embassyfs"
    elif ! command -v embassyfs; then
        echo "${0##*/}: embassyfs is not built (cargo build --release) and not in PATH" >&2
        exit 1
    fi
}

[ $# -ge 1 ] || usage
case $1 in -h | --help) usage ;; esac

program=$(find_program)
code=0
"$program" umount "$@" || code=$?
# 0 and 5 both say that it is unmounted.
if [ "$code" -ne 0 ] && [ "$code" -ne 5 ]; then
    exit "$code"
fi
if timeout 10 mountpoint -q -- "${!#}"; then
    echo "${0##*/}: something is still mounted at ${!#}" >&2
    exit 1
fi
exit "$code"
