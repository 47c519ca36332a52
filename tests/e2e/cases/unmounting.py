"""Unmounting one volume among others: what holds it elsewhere is named, and no other file system is taken for it.

The kernel gives the number of a FUSE file system and of its connection away as soon as it is unmounted, to the next
that is mounted: `Heir` is such a one.

Invariant: nobody touches a mount of an `Heir`, for nobody serves it.
"""

import contextlib
import ctypes
import errno
import os
import signal
import subprocess
import threading

import trees
from calls import LIBC, result
from harness import Failed, Volume, alive, check, check_same, mounted, mounts, program, run, wait_until

ROUNDS = 10
MNT_DETACH = 2


class Heir:
    """Mounts FUSE file systems, one after the other, until one has the number that another one had."""

    def __init__(self, directory, number):
        self.directory, self.number, self.mounts, self.wanted = directory, number, [], True
        self.found = threading.Event()
        self.thread = threading.Thread(target=self.wait, daemon=True)
        self.thread.start()

    def wait(self):
        while self.wanted:
            number = self.mount()
            if number == self.number:
                self.found.set()
                return
            # The lowest free number is given first: lower ones are kept, until the wanted one is the next.
            if number > self.number:
                self.drop()

    def mount(self):
        point = self.directory / str(len(self.mounts))
        point.mkdir(exist_ok=True)
        fd = os.open("/dev/fuse", os.O_RDWR | os.O_NONBLOCK)
        words = f"fd={fd},rootmode=40000,user_id=0,group_id=0".encode()
        result(LIBC.mount(b"heir", os.fsencode(point), b"fuse.heir", ctypes.c_ulong(0), words))
        self.mounts.append((point, fd))
        return self.device(point)

    @staticmethod
    def device(point):
        return next((minor for at, _, minor, _ in mounts() if at == os.fspath(point)), None)

    def drop(self):
        point, fd = self.mounts.pop()
        LIBC.umount2(os.fsencode(point), MNT_DETACH)
        os.close(fd)

    def lives(self):
        """Whether the connection of the one with the number is whole: its greeting waits to be read."""
        try:
            return bool(os.read(self.mounts[-1][1], 1 << 20))
        except OSError as e:
            if e.errno in (errno.ENODEV, errno.ECONNABORTED):
                return False
            raise

    def close(self):
        self.wanted = False
        self.thread.join(20)
        while self.mounts:
            self.drop()


def heir_of(volume, mount):
    """Starts the wait for a mount's number."""
    (number,) = [minor for at, _, minor, _ in mounts() if at == os.fspath(mount.point)]
    directory = volume.directory / "heirs"
    directory.mkdir(exist_ok=True)
    return contextlib.closing(Heir(directory, number))


def number_given_away(volume, state, *words):
    for _ in range(ROUNDS):
        home = volume.mount("home", state)
        trees.write_file(home.point / "kept", os.urandom(1000))
        with heir_of(volume, home) as heir:
            run(program(), "umount", *words, home.point)
            wait_until(heir.found.is_set, 20, "the number is given to another file system")
            if not heir.lives():
                raise Failed("umount has broken another file system's connection")
        wait_until(lambda pid=home.pid: not alive(pid), 20, "the daemon ends")
    said = " ".join(["umount", *words])
    check(True, f"{ROUNDS} x {said}: another file system that gets the number is no copy, and stays whole")


def second_signal(volume, state):
    """A daemon that is told a second time to stop gives up on who uses its mount, and on nobody else."""
    home = volume.mount("home", state, options=["protection=local"])
    away = volume.store_dir.rename(volume.directory / "store-away")
    trees.write_file(home.point / "unsent", b"unsent")
    with heir_of(volume, home) as heir:
        os.kill(home.pid, signal.SIGTERM)
        # While it waits for a store that is away, somebody else unmounts.
        run("umount", home.point)
        wait_until(heir.found.is_set, 20, "the number is given to another file system")
        check(alive(home.pid), "a daemon whose store is away is still closing when its number is another's")
        os.kill(home.pid, signal.SIGTERM)
        wait_until(lambda: not alive(home.pid), 60, "the daemon ends")
        check(heir.lives(), "asked again to stop, it does not break the other's connection")
    away.rename(volume.store_dir)


def second_signal_in_use(volume, state):
    home = volume.mount("home", state)
    held = os.open(home.point / "unsent", os.O_RDONLY)
    try:
        os.kill(home.pid, signal.SIGTERM)
        wait_until(lambda: mounted(home.point) is None, 30, "SIGTERM takes it out of the tree")
        check(os.read(held, 6) == b"unsent" and alive(home.pid), "and who has a file open goes on")
        os.kill(home.pid, signal.SIGTERM)
        wait_until(lambda: not alive(home.pid), 60, "the daemon ends at a second one")
        check(True, "a second one ends it, though the file is still open")
    finally:
        with contextlib.suppress(OSError):
            os.close(held)


@contextlib.contextmanager
def elsewhere(volume):
    """A process in a mount namespace of its own, where what is mounted here stays."""
    process = subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", "echo; exec cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=volume.directory,
    )
    try:
        process.stdout.readline()
        yield process.pid
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait(20)


def held(volume, state):
    """Copies are named, and the daemon ends when they are gone."""
    home = volume.mount("home", state)
    with elsewhere(volume) as pid:
        done = run(program(), "umount", home.point, ok=None)
        where = f"in another mount namespace, that of cat ({pid})"
        check(done.returncode == 6 and where in done.stderr, f"umount says where it is still mounted: {where}")
        check(f"nsenter -t {pid} -m umount {home.point}" in done.stderr, "and how to end that")
        check(mounted(home.point) is None and alive(home.pid), "here it is unmounted; the daemon goes on")
        run("nsenter", "-t", pid, "-m", "umount", home.point)
        wait_until(lambda: not alive(home.pid), 30, "that ends the daemon")
    home = volume.mount("home", state)
    with elsewhere(volume):
        run(program(), "umount", "--force", home.point, ok=None)
        wait_until(lambda: not alive(home.pid), 30, "the daemon ends")
        check(mounted(home.point) is None, "umount --force breaks it off, wherever it is mounted")
    home = volume.mount("home", state)
    bound = volume.directory / "bound"
    bound.mkdir()
    run("mount", "--bind", home.point, bound)
    done = run(program(), "umount", home.point, ok=None)
    check(done.returncode == 6 and f"still mounted at {bound}" in done.stderr, "a second mount here is named as well")
    check((bound / "unsent").read_bytes() == b"unsent", "and serves on")
    run("umount", bound)
    wait_until(lambda: not alive(home.pid), 30, "the daemon ends with the last")


def main(directory):
    volume = Volume(directory)
    volume.init("--name", "land")
    state = directory / "state"
    for words in ([], ["--force"]):
        number_given_away(volume, state, *words)
    second_signal(volume, state)
    second_signal_in_use(volume, state)
    held(volume, state)
    home = volume.mount("home", state)
    want = trees.manifest(home.point)
    home.umount()
    embassy = volume.embassy()
    check_same(want, trees.manifest(embassy.point), "after all of it home and embassy are equal", ignore=())
    embassy.umount()
