"""Attributes: extended ones, set-id bits and capabilities beside ext4, times, numbers, special files, statfs.

Invariant: what ext4 has an answer to is asked on a plain directory too, and the answers must be equal.
"""

import contextlib
import errno
import itertools
import mmap
import os
import socket
import stat
import threading

import trees
from calls import ALICE, BOB, UTIME_NOW, UTIME_OMIT, as_user, code_of, ends_with, fallocate, getxattr_into
from calls import listxattr_into, named, utimens
from harness import MIB, Volume, check, check_same, empty_dir, mounts, run, say, wait_until

OPTIONS = ["protection=local", "allow_other"]
VALUE_MAX = 64 << 10


def extended(place):
    """Extended attributes: sizes, flags, name spaces."""
    place.mkdir()
    path = place / "file"
    path.write_bytes(b"x")
    large = trees.random_bytes("value", VALUE_MAX)
    for space in ("user", "trusted", "security"):
        os.setxattr(path, f"{space}.large", large)
        check(os.getxattr(path, f"{space}.large") == large, f"{space}.: a value of 64 KiB")
    ends_with(errno.E2BIG, "one byte more", lambda: os.setxattr(path, "user.more", large + b"x"))
    ends_with(errno.ERANGE, "room for less than the value", lambda: getxattr_into(path, "user.large", VALUE_MAX - 1))
    check(getxattr_into(path, "user.large", 0) == VALUE_MAX, "no room asks for the length")
    ends_with(errno.ERANGE, "room for less than the list", lambda: listxattr_into(path, 5))
    check(listxattr_into(path, 0) == sum(len(n) + 1 for n in os.listxattr(path)), "no room asks for its length")
    ends_with(errno.ENODATA, "an attribute that is not there", lambda: os.getxattr(path, "user.none"))
    ends_with(errno.ENODATA, "to remove it", lambda: os.removexattr(path, "user.none"))
    replace = lambda: os.setxattr(path, "user.none", b"", os.XATTR_REPLACE)  # noqa: E731
    ends_with(errno.ENODATA, "to replace it", replace)
    create = lambda: os.setxattr(path, "user.large", b"", os.XATTR_CREATE)  # noqa: E731
    ends_with(errno.EEXIST, "to create what is there", create)
    check(os.getxattr(path, "user.large") == large, "and it is as it was")
    for name, code in (("user.none", errno.ENODATA), ("user.large", errno.EEXIST)):
        both = lambda n=name: os.setxattr(path, n, b"", os.XATTR_CREATE | os.XATTR_REPLACE)  # noqa: E731
        ends_with(code, f"to create and to replace {name}", both)
    os.setxattr(path, "user.large", b"short", os.XATTR_REPLACE)
    check(os.getxattr(path, "user.large") == b"short", "a shorter value replaces it")
    long = "user." + "n" * 250
    os.setxattr(path, long, b"long name")
    check(os.getxattr(path, long) == b"long name", "a name of 255 bytes")
    ends_with(errno.ERANGE, "one of 256", lambda: os.setxattr(path, long + "n", b""))
    ends_with(errno.EOPNOTSUPP, "no name space", lambda: os.setxattr(path, "plain", b""))
    for n in range(100):
        os.setxattr(path, f"user.{n:03}", b"%d" % n)
    for n in range(0, 100, 2):
        os.removexattr(path, f"user.{n:03}")
    want = {f"user.{n:03}" for n in range(1, 100, 2)} | {"user.large", "trusted.large", "security.large", long}
    check(set(os.listxattr(path)) == want, f"{len(want)} names in the list")
    os.chown(path, ALICE, ALICE)
    seen = as_user(ALICE, lambda: set(os.listxattr(path)))
    check(seen == {n for n in want if not n.startswith("trusted.")}, "a user's list has no trusted. ones")
    for code, claim, call in (
        (errno.ENODATA, "reading trusted.", lambda: os.getxattr(path, "trusted.large")),
        (errno.EPERM, "setting trusted.", lambda: os.setxattr(path, "trusted.x", b"")),
        (errno.EPERM, "setting security.", lambda: os.setxattr(path, "security.x", b"")),
    ):
        ends_with(code, f"{claim} as a user", lambda c=call: as_user(ALICE, c))
    ends_with(errno.EACCES, "user. of another's file", lambda: as_user(BOB, lambda: os.setxattr(path, "user.x", b"")))
    os.symlink("file", place / "link")
    link = lambda: os.setxattr(place / "link", "user.x", b"", follow_symlinks=False)  # noqa: E731
    ends_with(errno.EPERM, "user. of a symlink", link)
    os.setxattr(place / "link", "trusted.x", b"of the link", follow_symlinks=False)
    check(os.getxattr(place / "link", "trusted.x", follow_symlinks=False) == b"of the link", "trusted. of a symlink")

    def again(point):
        file, link = point / place.name / "file", point / place.name / "link"
        values = {f"user.{n:03}": b"%d" % n for n in range(1, 100, 2)} | {"user.large": b"short", long: b"long name"}
        values |= {"trusted.large": large, "security.large": large}
        same = {n: os.getxattr(file, n) for n in os.listxattr(file)} == values
        same = same and os.getxattr(link, "trusted.x", follow_symlinks=False) == b"of the link"
        check(same, "all extended attributes are there")

    return again


# --- beside ext4 ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def opened(path, flags):
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


def with_file(flags, call):
    """A change that is made through a descriptor."""

    def change(path):
        with opened(path, flags) as fd:
            call(fd)

    return change


def map_write(fd):
    with mmap.mmap(fd, 4096) as pages:
        pages[:5] = b"pages"
        pages.flush()


CHANGES = {
    "write": with_file(os.O_WRONLY, lambda fd: os.write(fd, b"x")),
    "write of nothing": with_file(os.O_WRONLY, lambda fd: os.write(fd, b"")),
    "append": with_file(os.O_WRONLY | os.O_APPEND, lambda fd: os.write(fd, b"x")),
    "pwrite beyond the end": with_file(os.O_WRONLY, lambda fd: os.pwrite(fd, b"x", 100_000)),
    "O_DIRECT write": with_file(os.O_RDWR | os.O_DIRECT, lambda fd: os.pwritev(fd, [mmap.mmap(-1, 4096)], 0)),
    "O_TRUNC": with_file(os.O_WRONLY | os.O_TRUNC, lambda fd: None),
    "truncate": lambda path: os.truncate(path, 10),
    "truncate to its size": lambda path: os.truncate(path, os.stat(path).st_size),
    "ftruncate": with_file(os.O_RDWR, lambda fd: os.ftruncate(fd, 100_000)),
    "fallocate": with_file(os.O_RDWR, lambda fd: fallocate(fd, 0, 0, 100_000)),
    "punch": with_file(os.O_RDWR, lambda fd: fallocate(fd, 3, 0, 4096)),
    "copy_file_range": with_file(os.O_RDWR, lambda fd: os.copy_file_range(fd, fd, 5, 0, 100_000)),
    "mapped write": with_file(os.O_RDWR, map_write),
    "chown to oneself": lambda path: os.chown(path, os.geteuid(), -1),
    "chown of nothing": lambda path: os.chown(path, -1, -1),
    "chown to another": lambda path: os.chown(path, BOB, -1),
    "chgrp to one's own": lambda path: os.chown(path, -1, os.getegid()),
    "chgrp to another": lambda path: os.chown(path, -1, BOB),
    "chmod": lambda path: os.chmod(path, 0o6711),
    "chmod less": lambda path: os.chmod(path, 0o0600),
    "utimes": lambda path: os.utime(path),
    "setxattr": lambda path: os.setxattr(path, "user.x", b"y"),
    "link": lambda path: os.link(path, f"{path}.link"),
    "rename": lambda path: (os.rename(path, f"{path}.new"), os.rename(f"{path}.new", path)),
    "read": lambda path: open(path, "rb").read(),
}
# Set-user-id, set-group-id, both, with and without the right of the group to run it (without it is a lock's mark).
MODES = (0o4755, 0o2755, 0o6777, 0o2767, 0o6666, 0o4644)
CAPABILITY = bytes.fromhex("0100000202000000000000000000000000000000")
# Who owns the file, and who changes it (None: root).
ACTORS = {
    "root, own": (0, None, ()),
    "root, another's": (ALICE, None, ()),
    "owner": (ALICE, ALICE, ()),
    "owner in the other group": (ALICE, ALICE, (BOB,)),
    "stranger": (ALICE, BOB, ()),
}


def table_of_changes(place):
    """(actor, mode, change, with a capability) -> what the call said, the mode after it, whether it is still there."""
    place.mkdir()
    os.chmod(place, 0o777)
    out = {}
    for actor, (owner, user, groups) in ACTORS.items():
        for mode, had in itertools.product(MODES, (True, False)):
            for name, change in CHANGES.items():
                path = str(place / f"{actor}-{mode:o}-{name}".replace("/", "-"))
                with open(path, "wb") as new:
                    new.write(b"c" * 5000)
                os.chown(path, owner, owner)
                os.chmod(path, mode)
                if had:
                    os.setxattr(path, "security.capability", CAPABILITY)
                call = lambda p=path, c=change: c(p) and None  # noqa: E731
                code = code_of(call if user is None else lambda: as_user(user, call, groups))
                capable = "security.capability" in os.listxattr(path)
                said = (named(code), f"{os.stat(path).st_mode & 0o7777:04o}", capable)
                out[actor, f"{mode:04o}", name, "capable" if had else "plain"] = said
                os.unlink(path)
    return out


def table_of_directories(place):
    """The same for directories, whose bits mean something else."""
    out = {}
    place.mkdir()
    os.chmod(place, 0o777)
    for actor, (owner, user, groups) in ACTORS.items():
        for mode in (0o2777, 0o6755, 0o3775):
            for name in ("chown to another", "chown of nothing", "chgrp to another", "chmod", "utimes"):
                path = str(place / f"{actor}-{mode:o}-{name}")
                os.mkdir(path)
                os.chown(path, owner, owner)
                os.chmod(path, mode)
                call = lambda p=path, n=name: CHANGES[n](p)  # noqa: E731
                code = code_of(call if user is None else lambda: as_user(user, call, groups))
                out[actor, f"{mode:04o}", name] = (named(code), f"{os.stat(path).st_mode & 0o7777:04o}")
    return out


def alike(key, want, got):
    """Whether two answers are equal, as far as the kernel lets any FUSE file system answer like ext4."""
    if key[0] == "stranger" and key[2] == "chown of nothing":
        # The kernel takes the capability away before it asks anybody, and then asks what it asks before a stranger's
        # write too, which is allowed. So it is not refused; it changes nothing.
        return want[1] == got[1]
    if key[0].startswith("root") and key[2:] == ("chown of nothing", "capable"):
        # From a file that has capabilities the kernel removes them first. What it asks then is what it asks before a
        # write by root, which leaves the set-id bits.
        return want[0] == got[0] and want[2:] == got[2:]
    mode, differs = int(got[1], 8), int(want[1], 8) ^ int(got[1], 8)
    if key[0] == "stranger" and differs == stat.S_ISGID and not mode & stat.S_IXGRP:
        # Only the kernel knows all groups of the writer. Without the right of the group to run the file the bit gives
        # nobody anything.
        return want[0] == got[0] and want[2:] == got[2:]
    return want == got


def beside_ext4(plain, home):
    """Set-id bits and capabilities under every change, by root, owner and strangers: as ext4 has it."""
    (kind,) = {k for at, k, _, _ in mounts() if at == "/"} or {"?"}
    say(f"the plain directory lies on {kind}")
    for claim, table in (("files", table_of_changes), ("directories", table_of_directories)):
        want, got = table(plain / claim), table(home / claim)
        wrong = [
            f"{' / '.join(key)}: {got[key]}, there {want[key]}" for key in want if not alike(key, want[key], got[key])
        ]
        moved = sum(1 for key in want if want[key][1] != key[1])
        told = "\n      ".join(["", *wrong[:60]])
        check(not wrong, f"{claim}: {len(want)} changes ({moved} of them change the mode) as on the plain disk", told)


def overwritten(home):
    """A program with a set-user-id bit that a stranger overwrites runs as the stranger: nothing looks at it between."""
    path = home / "program"
    for mode, change in ((0o4775, "1<>"), (0o6777, ">>")):
        path.write_bytes(b"")
        os.chown(path, 0, BOB)
        os.chmod(path, mode)
        os.stat(path)  # the kernel knows the mode
        script = f'cat "$(command -v id)" {change} "{path}"; "{path}" -u'
        done = run("setpriv", f"--reuid={BOB}", f"--regid={BOB}", "--clear-groups", "sh", "-c", script)
        check(done.stdout.strip() == str(BOB), f"what replaces a program of mode {mode:o} does not run as its owner")
        os.unlink(path)


def capability(home):
    """What setcap sets, getcap shows, and a write takes away."""
    path = home / "capable"
    path.write_bytes(b"#!/bin/sh\n")
    run("setcap", "cap_net_raw+ep", path)
    said = run("getcap", path).stdout
    check("cap_net_raw" in said, "setcap and getcap", said)
    with opened(path, os.O_WRONLY) as fd:
        os.pwrite(fd, b"#", 0)
    check(run("getcap", path).stdout.strip() == "", "a write takes the capability away")


# --- times and numbers ---------------------------------------------------------------------------------------------

# Seconds and nanoseconds: fractions before 1970, the ends of 32 bits, years beyond 2106, the far ends.
INSTANTS = [
    (0, 0),
    (0, 1),
    (-1, 0),
    (-1, 1),
    (-1, 999_999_999),
    (-5, 300_000_000),
    (-(2**31), 500_000_000),
    (-(2**31) - 1, 7),
    (2**31 - 1, 999_999_999),
    (2**31, 1),
    (2**32, 2),
    (2**34, 3),
    (253_402_300_800, 4),
    (-62_135_596_800, 5),
    (2**40, 6),
    (-(2**40), 7),
    (2**62, 8),
    (-(2**62), 9),
    (2**63 - 1, 0),  # the kernel itself takes the fraction away here
    (-(2**63) + 1, 1),
]


def times(place):
    """Times come back as they were set, to the nanosecond."""
    place.mkdir()
    want = {}
    for n, (seconds, nanos) in enumerate(INSTANTS):
        path = place / f"{n}"
        path.touch()
        other = INSTANTS[(n + 5) % len(INSTANTS)]
        utimens(path, (seconds, nanos), other)
        want[f"{n}"] = (seconds * 10**9 + nanos, other[0] * 10**9 + other[1])

    def again(point):
        infos = {n: os.stat(point / place.name / n) for n in want}
        got = {n: (info.st_atime_ns, info.st_mtime_ns) for n, info in infos.items()}
        wrong = [f"set {want[n]}, shown {got[n]}" for n in want if want[n] != got[n]]
        check(not wrong, f"{len(want)} instants, before 1970 and beyond 2106", "\n      " + "\n      ".join(wrong))

    run("sync")
    again(place.parent)
    path = place / "now"
    path.touch()
    utimens(path, (1000, 1), (2000, 2))
    changed = os.stat(path).st_ctime_ns
    utimens(path, (0, UTIME_OMIT), (0, UTIME_OMIT))
    info = os.stat(path)
    same = (info.st_atime_ns, info.st_mtime_ns) == (1000 * 10**9 + 1, 2000 * 10**9 + 2)
    check(same, "UTIME_OMIT twice changes nothing")
    utimens(path, (3000, 3), (0, UTIME_OMIT))
    one = os.stat(path)
    check((one.st_atime_ns, one.st_mtime_ns) == (3000 * 10**9 + 3, 2000 * 10**9 + 2), "UTIME_OMIT leaves one as it is")
    check(one.st_ctime_ns > changed, "and the change is seen in ctime")
    utimens(path, (0, UTIME_OMIT), (0, UTIME_NOW))
    now = os.stat(path)
    check(now.st_mtime_ns >= changed and now.st_atime_ns == 3000 * 10**9 + 3, "UTIME_NOW sets one to now")
    os.chown(path, ALICE, ALICE)
    os.chmod(path, 0o666)
    fixed = lambda: utimens(path, (1, 0), (1, 0))  # noqa: E731
    ends_with(errno.EPERM, "another user sets times", lambda: as_user(BOB, fixed))
    ends_with(0, "another user who may write sets them to now", lambda: as_user(BOB, lambda: os.utime(path)))
    return again


def marks_of_change(place):
    """Which calls move mtime and ctime, of the file and of its directory: as on the plain disk."""
    place.mkdir()
    path, out = place / "file", {}
    path.write_bytes(b"x" * 5000)
    (place / "dir").mkdir()
    steps = dict(CHANGES)
    steps.pop("chown to another"), steps.pop("chgrp to another")
    steps["mknod"] = lambda p: os.mkfifo(f"{p}.fifo")
    steps["mkdir"] = lambda p: os.mkdir(f"{p}.dir")
    steps["rmdir"] = lambda p: os.rmdir(f"{p}.dir")
    steps["unlink"] = lambda p: os.unlink(f"{p}.link")
    steps["symlink"] = lambda p: os.symlink("x", f"{p}.symlink")
    steps["move"] = lambda p: (os.rename(f"{p}.symlink", place / "dir" / "moved"))
    for name, change in steps.items():
        for at in (path, place, place / "dir"):
            os.utime(at, ns=(0, 0))
        before = [os.stat(at) for at in (path, place, place / "dir")]
        # ctime is coarse on ext4: a change within the same tick would not show.
        wait_until(lambda: tick(place.parent) > max(s.st_ctime_ns for s in before), 5, "the clock goes on", pause=0.002)
        change(str(path))
        after = [os.stat(at) for at in (path, place, place / "dir")]
        out[name] = [(b.st_mtime_ns != a.st_mtime_ns, b.st_ctime_ns != a.st_ctime_ns) for b, a in zip(before, after)]
    return out


def tick(place):
    """The time that the file system gives to a change now."""
    path = place / "tick"
    path.touch()
    os.utime(path)
    return os.stat(path).st_ctime_ns


def special(volume, place):
    """Devices, fifos and sockets."""
    place.mkdir()
    char, block = stat.S_IFCHR, stat.S_IFBLK
    numbers = {"zero": (char, 1, 5), "disk": (block, 259, 1_000_000), "high": (char, 4095, 1_048_575)}
    for name, (kind, major, minor) in numbers.items():
        os.mknod(place / name, kind | 0o640, os.makedev(major, minor))

    def again(point):
        for name, (kind, major, minor) in numbers.items():
            info = os.lstat(point / place.name / name)
            good = stat.S_IFMT(info.st_mode) == kind and info.st_rdev == os.makedev(major, minor)
            check(good, f"device {major}:{minor}", f"{oct(info.st_mode)} {info.st_rdev}")
        check(stat.S_ISSOCK(os.lstat(point / place.name / "socket").st_mode), "the socket's name is there")

    ends_with(errno.EACCES, "a device opened on a mount with nodev", lambda: os.open(place / "zero", os.O_RDONLY))
    os.mkfifo(place / "fifo")
    writer = threading.Thread(target=lambda: (place / "fifo").write_bytes(b"through the fifo"), daemon=True)
    writer.start()
    check((place / "fifo").read_bytes() == b"through the fifo", "a fifo carries bytes")
    writer.join(10)
    old = os.getcwd()
    os.chdir(place)  # the path of a socket has room for 107 bytes only
    try:
        with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
            server.bind("socket")
            server.listen()
            client.connect("socket")
            client.sendall(b"hello")
            end = server.accept()[0]
            check(end.recv(10) == b"hello", "a socket is bound and connected to")
            end.close()
    finally:
        os.chdir(old)
    again(place.parent)
    return again


def room(directory):
    """statfs, and a volume with a limit."""
    volume = Volume(empty_dir(directory / "limited"))
    volume.init()
    state = volume.directory / "state"
    home = volume.mount("home", state, options=["protection=local", "size=64M"])

    def free():
        s = os.statvfs(home.point)
        return s.f_bfree * s.f_frsize

    s = os.statvfs(home.point)
    check(s.f_blocks * s.f_frsize == 64 * MIB and s.f_namemax == 255, "statfs shows the size that was asked for")
    before = free()
    (home.point / "ten").write_bytes(trees.random_bytes("ten", 10 * MIB))
    used = before - free()
    check(10 * MIB <= used < 11 * MIB, "10 MiB written are 10 MiB less free", str(used))

    def fill():
        with open(home.point / "full", "ab", buffering=0) as out:
            while True:
                out.write(trees.random_bytes("full", MIB))

    ends_with(errno.ENOSPC, "writing beyond the limit", fill)
    size = (home.point / "full").stat().st_size
    check(53 * MIB <= size <= 54 * MIB, "at the limit", str(size))
    home.sync()
    check((home.point / "full").read_bytes()[-MIB:] == trees.random_bytes("full", MIB), "what was accepted is there")
    ends_with(0, "a full volume still takes names", lambda: (home.point / "name").touch())
    (home.point / "ten").unlink()
    nine = lambda: (home.point / "again").write_bytes(trees.random_bytes("a", 9 * MIB)) and None  # noqa: E731
    ends_with(0, "the room of a removed file can be written at once", nine)
    os.truncate(home.point / "full", MIB)
    more = lambda: (home.point / "more").write_bytes(trees.random_bytes("m", 40 * MIB)) and None  # noqa: E731
    ends_with(0, "so can that of one cut off", more)
    # 1 MiB, 9 and 40 are left; statfs counts exactly after a commit.
    wait_until(lambda: free() >= 13 * MIB, 30, "statfs shows the room that came back")
    want = trees.manifest(home.point)
    home.umount()
    home = volume.mount("home", state, options=["protection=local"])
    check_same(want, trees.manifest(home.point), "mounted without a limit all is there", ignore=())
    disk, s = os.statvfs(directory), os.statvfs(home.point)
    shown, left = s.f_bfree * s.f_frsize, disk.f_bavail * disk.f_frsize
    # The disk is in use by others too.
    check(abs(shown - left) < 2 << 30, "without a limit free is what the disk has left", f"{shown} {left}")
    home.umount()


def main(directory):
    volume = Volume(directory)
    volume.init()
    plain = empty_dir(directory / "plain")
    os.chmod(plain, 0o755)
    home = volume.mount("home", directory / "state", options=OPTIONS)
    looks = [extended(home.point / "extended")]
    capability(home.point)
    overwritten(home.point)
    beside_ext4(plain, home.point)
    looks.append(special(volume, home.point / "special"))
    want, got = marks_of_change(plain / "marks"), marks_of_change(home.point / "marks")
    wrong = [f"{name}: {got[name]}, there {want[name]}" for name in want if got[name] != want[name]]
    told = "\n      ".join(["", *wrong])
    check(not wrong, f"{len(want)} calls move mtime and ctime of file and directories as on the plain disk", told)
    looks.append(times(home.point / "times"))
    shown = trees.manifest(home.point)
    home.umount()
    home = volume.mount("home", directory / "state", options=OPTIONS)
    check_same(shown, trees.manifest(home.point), "after a remount numbers, times and all else are the same", ignore=())
    for look in looks:
        look(home.point)
    home.umount()
    embassy = volume.embassy()
    check_same(shown, trees.manifest(embassy.point), "and in the embassy", ignore=())
    for look in looks:
        look(embassy.point)
    embassy.umount()
    room(directory)
