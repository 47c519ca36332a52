#!/usr/bin/env bash
# Installs the Debian packages that the scripts need, and only those that are missing.
#   scripts/install-deps.sh [demo|test|bench]
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

purpose=${1:-test}
# command:package
wanted="fusermount3:fuse3 cc:gcc mountpoint:util-linux"
case $purpose in
    demo) wanted="$wanted git:git" ;;
    test)
        wanted="$wanted c++:g++ git:git python3:python3 rsync:rsync setfacl:acl setcap:libcap2-bin"
        wanted="$wanted postgres:postgresql stress-ng:stress-ng dbench:dbench fio:fio mkfs.ext4:e2fsprogs losetup:mount ip:iproute2"
        wanted="$wanted ssh-keygen:openssh-client"
        ;;
    bench)
        wanted="$wanted git:git python3:python3 pip:python3-pip openssl:openssl gocryptfs:gocryptfs rclone:rclone"
        wanted="$wanted postgres:postgresql"
        ;;
    *) fail "usage: install-deps.sh [demo|test|bench]" ;;
esac

# Debian keeps PostgreSQL's programs out of PATH, and a Python of one's own has its pip as a module.
present() {
    [ "$1" != pip ] || { python3 -m pip --version >/dev/null 2>&1; return; }
    command -v "$1" >/dev/null 2>&1 || { [ "$1" = postgres ] && compgen -G '/usr/lib/postgresql/*/bin/postgres' >/dev/null; }
}

# The package makes a cluster and starts it when it is installed for the first time; the tests make their own, and a
# machine that has none must not get a server for their sake. Where the package is there already nothing is changed.
no_cluster() {
    local conf=/etc/postgresql-common/createcluster.conf
    grep -qs '^ *create_main_cluster' "$conf" && return
    $sudo mkdir -p "${conf%/*}"
    echo "create_main_cluster = false" | $sudo tee -a "$conf" >/dev/null
}

missing=
for pair in $wanted; do
    present "${pair%%:*}" || missing="$missing ${pair##*:}"
done
# gcc without the headers of the C library compiles nothing.
case " $missing " in *" gcc "*) missing="$missing libc6-dev" ;; esac
# Without /dev/fuse nothing can be mounted, whatever is installed.
[ -e /dev/fuse ] || modprobe fuse 2>/dev/null || true

if [ -n "$missing" ]; then
    command -v apt-get >/dev/null 2>&1 || fail "please install:$missing"
    sudo=
    [ "$(id -u)" -eq 0 ] || sudo=sudo
    export DEBIAN_FRONTEND=noninteractive
    case " $missing " in *" postgresql "*) no_cluster ;; esac
    log=$(mktemp)
    # A list of packages that is some days old is enough; a machine that never had one needs it.
    # shellcheck disable=SC2086
    if ! $sudo apt-get -qq install -y --no-install-recommends $missing >"$log" 2>&1; then
        if ! { $sudo apt-get -qq update && $sudo apt-get -qq install -y --no-install-recommends $missing; } \
            >"$log" 2>&1; then
            cat "$log" >&2
            fail "cannot install:$missing"
        fi
    fi
    rm -f "$log"
    echo "installed:$missing"
fi
[ -e /dev/fuse ] || fail "/dev/fuse is missing: this kernel (or container) offers no FUSE"
