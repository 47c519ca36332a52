"""`embassyfs upgrade` under load: applications see a short pause and no error; a successor that fails changes nothing.

The short form upgrades a few times, the long one (E2E_FULL=1) many times. Stalls are measured, not assumed: the
longest call that overlaps an upgrade.
"""

import contextlib
import fcntl
import json
import os
import socket
import statistics
import struct
import subprocess
import time

import busy
import trees
from busy import Worker
from harness import FULL, MIB, Volume, alive, check, check_same, program, run, s3_environment, s3_server, say, wait_until
from proxy import Proxy

UPGRADES = 60 if FULL else 6
# What applications may notice, in seconds; generous, because the machines that run this are busy.
STALL_MAX = 2.0
NAMES = 2000

# A successor that says what one says, up to a point. It speaks the protocol of `src/cli/passing.rs`.
IMPOSTOR = """#!/usr/bin/env python3
import json, socket, struct, sys, time
s = socket.socket(fileno=0)
def receive():
    size, = struct.unpack("<I", s.recv(4, socket.MSG_WAITALL))
    return json.loads(s.recv(size, socket.MSG_WAITALL))
def send(message):
    body = json.dumps(message).encode()
    s.sendall(struct.pack("<I", len(body)) + body)
receive()
send({"prepared": {"version": "impostor"}})
take = receive()
%s
"""


def upgraded(mount, *more):
    """Upgrades, and gives when it began and ended."""
    begin = time.monotonic()
    done = run(program(), "upgrade", "--json", *more, mount.point, limit=90)
    status = json.loads(done.stdout)
    check_quietly(status["pid"] != mount.pid and alive(status["pid"]), "another process serves the mount", str(status))
    wait_until(lambda: not alive(mount.pid), 10, "the old daemon ends")
    mount.pid = status["pid"]
    return begin, time.monotonic()


def check_quietly(holds, claim, detail=""):
    if not holds:
        check(False, claim, detail)


class Held:
    """What an application holds open over the upgrades."""

    def __init__(self, point):
        self.point = point
        self.gone = os.open(point / "gone", os.O_CREAT | os.O_RDWR)
        os.write(self.gone, b"still here")
        os.unlink(point / "gone")
        # Known to the kernel from before, and removed only later: its reader must not lose it either.
        self.later = os.open(point / "later", os.O_CREAT | os.O_RDWR)
        os.write(self.later, b"later")
        self.position = os.open(point / "position", os.O_CREAT | os.O_RDWR)
        os.write(self.position, bytes(range(256)) * 64)
        os.lseek(self.position, 100, os.SEEK_SET)
        self.flock = os.open(point / "flock", os.O_CREAT | os.O_RDWR)
        fcntl.flock(self.flock, fcntl.LOCK_EX)
        self.lockf = os.open(point / "lockf", os.O_CREAT | os.O_RDWR)
        fcntl.lockf(self.lockf, fcntl.LOCK_EX)
        (point / "many").mkdir()
        for n in range(NAMES):
            (point / "many" / f"name-{n:05}").touch()
        self.listing, self.seen = os.scandir(point / "many"), []
        self.turn = 0

    def use(self):
        """Uses all of it once."""
        self.turn += 1
        check_quietly(os.fstat(self.gone).st_nlink == 0, "an unlinked file stays unlinked")
        check_quietly(os.pread(self.gone, 10, 0) == b"still here", "an unlinked file can still be read")
        word = b"turn %d" % self.turn
        os.pwrite(self.gone, word, MIB * self.turn)
        check_quietly(os.pread(self.gone, 99, MIB * self.turn) == word, "and written")
        if self.turn == 2:
            os.unlink(self.point / "later")
        check_quietly(os.pread(self.later, 10, 0) == b"later", "what was open before an upgrade and removed after it stays")
        got, want = os.read(self.position, 10), bytes((100 + 10 * (self.turn - 1) + n) % 256 for n in range(10))
        check_quietly(got == want, "a descriptor keeps its position")
        self.seen += [entry.name for _, entry in zip(range(NAMES // UPGRADES + 1), self.listing, strict=False)]

    def finish(self):
        self.seen += [entry.name for entry in self.listing]
        check(sorted(self.seen) == [f"name-{n:05}" for n in range(NAMES)], "a listing in several parts has every name once")
        for fd in (self.gone, self.later, self.position, self.flock, self.lockf):
            os.close(fd)


def report(workers, upgrades):
    """Stops the workers, demands that none had an error, and says how long calls took during the upgrades."""
    slow, failures, total = [], [], 0
    for worker in workers:
        error, calls, its_slow = worker.stop()
        failures += [f"{worker.name}: {error}"] if error else []
        slow += its_slow
        total += calls
    check(not failures, f"{len(workers)} applications made {total} calls without an error", "\n".join(failures))
    stalls = sorted(
        max((took for begin, took in slow if begin < end and begin + took > start), default=busy.SLOW)
        for start, end in upgrades
    )
    whole = sorted(end - start for start, end in upgrades)
    check(
        stalls[-1] <= STALL_MAX,
        f"{len(upgrades)} upgrades: longest call {statistics.median(stalls):.2f} s in the middle, {stalls[-1]:.2f} s at "
        f"most; the command {statistics.median(whole):.2f} s, {whole[-1]:.2f} s",
        f"more than {STALL_MAX} s",
    )


def start_workers(point):
    return [
        Worker(busy.fsyncing, point / "fsyncing"),
        Worker(busy.naming, f"{point}/naming"),
        Worker(busy.mapping, point / "mapping"),
        Worker(busy.streaming, point / "streaming"),
        Worker(busy.transactions, point / "database"),
        Worker(busy.locking, point / "flock", "flock"),
        Worker(busy.locking, point / "lockf", "lockf"),
    ]


def used_inodes(point):
    usage = os.statvfs(point)
    return usage.f_files - usage.f_ffree


def under_load(volume, state):
    home = volume.mount("home", state, options=["protection=local"])
    held = Held(home.point)
    workers = start_workers(home.point)
    upgrades = []
    for _ in range(UPGRADES):
        calls = time.monotonic()
        upgrades.append(upgraded(home))
        held.use()
        lost = [w.name for w in workers if w.failed()]
        if lost:
            report(workers, upgrades)
        wait_until(lambda: time.monotonic() - calls > 0.5, 5, "half a second has passed")
    broken_successors(volume, home, held, workers)
    done = time.monotonic() + 1
    wait_until(lambda: time.monotonic() > done, 5, "what waited for a successor that hung has been answered")
    upgrades.append(upgraded(home))
    report(workers, upgrades)
    held.finish()
    check(busy.check_database(home.point / "database", 1) > 0, "the database is whole")
    want = trees.manifest(home.point)
    home.umount()
    home = volume.mount("home", state)
    check_same(want, trees.manifest(home.point), "after unmounting and mounting again all is as it was", ignore=())
    count = 1 + sum(1 for _ in home.point.rglob("*"))
    check(used_inodes(home.point) == count, f"and nothing but its {count} files is left", str(used_inodes(home.point)))
    home.umount()


def script(path, text):
    path.write_text(text)
    path.chmod(0o755)
    return path


def broken_successors(volume, home, held, workers):
    """Whatever a successor does wrong, the old daemon goes on."""
    directory = volume.directory
    broken = {
        "no program": directory / "missing",
        "not a program": script(directory / "text", "this is no program\n"),
        "a program that ends at once": "/bin/true",
        "another program": "/bin/cat",
        "one that dies when it has the volume": script(directory / "dies", IMPOSTOR % "sys.exit(3)"),
        "one that cannot open the volume": script(
            directory / "cannot", IMPOSTOR % 's.recv(take["held"], socket.MSG_WAITALL); send({"failed": {"message": "no"}})'
        ),
        "one that lies on the mount": home.point / "fsyncing",
    }
    if FULL:
        broken["one that hangs when it has the volume"] = script(directory / "hangs", IMPOSTOR % "time.sleep(600)")
    for what, path in broken.items():
        done = run(program(), "upgrade", "--program", path, home.point, limit=90, ok=None)
        line = done.stderr.strip()
        good = done.returncode == 1 and len(line.splitlines()) == 1 and "not upgraded" in line
        check(good, f"{what}: {line[:110]}", f"exit {done.returncode}: {line}")
        check_quietly(home.status()["pid"] == home.pid and alive(home.pid), "the old daemon goes on")
        held.turn -= 1
        os.lseek(held.position, -10, os.SEEK_CUR) if held.turn else None
        held.use()
        check_quietly(not any(w.failed() for w in workers), "applications go on")


def talk(hello):
    """What a successor says to a `hello`."""
    ours, theirs = socket.socketpair()
    child = subprocess.Popen([program(), "take-over"], stdin=theirs, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    theirs.close()
    ours.settimeout(20)
    body = json.dumps(hello).encode()
    ours.sendall(struct.pack("<I", len(body)) + body)
    (size,) = struct.unpack("<I", ours.recv(4, socket.MSG_WAITALL))
    answer = json.loads(ours.recv(size, socket.MSG_WAITALL))
    ours.close()
    return answer, child.wait(20)


def strangers(volume):
    """Nobody but a daemon starts a successor, and versions that do not go together say so."""
    done = run(program(), "take-over", ok=False)
    check("only a daemon" in done.stderr, "take-over by hand is refused", done.stderr)
    hello = {"version": 99, "words": [], "foreground": False, "greeting_request": "", "greeting_reply": ""}
    answer, code = talk(hello)
    check(code == 8 and "version 99" in answer["failed"]["message"], "another version's handover is refused", str(answer))
    words = ["--store", volume.url, "--key", "/k", "--state", "/s", "--options", "from_the_future", "--", "/m"]
    answer, code = talk({**hello, "version": 1, "words": words, "new": "passed over"})
    check(code == 2 and "from_the_future" in answer["failed"]["message"], "so is an unknown option, by name", str(answer))


def reader(volume):
    """A read-only mount keeps showing what it showed, also after an upgrade."""
    embassy = volume.embassy()
    want = trees.manifest(embassy.point)
    with open(embassy.point / "fsyncing", "rb") as file:
        first = file.read(64)
        home = volume.mount("home", volume.directory / "state")
        (home.point / "new").write_text("new")
        home.umount()
        upgraded(embassy)
        check(file.read(64) != first and os.pread(file.fileno(), 64, 0) == first, "a reader's open file goes on")
        check_same(want, trees.manifest(embassy.point), "an upgraded reader shows the same version", ignore=())
        away = volume.store_dir.with_name("away")
        volume.store_dir.rename(away)
        done = run(program(), "upgrade", embassy.point, limit=90, ok=False)
        check("store" in done.stderr and alive(embassy.pid), "without the store it is not upgraded", done.stderr)
        away.rename(volume.store_dir)
        check(os.pread(file.fileno(), 64, 0) == first, "and goes on")
    embassy.umount()


def without_the_store(directory, stack):
    """While the store is silent, an upgrade waits for nothing, and fsync has fallen back before and after it."""
    root, port = stack.enter_context(s3_server(directory))
    proxy = Proxy(port)
    stack.callback(proxy.close)
    volume = Volume(directory, "s3://land/upgrade", s3_environment(port))
    volume.init()
    behind = volume.at(volume.url, s3_environment(proxy.port))
    home = behind.mount("home", directory / "state", options=["sync_timeout=1s"])
    (home.point / "before").write_text("before")
    home.sync()
    proxy.set("hang")
    worker = Worker(busy.fsyncing, home.point / "lines")
    wait_until(lambda: not home.status()["in_sync"], 20, "fsync falls back")
    upgrades = [upgraded(home) for _ in range(3)]
    check(not home.status()["in_sync"], "the successor knows that fsync had fallen back")
    report([worker], upgrades)
    proxy.set("pass")
    home.sync(limit=60)
    status = home.status()
    check(status["unsent_bytes"] == 0 and status["fallbacks"] == 0, "and ships it all when the link is back", str(status))
    want = trees.manifest(home.point)
    home.umount()
    embassy = volume.embassy()
    check_same(want, trees.manifest(embassy.point), "home and embassy are equal", ignore=())
    embassy.umount()


def main(directory):
    volume = Volume(directory)
    volume.init()
    strangers(volume)
    under_load(volume, directory / "state")
    reader(volume)
    with contextlib.ExitStack() as stack:
        second = directory / "s3"
        second.mkdir()
        without_the_store(second, stack)
    say("done")
