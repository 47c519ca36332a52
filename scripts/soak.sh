#!/usr/bin/env bash
# The simulation of the core on fresh seeds, on all processors, for hours (docs/testing.md, "Simulation").
#   scripts/soak.sh [HOURS]    default: 8. Ends with code 1 at the first seed that fails, and says how to run it again.
#   SOAK_STEPS=N               length of each run
#   SOAK_JOBS=N                runs at a time
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"
cd "$root"

hours=${1:-8}
[[ $hours =~ ^[0-9]+([.][0-9]+)?$ ]] || fail "HOURS is a number, not '$hours'"
need_cargo
cargo test --release --locked --quiet --test sim --no-run
seconds=$(awk -v hours="$hours" 'BEGIN { printf "%d", hours * 3600 }')
logs=$(mktemp -d "$root/target/soak.XXXXXX")
runs=()

end_all() {
    [ ${#runs[@]} -eq 0 ] || kill -TERM "${runs[@]}" 2>/dev/null || true
}
trap end_all EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

for job in $(seq "${SOAK_JOBS:-$(nproc)}"); do
    EMBASSYFS_SIM_SECONDS=$seconds EMBASSYFS_SIM_STEPS=${SOAK_STEPS:-3000} \
        cargo test --release --locked --quiet --test sim other_seeds -- --nocapture >"$logs/$job" 2>&1 &
    runs+=($!)
done
echo "soaking for $seconds s in ${#runs[@]} processes; their logs: $logs"
for _ in "${runs[@]}"; do
    if ! wait -n; then
        grep -h -B 3 -A 45 'panicked at' "$logs"/* | tail -60 >&2 || true
        fail "a seed failed; the logs are in $logs"
    fi
done
runs=()
cat "$logs"/* | awk '/^seed [0-9]+: / { n++ } /^in all: / { print } END { printf "%d runs, none failed\n", n }'
rm -r "$logs"
