"""Contents: open and removed, sparse and huge, holes, shared copies, mappings, appending, direct, synchronous, locks.

Invariant: what is read is compared with what was written, never with another read of the mount alone.
"""

import contextlib
import errno
import fcntl
import filecmp
import mmap
import os
import random
import struct

import posix_random
import trees
from calls import COLLAPSE_RANGE, F_OFD_SETLK, INSERT_RANGE, KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE, Child
from calls import ends_with, fallocate, lock_record
from harness import FULL, MIB, Failed, Volume, check, run, say, timed, wait_until

SEED = int(os.environ.get("E2E_SEED", "1"))
LARGEST = 2**63 - 1
OPTIONS = ["protection=local", "size=8G"]


def used(point):
    """Bytes in use, as statfs tells them."""
    s = os.statvfs(point)
    return (s.f_blocks - s.f_bfree) * s.f_frsize


def stored(volume):
    """Bytes of all objects in the store."""
    return sum(p.stat().st_size for p in volume.store_dir.rglob("*") if p.is_file())


@contextlib.contextmanager
def opened(path, flags=os.O_RDWR | os.O_CREAT, mode=0o644):
    fd = os.open(path, flags, mode)
    try:
        yield fd
    finally:
        os.close(fd)


def open_and_removed(root):
    """A file without a name lives until the last close, and its room comes back."""
    before, size = used(root), 32 * MIB
    fd = os.open(root / "removed", os.O_RDWR | os.O_CREAT)
    again = os.dup(fd)
    data = trees.random_bytes("removed", size)
    os.write(fd, data)
    os.fsync(fd)
    check(used(root) - before >= size, f"statfs counts {size // MIB} MiB written", f"{used(root) - before}")
    os.unlink(root / "removed")
    os.pwrite(fd, b"after", 5)
    os.ftruncate(fd, size // 2)
    want = bytearray(data[: size // 2])
    want[5:10] = b"after"
    got = os.pread(fd, size, 0)
    check(got == want and os.fstat(fd).st_nlink == 0, "an open file without a name is read, written and cut")
    os.close(fd)
    held = os.pread(again, 10, 0) == want[:10] and used(root) - before >= size // 2
    check(held, "until its last descriptor is closed")
    os.close(again)
    wait_until(lambda: used(root) <= before, 30, "the room of the removed file comes back")
    say("ok  then its room comes back")


def killed(volume, home):
    """SIGKILL with a removed file open, and with files that were synced in each way."""
    before, size = used(home.point), 16 * MIB
    removed = os.open(home.point / "removed", os.O_RDWR | os.O_CREAT)
    os.write(removed, trees.random_bytes("killed", size))
    os.unlink(home.point / "removed")
    os.fsync(removed)
    held = []
    ways = {"fsync": 0, "fdatasync": 0, "O_SYNC": os.O_SYNC, "O_DSYNC": os.O_DSYNC, "msync": 0}
    for name, flag in ways.items():
        fd = os.open(home.point / f"synced-{name}", os.O_RDWR | os.O_CREAT | flag)
        held.append(fd)
        os.write(fd, trees.random_bytes(name, 100_000))
        if name == "msync":
            with mmap.mmap(fd, 100_000) as pages:
                pages[70_000:70_005] = b"pages"
                pages.flush()
        elif not flag:
            getattr(os, name)(fd)
        # The last of them could have been made durable by the next; killed after each it would take five mounts.
    home.kill()
    for fd in [removed, *held]:
        with contextlib.suppress(OSError):
            os.close(fd)
    home = volume.mount("home", home.state, options=OPTIONS)
    for name in ways:
        want = bytearray(trees.random_bytes(name, 100_000))
        if name == "msync":
            want[70_000:70_005] = b"pages"
        got = (home.point / f"synced-{name}").read_bytes()
        check(got == want, f"SIGKILL right after {name}: all is there", f"{len(got)} bytes")
    room = sum((home.point / f"synced-{name}").stat().st_blocks * 512 for name in ways)
    check(not (home.point / "removed").exists(), "the removed file is not")
    now = wait_until(lambda: used(home.point) <= before + room and used(home.point), 30, "its room comes back")
    say(f"ok  and its room came back with the mount ({(now - before) // 1024} KiB more than before)")
    return home


def sync_alone(volume, home):
    """O_SYNC and O_DSYNC by themselves: nothing after the write helps them."""
    for name, flag in (("O_SYNC", os.O_SYNC), ("O_DSYNC", os.O_DSYNC)):
        fd = os.open(home.point / f"alone-{name}", os.O_RDWR | os.O_CREAT | flag)
        os.write(fd, b"alone")
        home.kill()
        os.close(fd)
        home = volume.mount("home", home.state, options=OPTIONS)
        check((home.point / f"alone-{name}").read_bytes() == b"alone", f"SIGKILL right after one write with {name}")
    return home


def huge(root):
    """The largest size there is."""
    path = root / "huge"
    with opened(path) as fd:
        os.ftruncate(fd, LARGEST)
        check(os.fstat(fd).st_size == LARGEST and os.fstat(fd).st_blocks <= 1, "a file of 2^63 - 1 bytes, all a hole")
        os.pwrite(fd, b"the end", LARGEST - 7)
        os.pwrite(fd, b"middle", 1 << 62)
        ends_with(errno.EFBIG, "room beyond it", lambda: fallocate(fd, 0, LARGEST, 1))
    # pwrite beyond would be refused by the kernel before any file system is asked.
    with opened(path, os.O_WRONLY | os.O_APPEND) as fd:
        ends_with(errno.EFBIG, "a byte more at its end", lambda: os.write(fd, b"x"))
    return lambda point: check_huge(point / "huge")


def check_huge(path):
    with opened(path, os.O_RDONLY) as fd:
        good = os.pread(fd, 7, LARGEST - 7) == b"the end" and os.pread(fd, 6, 1 << 62) == b"middle"
        good = good and os.pread(fd, 4096, (1 << 61) + 1) == bytes(4096)
        first = os.lseek(fd, 0, os.SEEK_DATA)
        good = good and (1 << 62) - MIB <= first <= 1 << 62
        last = os.lseek(fd, (1 << 62) + MIB, os.SEEK_DATA)
        good = good and LARGEST - MIB <= last <= LARGEST - 7
        check(good, "what was written at 2^62 and at the end is there, zeros and holes between", f"{first} {last}")


def holes(root):
    """Each range that SEEK_HOLE calls a hole is zeros, each byte written lies in data, large holes are told."""
    path, written = root / "holes", [(0, 70_001), (5 * MIB + 3, 200_000), (40 * MIB, 1), (50 * MIB, 3 * MIB)]
    with opened(path) as fd:
        for offset, length in written:
            os.pwrite(fd, b"d" * length, offset)
        os.ftruncate(fd, 60 * MIB)
        fallocate(fd, PUNCH_HOLE | KEEP_SIZE, 51 * MIB, MIB)
    want_holes = [(2 * MIB, 4 * MIB), (10 * MIB, 39 * MIB), (51 * MIB + 4096, 52 * MIB - 4096), (54 * MIB, 60 * MIB)]

    def again(point):
        with opened(point / "holes", os.O_RDONLY) as fd:
            found, at, size = [], 0, os.fstat(fd).st_size
            while at < size:
                try:
                    data = os.lseek(fd, at, os.SEEK_DATA)
                except OSError as error:
                    if error.errno != errno.ENXIO:
                        raise
                    data = size
                if data > at:
                    found.append((at, data))
                at = os.lseek(fd, data, os.SEEK_HOLE) if data < size else size
            zeros = all(os.pread(fd, end - start, start) == bytes(end - start) for start, end in found)
            told = all(any(s <= start and end <= e for s, e in found) for start, end in want_holes)
            check(zeros and told, f"{len(found)} holes told by lseek: zeros all, and none missing", str(found))
            ends_with(errno.ENXIO, "SEEK_HOLE at the end", lambda: os.lseek(fd, size, os.SEEK_HOLE))
            room = os.fstat(fd).st_blocks * 512
            check(2 * MIB < room < 3 * MIB, "blocks count what is no hole", str(room))

    return again


def allocation(root):
    """Every mode of fallocate."""
    with opened(root / "allocated") as fd:
        os.write(fd, b"a" * 10_000)
        fallocate(fd, 0, 5_000, 20_000)
        check(os.pread(fd, 30_000, 0) == b"a" * 10_000 + bytes(15_000), "fallocate makes a file longer, with zeros")
        fallocate(fd, KEEP_SIZE, 0, 1 << 30)
        check(os.fstat(fd).st_size == 25_000, "KEEP_SIZE keeps the size")
        fallocate(fd, PUNCH_HOLE | KEEP_SIZE, 100, 200)
        fallocate(fd, ZERO_RANGE, 24_000, 6_000)
        fallocate(fd, ZERO_RANGE | KEEP_SIZE, 9_000, 100_000)
        want = b"a" * 100 + bytes(200) + b"a" * 8_700 + bytes(21_000)
        check(os.pread(fd, 40_000, 0) == want, "PUNCH_HOLE and ZERO_RANGE make zeros, the latter moves the end")
        ends_with(errno.EOPNOTSUPP, "PUNCH_HOLE without KEEP_SIZE", lambda: fallocate(fd, PUNCH_HOLE, 0, 100))
        for name, mode in (("COLLAPSE_RANGE", COLLAPSE_RANGE), ("INSERT_RANGE", INSERT_RANGE)):
            ends_with(errno.EOPNOTSUPP, name, lambda m=mode: fallocate(fd, m, 0, 4096))
        ends_with(errno.EINVAL, "no length", lambda: fallocate(fd, 0, 0, 0))
    tmpfile = os.O_RDWR | os.O_TMPFILE
    ends_with(errno.EOPNOTSUPP, "O_TMPFILE", lambda: os.close(os.open(root, tmpfile, 0o600)))


def copies(volume, home):
    """A copy within the volume costs no data in the store."""
    size = (1024 if FULL else 256) * MIB
    source, target = home.point / "source", home.point / "copy"
    trees.write_random(source, "source", size)
    home.sync()
    before = stored(volume)

    def copy():
        with opened(source, os.O_RDONLY) as old, opened(target) as new:
            done = 0
            while done < size:
                done += os.copy_file_range(old, new, size - done) or Failed("a copy of no bytes")

    _, took = timed(copy)
    home.sync()
    cost = stored(volume) - before
    say(f"copy_file_range of {size // MIB} MiB: {took * 1000:.1f} ms, {cost / 1024:.0f} KiB more in the store")
    check(cost < size // 100, "a copy of sealed data costs no data in the store", f"{cost} bytes")
    digest = trees.digest(source)
    check(trees.digest(target) == digest, "and reads as the original")
    with opened(target) as new:
        os.pwrite(new, b"changed", size // 2)
    apart = trees.digest(source) == digest and trees.digest(target) != digest
    check(apart, "a change of the copy is none of the original")
    os.unlink(source)
    home.sync()
    want = bytearray(random_piece("source", size, size // 2))
    want[:7] = b"changed"
    with opened(target) as new:
        check(os.pread(new, MIB, size // 2) == want, "the copy outlives the original")
    os.unlink(target)


def random_piece(seed, size, at):
    """The MiB at `at` of what `write_random` wrote."""
    source, done = random.Random(seed), 0
    while True:
        piece = source.randbytes(min(MIB, size - done))
        if done == at:
            return piece
        done += MIB


def mapped_holes(root):
    """What a mapping has put into a hole is there for who skips holes, before anybody writes it back."""
    path, size, at = root / "mapped-hole", MIB, 500_000
    with opened(path) as fd:
        os.ftruncate(fd, size)
        with mmap.mmap(fd, size) as pages:
            pages[at : at + 5] = b"hello"
            found = os.lseek(fd, 0, os.SEEK_DATA)
            check(found <= at < os.lseek(fd, found, os.SEEK_HOLE), "SEEK_DATA finds what is only mapped", str(found))
            for command in (["cp"], ["cp", "--sparse=always"], ["cp", "--reflink=never"]):
                pages[at : at + 5] = b"again"
                run(*command, path, f"{path}.copy")
                check(filecmp.cmp(path, f"{path}.copy", shallow=False), f"{' '.join(command)} copies it")
            pages[900_000:900_005] = b"later"
            check(os.lseek(fd, 600_000, os.SEEK_HOLE) == 600_000, "a hole behind it is told")
            check(os.lseek(fd, 900_000, os.SEEK_HOLE) > 900_004, "SEEK_HOLE does not take the new bytes for one")
            pages[at : at + 5] = b"third"
            run("tar", "-cSf", root / "mapped.tar", "-C", root, path.name)
    out = root / "unpacked"
    out.mkdir()
    run("tar", "-xf", root / "mapped.tar", "-C", out)
    check(filecmp.cmp(path, out / path.name, shallow=False), "and so does tar -S")


def mappings(root):
    """Shared pages between two processes and with read and write; private ones stay private."""
    path, size = root / "mapped", 1_000_000
    path.write_bytes(bytes(size))
    want = bytearray(size)
    with opened(path) as fd, mmap.mmap(fd, size) as pages:

        def other():
            with opened(path) as own, mmap.mmap(own, size) as theirs:
                theirs[500_000:500_005] = b"child"
                before = bytes(theirs[10:16])
                theirs.flush()
                return before

        pages[10:16] = b"parent"
        check(Child(other).wait() == b"parent", "a shared mapping shows another process's changes at once")
        check(pages[500_000:500_005] == b"child", "in both directions")
        want[10:16], want[500_000:500_005] = b"parent", b"child"
        check(os.pread(fd, size, 0) == want, "and read shows them")
        os.pwrite(fd, b"by write", 300_000)
        want[300_000:300_008] = b"by write"
        check(pages[300_000:300_008] == b"by write", "a write shows in the mapping")
        with mmap.mmap(fd, size, mmap.MAP_PRIVATE) as own:
            own[0:7] = b"private"
            own[999_990:1_000_000] = b"my own end"
        check(os.pread(fd, size, 0) == want, "a private mapping's changes never reach the file")
        os.ftruncate(fd, size + 10_000)
        with mmap.mmap(fd, size + 10_000) as longer:
            longer[size + 9_000 : size + 9_004] = b"long"
            longer.flush()
        want += bytes(10_000)
        want[size + 9_000 : size + 9_004] = b"long"
        check(os.pread(fd, 2 * size, 0) == want, "a file that has grown is mapped to its end")

    def again(point):
        check((point / "mapped").read_bytes() == want, "what was written through mappings is there")

    return again


def appending(root):
    """Several processes append; no record is lost, torn or mixed."""
    path, records, size = root / "appended", 400, 4_093

    def append(letter):
        with opened(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT) as fd:
            for n in range(records):
                os.write(fd, (b"%c%07d" % (letter, n)) + bytes([letter]) * (size - 8))

    for child in [Child(lambda letter=letter: append(letter)) for letter in b"abcd"]:
        child.wait()
    data = path.read_bytes()
    pieces = [data[at : at + size] for at in range(0, len(data), size)]
    whole = all(p[1:8].isdigit() and p == p[:8] + p[:1] * (size - 8) for p in pieces)
    orders = all([int(p[1:8]) for p in pieces if p[0] == letter] == list(range(records)) for letter in b"abcd")
    check(len(data) == 4 * records * size and whole and orders, f"4 processes append {records} records each, none torn")


def direct(root):
    """O_DIRECT beside the page cache, at any offset and length."""
    path, want = root / "direct", bytearray(trees.random_bytes("direct", 500_000))
    with opened(path) as plain, opened(path, os.O_RDWR | os.O_DIRECT) as fd, mmap.mmap(-1, 1 << 20) as page:
        page[: len(want)] = bytes(want)
        os.pwritev(fd, [memoryview(page)[: len(want)]], 0)
        check(os.pread(plain, 1 << 20, 0) == want, "what O_DIRECT wrote is read through the cache")
        os.pwrite(plain, b"through the cache", 12_345)
        want[12_345:12_362] = b"through the cache"
        length = os.preadv(fd, [page], 0)
        check(length == len(want) and page[:length] == want, "and what the cache wrote by O_DIRECT")
        os.pwritev(fd, [memoryview(page)[1:1001]], 77_777)
        want[77_777:78_777] = want[1:1001]
        check(os.pread(plain, 1 << 20, 0) == want, "at an odd offset, from an odd address, with an odd length")
        with mmap.mmap(plain, len(want)) as mapped:
            os.pwritev(fd, [memoryview(page)[:4096]], 8192)
            want[8192:12288] = want[:4096]
            check(mapped[:] == want, "and in a mapping")
    return lambda point: check((point / "direct").read_bytes() == want, "all of it is there")


def posix_lock(fd, kind, command=fcntl.F_SETLK, start=0, length=0):
    fcntl.fcntl(fd, command, lock_record(kind, start, length))


def locks(root):
    """flock, fcntl and OFD locks: who holds one keeps others out, in other processes too."""
    path = root / "locked"
    path.write_bytes(b"l" * 100)
    ways = {
        "flock": (lambda fd: fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB), lambda fd: fcntl.flock(fd, fcntl.LOCK_UN)),
        "fcntl": (lambda fd: posix_lock(fd, fcntl.F_WRLCK), lambda fd: posix_lock(fd, fcntl.F_UNLCK)),
        "OFD": (
            lambda fd: posix_lock(fd, fcntl.F_WRLCK, F_OFD_SETLK),
            lambda fd: posix_lock(fd, fcntl.F_UNLCK, F_OFD_SETLK),
        ),
    }

    def try_it(take):
        with opened(path) as own:
            take(own)

    for name, (take, release) in ways.items():
        with opened(path) as fd:
            take(fd)
            other = lambda t=take: Child(lambda: try_it(t)).wait()  # noqa: E731
            ends_with(errno.EAGAIN, f"{name} lock held by another process", other)
            release(fd)
            ends_with(0, f"{name} lock after it was let go", other)
            take(fd)
        ends_with(0, f"{name} lock after its file was closed", other)
    with opened(path) as fd, opened(path) as other:
        ways["fcntl"][0](fd)
        ways["fcntl"][0](other)
        say("ok  a process does not keep itself out with fcntl locks")
        ways["OFD"][1](fd)
        os.close(os.dup(other))
        third = lambda: Child(lambda: try_it(ways["fcntl"][0])).wait()  # noqa: E731
        ends_with(0, "fcntl locks end when any descriptor is closed", third)
        ways["OFD"][0](fd)
        ends_with(errno.EAGAIN, "an OFD lock keeps out its own process", lambda: ways["OFD"][0](other))
        os.close(os.dup(other))
        ends_with(errno.EAGAIN, "and stays when another descriptor is closed", lambda: ways["OFD"][0](other))
    with opened(path) as fd:
        posix_lock(fd, fcntl.F_WRLCK, start=0, length=50)
        halves = {0: errno.EAGAIN, 49: errno.EAGAIN, 50: 0}
        for start, code in halves.items():
            call = lambda s=start: Child(lambda: locked_range(path, s)).wait()  # noqa: E731
            ends_with(code, f"the byte at {start} beside a lock of the first 50", call)
        asked = struct.unpack("hhqqi4x", Child(lambda: asked_for(path)).wait())
        check(asked[0] == fcntl.F_WRLCK and asked[4] == os.getpid(), "F_GETLK names the holder", str(asked))
        waiter = Child(lambda: waited(path))
        posix_lock(fd, fcntl.F_UNLCK)
        check(waiter.wait() == "got it", "F_SETLKW waits and then has the lock")


def locked_range(path, start):
    with opened(path) as fd:
        posix_lock(fd, fcntl.F_WRLCK, start=start, length=1)


def asked_for(path):
    with opened(path) as fd:
        return fcntl.fcntl(fd, fcntl.F_GETLK, lock_record(fcntl.F_WRLCK))


def waited(path):
    with opened(path) as fd:
        posix_lock(fd, fcntl.F_WRLCK, fcntl.F_SETLKW)
        return "got it"


def main(directory):
    volume = Volume(directory)
    volume.init()
    home = volume.mount("home", directory / "state", options=OPTIONS)
    open_and_removed(home.point)
    home = killed(volume, home)
    home = sync_alone(volume, home)
    home, random_again = posix_random.run(volume, home, OPTIONS)
    allocation(home.point)
    appending(home.point)
    locks(home.point)
    copies(volume, home)
    mapped_holes(home.point)
    looks = [part(home.point) for part in (holes, huge, mappings, direct)]
    for look in [random_again, *looks]:
        look(home.point)
    home.umount(limit=300)
    say("--  after a remount")
    home = volume.mount("home", home.state, options=OPTIONS)
    for look in [random_again, *looks]:
        look(home.point)
    home.umount(limit=300)
    say("--  in the embassy")
    embassy = volume.embassy()
    for look in [random_again, *looks]:
        look(embassy.point)
    embassy.umount()
