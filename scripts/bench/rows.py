"""The measurements: what is done to each file system, in which order, and what it costs the daemon.

Invariant: every row begins with nothing left to write back, makes what it needs outside its time, and is the same calls
for every file system. A row that a slow one cannot finish ends after BENCH_SECONDS and counts what was done.

Environment: BENCH_FILES (20000), BENCH_MIB (2048), BENCH_SECONDS (8), BENCH_READS (20000), BENCH_WRITES (40000),
BENCH_APPENDS (10000), BENCH_BASE_MIB (256: the file that is overwritten), BENCH_COPY_MIB (1024); and what databases.py
names.
"""

import shutil
from dataclasses import dataclass
from typing import Callable

import common
import databases
from common import BYTES, FILES, WORK, counted, setting
from harness import MIB, run, timed

SECONDS = setting("BENCH_SECONDS", 8, 1)
READS = setting("BENCH_READS", 20000, 200)
WRITES = setting("BENCH_WRITES", 40000, 640)
APPENDS = setting("BENCH_APPENDS", 10000, 200)
BASE = setting("BENCH_BASE_MIB", 256, 16) * MIB
COPY = min(setting("BENCH_COPY_MIB", 1024, 32) * MIB, BYTES)
# Some file systems need minutes for what takes others a second; this is where the patience ends.
LIMIT = 900


@dataclass
class Row:
    """One measurement: what it is called, in what its rate is, which group it belongs to."""

    key: str
    name: str
    unit: str
    group: str
    call: Callable
    cold: bool


@dataclass
class Tree:
    """The real tree: as a tar and as a repository, with so many entries (directories included) and files."""

    entries: int
    files: int
    tar = WORK / "tree.tar"
    repository = WORK / "repository"


class Meter:
    """What the daemon of a system uses from now on."""

    def __init__(self, system):
        self.system, self.pids = system, system.pids()
        for pid in self.pids:
            common.forget_peak(pid)
        self.before, self.sent = self.look(), system.sent()

    def look(self):
        return common.cpu_seconds(self.pids), common.disk_written(self.pids)

    def read(self):
        """The figures by name; those that a system does not have are left out."""
        figures = {}
        if self.pids:
            cpu, disk = self.look()
            peak = sum(common.peak_memory(pid) for pid in self.pids)
            figures = {"cpu": cpu - self.before[0], "disk bytes": disk - self.before[1], "peak": peak}
        sent = self.system.sent()
        if self.sent is not None and sent is not None:
            figures |= {"sent bytes": sent[0] - self.sent[0], "sent requests": sent[1] - self.sent[1]}
        return figures


class Scene:
    """One system in one round: what is in it, and the measures so far."""

    def __init__(self, system, tree):
        self.system, self.tree, self.point = system, tree, system.point
        self.mounts = [t for t in [system.mount()] if t is not None]
        self.meter = None

    def measure(self, row):
        """The figures of one row."""
        if row.cold:
            self.cold()
        self.begin()
        count, seconds, payload = row.call(self)
        self.system.settle()
        figures = {"rate": count / seconds, "count": count, "seconds": seconds, **self.meter.read()}
        return figures | ({"payload": payload} if payload else {})

    def begin(self):
        """What was done so far is not part of the measurement."""
        self.system.settle()
        self.meter = Meter(self.system)

    def cold(self):
        took = self.system.cold()
        self.mounts += [took] if took is not None else []

    def fresh(self, name):
        """A new directory."""
        place = self.point / name
        if place.exists():
            run("rm", "-rf", place, limit=LIMIT)
        place.mkdir()
        return place

    def made(self, name, make, cold=False):
        """What a row reads, made by another row or now; with `cold` not remembered from making it."""
        place = self.point / name
        if not place.exists():
            make(self)
            if cold:
                self.cold()
            self.begin()
        return place


ROWS = []


def row(key, name, unit, group, cold=False):
    """Enters a function into the list."""

    def enter(call):
        ROWS.append(Row(key, name, unit, group, call, cold))
        return call

    return enter


def make_files(scene, name, threads, sync):
    count, seconds = counted("make", scene.fresh(name), FILES, 4096, threads, sync, SECONDS)
    return count, seconds, count * 4096


@row("create", "create 4 KiB", "files/s", "files")
def create(scene):
    return make_files(scene, "files", 1, 0)


@row("create-fsync-1", "create 4 KiB + fsync, 1 thread", "files/s", "files")
def create_fsync_1(scene):
    return make_files(scene, "synced-1", 1, 1)


@row("create-fsync-8", "create 4 KiB + fsync, 8 threads", "files/s", "files")
def create_fsync_8(scene):
    return make_files(scene, "synced-8", 8, 1)


@row("small-cold", "read 4 KiB files, cold", "files/s", "files", cold=True)
def small_cold(scene):
    return *counted("files", scene.made("files", create, cold=True)), None


@row("untar", "untar", "entries/s", "tree")
def untar(scene):
    into = scene.fresh("tree")
    _, seconds = timed(lambda: run("tar", "-xf", scene.tree.tar, "-C", into, limit=LIMIT))
    return scene.tree.entries, seconds, None


@row("walk-cold", "walk + stat, cold", "entries/s", "tree", cold=True)
def walk_cold(scene):
    return *counted("walk", scene.made("tree", untar, cold=True)), None


@row("walk-warm", "walk + stat, warm", "entries/s", "tree")
def walk_warm(scene):
    place = scene.made("tree", untar)
    counted("walk", place)
    return *counted("walk", place), None


@row("tree-cold", "read the tree, cold", "files/s", "tree", cold=True)
def tree_cold(scene):
    return *counted("files", scene.made("tree", untar, cold=True)), None


@row("remove", "remove the tree", "entries/s", "tree")
def remove(scene):
    place = scene.made("tree", untar)
    _, seconds = timed(lambda: run("rm", "-rf", place, limit=LIMIT))
    return scene.tree.entries, seconds, None


@row("write", "sequential write + fsync", "MiB/s", "big")
def write(scene):
    return *counted("write", scene.point / "big", BYTES), BYTES


@row("read-cold", "sequential read, cold", "MiB/s", "big", cold=True)
def read_cold(scene):
    return BYTES / MIB, counted("read", scene.made("big", write, cold=True))[1], None


@row("read-warm", "sequential read, warm", "MiB/s", "big")
def read_warm(scene):
    place = scene.made("big", write)
    counted("read", place)
    return BYTES / MIB, counted("read", place)[1], None


@row("random-read", "random 4 KiB read, cold", "reads/s", "big", cold=True)
def random_read(scene):
    return *counted("random", scene.made("big", write, cold=True), READS, SECONDS), None


@row("copy", "copy_file_range of 1 GiB + fsync", "MiB/s", "big", cold=True)
def copy(scene):
    done = counted("copy", scene.made("big", write, cold=True), scene.point / "copy", COPY)
    return *done, None


@row("random-write", "random 8 KiB write, fdatasync each 16", "writes/s", "writes")
def random_write(scene):
    base = scene.made("base", lambda s: counted("write", s.point / "base", BASE))
    count, seconds = counted("overwrite", base, WRITES, SECONDS)
    return count, seconds, count * 8192


@row("append", "append 200 bytes + fdatasync", "appends/s", "writes")
def append(scene):
    count, seconds = counted("append", scene.point / "log", APPENDS, 200, SECONDS)
    return count, seconds, count * 200


@row("sqlite", "SQLite, WAL, synchronous=full", "transactions/s", "databases")
def sqlite(scene):
    return *databases.sqlite(scene.fresh("sqlite") / "base.db", "wal", SECONDS), None


@row("sqlite-rollback", "SQLite, rollback journal", "transactions/s", "databases")
def sqlite_rollback(scene):
    return *databases.sqlite(scene.fresh("sqlite-rollback") / "base.db", "delete", SECONDS), None


@row("pgbench", "PostgreSQL, pgbench -c 8", "transactions/s", "databases")
def pgbench(scene):
    log = WORK / f"{scene.system.name}-postgres.log"
    return *databases.pgbench(scene.point, log, scene.begin), None


@row("clone", "git clone --no-hardlinks", "files/s", "git")
def clone(scene):
    words = ["git", "clone", "--quiet", "--no-hardlinks", scene.tree.repository, scene.point / "clone"]
    _, seconds = timed(lambda: run(*words, limit=LIMIT, env=GIT))
    return scene.tree.files, seconds, None


# No setting of the host's owner changes what is measured.
GIT = {
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_SYSTEM": "/dev/null",
    **{f"GIT_{who}_{what}": "bench" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
}


def make_repository(tree, place):
    """The tree as one commit in one pack."""
    run("git", "init", "--quiet", "--bare", place, env=GIT)
    git = ["git", f"--git-dir={place}", f"--work-tree={tree}"]
    # A crate may bring rules of what to ignore; the whole tree is meant.
    run(*git, "add", "--all", "--force", limit=600, env=GIT)
    run(*git, "commit", "--quiet", "--message", "a tree", limit=600, env=GIT)
    run(*git, "repack", "-adq", limit=600, env=GIT)
    shutil.rmtree(tree)
