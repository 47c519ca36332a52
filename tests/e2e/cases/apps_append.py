"""Logs that are appended to, as Redis and mail servers keep them: nothing torn, nothing acknowledged lost, in order.

Two kinds of writer. *shared*: several processes append to one file with `O_APPEND` and `fdatasync` each record; a
rotator renames the file away (a *turn*), under a lock that the writers share while they append. *own*: a process
appends to a file of its own with `fsync`; now and then it writes a shorter one beside it, renames that over the first
and goes on there. Followers read along.

The kernel makes one request of a write only where it does not cross from a page of the file into another (else a
write that was killed, or not yet acknowledged when the daemon died, may be cut there; ext4 cuts there, too). So the
records of the shared log are 512 bytes long, each is one request, and none may ever be torn. The records of the own
logs are of any length; there the last one may be cut at a page's border, if it was not acknowledged.

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
TURN_BYTES = 200_000
PAGE = os.sysconf("SC_PAGESIZE")
ROUNDS = 20 if FULL else 4

COMMON = r"""
import fcntl, os, sys, time, zlib
APPEND = os.O_CREAT | os.O_APPEND | os.O_WRONLY
def record(writer, n):
    body = b"%s %d " % (writer.encode(), n)
    body += b"a" * (502 - len(body)) if writer.startswith("shared") else b"abcdefgh" * (n * 131 % 1500)
    return b"%08x %s\n" % (zlib.crc32(body), body)
def append(fd, data):
    if os.write(fd, data) != len(data):
        sys.exit("a short write")
def acknowledge(log, n):
    append(log, b"%d\n" % n)
def last_turn(directory):
    return max((int(name[4:]) for name in os.listdir(directory) if name.startswith("log.")), default=0)
"""

SHARED_WRITER = COMMON + r"""
path, writer, log = sys.argv[1:]
outside, n, fd = os.open(log, APPEND), 0, os.open(path, APPEND)
while True:
    fcntl.flock(fd, fcntl.LOCK_SH)
    # Whoever holds the lock of a renamed file must not write there any more: its followers may have left.
    if not os.path.exists(path) or os.stat(path).st_ino != os.fstat(fd).st_ino:
        os.close(fd)
        fd = os.open(path, APPEND)
        continue
    append(fd, record(writer, n + 1))
    fcntl.flock(fd, fcntl.LOCK_UN)
    n += 1
    os.fdatasync(fd)
    acknowledge(outside, n)
"""

ROTATOR = COMMON + r"""
directory, size = sys.argv[1], int(sys.argv[2])
turn, path = last_turn(directory), f"{directory}/log"
while True:
    while not os.path.exists(path) or os.path.getsize(path) < size:
        time.sleep(0.005)
    turn += 1
    fd = os.open(path, APPEND)
    fcntl.flock(fd, fcntl.LOCK_EX)
    os.rename(path, f"{path}.{turn:06}")
    os.close(os.open(path, APPEND))
    os.close(fd)
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

# Reads each turn of the shared log to its end, then the next; what it reads must be whole at once.
FOLLOWER = COMMON + r"""
directory, log = sys.argv[1:]
outside, seen, told = os.open(log, APPEND), {}, 0

def open_turn(number):
    # While no turn comes or goes, `log` is the one behind the last.
    while True:
        last = last_turn(directory)
        try:
            if number is not None and last >= number:
                return open(f"{directory}/log.{number:06}", "rb", buffering=0), number
            source = open(f"{directory}/log", "rb", buffering=0)
        except FileNotFoundError:
            continue
        if last_turn(directory) == last:
            return source, last + 1

source, turn = open_turn(None)
rest = b""
while True:
    ended = last_turn(directory) >= turn  # asked before the reading: nothing is added after the renaming
    piece = source.read(1 << 16)
    if not piece and ended:
        assert rest == b"", f"turn {turn} ends in the middle of a record: {rest[-80:]}"
        source.close()
        source, turn = open_turn(turn + 1)
    elif not piece:
        time.sleep(0.001)
    *lines, rest = (rest + piece).split(b"\n")
    for line in lines:
        crc, writer, n, _ = line.split(b" ", 3)
        assert int(crc, 16) == zlib.crc32(line[9:]), f"torn: {line[:80]}"
        # It may begin in the middle; from there on it must see each record once and in order.
        assert int(n) == seen.get(writer, int(n) - 1) + 1, f"{writer}: {n} after {seen[writer]}"
        seen[writer] = int(n)
    told += len(lines)
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


def lines_of(path, where, may_be_cut=False):
    """The whole records of a file; what follows them must be nothing, or cut where it may be."""
    data = path.read_bytes() if path.exists() else b""
    *lines, rest = data.split(b"\n")
    if rest and not (may_be_cut and len(data) % PAGE == 0):
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
        for line in lines_of(path, where, may_be_cut=True):
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

    def start(self, point):
        """Everything of a round; returns when each process has done something."""
        self.round += 1
        place = point / "logs"
        place.mkdir(exist_ok=True)
        turns = len(list(place.glob("log.*")))
        scripts, names = [(ROTATOR, [place, TURN_BYTES])], []
        for k in range(SHARED):
            names.append(f"shared-{self.round}-{k}")
            scripts.append((SHARED_WRITER, [place / "log", names[-1], self.notes / names[-1]]))
        for k in range(OWN):
            names.append(f"own-{self.round}-{k}")
            scripts.append((OWN_WRITER, [place / f"own.{names[-1]}", names[-1], self.notes / names[-1]]))
        for k in range(FOLLOWERS):
            names.append(f"follower-{self.round}-{k}")
            scripts.append((FOLLOWER, [place, self.notes / names[-1]]))
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", script, *map(str, words)], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE
            )
            for script, words in scripts
        ]
        wait_until(lambda: self.under_way(names), 60, "every process has done something")
        turned = lambda: len(list(place.glob("log.*"))) >= turns + 2  # noqa: E731
        wait_until(lambda: self.under_way(names) and turned(), 60, "the log was rotated twice")

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
        count = f"{sum(found.values())} records of {len(found)} writers in {turns} turns"
        check(True, f"{where}: {count}: none missing or torn")
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
