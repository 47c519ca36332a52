"""Logs that are appended to, as Redis and mail servers keep them: nothing torn, nothing acknowledged lost, in order.

Two kinds of writer. *shared*: several processes append to one file with `O_APPEND` and `fdatasync` each record; a
rotator renames the file away, and each writer opens the new one as soon as it sees it. *own*: a process appends to a
file of its own with `fsync`; now and then it writes a shorter one beside it, renames that over the first and goes on
there. Followers read along.

Invariant: every writer that is started has a name of its own and numbers its records from 1, so that a gap, a record
twice, and a wrong order can be told apart; what is acknowledged is noted outside the mount.
"""

import os
import random
import subprocess
import sys
import time
import zlib

from harness import FULL, Failed, Volume, check, empty_dir, say, wait_until

SHARED, OWN, FOLLOWERS = 3, 2, 2
ROUNDS = 20 if FULL else 4

COMMON = r"""
import os, sys, time, zlib
APPEND = os.O_CREAT | os.O_APPEND | os.O_WRONLY
def record(writer, n):
    # Up to three pages, so that records lie across the borders of pages.
    body = b"%s %d %s" % (writer.encode(), n, b"abcdefgh" * (n * 131 % 1500))
    return b"%08x %s\n" % (zlib.crc32(body), body)
def append(fd, data):
    if os.write(fd, data) != len(data):
        sys.exit("a short write")
def acknowledge(log, n):
    append(log, b"%d\n" % n)
"""

SHARED_WRITER = COMMON + r"""
path, writer, log = sys.argv[1:]
outside, n, fd = os.open(log, APPEND), 0, os.open(path, APPEND)
while True:
    try:
        if os.stat(path).st_ino != os.fstat(fd).st_ino:
            os.close(fd)
            fd = os.open(path, APPEND)
    except FileNotFoundError:
        pass  # between the rotator's two steps
    n += 1
    append(fd, record(writer, n))
    os.fdatasync(fd)
    acknowledge(outside, n)
"""

ROTATOR = COMMON + r"""
directory, turn = sys.argv[1], int(sys.argv[2])
while True:
    while not os.path.exists(f"{directory}/log") or os.path.getsize(f"{directory}/log") < 300_000:
        time.sleep(0.005)
    turn += 1
    os.rename(f"{directory}/log", f"{directory}/log.{turn:06}")
    os.close(os.open(f"{directory}/log", APPEND))
"""

OWN_WRITER = COMMON + r"""
path, writer, log = sys.argv[1:]
outside, n, fd = os.open(log, APPEND), 0, os.open(path, APPEND)
directory = os.open(os.path.dirname(path), os.O_RDONLY)
while True:
    n += 1
    append(fd, record(writer, n))
    os.fsync(fd)
    acknowledge(outside, n)
    if n % 40 == 0:
        new = os.open(path + ".new", os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_WRONLY)
        append(new, b"%s stands for %d\n" % (writer.encode(), n))
        os.fsync(new)
        os.rename(path + ".new", path)
        os.fsync(directory)
        os.close(fd)
        fd = new
"""

# Follows the file from turn to turn, by its descriptor and not by its name, as `tail -F` does.
FOLLOWER = COMMON + r"""
path, log = sys.argv[1:]
outside, seen, rest, source, told = os.open(log, APPEND), {}, b"", None, 0
while True:
    if source is None:
        try:
            source = open(path, "rb", buffering=0)
        except FileNotFoundError:
            continue
    piece = source.read(1 << 16)
    if not piece:
        try:
            moved = os.stat(path).st_ino != os.fstat(source.fileno()).st_ino
        except FileNotFoundError:
            moved = False
        # The old file may have got its last records between the reading and the looking.
        piece = source.read(1 << 16)
        if moved and not piece and os.fstat(source.fileno()).st_size == source.tell():
            late = time.monotonic() + 0.2
            while time.monotonic() < late and not piece:
                piece = source.read(1 << 16)
            if not piece:
                assert rest == b"", f"ended in the middle of a record: {rest[-80:]}"
                source.close()
                source = None
    *lines, rest = (rest + piece).split(b"\n")
    for line in lines:
        crc, writer, n, _ = line.split(b" ", 3)
        assert int(crc, 16) == zlib.crc32(line[9:]), f"torn: {line[:80]}"
        # It may begin in the middle; from there on it must see each record once and in order.
        assert int(n) == seen.get(writer, int(n) - 1) + 1, f"{writer}: {n} after {seen[writer]}"
        seen[writer] = int(n)
        told += 1
    if lines:
        acknowledge(outside, told)
"""


def last_noted(log):
    """The last number that a process noted outside the mount."""
    return int(log.read_bytes().split()[-1]) if log.exists() and log.stat().st_size else 0


def parse(line, where):
    """(writer, number) of a record, which must be whole."""
    try:
        crc, writer, n, _ = line.split(b" ", 3)
        whole = int(crc, 16) == zlib.crc32(line[9:])
    except ValueError:
        whole = False
    if not whole:
        raise Failed(f"{where}: a torn record: {line[:80]!r}")
    return writer.decode(), int(n)


def lines_of(path, where):
    """The records of a file, the last of which must be whole too."""
    *lines, rest = path.read_bytes().split(b"\n") if path.exists() else [b""]
    if rest:
        raise Failed(f"{where}: {path.name} ends in the middle of a record: {rest[-80:]!r}")
    return lines


def shared_records(place, where):
    """Writer -> its last record, through all turns of the shared log."""
    found = {}
    for path in [*sorted(place.glob("log.*")), place / "log"]:
        for line in lines_of(path, where):
            writer, n = parse(line, where)
            if n != found.get(writer, 0) + 1:
                raise Failed(f"{where}: {path.name}: {writer}: {n} follows {found.get(writer, 0)}")
            found[writer] = n
    return found


def own_records(place, where):
    """Writer -> its last record, in the logs that are rewritten."""
    found = {}
    for path in place.glob("own.*"):
        if path.suffix == ".new":
            continue
        writer = path.name.removeprefix("own.")
        last = 0
        for line in lines_of(path, where):
            if b" stands for " in line and last == 0:
                last = int(line.rsplit(b" ", 1)[1])
                continue
            name, n = parse(line, where)
            if name != writer or n != last + 1:
                raise Failed(f"{where}: {path.name}: {name} {n} follows {last}")
            last = n
        found[writer] = last
    return found


class Logs:
    """The processes of all rounds, and what they were told."""

    def __init__(self, directory):
        self.notes, self.round = empty_dir(directory / "notes"), 0

    def start(self, point, rotate=True):
        """Everything of a round; returns when each process has done something."""
        self.round += 1
        place = point / "logs"
        place.mkdir(exist_ok=True)
        turns = [int(p.suffix[1:]) for p in place.glob("log.*")]
        scripts = [(ROTATOR, [place, max(turns, default=0)])] if rotate else []
        names = []
        for k in range(SHARED):
            names.append(f"shared-{self.round}-{k}")
            scripts.append((SHARED_WRITER, [place / "log", names[-1], self.notes / names[-1]]))
        for k in range(OWN):
            names.append(f"own-{self.round}-{k}")
            scripts.append((OWN_WRITER, [place / f"own.{names[-1]}", names[-1], self.notes / names[-1]]))
        for k in range(FOLLOWERS):
            names.append(f"follower-{self.round}-{k}")
            scripts.append((FOLLOWER, [place / "log", self.notes / names[-1]]))
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", script, *map(str, words)], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE
            )
            for script, words in scripts
        ]
        wait_until(lambda: self.under_way(names), 60, "every process has done something")
        if rotate:
            wait_until(lambda: self.under_way(names) and self.turned(place, turns), 60, "the log was rotated")

    @staticmethod
    def turned(place, turns):
        return len(list(place.glob("log.*"))) >= len(turns) + 2

    def under_way(self, names):
        self.check_alive()
        return all(last_noted(self.notes / name) for name in names)

    def check_alive(self):
        for process in self.processes:
            if process.poll() is not None:
                raise Failed(f"a process ended: {process.stderr.read().decode()[-2000:]}")

    def end(self):
        """SIGKILL to all, wherever they are."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait(60)
            process.stderr.close()

    def look(self, point, where):
        """Every log whole and in order, with all that was acknowledged."""
        place = point / "logs"
        found = {**shared_records(place, where), **own_records(place, where)}
        for log in self.notes.iterdir():
            noted, have = last_noted(log), found.get(log.name, 0)
            if not log.name.startswith("follower") and not noted <= have <= noted + 1:
                raise Failed(f"{where}: {log.name} was told {noted}, there are {have}")
        turns = len(list(place.glob("log.*")))
        check(True, f"{where}: {sum(found.values())} records of {len(found)} writers, {turns} turns: none missing or torn")
        return found


def append_log(directory):
    """Writers are killed in each round, the daemon in every other as well."""
    seed = os.environ.get("E2E_SEED") or f"{random.SystemRandom().getrandbits(32)}"
    say(f"E2E_SEED={seed}")
    draw = random.Random(seed)
    volume, logs = Volume(directory), Logs(directory)
    volume.init()
    home = volume.mount("home", directory / "state", options=["protection=local"])
    for number in range(ROUNDS):
        logs.start(home.point)
        # A moment that no one chose.
        time.sleep(draw.uniform(0.0, 1.0))
        logs.check_alive()
        daemon = number % 2 == 1
        if daemon:
            home.kill()
        logs.end()
        if daemon:
            home = volume.mount("home", home.state, options=["protection=local"])
        logs.look(home.point, f"round {number}, {'daemon and ' if daemon else ''}writers killed")
    found = logs.look(home.point, "home")
    home.umount()
    home = volume.mount("home", home.state, options=["protection=local"])
    check(logs.look(home.point, "after another mount") == found, "the same as before")
    home.umount()
    embassy = volume.embassy("embassy")
    check(logs.look(embassy.point, "embassy") == found, "the same as at home")
    embassy.umount()
