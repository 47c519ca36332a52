#!/bin/sh
# An S3 server in a directory, for tests. It checks "create if absent" and then writes, in two steps: two racing
# puts may both win. So it is good for tests and measurements and never for a volume with two writers.
#
#   scripts/s3-server.sh install          builds s3s-fs into target/tools
#   scripts/s3-server.sh start DIR PORT   serves the directories in DIR as buckets on 127.0.0.1:PORT, in the
#                                         foreground; keys from S3_ACCESS_KEY and S3_SECRET_KEY (test, testtest)
set -eu
cd "$(dirname "$0")/.."
version=0.14.1
binary=target/tools/bin/s3s-fs

case "${1:-}" in
install)
    if [ -x "$binary" ]; then
        echo "$binary is there"
        exit 0
    fi
    exec cargo install s3s-fs --version "$version" --features binary --locked -j "${JOBS:-1}" --root target/tools
    ;;
start)
    if [ $# -ne 3 ]; then
        echo "usage: $0 start DIR PORT" >&2
        exit 2
    fi
    if [ ! -x "$binary" ]; then
        echo "$binary is missing; run: $0 install" >&2
        exit 1
    fi
    mkdir -p "$2"
    # It logs each answer that is an error, also those that a test asks for.
    RUST_LOG="${RUST_LOG:-off}" exec "$binary" --host 127.0.0.1 --port "$3" \
        --access-key "${S3_ACCESS_KEY:-test}" --secret-key "${S3_SECRET_KEY:-testtest}" "$2"
    ;;
*)
    sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
