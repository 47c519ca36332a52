"""Applications that go on while the daemon below them is changed: each a process of its own that checks what it does.

Invariant: a worker stops only when it is told to or at the first thing that is not as it must be; it reports that, how
much it has done, and how long its calls took.
"""

import fcntl
import mmap
import multiprocessing
import os
import sqlite3
import time
import traceback

CONTEXT = multiprocessing.get_context("fork")
# Calls that take longer are remembered with their time.
SLOW = 0.02
LINE = 64


class Timer:
    """Measures calls."""

    def __init__(self):
        self.slow, self.calls = [], 0

    def __call__(self, call, *args, **how):
        begin = time.monotonic()
        try:
            return call(*args, **how)
        finally:
            self.calls += 1
            took = time.monotonic() - begin
            if took > SLOW:
                self.slow.append((begin, took))


class Worker:
    """One application, in a process of its own."""

    def __init__(self, what, *args):
        self.name = what.__name__
        self.stopping = CONTEXT.Event()
        self.inbox, outbox = CONTEXT.Pipe(duplex=False)
        self.process = CONTEXT.Process(target=self.main, args=(what, outbox, *args), daemon=True)
        self.process.start()
        outbox.close()

    def main(self, what, outbox, *args):
        timed, error = Timer(), None
        try:
            what(self.stopping.is_set, timed, *args)
        except BaseException:
            error = traceback.format_exc(limit=3)
        outbox.send((error, timed.calls, timed.slow))

    def failed(self):
        """True if it has ended though nobody told it to."""
        return self.inbox.poll() or not self.process.is_alive()

    def stop(self, limit=60):
        """Its error if there was one, its number of calls, its slow calls."""
        self.stopping.set()
        if not self.inbox.poll(limit):
            return f"{self.name} does not stop: one of its calls hangs", 0, []
        answer = self.inbox.recv()
        self.process.join(limit)
        return answer


def fsyncing(stop, timed, path):
    """Appends numbered lines, each with an fsync, through one descriptor; all must be there in the end."""
    fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND)
    n = os.fstat(fd).st_size // LINE
    while not stop():
        assert timed(os.write, fd, b"%063d\n" % n) == LINE
        timed(os.fsync, fd)
        n += 1
        assert os.fstat(fd).st_size == n * LINE
    lines = os.pread(fd, n * LINE, 0).split()
    assert [int(line) for line in lines] == list(range(n)), "lines are missing or twice there"


def naming(stop, timed, directory):
    """Makes, renames and removes names; a call that took effect twice or never is an error of the next."""
    os.mkdir(directory)
    n, there = 0, set()
    while not stop():
        a, b = f"{directory}/{n}", f"{directory}/{n}.done"
        fd = timed(os.open, a, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        assert timed(os.write, fd, b"x" * 700) == 700
        os.close(fd)
        timed(os.rename, a, b)
        timed(os.link, b, a)
        timed(os.unlink, a)
        timed(os.mkdir, a)
        timed(os.symlink, "nowhere", f"{a}/link")
        timed(os.unlink, f"{a}/link")
        timed(os.rmdir, a)
        timed(os.setxattr, b, "user.n", b"%d" % n)
        there.add(f"{n}.done")
        if n % 3 == 0:
            timed(os.unlink, b)
            there.discard(f"{n}.done")
        elif n % 50 == 1:
            found = set(timed(os.listdir, directory))
            assert found == there, f"{len(found ^ there)} names differ"
        n += 1
    for name in there:
        status = os.stat(f"{directory}/{name}")
        assert (status.st_size, status.st_nlink) == (700, 1), name


def mapping(stop, timed, path):
    """Changes a file through a shared mapping, and compares with what it can be read to hold."""
    size, n = 1 << 20, 0
    fd = os.open(path, os.O_CREAT | os.O_RDWR)
    os.ftruncate(fd, size)
    want = bytearray(size)
    with mmap.mmap(fd, size) as view:
        while not stop():
            at = (n * 40961) % (size - 8)
            view[at : at + 8] = want[at : at + 8] = n.to_bytes(8, "little")
            if n % 8 == 0:
                timed(view.flush)
            n += 1
        view.flush()
    direct = os.open(path, os.O_RDONLY | os.O_DIRECT)
    with mmap.mmap(-1, size) as page_aligned:
        assert os.preadv(direct, [page_aligned], 0) == size
        assert page_aligned[:] == bytes(want), "what was written through the mapping is not what is read"


def streaming(stop, timed, path):
    """Writes and reads a large file in order, past the kernel's cache, by the descriptor's own position."""
    chunk, count = 256 << 10, 32
    fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_DIRECT)
    page_aligned = mmap.mmap(-1, chunk)
    turn = 0
    while not stop():
        os.lseek(fd, 0, os.SEEK_SET)
        for n in range(count):
            page_aligned[:] = bytes([(turn + n) % 256]) * chunk
            assert timed(os.writev, fd, [page_aligned]) == chunk
        os.lseek(fd, 0, os.SEEK_SET)
        for n in range(count):
            assert timed(os.readv, fd, [page_aligned]) == chunk
            assert page_aligned[:] == bytes([(turn + n) % 256]) * chunk, f"chunk {n} of turn {turn}"
        turn += 1


def transactions(stop, timed, path):
    """A SQLite database: two tables change together in each transaction; none is lost, none is there twice."""
    database = sqlite3.connect(path, isolation_level=None, timeout=30)
    database.execute("CREATE TABLE IF NOT EXISTS entry(n INTEGER PRIMARY KEY, text)")
    database.execute("CREATE TABLE IF NOT EXISTS total(n INTEGER)")
    if not database.execute("SELECT count(*) FROM total").fetchone()[0]:
        database.execute("INSERT INTO total VALUES(0)")
    n = database.execute("SELECT n FROM total").fetchone()[0]
    while not stop():
        for statement in ("BEGIN IMMEDIATE", f"INSERT INTO entry VALUES({n}, 'entry {n}')", "UPDATE total SET n=n+1", "COMMIT"):
            timed(database.execute, statement)
        n += 1
    check_database(path, n)


def check_database(path, at_least):
    """The number of transactions in it."""
    database = sqlite3.connect(path)
    assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    total = database.execute("SELECT n FROM total").fetchone()[0]
    count, last = database.execute("SELECT count(*), max(n) FROM entry").fetchone()
    assert total == count == (last or -1) + 1 >= at_least, f"{total}, {count}, {last}, {at_least}"
    return total


def locking(stop, timed, path, held):
    """Tries to get a lock that the case holds (`held`: flock or lockf); it must not."""
    lock = fcntl.flock if held == "flock" else fcntl.lockf
    fd = os.open(path, os.O_RDWR)
    while not stop():
        try:
            timed(lock, fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.002)
            continue
        raise AssertionError("got a lock that somebody holds")


def persisting(stop, timed, path, directory, outbox):
    """Appends numbered lines with fsync, opening the file anew for each, and goes on over errors; tells which lines
    were acknowledged, which errors there were, and for how long at most nothing worked. Remembers what it found at
    `directory`, to see whether it ever was another directory than the mount's root."""
    acknowledged, errors, longest, last, strangers = -1, {}, 0.0, time.monotonic(), 0
    n = 0
    while not stop():
        try:
            fd = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            try:
                strangers += os.fstat(fd).st_dev == os.stat(os.path.dirname(directory)).st_dev
                os.write(fd, b"%063d\n" % n)
                os.fsync(fd)
            finally:
                os.close(fd)
            now = time.monotonic()
            longest, last = max(longest, now - last), now
            acknowledged = n
        except OSError as e:
            errors[e.errno] = errors.get(e.errno, 0) + 1
            time.sleep(0.001)
        n += 1
    outbox.send((acknowledged, errors, longest, strangers))
