"""Unmounting one volume among others: what holds it elsewhere is named, and no other file system is taken for it.

The kernel gives the numbers of a mount, of its file system and of its connection to the next one as soon as they are
free. `Heir` is such a next one; the other volume comes to the place of one that is not closed yet.

Invariant: nobody touches a mount of an `Heir`, for nobody serves it.
"""

import contextlib
import ctypes
import errno
import functools
import os
import signal
import subprocess
import threading
from pathlib import Path

import trees
from calls import LIBC, result
from harness import (
    FS_TYPE,
    FUSECTL,
    Failed,
    Volume,
    alive,
    check,
    check_abroad,
    mount_fusectl,
    mounted,
    mounts,
    program,
    run,
    side_by_side,
    wait_until,
)

ROUNDS = 10
MNT_DETACH = 2
IN_USE, UNSENT = 6, 5


class Heir:
    """Mounts file systems that look like the volume, until one has the number that the volume's had."""

    def __init__(self, directory, number):
        self.directory, self.number, self.mounts, self.wanted, self.trouble = directory, number, [], True, None
        self.found = threading.Event()
        self.thread = threading.Thread(target=self.wait, daemon=True)
        self.thread.start()

    def wait(self):
        try:
            while self.wanted:
                number = self.mount()
                if number == self.number:
                    self.found.set()
                    return
                # The lowest free number is given first: lower ones are kept, until the wanted one is the next.
                if number > self.number:
                    self.drop()
        except Exception as e:  # told where the case waits for it
            self.trouble = e

    def mount(self):
        point = self.directory / str(len(self.mounts))
        point.mkdir(exist_ok=True)
        fd = os.open("/dev/fuse", os.O_RDWR | os.O_NONBLOCK)
        words = f"fd={fd},rootmode=40000,user_id=0,group_id=0".encode()
        self.mounts.append((point, fd))
        result(LIBC.mount(b"embassyfs:land", os.fsencode(point), FS_TYPE.encode(), ctypes.c_ulong(0), words))
        return number_of(point)

    def drop(self):
        point, fd = self.mounts.pop()
        LIBC.umount2(os.fsencode(point), MNT_DETACH)
        os.close(fd)

    def has_come(self):
        if self.trouble:
            raise Failed(f"no heir: {self.trouble!r}")
        return self.found.is_set()

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


def number_of(point):
    return next((minor for at, _, minor, _ in mounts() if at == os.fspath(point)), None)


def heir_of(volume, mount):
    """Starts the wait for a mount's number."""
    directory = volume.directory / "heirs"
    directory.mkdir(exist_ok=True)
    return contextlib.closing(Heir(directory, number_of(mount.point)))


@contextlib.contextmanager
def unsent(volume, home):
    """What home has just written cannot be shipped meanwhile: the store is away."""
    away = volume.store_dir.rename(volume.directory / "store-away")
    try:
        trees.write_file(home.point / "unsent", b"unsent")
        yield
    finally:
        away.rename(volume.store_dir)


def number_given_away(volume, state, *words):
    came = 0
    for _ in range(ROUNDS):
        home = volume.mount("home", state)
        trees.write_file(home.point / "kept", os.urandom(1000))
        with heir_of(volume, home) as heir:
            run(program(), "umount", *words, home.point)
            # Anything else on the machine may have got the number, and kept it.
            with contextlib.suppress(Failed):
                wait_until(heir.has_come, 5, "the number is given to another file system")
                came += 1
            if heir.trouble or (heir.found.is_set() and not heir.lives()):
                raise Failed(f"umount has broken another file system's connection: {heir.trouble}")
        wait_until(lambda pid=home.pid: not alive(pid), 20, "the daemon ends")
    said = " ".join(["umount", *words])
    check(came > ROUNDS // 2, f"{came} x {said}: another that gets the number is no copy, and stays whole")


@contextlib.contextmanager
def second_signal(volume, state):
    """A daemon that is told a second time to stop gives up on who uses its mount, and on nobody else."""
    home = volume.mount("home", state, options=["protection=local"])
    with unsent(volume, home), heir_of(volume, home) as heir:
        os.kill(home.pid, signal.SIGTERM)
        # While it waits for a store that is away, somebody else unmounts.
        run("umount", home.point)
        wait_until(heir.has_come, 20, "the number is given to another file system")
        check(alive(home.pid), "a daemon whose store is away is still closing when its number is another's")
        os.kill(home.pid, signal.SIGTERM)
        yield
        wait_until(lambda: not alive(home.pid), 60, "the daemon ends")
        check(heir.lives(), "asked again to stop, it does not break the other's connection")


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


class Place:
    """A mount whose place another volume takes."""

    def __init__(self, home, other):
        self.home, self.other = home, other

    @contextlib.contextmanager
    def taken(self):
        """Somebody unmounts, and another volume is mounted there: it must stay, and be whole."""
        run("umount", self.home.point)
        words = ["--store", self.other.url, "--key", self.other.key("writer")]
        run(program(), "mount", *words, "--state", self.other.directory / "state", self.home.point)
        file = self.home.point / "other"
        trees.write_file(file, b"other")
        yield
        whole = file.exists() and file.read_bytes() == b"other"
        check(whole, "the other volume in its place stays mounted and serves")
        run(program(), "umount", self.home.point)


@contextlib.contextmanager
def place(directory, *options):
    """The place of a volume that cannot ship meanwhile; afterwards it can be mounted and ships."""
    directory.mkdir()
    volume, other = Volume(directory / "land"), Volume(directory / "taxes")
    for each in (volume, other):
        each.directory.mkdir(exist_ok=True)
        each.init("--name", each.directory.name)
        (each.directory / "state").mkdir()
    home = volume.mount("home", volume.directory / "state", options=["protection=local", *options])
    with unsent(volume, home):
        yield Place(home, other)
    volume.mount("home", volume.directory / "state").umount()


def place_taken_after_signal(directory):
    with place(directory) as here:
        os.kill(here.home.pid, signal.SIGTERM)
        with here.taken():
            wait_until(lambda: not alive(here.home.pid), 60, "the daemon that was told to stop ends")


def place_taken_under_command(directory):
    with place(directory) as here:
        command = [program(), "umount", "--timeout", "4s", here.home.point]
        unmounting = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        wait_until(lambda: here.home.status()["waiting"], 20, "it has been told to end")
        with here.taken():
            said = unmounting.communicate(timeout=120)[1]
            check(unmounting.returncode == UNSENT and "unsent" in said, "umount tells that something is unsent", said)
            wait_until(lambda: not alive(here.home.pid), 60, "the daemon ends")


def place_taken_from_supervised(directory):
    with place(directory, "supervise") as here:
        supervisor = int(Path(f"/proc/{here.home.pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
        with here.taken():
            os.kill(here.home.pid, signal.SIGKILL)
            wait_until(lambda: not alive(supervisor), 30, "the supervisor ends")


def places_taken(directory):
    """While a daemon still ships, or is dead, its place is taken."""
    scenes = (place_taken_after_signal, place_taken_under_command, place_taken_from_supervised)
    side_by_side({scene.__name__: functools.partial(scene, directory / scene.__name__) for scene in scenes})


@contextlib.contextmanager
def elsewhere(volume, script="", propagation="private"):
    """A process in a mount namespace of its own, in which `script` was run."""
    process = subprocess.Popen(
        ["unshare", "--mount", "--propagation", propagation, "sh", "-c", f"{script}\nexec cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=volume.directory,
    )
    try:
        comm = Path(f"/proc/{process.pid}/comm")
        wait_until(lambda: comm.read_text() == "cat\n", 20, "a process in another mount namespace")
        yield process.pid
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait(20)


def held_by_another_namespace(volume, state):
    """Copies are named, and the daemon ends when they are gone."""
    home = volume.mount("home", state)
    with elsewhere(volume) as pid:
        done = run(program(), "umount", home.point, ok=None)
        where = f"in another mount namespace, that of cat ({pid})"
        check(done.returncode == IN_USE and where in done.stderr, f"umount says where it is still mounted: {where}")
        check(f"nsenter -t {pid} -m umount {home.point}" in done.stderr, "and how to end that")
        check(mounted(home.point) is None and alive(home.pid), "here it is unmounted; the daemon goes on")
        run("nsenter", "-t", pid, "-m", "umount", home.point)
        wait_until(lambda: not alive(home.pid), 30, "that ends the daemon")
    home = volume.mount("home", state)
    with elsewhere(volume):
        run(program(), "umount", "--force", home.point)
        wait_until(lambda: not alive(home.pid), 30, "the daemon ends")
        check(mounted(home.point) is None, "umount --force breaks it off, wherever it is mounted")
    home = volume.mount("home", state)
    # In a namespace without fusectl, into which the mount was copied, and from which it is unmounted.
    script = f'umount {FUSECTL} || exit 1; exec "{program()}" umount --force "{home.point}"'
    done = run("unshare", "--mount", "--propagation", "private", "sh", "-c", script, ok=None)
    check(done.returncode == IN_USE and "cannot be broken" in done.stderr, "without fusectl --force says what it cannot")
    check((home.point / "unsent").exists(), "and where it is mounted it serves on")
    home.umount()


def held_by_propagation(volume, state):
    """A mount that is shared goes from all namespaces at once; what was made of it there stays."""
    shared, data = volume.directory / "shared", volume.directory / "data"
    for place in (shared, data):
        place.mkdir()
    run("mount", "--bind", shared, shared)
    run("mount", "--make-shared", shared)
    try:
        home = volume.mount("shared/home", state)
        with elsewhere(volume, propagation="slave"):
            home.umount()
            check(True, "a mount that goes from another namespace with ours is no copy")
        home = volume.mount("shared/home", state)
        with elsewhere(volume, f'mount --bind "{home.point}" "{data}"', propagation="slave") as pid:
            done = run(program(), "umount", home.point, ok=None)
            way = f"nsenter -t {pid} -m umount {data}"
            check(done.returncode == IN_USE and way in done.stderr, "what another namespace made of it is", done.stderr)
        wait_until(lambda: not alive(home.pid), 30, "the daemon ends with that namespace")
    finally:
        run("umount", shared)


def held_here(volume, state):
    home = volume.mount("home", state)
    bound = volume.directory / "bound"
    bound.mkdir()
    run("mount", "--bind", home.point, bound)
    done = run(program(), "umount", home.point, ok=None)
    check(done.returncode == IN_USE and f"still mounted at {bound}" in done.stderr, "a second mount here is named")
    check((bound / "unsent").exists(), "and serves on")
    run("umount", bound)
    wait_until(lambda: not alive(home.pid), 30, "the daemon ends with the last")


def main(directory):
    mount_fusectl()
    check(mounted(FUSECTL), "the kernel's control files are there")
    volume, state = Volume(directory), directory / "state"
    volume.init("--name", "land")
    for words in ([], ["--force"]):
        number_given_away(volume, state, *words)
    with second_signal(volume, state):
        places_taken(directory)
    second_signal_in_use(volume, state)
    held_by_another_namespace(volume, state)
    held_by_propagation(volume, state)
    held_here(volume, state)
    check_abroad(volume, state)
