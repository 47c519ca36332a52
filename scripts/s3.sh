#!/usr/bin/env bash
# An S3 server on loopback, for tests and for trying things out.
#   scripts/s3.sh path               builds it if need be; prints where it is
#   scripts/s3.sh start DIR [PORT]   serves DIR (a directory in it is a bucket) in the background; prints the variables
#   scripts/s3.sh stop DIR           ends it
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

program() {
    need_cargo
    tool s3s-fs 0.14.1 s3s-fs --features binary
}

case ${1:-} in
    path)
        program
        ;;
    start)
        [ $# -ge 2 ] || fail "usage: s3.sh start DIR [PORT]"
        server=$(program) dir=$2 port=${3:-8014}
        mkdir -p "$dir/land"
        "$server" --host 127.0.0.1 --port "$port" --access-key embassy --secret-key embassy-secret "$dir" \
            </dev/null >"$dir/.server.log" 2>&1 &
        echo $! >"$dir/.server.pid"
        for _ in $(seq 100); do
            (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null && break
            kill -0 "$(cat "$dir/.server.pid")" 2>/dev/null || fail "the server ended: $(cat "$dir/.server.log")"
            sleep 0.1
        done
        cat <<SAY
export AWS_ENDPOINT_URL=http://127.0.0.1:$port AWS_ENDPOINT=http://127.0.0.1:$port AWS_ALLOW_HTTP=true
export AWS_REGION=us-east-1 AWS_ACCESS_KEY_ID=embassy AWS_SECRET_ACCESS_KEY=embassy-secret
# then: embassyfs init --store s3://land/registers ...
SAY
        ;;
    stop)
        [ $# -eq 2 ] || fail "usage: s3.sh stop DIR"
        kill "$(cat "$2/.server.pid")"
        rm -f "$2/.server.pid"
        ;;
    *)
        fail "usage: s3.sh path | start DIR [PORT] | stop DIR"
        ;;
esac
