"""Times EmbassyFS at each protection level beside JuiceFS where the store is 35 ms and 1 Gbit/s away, an S3 server on
loopback, its objects in memory, behind wire.c; `scripts/bench.sh link` calls it (about an hour, most of it JuiceFS). The
table is in target/bench/link.md, every number in link.json.

Invariant: each system gets the same calls in the same order through the same link; nothing of the row before is on its
way when a row begins. Requests and bytes are counted by the link, and those of what was still to be sent count too.

Environment: LINK_ROUNDS (3), LINK_PER_THREAD (100 files), LINK_FILES (2000 without fsync), LINK_TREE (6500 entries),
LINK_MIB (512), LINK_DATABASE_MIB (256), LINK_WRITES (2048 of 8 KiB), LINK_SYSTEMS (all; a wrong name lists them),
BENCH_DIR (see parts.py). More than the usual bytes need more than the server's 8 GiB.
"""

import contextlib
import os
import shutil
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import common
import harness
import linkreport
import parts
import systems
from common import REPO, setting
from harness import MIB, Failed, check, drop_caches, empty_dir, run, s3_environment, timed, wait_until
from parts import Meter, Wire

sys.path.append(str(REPO / "tests" / "e2e" / "cases"))
import link_drain  # noqa: E402

ONE_WAY = 0.0175
ROUND_TRIP = 2 * ONE_WAY
RATE = 125_000_000
THREADS = (1, 8, 32)
ROUNDS = setting("LINK_ROUNDS", 3, 1)
PER_THREAD = setting("LINK_PER_THREAD", 100, 20)
FILES = setting("LINK_FILES", 2000, 300)
TREE = setting("LINK_TREE", 6500, 300)
BYTES = setting("LINK_MIB", 512, 32) * MIB
DATABASE = setting("LINK_DATABASE_MIB", 256, 16) * MIB
WRITES = setting("LINK_WRITES", 2048, 128)
LIMIT = 1800


class EmbassyFs:
    """The real thing at one protection level."""

    def __init__(self, level, directory, port):
        self.level = level
        self.volume = harness.Volume(directory, f"s3://land/{directory.name}", s3_environment(port))
        self.volume.init()
        self.state, self.point = directory / "state", directory / "mount"

    def mount(self):
        self.mounted = self.volume.mount("mount", self.state, options=[f"protection={self.level}"])
        self.pid = self.mounted.pid

    def settle(self):
        self.mounted.sync()

    def umount(self):
        fallbacks = self.mounted.status()["fallbacks"]
        check(fallbacks == 0, f"{self.level} never fell back to the local disk", f"{fallbacks} times")
        self.mounted.umount(limit=600)

    @contextlib.contextmanager
    def embassy(self):
        """The volume as it is seen with nothing but the store and a key."""
        view = self.volume.embassy()
        yield view
        view.umount()


class JuiceFs(systems.JuiceFS):
    """JuiceFS with its metadata in SQLite beside it, and so in no embassy."""

    def __init__(self, writeback, directory, port):
        access = ["--access-key", "embassy", "--secret-key", "embassy-secret"]
        env = s3_environment(port)
        store = ["--storage", "s3", "--bucket", f"{env['AWS_ENDPOINT_URL']}/land", *access]
        super().__init__(directory, store=store, env=env, writeback=writeback)

    def mount(self):
        super().mount()
        self.pid = self.server.pid

    def settle(self):
        """What `close` has returned for is in the store, except what is staged: files below its cache."""
        wait_until(lambda: not self.staged(), LIMIT, "JuiceFS sends what it staged", pause=0.01)

    def staged(self):
        stages = (self.directory / "cache").glob("*/rawstaging")
        return any(names for stage in stages for _, _, names in os.walk(stage))

    @contextlib.contextmanager
    def embassy(self):
        """Its data is read from the store alone; its metadata has to be at hand."""
        empty_dir(self.directory / "cache")
        self.mount_options = ["--read-only"]
        self.mount()
        yield self
        self.umount()


OURS = {f"embassyfs {level}": (EmbassyFs, level) for level in ("strict", "available", "local")}
SYSTEMS = {**OURS, "juicefs": (JuiceFs, False), "juicefs --writeback": (JuiceFs, True)}


class Round:
    """The rows of one system, from an empty file system on."""

    def __init__(self, system, wire, helper, tree):
        self.system, self.wire, self.program, self.tree = system, wire, helper, tree
        self.rows = {}

    def helper(self, *words):
        run(self.program, *words, limit=LIMIT)

    def row(self, name, call, **more):
        """Times `call`, and then what is still to be sent."""
        meter, before = Meter(self.system.pid), self.wire.count()
        _, took = timed(call)
        _, settling = timed(self.system.settle)
        row = {"seconds": took, "settling": settling, **self.wire.since(before), **meter.read(), **more}
        self.rows[name] = row

    def all(self):
        point = self.system.point
        self.system.mount()
        for threads in THREADS:
            place = point / f"fsync-{threads}"
            place.mkdir()
            self.system.settle()
            words = ["fsync", place, threads, PER_THREAD, 4096]
            self.row(f"fsync {threads}", lambda: self.helper(*words), files=threads * PER_THREAD)
        files = point / "files"
        files.mkdir()
        self.system.settle()
        self.row("create", lambda: self.helper("create", files, FILES, 4096), files=FILES)
        place = point / "tree"
        place.mkdir()
        self.system.settle()
        untar = ["tar", "-xf", self.tree["tar"], "-C", place]
        self.row("untar", lambda: run(*untar, limit=LIMIT), **self.tree["size"])
        self.row("write", lambda: self.helper("write", point / "big", BYTES), payload=BYTES)
        self.helper("write", point / "database", DATABASE)
        self.system.settle()
        words = ["overwrite", point / "database", WRITES, 7]
        self.row("overwrite", lambda: self.helper(*words), payload=WRITES * 8192, writes=WRITES)
        before = self.wire.count()
        _, took = timed(self.system.umount)
        self.rows["umount"] = {"seconds": took, **self.wire.since(before)}
        self.cold()
        return self.rows

    def cold(self):
        """A mount with nothing of home's, and all of the tree read there."""
        drop_caches()
        before, begin = self.wire.count(), time.monotonic()
        with self.system.embassy() as view:
            mounted, meter = time.monotonic(), Meter(view.pid)
            mounting = self.wire.since(before)
            self.helper("readtree", view.point / "tree")
            took = time.monotonic() - mounted
            row = {"mount": mounted - begin, "mount requests": mounting["requests"], "seconds": took}
            self.rows["cold"] = {**row, **self.wire.since(before), **meter.read(), **self.tree["size"]}


@contextlib.contextmanager
def abroad(directory):
    """A disk of its own for the server: it stands for a machine elsewhere, and home's disk has enough to do. In memory."""
    place = empty_dir(directory / "abroad")
    try:
        run("mount", "-t", "tmpfs", "-o", "size=8g", "abroad", place)
        yield place
    finally:
        run("umount", "-l", place, ok=None)


def make_tree(directory):
    """A tar of a real tree: sources of crates, as they lie in cargo's own cache."""
    home = Path(os.environ.get("CARGO_HOME", Path.home() / ".cargo"))
    tree, entries = empty_dir(directory / "tree"), 0
    for crate in sorted(home.glob("registry/src/*/*")):
        inside = sum(1 + len(names) for _, _, names in os.walk(crate))
        if entries + inside <= TREE and inside <= 800:
            run("cp", "-a", crate, tree / crate.name)
            entries += inside
    if entries < TREE // 2:
        raise Failed(f"only {entries} entries in cargo's cache: build something first")
    size = sum(path.stat().st_size for path in tree.rglob("*") if path.is_file())
    run("tar", "-cf", directory / "tree.tar", "-C", tree, ".")
    shutil.rmtree(tree)
    print(f"tree: {entries} entries, {size / 1e6:.1f} MB in files", flush=True)
    return {"tar": directory / "tree.tar", "size": {"entries": entries, "payload": size}}


def plain_puts(port):
    """Bytes a second of a client without a file system: as many puts at once, of the same size, as EmbassyFS makes."""
    body, environment = os.urandom(16 * MIB), s3_environment(port)
    puts = max(4, BYTES // len(body))
    with ThreadPoolExecutor(4) as pool:
        names = [f"plain-{n}" for n in range(puts)]
        answers, took = timed(lambda: list(pool.map(lambda name: link_drain.put(port, environment, name, body), names)))
    check(all(status == 200 for status, _ in answers), "the plain client's puts succeed", str(answers[:1]))
    return puts * len(body) / took


def put_alone(port):
    """Seconds that the server itself takes for 4 KiB, connection included: no fsync abroad can be faster by more."""
    environment, body = s3_environment(port), os.urandom(4096)
    names = [f"small-{n}" for n in range(30)]
    return statistics.median(timed(lambda: link_drain.put(port, environment, name, body))[1] for name in names)


def measure(directory):
    names = common.chosen("LINK_SYSTEMS", SYSTEMS)
    facts, helper, rounds = common.machine(), parts.compiled(directory, "threads"), {name: [] for name in names}
    tree = make_tree(directory)
    with contextlib.ExitStack() as stack:
        root, server = stack.enter_context(harness.s3_server(stack.enter_context(abroad(directory))))
        wire = stack.enter_context(contextlib.closing(Wire(parts.compiled(directory, "wire"), server)))
        wire.shape(ONE_WAY, RATE)
        facts |= {"plain puts": plain_puts(wire.port), "put alone": put_alone(server)}
        print(f"plain puts through the link: {facts['plain puts'] / 1e6:.1f} MB/s", flush=True)
        for n in range(ROUNDS):
            # Another order in each round: what the first leaves behind hits all alike.
            for name in names[n % len(names) :] + names[: n % len(names)]:
                kind, how = SYSTEMS[name]
                place = empty_dir(directory / f"{name.replace(' ', '').replace('--', '-')}-{n}")
                begin = time.monotonic()
                rounds[name].append(Round(kind(how, place, wire.port), wire, helper, tree).all())
                shutil.rmtree(place)
                empty_dir(root / "land")
                print(f"round {n + 1}, {name}: {time.monotonic() - begin:.0f} s", flush=True)
    medians = {name: linkreport.median(all_rounds) for name, all_rounds in rounds.items()}
    text = linkreport.table(medians, ROUND_TRIP, RATE, facts)
    parts.write("link", text, {"machine": facts, "medians": medians, "rounds": rounds})


if __name__ == "__main__":
    parts.stage("link", measure)
