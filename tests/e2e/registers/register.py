"""What the seven registers have in common: a clerk that works without pause, and a check that knows what must be there.

Invariant: what was acknowledged is noted in this process, outside every mount; a check reads only what it is given, and
never writes into a tree that it was told is read-only.
"""

import errno
import hashlib
import os
import threading

from harness import Failed

# How a clerk's call ends when home goes down under it.
GONE = (errno.ENOTCONN, errno.ECONNABORTED, errno.EIO, errno.ENODEV, errno.ENOENT, errno.EROFS, errno.EPIPE)


class Gone(Exception):
    """What a clerk works with, or on, has gone."""


def body(name, number, size):
    """The one right contents of a document: anybody can compute it again."""
    block = hashlib.sha256(f"{name} {number}".encode()).digest()
    return (block * (size // len(block) + 1))[:size]


def digest(data):
    return hashlib.sha256(data).hexdigest()


def put(path, data, mode=None, owner=None):
    """A file that is there whole or not at all, and stays."""
    new = f"{path}.new"
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        at = 0
        while at < len(data):
            at += os.write(fd, data[at:])
        if owner is not None:
            os.fchown(fd, *owner)
        if mode is not None:
            os.fchmod(fd, mode)
        os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(new, path)


def read(path):
    """What a file holds; None where there is no file."""
    try:
        with open(path, "rb") as source:
            return source.read()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None


def sync_dir(path):
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class Register:
    """One register. Its clerks work on `point` until it is gone; `acknowledged` counts what they were promised."""

    name = ""
    protection = "available"
    # A database has to be started before it can be asked.
    served = False

    def __init__(self, directory, size):
        self.directory, self.size = directory / self.name, size
        self.directory.mkdir(parents=True, exist_ok=True)
        self.acknowledged, self.trouble, self.thread = 0, None, None
        self.stopping = threading.Event()

    def prepare(self, point):
        """The register before the first case is entered."""

    def resume(self, point, cases):
        """Makes the register ready to go on behind so many cases, elsewhere and after a crash."""
        self.acknowledged = cases

    def start(self, point):
        self.stopping.clear()
        self.thread = threading.Thread(target=self.run, args=(point,), daemon=True)
        self.thread.start()

    def run(self, point):
        try:
            while not self.stopping.is_set():
                self.work(point)
        except Gone:
            pass
        except OSError as error:
            if error.errno not in GONE:
                self.trouble = error
        except Exception as error:
            self.trouble = error

    def work(self, point):
        """Enters one case, durably, and counts it."""
        raise NotImplementedError

    def kill(self):
        """What runs at home for this register dies with home."""

    def end(self):
        """Waits for the clerks, after home has gone."""
        self.stopping.set()
        self.thread.join(60)
        if self.thread.is_alive():
            raise Failed(f"{self.name}: its clerk does not end")
        if self.trouble:
            raise Failed(f"{self.name}: its clerk met {self.trouble!r}")

    def check(self, point):
        """Checks all that `point` shows; gives (cases found, what was looked at). Raises Failed for a wrong one."""
        raise NotImplementedError

    @staticmethod
    def lost(promised, found):
        """How many of the cases that the clerks were promised are not there."""
        return max(0, promised - found)

    def holds(self, lost):
        """Whether so many may be lost: what is promised at `local` is promised of home's own disk."""
        return self.protection == "local" or not lost

    def close(self):
        """Nothing of the register runs any more."""


def must(holds, register, claim):
    if not holds:
        raise Failed(f"{register.name}: {claim}")
