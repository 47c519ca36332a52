"""Times the same work on ext4, gocryptfs and EmbassyFS, side by side in one run on one disk; scripts/bench.sh calls it.

Invariant: each system gets the same calls in the same order, starts every measurement with nothing left to write back,
and takes each place in the order equally often. What is shown is the median of the rounds.

Environment: BENCH_ROUNDS (3), BENCH_FILES (10000), BENCH_MIB (2048), BENCH_TREE (7000), BENCH_MANY (20000),
BENCH_SYSTEMS (ext4,gocryptfs,embassyfs), BENCH_ROWS (files,big,pgbench,sqlite,many: which groups of rows; "many" is the
read-only mounts); and what databases.py names.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
import uuid
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
OUT = REPO / "target" / "bench"
WORK = OUT / "work"
os.environ.setdefault("E2E_DIR", str(WORK))
sys.path.insert(0, str(REPO / "tests" / "e2e"))
sys.dont_write_bytecode = True  # nothing is left in the checkout but target/

import databases  # noqa: E402
import harness  # noqa: E402
from harness import MIB, drop_caches, run, timed, wait_until  # noqa: E402

ROUNDS = int(os.environ.get("BENCH_ROUNDS", "3"))
FILES = int(os.environ.get("BENCH_FILES", "10000"))
BYTES = int(os.environ.get("BENCH_MIB", "2048")) * MIB
TREE_FILES = int(os.environ.get("BENCH_TREE", "7000"))
MANY = int(os.environ.get("BENCH_MANY", "20000"))
RANDOM_READS = 4000
GROUPS = ["files", "big", "pgbench", "sqlite", "many"]
ROWS = os.environ.get("BENCH_ROWS", ",".join(GROUPS)).split(",")
HELPER = OUT / "work-helper"

# Measure -> (unit, bigger is better, wanted against gocryptfs).
MEASURES = {
    "create+write 4 KiB+close": ("files/s", True, 3.0),
    "untar": ("files/s", True, 3.0),
    "walk+stat, cold": ("files/s", True, None),
    "remove the tree": ("files/s", True, None),
    "sequential write+fsync": ("MiB/s", True, 1.5),
    "sequential read, cold": ("MiB/s", True, 1.0),
    "random 4 KiB read, cold": ("reads/s", True, None),
    "PostgreSQL, pgbench -c 8": ("transactions/s", True, None),
    "SQLite, WAL, synchronous=full": ("transactions/s", True, None),
    "SQLite, rollback journal": ("transactions/s", True, None),
    "mount": ("s", False, None),
    "peak resident memory": ("MiB", False, None),
}


def peak_memory(pid):
    """The most that a process was resident so far, in MiB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return 0.0


class Ext4:
    """A directory on the disk: the limit of the disk."""

    name = "ext4"

    def __init__(self, directory):
        self.point = directory / "plain"
        self.point.mkdir()
        self.peak = 0.0

    def mount(self):
        return 0.0

    def settle(self):
        run("sync", limit=600)

    def umount(self):
        pass


class Gocryptfs:
    """Local encryption only."""

    name = "gocryptfs"

    def __init__(self, directory):
        self.cipher, self.point = directory / "cipher", directory / "mount"
        self.cipher.mkdir()
        self.point.mkdir()
        self.secret = directory / "secret"
        self.secret.write_text("a passphrase for the bench\n")
        self.peak, self.server = 0.0, None
        run("gocryptfs", "-q", "-init", "-passfile", self.secret, self.cipher)

    def mount(self):
        command = ["gocryptfs", "-fg", "-q", "-nosyslog", "-allow_other"]
        command += ["-passfile", self.secret, self.cipher, self.point]
        begin = time.monotonic()
        self.server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_until(lambda: harness.mounted(self.point), 30, "gocryptfs mounts", pause=0.005)
        return time.monotonic() - begin

    def settle(self):
        self.peak = max(self.peak, peak_memory(self.server.pid))
        run("sync", limit=600)

    def umount(self):
        self.settle()
        run("umount", self.point)
        self.server.wait(60)


class EmbassyFs:
    """The real thing at `local`, the store a directory on the same disk."""

    name = "embassyfs"

    def __init__(self, directory):
        self.volume = harness.Volume(directory)
        self.volume.init()
        self.state = directory / "state"
        self.point, self.peak = directory / "mount", 0.0

    def mount(self):
        begin = time.monotonic()
        self.mounted = self.volume.mount("mount", self.state, options=["protection=local", "allow_other"])
        return time.monotonic() - begin

    def settle(self):
        self.mounted.sync()
        self.peak = max(self.peak, peak_memory(self.mounted.pid))
        run("sync", limit=600)

    def umount(self):
        self.settle()
        self.mounted.umount(limit=600)


SYSTEMS = {s.name: s for s in (Ext4, Gocryptfs, EmbassyFs)}


def helper(*words):
    """Seconds that the compiled helper took."""
    return float(run(HELPER, *words, limit=1800).stdout)


def prepare():
    """The helper, and a tar of a real tree where one is needed."""
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    run("cc", "-O2", "-Wall", "-Wextra", "-o", HELPER, Path(__file__).with_name("work.c"))
    if "files" not in ROWS:
        return 0
    home = Path(os.environ.get("CARGO_HOME", Path.home() / ".cargo"))
    tree, count = WORK / "tree", 0
    tree.mkdir()
    for crate in sorted(home.glob("registry/src/*/*")):
        files = sum(len(names) for _, _, names in os.walk(crate))
        if count < TREE_FILES and files <= 800:
            run("cp", "-a", crate, tree / crate.name)
            count += files
    run("tar", "-cf", WORK / "tree.tar", "-C", tree, ".")
    shutil.rmtree(tree)
    print(f"tree: {count} files, {(WORK / 'tree.tar').stat().st_size // MIB} MiB as a tar", flush=True)
    return count


class Round:
    """The measures of one system, from an empty file system on."""

    def __init__(self, system, tree_files):
        self.system, self.tree_files = system, tree_files
        self.point, self.result = system.point, {}
        self.mount_times = [system.mount()]

    def cold(self):
        self.system.umount()
        drop_caches()
        self.mount_times.append(self.system.mount())

    def measure(self, name, amount, call):
        self.result[name] = amount / call()
        self.system.settle()

    def rate(self, name, call):
        self.result[name] = call()
        self.system.settle()

    def files(self):
        files, tree = self.point / "files", self.point / "tree"
        files.mkdir()
        tree.mkdir()
        self.measure("create+write 4 KiB+close", FILES, lambda: helper("create", files, FILES, 4096))
        untar = ["tar", "-xf", WORK / "tree.tar", "-C", tree]
        self.measure("untar", self.tree_files, lambda: timed(lambda: run(*untar, limit=1800))[1])
        self.cold()
        self.measure("walk+stat, cold", self.tree_files, lambda: helper("walk", tree))
        remove = ["rm", "-rf", tree]
        self.measure("remove the tree", self.tree_files, lambda: timed(lambda: run(*remove, limit=1800))[1])

    def big(self):
        big = self.point / "big"
        self.measure("sequential write+fsync", BYTES / MIB, lambda: helper("write", big, BYTES))
        self.cold()
        self.measure("sequential read, cold", BYTES / MIB, lambda: helper("read", big))
        self.cold()
        self.measure("random 4 KiB read, cold", RANDOM_READS, lambda: helper("random", big, RANDOM_READS))

    def pgbench(self):
        log = WORK / f"{self.system.name}-postgres.log"
        self.rate("PostgreSQL, pgbench -c 8", lambda: databases.pgbench(self.point, log))

    def sqlite(self):
        base = self.point / "sqlite"
        base.mkdir()
        self.rate("SQLite, WAL, synchronous=full", lambda: databases.sqlite(base / "wal.db", "wal"))
        self.rate("SQLite, rollback journal", lambda: databases.sqlite(base / "delete.db", "delete"))

    def all(self):
        for group in ("files", "big", "pgbench", "sqlite"):
            if group in ROWS:
                getattr(self, group)()
        self.system.umount()
        self.result["mount"] = statistics.median(self.mount_times)
        self.result["peak resident memory"] = self.system.peak
        return self.result


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


def number(value, unit):
    return f"{value:.3f}" if unit == "s" else f"{value:,.0f}"


def table(medians, mounts):
    """The result in Markdown."""
    names = list(medians)
    lines = [
        "| | unit | " + " | ".join(names) + " | embassyfs / gocryptfs | wanted |",
        "|---|---|" + "---:|" * len(names) + "---:|---|",
    ]
    for measure, (unit, bigger, wanted) in MEASURES.items():
        if any(measure not in medians[n] for n in names):
            continue
        values = [number(medians[n][measure], unit) for n in names]
        ratio = verdict = ""
        if "embassyfs" in medians and "gocryptfs" in medians:
            ours, theirs = medians["embassyfs"][measure], medians["gocryptfs"][measure]
            ratio = f"{ours / theirs:.2f}" if theirs else ""
            if wanted:
                verdict = f"at least {wanted}: {'met' if ours / theirs >= wanted else 'MISSED'}"
        if measure == "peak resident memory" and "embassyfs" in medians:
            verdict = f"at most 400: {'met' if medians['embassyfs'][measure] <= 400 else 'MISSED'}"
        lines.append(f"| {measure} | {unit} | " + " | ".join(values) + f" | {ratio} | {verdict} |")
    for when, took in mounts.items():
        verdict = f"at most 1: {'met' if took <= 1 else 'MISSED'}"
        row = " | ".join(f"{took:.3f}" if n == "embassyfs" else "" for n in names)
        lines.append(f"| read-only mount of {MANY:,} files, empty state, {when} | s | {row} | | {verdict} |")
    return "\n".join(lines)


def machine():
    cpu = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return {
        "kernel": os.uname().release,
        "cpu": cpu[0] if cpu else "?",
        "cores": os.cpu_count(),
        "load before": os.getloadavg(),
        "rounds": ROUNDS,
        "files": FILES,
        "bytes": BYTES,
    }


def main():
    if unknown := set(ROWS) - set(GROUPS):
        sys.exit(f"bench: no such rows: {', '.join(unknown)}; there are {', '.join(GROUPS)}")
    names = os.environ.get("BENCH_SYSTEMS", "ext4,gocryptfs,embassyfs").split(",")
    facts = machine()
    tree_files = prepare()
    rounds = {name: [] for name in names}
    for n in range(ROUNDS):
        # Another order in each round: what the first leaves behind (a warm disk, a full one) hits all alike.
        for name in names[n % len(names) :] + names[: n % len(names)]:
            directory = harness.empty_dir(WORK / name)
            drop_caches()
            rounds[name].append(Round(SYSTEMS[name](directory), tree_files).all())
            shutil.rmtree(directory)
            said = ", ".join(f"{m} {number(v, MEASURES[m][0])}" for m, v in rounds[name][-1].items())
            print(f"round {n + 1}, {name}: {said}", flush=True)
    medians = {
        name: {
            m: (max if m == "peak resident memory" else statistics.median)(r[m] for r in rounds[name])
            for m in rounds[name][0]
        }
        for name in names
    }
    mounts = read_only_mount() if "embassyfs" in names and "many" in ROWS else {}
    text = table(medians, mounts)
    (OUT / "results.md").write_text(text + "\n")
    everything = {"machine": facts, "medians": medians, "rounds": rounds, "read-only mount": mounts}
    (OUT / "results.json").write_text(json.dumps(everything, indent=1) + "\n")
    print(f"\n{facts['cpu']}, {facts['cores']} cores, Linux {facts['kernel']}; medians of {ROUNDS} rounds\n\n{text}")


def run_and_clean(name, measure):
    """Measures, and leaves neither mounts nor processes nor data."""
    tag = uuid.uuid4().hex
    os.environ[harness.RUN_TAG] = tag
    try:
        measure()
    except harness.Failed as failure:
        sys.exit(f"{name}: {failure}")
    finally:
        harness.clean_up(WORK, tag)
        shutil.rmtree(WORK, ignore_errors=True)


if __name__ == "__main__":
    run_and_clean("bench", main)
