#!/usr/bin/env bash
# The main job, told step by step on this machine: a home and an embassy, with a directory as the embassy's store.
# Writes a real tree through the mount, kills home with SIGKILL, mounts the embassy read-only from the store alone, and
# compares byte for byte. Installs what it needs, leaves nothing behind but target/.
#   scripts/demo.sh [--keep]    --keep leaves the store, the keys and the trees in target/demo
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"
cd "$root"

demo=$root/target/demo
store=$demo/embassy/store keys=$demo/keys
home=$demo/home/registers embassy=$demo/embassy/registers
registers=${DEMO_REGISTERS:-3000}
keep=no
[ "${1:-}" != --keep ] || keep=yes

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
show() {
    local words=${*//$root\//}
    printf '  $ %s\n' "${words#quick }"
    "$@" 2>&1 | sed 's/^/    /'
}

clean_up() {
    local code=$?
    trap - EXIT
    clean_below "$demo"
    [ $keep = yes ] || rm -rf "$demo"
    [ $code -eq 0 ] || echo "the demo FAILED" >&2
    exit $code
}

# What a registry host might hold: this checkout, and registers that follow from a number (so that a second run is the same).
make_original() {
    mkdir -p "$1/land" "$1/people" "$1/archive"
    if git rev-parse --git-dir >/dev/null 2>&1; then
        mkdir "$1/checkout"
        git ls-files -z | xargs -0 cp -a --parents -t "$1/checkout"
    fi
    awk -v n="$registers" -v to="$1" 'BEGIN {
        for (i = 0; i < n; i++) {
            f = sprintf("%s/land/parcel-%05d.json", to, i)
            printf "{\"parcel\": %d, \"owner\": \"person-%d\", \"area_m2\": %d, \"encumbrances\": []}\n", i, i * 7919 % n, 300 + i * 31 % 9000 > f
            close(f)
            printf "%d;person-%d;%d-%02d-%02d\n", i, i, 1930 + i % 90, 1 + i % 12, 1 + i % 28 > (to "/people/register.csv")
        }
    }'
    # A scan is random enough not to be compressible.
    head -c 33554432 /dev/urandom >"$1/archive/cadastral-map.tif"
    ln -s ../archive/cadastral-map.tif "$1/land/map"
    ln "$1/people/register.csv" "$1/people/register-2024.csv"
    chmod 0640 "$1/people/register.csv"
    chown 1000:1000 "$1/people/register.csv" 2>/dev/null || true
    truncate -s 1G "$1/archive/sparse-image"
    touch -d '1991-08-20 23:02:03.123456789' "$1/archive"
}

# Kind, mode, owner, links, time, size, name, target of everything: what `diff -r` does not compare.
listing() {
    (cd "$1" && find . -printf '%y %m %U:%G %n %T@ %p %l\n' | sort -k6)
    (cd "$1" && find . -type f -printf '%s %p\n' | sort -k2)
}

# Hangs must not look like patience.
quick() { timeout --kill-after=5 60 "$@"; }

trap clean_up EXIT
trap 'exit 130' INT TERM

say "What it needs"
"$root/scripts/install-deps.sh" demo
need_cargo
echo "  cargo build --release (the first time this takes some minutes)"
cargo build --release --locked --quiet
efs=$root/target/release/embassyfs
clean_below "$demo"
rm -rf "$demo"
mkdir -p "$store" "$home" "$embassy"

say "1. A volume. Its key files stay with the state; the embassy gets the reader's key when it is needed."
show "$efs" init --store "file://$store" --keys "$keys" --name registers
show "$efs" mount --store "file://$store" --key "$keys/writer.key" --state "$demo/home/state" "$home"
mountpoint -q "$home" || fail "nothing is mounted at $home"
show grep "$home" /proc/mounts

say "2. Applications write to it as to any directory."
make_original "$demo/original"
begin=$(date +%s.%N)
show cp -a "$demo/original/." "$home/"
awk -v a="$begin" -v b="$(date +%s.%N)" -v n="$(find "$demo/original" | wc -l)" \
    'BEGIN { printf "    %d files and directories in %.1f s\n", n, b - a }'
show quick "$efs" sync "$home"
show quick "$efs" status "$home"

say "3. What the embassy's operator sees: sealed segments, no name, no content."
(cd "$demo/embassy" && find store -type f -printf '    %9s bytes  %p\n' | sort -k3 | awk 'NR <= 8; END { print "    ... in all", NR, "objects" }')
if grep -rqaF -e "parcel-00001" -e "encumbrances" "$store" "$demo/home/state"; then
    fail "plaintext in the store or in the state directory"
fi
echo "    (a search for names and contents of the registers in it finds nothing)"

say "4. Home is gone: SIGKILL, no farewell."
pid=$("$efs" status "$home" --json | sed -n 's/.*"pid": *\([0-9]*\).*/\1/p')
show kill -KILL "$pid"
sleep 0.5
quick ls "$home" 2>&1 | sed 's/^/    /' || true
umount -l "$home" 2>/dev/null || fusermount3 -uz "$home"
mv "$demo/home" "$demo/lost"

say "5. In the embassy: mounted read-only, from the store alone, with nothing of home's."
begin=$(date +%s.%N)
show "$efs" mount --read-only --store "file://$store" --key "$keys/reader.key" --state "$demo/embassy/state" "$embassy"
awk -v a="$begin" -v b="$(date +%s.%N)" 'BEGIN { printf "    mounted in %.2f s\n", b - a }'
mountpoint -q "$embassy" || fail "nothing is mounted at $embassy"
show ls -l "$embassy"
show head -1 "$embassy/land/parcel-00042.json"
if touch "$embassy/written" 2>/dev/null; then
    fail "the embassy's mount took a write"
fi

say "6. Compared with the original."
diff -r --no-dereference "$demo/original" "$embassy"
echo "    contents: equal, byte for byte"
diff <(listing "$demo/original") <(listing "$embassy")
echo "    modes, owners, links, times to the nanosecond, sizes, targets: equal"
show quick "$efs" umount "$embassy"

say "Done: what was written at home is in the embassy, and can be read there without home."
