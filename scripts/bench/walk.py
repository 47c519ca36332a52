"""Times finding and stat of many small files, and the daemon's memory while it does so; scripts/bench.sh walk calls it.

Invariant: a cold walk has nothing in the kernel's memory nor in the daemon's; peaks are counted from the walk's begin.

Environment: WALK_FILES (1000000), WALK_PER_DIRECTORY (1000), WALK_ROUNDS (3).
"""

import json
import os
import statistics
import sys

sys.dont_write_bytecode = True  # nothing is left in the checkout but target/

import bench  # noqa: E402
import harness  # noqa: E402
from bench import OUT, WORK, helper, peak_memory  # noqa: E402
from common import forget_peak, status  # noqa: E402

FILES = int(os.environ.get("WALK_FILES", "1000000"))
PER_DIRECTORY = int(os.environ.get("WALK_PER_DIRECTORY", "1000"))
ROUNDS = int(os.environ.get("WALK_ROUNDS", "3"))


def walk(mount):
    """One walk: files per second, and the most that the daemon was resident meanwhile."""
    forget_peak(mount.pid)
    return FILES / helper("walk", mount.point), peak_memory(mount.pid), status(mount.pid, "VmRSS")


def make(mount):
    """The tree; gives files per second."""
    seconds = 0.0
    for n in range(0, FILES, PER_DIRECTORY):
        place = mount.point / f"{n // PER_DIRECTORY:05}"
        place.mkdir()
        seconds += helper("create", place, min(PER_DIRECTORY, FILES - n), 100)
    return FILES / seconds


def report(rows):
    """Medians as Markdown."""
    lines = ["| | files/s | peak memory, MiB | memory after, MiB |", "|---|---:|---:|---:|"]
    for name, results in rows.items():
        speed, peak, after = (statistics.median(r[k] for r in results) for k in range(3))
        lines.append(f"| {name} | {speed:,.0f} | {peak:,.0f} | {after:,.0f} |")
    return "\n".join(lines)


def main():
    directory = harness.empty_dir(WORK / "walk")
    bench.build_helper()
    volume = harness.Volume(directory)
    volume.init()
    state, options = directory / "state", ["protection=local"]
    home = volume.mount("home", state, options=options)
    rate, peak = make(home), peak_memory(home.pid)
    home.sync()
    print(f"{FILES:,} files of 100 bytes made: {rate:,.0f} files/s, peak {peak:,.0f} MiB", flush=True)
    home.umount(limit=600)
    rows = {}
    for _ in range(ROUNDS):
        harness.drop_caches()
        home = volume.mount("home", state, options=options)
        rows.setdefault("home, cold (after a remount)", []).append(walk(home))
        rows.setdefault("home, warm", []).append(walk(home))
        home.umount(limit=600)
        harness.drop_caches()
        embassy = volume.embassy()
        rows.setdefault("embassy, cold (empty state directory)", []).append(walk(embassy))
        rows.setdefault("embassy, warm", []).append(walk(embassy))
        embassy.umount(limit=600)
    text = report(rows)
    (OUT / "walk.md").write_text(text + "\n")
    everything = {"machine": bench.machine(), "create": [rate, peak], "walks": rows}
    (OUT / "walk.json").write_text(json.dumps(everything) + "\n")
    print(f"medians of {ROUNDS} rounds, {FILES:,} files, {PER_DIRECTORY:,} in a directory\n\n{text}")


if __name__ == "__main__":
    bench.run_and_clean("walk", main)
