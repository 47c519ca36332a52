"""Times the same work on ext4, a null FUSE file system, gocryptfs, JuiceFS, rclone and EmbassyFS, side by side in one
run on one disk; scripts/bench.sh calls it.

Invariant: each system gets the same calls in the same order, starts every measurement with nothing left to write back,
and takes each place in the order equally often. What is shown is the median of the rounds.

Environment: BENCH_ROUNDS (3), BENCH_QUICK, BENCH_SYSTEMS (ext4,null,gocryptfs,juicefs,rclone,embassyfs), BENCH_ROWS
(keys or groups of rows.py, and "many", the read-only mounts), BENCH_TREE (7000 files), BENCH_MANY (20000); and the
sizes that rows.py and databases.py name.
"""

import os
import shutil
import statistics
import sys
from pathlib import Path

sys.dont_write_bytecode = True  # nothing is left in the checkout but target/

import common  # noqa: E402
import harness  # noqa: E402
import report  # noqa: E402
import rows  # noqa: E402
from common import HELPER, OUT, ROUNDS, WORK, build_helper, helper, machine, peak_memory, run_and_clean  # noqa: E402
from harness import MIB, drop_caches, run, timed  # noqa: E402
from rows import Scene, Tree  # noqa: E402
from systems import SYSTEMS  # noqa: E402

# Other parts of the bench take these from here.
__all__ = ["HELPER", "OUT", "WORK", "build_helper", "helper", "machine", "peak_memory", "run_and_clean"]

TREE_FILES = common.setting("BENCH_TREE", 7000, 300)
MANY = common.setting("BENCH_MANY", 20000, 500)


def chosen_rows():
    """The rows, and whether the read-only mounts are wanted."""
    groups = list(dict.fromkeys(r.group for r in rows.ROWS))
    words = os.environ.get("BENCH_ROWS", ",".join([*groups, "many"])).split(",")
    known = {r.key for r in rows.ROWS} | {*groups, "many"}
    if unknown := set(words) - known:
        keys = ", ".join(r.key for r in rows.ROWS)
        sys.exit(f"bench: no such rows: {', '.join(unknown)}; there are {keys}; groups: {', '.join(groups)}, many")
    return [r for r in rows.ROWS if r.key in words or r.group in words], "many" in words


def suitable(crate):
    """How many files a crate has; 0 for one with links, which not every file system has."""
    files = 0
    for directory, names, leaves in os.walk(crate):
        if any(os.path.islink(os.path.join(directory, name)) for name in [*names, *leaves]):
            return 0
        files += len(leaves)
    return files if files <= 800 else 0


def prepare(needs_tree):
    """The helper, and a real tree where one is needed: as a tar, and as a repository."""
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    build_helper()
    if not needs_tree:
        return None
    home = Path(os.environ.get("CARGO_HOME", Path.home() / ".cargo"))
    place, files = WORK / "tree", 0
    place.mkdir()
    for crate in sorted(home.glob("registry/src/*/*")):
        if files < TREE_FILES and (count := suitable(crate)):
            run("cp", "-a", crate, place / crate.name)
            files += count
    entries = sum(len(names) + len(leaves) for _, names, leaves in os.walk(place))
    tree = Tree(entries, files)
    run("tar", "-cf", tree.tar, "-C", place, ".")
    rows.make_repository(place, tree.repository)
    print(f"tree: {entries} entries, {tree.tar.stat().st_size // MIB} MiB as a tar", flush=True)
    return tree


def reason(failure):
    """The end of what a failure says, in one line, without where this checkout lies."""
    return " ".join(str(failure).replace(f"{common.REPO}/", "").split())[-300:]


def usable(system):
    """Whether a system is there and answers: after a failure it may be gone, and what lies below is the disk."""
    if not system.there():
        return False
    try:
        run("stat", system.point, limit=20)
        return True
    except harness.Failed:
        return False


def one_round(name, wanted, tree):
    """The figures of one system, from an empty file system on: row to figures, what failed, seconds of the mounts."""
    directory = harness.empty_dir(WORK / name)
    drop_caches()
    scene, results, failures = Scene(SYSTEMS[name](directory), tree), {}, {}
    for row in wanted:
        try:
            results[row.key] = scene.measure(row)
        except (harness.Failed, OSError) as failure:
            # Some cannot do everything; that must not take the others' results with it.
            failures[row.key] = reason(failure)
            print(f"  {name}, {row.name}: FAILED: {failures[row.key]}", flush=True)
            if not usable(scene.system):
                break
    try:
        if scene.system.there():
            scene.system.umount()
    except harness.Failed as failure:
        failures["umount"] = reason(failure)
    harness.abort_mounts(directory)
    for point in [m[0] for m in harness.mounts() if m[0].startswith(f"{directory}/")]:
        run("umount", "-l", point, ok=None)
    shutil.rmtree(directory)
    return results, failures, scene.mounts


def read_only_mount():
    """Seconds to mount a volume of many files read-only with an empty state directory, after SIGKILL and after a clean
    unmount of home; and the first listing of its directory."""
    directory = harness.empty_dir(WORK / "many")
    volume = harness.Volume(directory)
    volume.init()
    home = volume.mount("home", directory / "state", options=["protection=local"])
    (home.point / "files").mkdir()
    helper("create", home.point / "files", MANY, 300)
    home.sync()
    home.kill()
    times = {"after SIGKILL of home": [], "after a clean unmount": []}
    for when, taken in times.items():
        if when == "after a clean unmount":
            volume.mount("home", directory / "state").umount()
        for _ in range(ROUNDS):
            drop_caches()
            embassy, took = timed(lambda: volume.embassy())
            taken.append(took)
            count = len(os.listdir(embassy.point / "files"))
            if count != MANY:
                raise harness.Failed(f"{count} files instead of {MANY}")
            embassy.umount()
    shutil.rmtree(directory)
    return {when: statistics.median(taken) for when, taken in times.items()}


def main():
    names, (wanted, many) = common.chosen("BENCH_SYSTEMS", SYSTEMS), chosen_rows()
    facts = machine()
    tree = prepare(any(r.group in ("tree", "git") for r in wanted))
    rounds = {name: [] for name in names}
    failures = {name: {} for name in names}
    mounts = {name: [] for name in names}
    for n in range(ROUNDS):
        # Another order in each round: what the first leaves behind (a warm disk, a full one) hits all alike.
        for name in names[n % len(names) :] + names[: n % len(names)]:
            (results, failed, mounted), took = timed(lambda name=name: one_round(name, wanted, tree))
            rounds[name].append(results)
            failures[name] |= failed
            mounts[name] += mounted
            said = ", ".join(f"{key} {figures['rate']:,.0f}" for key, figures in results.items())
            print(f"round {n + 1}, {name} ({took:.0f} s): {said}", flush=True)
    # Only those that have a mount can be timed at it.
    mounts = {name: statistics.median(taken) for name, taken in mounts.items() if taken}
    reads = read_only_mount() if "embassyfs" in names and many else {}
    notes = {name: SYSTEMS[name].note for name in names if SYSTEMS[name].note}
    result = report.Result(facts, wanted, rounds, failures, mounts, reads, MANY, notes)
    print(f"\n{report.write(result, OUT, 'results')}")


if __name__ == "__main__":
    run_and_clean("bench", main)
