"""Measures what becomes of a volume as it grows: 10 thousand to 10 million files, and a file of 100 GiB;
`scripts/bench.sh growth` calls it. The table is in target/bench/growth.md, every number in growth.json.

At each size the rates are taken beside those of a fresh volume of the smallest size, in turns: what else the machine
does hits both alike, and the ratio is that of neighbours. Both are mounted anew before, so that neither gains by what
it has just written. The files are empty (a volume of ten million is to be there soon); those that are timed are not.

Invariant: a name that is looked up was forgotten by the kernel before; a mount that is timed has nothing in any cache.

Environment: GROWTH_SIZES (10000,100000,1000000,10000000), GROWTH_SAMPLE (10000 operations), GROWTH_ROUNDS (8),
GROWTH_KILLS (3), GROWTH_GIB (100; 0: none), BENCH_DIR (see parts.py). Needs about 20 GiB of disk. Ten million
names also fill the kernel's own memory, some 12 GiB, unless it has less and forgets the oldest.
"""

import contextlib
import os
import random
import shutil
import statistics
import subprocess
import time
from pathlib import Path

import common
import growthreport
import harness
import parts
from common import QUICK, REPO, setting
from harness import MIB, Failed, check, drop_caches, empty_dir, run, s3_environment, timed, wait_until
from parts import Meter, Wire
from watch import Checkpoints

USUAL_SIZES = "2000,20000" if QUICK else "10000,100000,1000000,10000000"
SIZES = [int(size) for size in os.environ.get("GROWTH_SIZES", USUAL_SIZES).split(",")]
SAMPLE = setting("GROWTH_SAMPLE", 10_000, 2000)
ROUNDS = setting("GROWTH_ROUNDS", 8, 2)  # even: each of the two is first as often
KILLS = setting("GROWTH_KILLS", 3, 1)
GIB = setting("GROWTH_GIB", 100, 2)
NOWHERE = subprocess.DEVNULL
# As threads.c has it.
PER_DIRECTORY = 1000
# Each time that is measured by mounting is the median of so many.
MOUNTS = 3
LIMIT = 7200


class Side:
    """A volume and its mount. The store lies where an S3 server finds it as a bucket."""

    def __init__(self, directory, helper):
        self.directory, self.program, self.files = empty_dir(directory), helper, 0
        self.store = directory / "s3" / "land" / "volume"
        self.store.mkdir(parents=True)
        self.volume = harness.Volume(directory, f"file://{self.store}")
        self.volume.init()
        self.mount()

    def mount(self):
        options = ["protection=local"]
        self.mounted, took = timed(lambda: self.volume.mount("mount", self.directory / "state", options=options))
        self.point, self.pid = self.mounted.point, self.mounted.pid
        return took

    def umount(self):
        return timed(lambda: self.mounted.umount(limit=LIMIT))[1]

    def sync(self):
        return timed(lambda: self.mounted.sync(limit=LIMIT))[1]

    def helper(self, *words):
        return float(run(self.program, *words, limit=LIMIT).stdout)

    def stored(self):
        """Bytes in the store."""
        return sum(path.stat().st_size for path in self.store.rglob("*") if path.is_file())

    def grow(self, to):
        took = self.helper("grow", self.point, self.files, to)
        self.files = to
        return took

    def close(self):
        self.mounted.umount(limit=LIMIT)
        shutil.rmtree(self.directory)


def forget_names():
    """The kernel forgets names and attributes; what the daemon knows, and the disk's cache, stay."""
    Path("/proc/sys/vm/drop_caches").write_text("2\n")


def operations(side, salt):
    """Operation -> a second, on names that the kernel does not know."""
    draw = random.Random(f"{salt} {side.files}")
    new = side.point / f"new-{salt}"
    new.mkdir()
    count = min(SAMPLE, SIZES[0]) // PER_DIRECTORY
    some = draw.sample(range(side.files // PER_DIRECTORY), count)
    took = {"create": side.helper("create", new, SAMPLE, 100)}
    side.sync()
    forget_names()
    took["lookup"] = side.helper("lookup", side.point, *some)
    took["stat"] = side.helper("stat", side.point, *some)
    forget_names()
    took["lookup, scattered"] = side.helper("scatter", side.point, side.files, SAMPLE, salt)
    many = {"create": SAMPLE, "lookup, scattered": SAMPLE}
    return {name: many.get(name, count * PER_DIRECTORY) / seconds for name, seconds in took.items()}


def compare(measured, sides):
    """Takes `measured(side, round)` of both in turns; gives rates of each, and the ratios of neighbours."""
    rates = {name: [] for name in sides}
    for n in range(ROUNDS):
        for name in list(sides)[:: 1 if n % 2 else -1]:
            rates[name].append(measured(sides[name], n))
    out = {}
    for operation in rates["grown"][0]:
        both = zip(rates["grown"], rates["small"], strict=True)
        pairs = [(grown[operation], small[operation]) for grown, small in both]
        ratio = statistics.median(grown / small for grown, small in pairs)
        grown, small = (statistics.median(column) for column in zip(*pairs, strict=True))
        out[operation] = {"rate": grown, "beside": small, "ratio": ratio, "pairs": pairs}
    return out


def mounting(side):
    """Seconds of a mount with nothing cached. The side is mounted at the end, as before."""
    took = []
    for _ in range(MOUNTS):
        side.umount()
        drop_caches()
        took.append(side.mount())
    return {"mount": statistics.median(took), "MiB after mount": common.status(side.pid, "VmRSS")}


def checkpointing(side, change):
    """A checkpoint by itself: of what `change` changed, at the unmount. The side is mounted at the end."""
    change()
    side.sync()
    before = side.stored()
    took = side.umount()
    out = {"checkpoint": took, "checkpoint bytes": side.stored() - before}
    side.mount()
    return out


def recovering(side, busy, latest):
    """The longest that a mount took after a SIGKILL while `busy(n)`, words for the helper, ran. `latest`: seconds after
    which it comes at the latest, about those between two checkpoints: a replay is the longest just before one."""
    took, draw = [], random.Random(side.files)
    for n in range(KILLS):
        marker = side.point / f"kept-{n}"
        marker.write_bytes(b"kept")
        side.sync()
        worker = subprocess.Popen([str(w) for w in (side.program, *busy(n))], stdout=NOWHERE, stderr=NOWHERE)
        time.sleep(draw.uniform(1, latest))
        if not harness.alive(side.pid):
            raise Failed("the daemon ended by itself, or somebody broke its mount")
        side.mounted.kill()
        worker.wait(60)
        drop_caches()
        took.append(side.mount())
        check(marker.read_bytes() == b"kept", f"what was synced is there after kill -9, {took[-1]:.2f} s later")
        # The next size is to be that size.
        run("rm", "-rf", *side.point.glob("busy-*"), limit=LIMIT)
    side.sync()
    return {"recovery": max(took)}


def at_the_embassy(side, wire_program):
    """A read-only mount with an empty state directory: from the directory, and what it asks of an S3 server there."""
    took = []
    for _ in range(MOUNTS):
        drop_caches()
        view, seconds = timed(side.volume.embassy)
        took.append(seconds)
        view.umount()
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(served(side.directory / "s3"))
        wire = stack.enter_context(contextlib.closing(Wire(wire_program, server)))
        remote = side.volume.at("s3://land/volume", s3_environment(wire.port))
        drop_caches()
        view, seconds = timed(remote.embassy)
        asked, peak = wire.count(), common.peak_memory(view.pid)
        view.umount()
    s3 = {"s3 mount": seconds, "requests": asked["requests"], "MB": asked["down"] / 1e6, "MiB": peak}
    return {"read-only mount": statistics.median(took), "embassy": s3}


@contextlib.contextmanager
def served(root):
    """An S3 server for a directory that is there already (harness.s3_server begins with an empty one)."""
    program = os.environ.get("S3S_FS") or run(REPO / "scripts" / "s3.sh", "path").stdout.strip()
    port = harness.free_port()
    access = s3_environment(port)
    words = ["--access-key", access["AWS_ACCESS_KEY_ID"], "--secret-key", access["AWS_SECRET_ACCESS_KEY"]]
    words = [program, "--host", "127.0.0.1", "--port", str(port), *words, str(root)]
    server = subprocess.Popen(words, stdin=NOWHERE, stdout=NOWHERE, stderr=NOWHERE)
    try:
        wait_until(lambda: harness.listens(port), 20, "the S3 server listens")
        yield port
    finally:
        server.kill()
        server.wait(10)


def at_size(side, size, directory, programs):
    """Brings the volume to a size, and measures it there."""
    out, before, meter = {"files": size}, side.stored(), Meter(side.pid)
    more = size - side.files
    with Checkpoints(side.pid) as checkpoints:
        took = side.grow(size)
    out |= {"growing": more / took, "checkpoints": checkpoints.figures(), "sync": side.sync(), "grew": meter.read()}
    out["MiB after growing"] = common.status(side.pid, "VmRSS")
    out["bytes a file"] = (side.stored() - before) / more
    out["umount"] = side.umount()
    side.mount()
    out |= mounting(side)
    small = Side(directory / "small", programs["threads"])
    small.grow(SIZES[0])
    small.sync()
    small.umount()
    small.mount()
    meter = Meter(side.pid)
    out["operations"] = compare(operations, {"grown": side, "small": small})
    out["used"] = meter.read()
    small.close()
    touch = ["touch", side.point, side.files, SAMPLE, 99]
    out |= checkpointing(side, lambda: side.helper(*touch))

    def busy(n):
        place = side.point / f"busy-{n}"
        place.mkdir()
        return "create", place, 10_000_000, 100

    out |= recovering(side, busy, 6)
    out |= at_the_embassy(side, programs["wire"])
    for n in range(ROUNDS):
        run("rm", "-rf", side.point / f"new-{n}", limit=LIMIT)
    return out


def data(side, salt):
    """Reads and writes at random places, as `operations`."""
    drop_caches()
    reads, writes = 2000, 1024
    read = reads / side.helper("random", side.point / "big", reads, salt)
    write = writes / side.helper("overwrite", side.point / "big", writes, salt)
    side.sync()
    return {"random 4 KiB read": read, "random 8 KiB write": write}


def wide(directory, programs):
    """A volume with one file of GIB, beside one of a GiB."""
    side, small = (Side(directory / name, programs["threads"]) for name in ("wide", "small"))
    gib, tenth = 1024 * MIB, max(GIB // 10, 1)
    for one in (side, small):
        one.files = 0
    small.helper("pattern", small.point / "big", 0, min(gib, tenth * gib))
    small.sync()
    rates, meter = [], Meter(side.pid)
    with Checkpoints(side.pid) as checkpoints:
        for at in range(0, GIB, tenth):
            rates.append(tenth * 1024 / side.helper("pattern", side.point / "big", at * gib, tenth * gib))
            print(f"{at + tenth} GiB: {rates[-1]:,.0f} MiB/s", flush=True)
    out = {"GiB": GIB, "MiB/s": rates, "checkpoints": checkpoints.figures(), "sync": side.sync(), "grew": meter.read()}
    out["stored GiB"] = side.stored() / gib
    out |= mounting(side)
    mounting(small)
    out["first stat"] = timed(lambda: os.stat(side.point / "big"))[1]
    meter = Meter(side.pid)
    out["operations"] = compare(data, {"grown": side, "small": small})
    out["used"] = meter.read()
    small.close()
    out |= checkpointing(side, lambda: side.helper("overwrite", side.point / "big", 4096, 99))
    out |= recovering(side, lambda n: ("pattern", side.point / "more", 0, 50 * gib), 10)
    out |= at_the_embassy(side, programs["wire"])
    side.close()
    return out


def measure(directory):
    programs = {name: parts.compiled(directory, name) for name in ("threads", "wire")}
    results = {"machine": common.machine(), "sizes": [], "wide": None}
    side = Side(directory / "grown", programs["threads"])
    for size in SIZES:
        (one, took) = timed(lambda: at_size(side, size, directory, programs))
        results["sizes"].append(one)
        print(f"{size:,} files: {took:.0f} s", flush=True)
        parts.write("growth", growthreport.table(results), results, show=False)  # what there is
    side.close()
    if GIB:
        results["wide"] = wide(directory, programs)
    parts.write("growth", growthreport.table(results), results)


if __name__ == "__main__":
    parts.stage("growth", measure)
