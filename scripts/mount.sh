#!/usr/bin/env bash
# Mounts a volume and checks that the mount is there and answers. All words are those of 'embassyfs mount'.
set -euo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)

usage() {
    cat >&2 <<USAGE
usage: ${0##*/} CONFIG_FILE [MOUNTPOINT]
       ${0##*/} --store URL --key FILE --state DIR [-o OPTION,...] [--read-only] [--at SEQ|TIME] MOUNTPOINT

Mounts a volume; returns when it is usable. The program is taken from EMBASSYFS, target/release or PATH.
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
case $1 in
    -h | --help) usage ;;
    -*) ;;
    *)
        [ $# -le 2 ] || usage
        set -- --config "$@"
        ;;
esac

program=$(find_program)
"$program" mount "$@"

# The mount point is the last word, or stands in the config file; then the program's own word has to do.
mountpoint=${!#}
if [ -d "$mountpoint" ] && ! timeout 30 mountpoint -q -- "$mountpoint"; then
    echo "${0##*/}: $mountpoint does not answer; see 'embassyfs status' and the log in the state directory" >&2
    exit 1
fi
