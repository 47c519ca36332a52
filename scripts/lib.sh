# What the scripts share; to be sourced. Invariant: whoever sources it has `root` (the checkout) and ends with what it
# started taken away: `clean_below DIR` unmounts and ends everything below a directory.

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
# Tools that are built once for a checkout.
TOOLS=${EMBASSYFS_TOOLS:-$root/target/tools}
export TOOLS

# A rustup that was installed a moment ago is not in the PATH of the shell yet.
if ! command -v cargo >/dev/null 2>&1 && [ -x "$HOME/.cargo/bin/cargo" ]; then
    PATH=$HOME/.cargo/bin:$PATH
fi

fail() {
    echo "${0##*/}: $*" >&2
    exit 1
}

need_cargo() {
    command -v cargo >/dev/null 2>&1 && return
    fail "cargo is not installed. Rust comes from https://rustup.rs (or a distribution's rustup package):" \
        "install it, then run this again"
}

# step TEXT: a heading with the time since the script began.
step() {
    printf '\n=== [%d:%02d] %s\n' $((SECONDS / 60)) $((SECONDS % 60)) "$*"
}

# Mount points below a directory, the deepest first, from the mount table alone (touching a dead mount can hang).
mounts_below() {
    awk -v below="$1/" 'index($5, below) == 1 { print $5 }' /proc/self/mountinfo | tac
}

# Breaks the FUSE connections of all mounts below a directory, so that whoever waits on one gets an error.
abort_below() {
    local control=/sys/fs/fuse/connections minor
    awk -v below="$1/" 'index($5, below) == 1 && / - fuse/ { split($3, dev, ":"); print dev[2] }' \
        /proc/self/mountinfo | while read -r minor; do
        mountpoint -q "$control" || mount -t fusectl fusectl "$control" 2>/dev/null || true
        echo 1 >"$control/$minor/abort" 2>/dev/null || true
    done
}

# Takes away the mounts below a directory and ends their daemons, however they are.
clean_below() {
    local point
    abort_below "$1"
    mounts_below "$1" | while read -r point; do
        umount -l "$point" 2>/dev/null || fusermount3 -uz "$point" 2>/dev/null || true
    done
}

# watchdog SECONDS DIR: in the background; when the time is over, breaks the mounts below DIR and ends this script.
watchdog() {
    local limit=$1 below=$2 me=$$
    (
        trap - EXIT
        sleep "$limit" &
        # The sleep must not outlive the watchdog and hold the script's output open.
        trap 'kill $! 2>/dev/null; exit 0' TERM
        wait $!
        echo "${0##*/}: not done after $limit s: breaking the mounts below $below" >&2
        abort_below "$below"
        sleep 20
        kill -TERM "$me"
    ) &
    WATCHDOG=$!
}

# tool NAME VERSION COMMAND [FLAG...]: builds a tool from its registry when it is not there yet; prints its path.
tool() {
    local name=$1 version=$2 program=$3
    shift 3
    local place=$TOOLS/$name-$version
    if [ ! -x "$place/bin/$program" ]; then
        echo "building $name $version (once; it stays in $TOOLS)" >&2
        mkdir -p "$TOOLS"
        # Two callers at once: the second waits, then finds it.
        (
            flock 9
            [ -x "$place/bin/$program" ] || CARGO_PROFILE_DEV_DEBUG=0 CARGO_TARGET_DIR=$place/build \
                cargo install --quiet --locked "$name" --version "$version" --root "$place" "$@" >&2
            rm -rf "$place/build"
        ) 9>"$TOOLS/.lock"
    fi
    printf '%s\n' "$place/bin/$program"
}
