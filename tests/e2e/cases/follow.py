"""A follower: a read-only mount abroad that moves on with home, both 35 ms (round trip) from the store.

What home has shipped is seen abroad within 2 s, whatever the kernel there had kept of before: names, also those that
were not there, data, also mapped, listings, attributes, links. What is open abroad stays readable after home has
removed or replaced it. What is read is a prefix of what home did. While the store is away the follower serves what it
has and says so; far behind it jumps.

Invariant: a change is asked for through the same calls that have filled the kernel's caches just before.
"""

import contextlib
import mmap
import os
import random
import statistics
import subprocess
import sys
import threading
import time

from harness import FULL, MIB, check, run, s3_environment, say, volume_on, wait_until
from proxy import Proxy

ROUND_TRIP = 0.035
LIMIT = 2.0
# What a busy machine may add where a limit of the program itself is not what is measured.
SLACK = 8
FAR = 150


def main(directory):
    with contextlib.ExitStack() as stack:
        volume = volume_on("s3", directory, stack)
        port = int(volume.env["AWS_ENDPOINT"].rsplit(":", 1)[1])
        links = [stack.enter_context(contextlib.closing(Proxy(port))) for _ in range(2)]
        for link in links:
            link.set("pass", delay=ROUND_TRIP / 2)
        here, there = [volume.at(volume.url, s3_environment(link.port)) for link in links]
        home = here.mount("home", directory / "home-state")
        (home.point / "d").mkdir()
        (home.point / "d/first").write_text("1")
        home.sync()
        abroad = there.embassy(more=["--follow"])
        world = World(home, abroad)
        world.changes()
        world.open_files()
        world.prefix()
        world.away(links[1])
        home = world.jump(here, links, directory)
        if FULL:
            for name, rate in [("50 MB/s", writing), ("2,000 files/s", creating)]:
                under_load(World(home, abroad), name, rate)
        abroad.umount()
        home.umount()


def read(path):
    """The file's contents, from the kernel's cache if they are there."""
    with open(path, "rb") as file:
        return file.read()


def read_direct(path):
    """The file's contents as the daemon has them now."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        block = mmap.mmap(-1, 4096)
        return block[: os.preadv(fd, [block], 0)]
    finally:
        os.close(fd)


class World:
    def __init__(self, home, abroad):
        self.home, self.abroad = home, abroad
        self.lags = []

    def soon(self, what, change, look, want):
        """`look` has another answer than `want`; after `change` at home it has that one within the limit."""
        before = look()
        check(before != want, f"{what}: not seen before", f"{before!r}")
        change()
        self.home.sync()
        shipped = time.monotonic()
        wait_until(lambda: look() == want, LIMIT + SLACK, f"{what} is seen abroad (last: {look()!r})", pause=0.005)
        self.lags.append(time.monotonic() - shipped)

    def changes(self):
        home, abroad = self.home.point, self.abroad.point
        names = lambda: sorted(os.listdir(abroad / "d"))
        self.soon("a name that was not there", lambda: (home / "new").write_text("x"),
                  lambda: (abroad / "new").exists(), True)
        self.soon("a listing", lambda: (home / "d/second").write_text("2"), names, ["first", "second"])
        self.soon("data of the same length", lambda: (home / "d/first").write_text("7"),
                  lambda: read(abroad / "d/first"), b"7")
        with open(home / "big", "wb") as big:
            big.write(random.Random(1).randbytes(3 * MIB))
        self.home.sync()
        wait_until(lambda: (abroad / "big").exists(), LIMIT + SLACK, "the big file is there")
        with open(abroad / "big", "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            whole = mapped[:]

            def poke():
                with open(home / "big", "r+b") as big:
                    big.seek(2 * MIB + 77)
                    big.write(b"changed")

            self.soon("data in a mapping", poke, lambda: mapped[2 * MIB + 77 : 2 * MIB + 84], b"changed")
            want = whole[: 2 * MIB + 77] + b"changed" + whole[2 * MIB + 84 :]
            check(mapped[:] == want, "nothing else of the mapping has changed")
        self.soon("a longer file", lambda: (home / "new").write_text("longer"), lambda: read(abroad / "new"), b"longer")
        self.soon("a shorter file", lambda: os.truncate(home / "new", 2), lambda: read(abroad / "new"), b"lo")
        self.soon("a mode", lambda: os.chmod(home / "new", 0o604), lambda: (abroad / "new").stat().st_mode & 0o777, 0o604)
        attribute = lambda: os.getxattr(abroad / "new", "user.a") if "user.a" in os.listxattr(abroad / "new") else None
        self.soon("an attribute", lambda: os.setxattr(home / "new", "user.a", b"v"), attribute, b"v")
        os.symlink("first", home / "d/link")
        self.home.sync()
        wait_until(lambda: os.path.islink(abroad / "d/link"), LIMIT + SLACK, "the link is there")

        def relink():
            os.symlink("second", home / "d/l2")
            os.rename(home / "d/l2", home / "d/link")

        self.soon("a link", relink, lambda: os.readlink(abroad / "d/link"), "second")
        self.soon("a name that went", lambda: (home / "d/second").unlink(), names, ["first", "link"])
        self.soon("a renamed directory", lambda: (home / "d").rename(home / "e"),
                  lambda: ((abroad / "d").exists(), (abroad / "e/first").exists()), (False, True))
        worst = max(self.lags)
        say(f"lag behind what was shipped: p50 {statistics.median(self.lags):.2f} s, worst {worst:.2f} s "
            f"of {len(self.lags)} changes")
        check(worst < LIMIT, f"all seen within {LIMIT} s", f"{worst:.2f} s")

    def open_files(self):
        home, abroad = self.home.point, self.abroad.point
        bodies = {name: random.Random(name).randbytes(2 * MIB) for name in ("removed", "replaced")}
        for name, body in bodies.items():
            (home / name).write_bytes(body)
        self.home.sync()
        wait_until(lambda: (abroad / "replaced").exists(), LIMIT + SLACK, "the files are there")
        opened = {name: os.open(abroad / name, os.O_RDONLY) for name in bodies}
        for fd in opened.values():
            os.pread(fd, 100, 0)
        (home / "removed").unlink()
        (home / "fresh").write_text("fresh")
        (home / "fresh").rename(home / "replaced")
        self.home.sync()
        wait_until(lambda: not (abroad / "removed").exists() and read(abroad / "replaced") == b"fresh",
                   LIMIT + SLACK, "one file is gone, the other replaced")
        for name, fd in opened.items():
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            check(os.pread(fd, 3 * MIB, 0) == bodies[name], f"what was open is read on: {name}")
            check(os.fstat(fd).st_size == 2 * MIB, f"and has its size: {name}")
            os.close(fd)
        check(sorted(os.listdir(abroad)) == sorted(os.listdir(home)), "the root lists the same on both sides")

    def prefix(self):
        """Home writes n into A, then into B. Who reads B and then A never finds A behind B."""
        home, abroad = self.home.point, self.abroad.point
        for name in "AB":
            (home / name).write_text("0" * 16)
        self.home.sync()
        wait_until(lambda: (abroad / "B").exists(), LIMIT + SLACK, "A and B are there")
        stop, written = threading.Event(), [0]

        def write():
            files = [os.open(home / name, os.O_WRONLY) for name in "AB"]
            while not stop.is_set():
                written[0] += 1
                for fd in files:
                    os.pwrite(fd, b"%016d" % written[0], 0)
            for fd in files:
                os.close(fd)

        writer = threading.Thread(target=write)
        writer.start()
        seen, end = set(), time.monotonic() + (60 if FULL else 6)
        try:
            while time.monotonic() < end:
                b = int(read_direct(abroad / "B"))
                a = int(read_direct(abroad / "A"))
                if a < b:
                    check(False, "what is seen is a prefix of what was done", f"A {a}, B {b}")
                seen.add(b)
        finally:
            stop.set()
            writer.join()
        check(len(seen) >= 3, "and it moves", f"{len(seen)} states")
        say(f"{len(seen)} states of A and B were seen, each a prefix")
        self.home.sync()
        want = b"%016d" % written[0]
        wait_until(lambda: read(abroad / "A") == want == read(abroad / "B"), LIMIT + SLACK, "the end is seen")

    def away(self, link):
        home, abroad = self.home.point, self.abroad.point
        status = self.abroad.status()
        check(status["follow"]["state"] == "following" and status["head"], "the status says so", status["follow"])
        link.set("cut")
        (home / "meanwhile").write_text("later")
        self.home.sync()
        wait_until(lambda: self.abroad.status()["follow"]["state"] == "store away", 30, "the status says that it is away")
        check(not (abroad / "meanwhile").exists() and read(abroad / "new") == b"lo", "what it has is served on")
        text = run("cat", abroad / ".embassyfs/status", limit=20).stdout
        check("store away" in text, "the control directory says it too", text[:200])
        link.set("pass", delay=ROUND_TRIP / 2)
        wait_until(lambda: (abroad / "meanwhile").exists(), 30, "it goes on when the store is back")
        wait_until(lambda: self.abroad.status()["follow"]["state"] == "following", 10, "and says so")

    def jump(self, here, links, directory):
        """Home is far ahead, and has a checkpoint there."""
        abroad = self.abroad.point
        jumps = self.abroad.status()["follow"]["jumps"]
        held = os.open(abroad / "big", os.O_RDONLY)
        body = os.pread(held, 4096, 0)
        links[1].set("cut")
        links[0].set("pass", delay=0)
        point = self.home.point
        fd = os.open(point / "A", os.O_WRONLY)
        for n in range(FAR):
            os.pwrite(fd, b"%016d" % n, 0)
            os.fsync(fd)
        os.close(fd)
        (point / "big").unlink()
        (point / "new").write_text("jumped")
        (point / "e/far").write_text("far")
        self.home.umount()
        self.home = here.mount("home", directory / "home-state")
        (self.home.point / "after").write_text("after")
        self.home.sync()
        links[0].set("pass", delay=ROUND_TRIP / 2)
        links[1].set("pass", delay=ROUND_TRIP / 2)
        since = time.monotonic()
        wait_until(lambda: (abroad / "after").exists(), 60, "a follower far behind arrives")
        say(f"{FAR} segments behind: there after {time.monotonic() - since:.1f} s")
        check(self.abroad.status()["follow"]["jumps"] == jumps + 1, "by one jump")
        wait_until(lambda: read(abroad / "new") == b"jumped", LIMIT + SLACK, "old data is not shown any more")
        wait_until(lambda: sorted(os.listdir(abroad / "e")) == ["far", "first", "link"], LIMIT + SLACK, "nor old lists")
        check(not (abroad / "big").exists(), "nor old names")
        os.posix_fadvise(held, 0, 0, os.POSIX_FADV_DONTNEED)
        check(os.pread(held, 4096, 0) == body, "what was open before the jump is read on")
        os.close(held)
        return self.home


LOAD = r"""
import os, sys, time
root, kind, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
os.makedirs(root, exist_ok=True)
begin, n = time.monotonic(), 0
block = os.urandom(1 << 20)
rate = {"write": 50e6 / len(block), "create": 2000}[kind]
while (now := time.monotonic()) - begin < seconds:
    if n > (now - begin) * rate:
        time.sleep(0.001)
        continue
    if kind == "write":
        with open(f"{root}/{n // 64 % 8}", "ab" if n % 64 else "wb") as out:
            out.write(block[n % 4096:] + block[:n % 4096])
    else:
        if n % 2000 == 0:
            os.makedirs(f"{root}/{n // 2000}", exist_ok=True)
        with open(f"{root}/{n // 2000}/{n}", "wb") as out:
            out.write(b"x" * 100)
    n += 1
print(n / (time.monotonic() - begin))
"""


def writing(root, seconds):
    return [sys.executable, "-c", LOAD, root, "write", str(seconds)], "MiB/s"


def creating(root, seconds):
    return [sys.executable, "-c", LOAD, root, "create", str(seconds)], "files/s"


def under_load(world, name, load, seconds=40):
    """How old what is seen abroad is: from the write of a time stamp at home, without fsync, to its being read."""
    home, abroad = world.home.point, world.abroad.point
    (home / "clock").write_text("0" * 17)
    world.home.sync()
    wait_until(lambda: (abroad / "clock").exists(), LIMIT + SLACK, "the clock is there")
    command, unit = load(str(home / name.replace("/", "-").replace(" ", "")), seconds)
    busy = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    ages, lags = [], []
    fd = os.open(home / "clock", os.O_WRONLY)
    since, asked = time.time(), 0.0
    while busy.poll() is None:
        os.pwrite(fd, b"%017.6f" % time.time(), 0)
        shown = float(read_direct(abroad / "clock"))
        if time.time() - since > 5:
            ages.append(time.time() - shown)
            if time.time() - asked > 0.5:
                asked = time.time()
                lags.append(world.abroad.status()["lag_seconds"])
        time.sleep(0.05)
    os.close(fd)
    rate = float(busy.stdout.read())
    figures = lambda all: f"p50 {statistics.median(all):.2f} s, p99 {statistics.quantiles(all, n=100)[98]:.2f} s"
    say(f"while home does {name} (it did {rate:.0f} {unit}): from write to seen {figures(ages)}; from commit to seen "
        f"{figures(lags)}")
    world.home.sync()
