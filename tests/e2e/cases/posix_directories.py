"""Names: large directories, places in a listing, deep paths, all bytes, renaming in every way, links, set-id, sticky.

Invariant: entries that are in a directory during a whole listing come exactly once, whatever comes and goes meanwhile.
"""

import errno
import os
import random
import stat
import time

import trees
from calls import ALICE, BOB, RENAME_EXCHANGE, RENAME_NOREPLACE, RENAME_WHITEOUT, Child, Directory
from calls import as_user, ends_with, rename2
from harness import FULL, Volume, check, check_same, say, timed

SEED = int(os.environ.get("E2E_SEED", "1"))
MANY = 1_000_000 if FULL else 50_000
LINKS_MAX = 65_000


def touch(path, mode=0o644):
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))


def fill_large(place):
    """Many entries, every tenth a directory, with names of many lengths."""
    for n in range(MANY):
        name = f"{place}/{n:07}{'-' * (n % 50)}"
        os.mkdir(name) if n % 10 == 0 else touch(name)


def check_large(place, when):
    """A listing holds each name once, with the right number and kind."""
    (entries, took) = timed(lambda: list(os.scandir(place)))
    names = {e.name for e in entries}
    once = len(names) == len(entries) == MANY
    check(once, f"{when}: {MANY:,} entries, none twice, in {took:.2f} s", f"{len(entries)} entries, {len(names)} names")
    check(all(f"{n:07}{'-' * (n % 50)}" in names for n in range(MANY)), f"{when}: each of them")
    kinds = all(e.is_dir(follow_symlinks=False) == (int(e.name[:7]) % 10 == 0) for e in entries)
    numbers = all(os.lstat(e.path).st_ino == e.inode() for e in entries[:: max(1, MANY // 5000)])
    check(kinds and numbers, f"{when}: kinds and inode numbers are those of stat")
    links = os.stat(place).st_nlink
    check(links == 2 + (MANY + 9) // 10, f"{when}: a directory has 2 links and one per directory in it", str(links))


def dots(place):
    below = place / "below"
    below.mkdir()
    for path in (below, place):
        listing = Directory(path)
        got = dict(listing.take())
        listing.close()
        # At the root of the mount the number of `..` is the file system's own affair: stat gives the one outside.
        want = {b".": os.stat(path).st_ino}
        if not os.path.ismount(path):
            want[b".."] = os.stat(path.parent).st_ino
        same = all(got.get(name) == ino for name, ino in want.items())
        check(same and b".." in got, f"`.` and `..` of {path.name} are there with their numbers", f"{got} {want}")


def places(place):
    """telldir and seekdir, while other entries come, go and change their names."""
    place.mkdir()
    stay = [f"stay-{n:05}".encode() for n in range(3000)]
    for n, name in enumerate(stay):
        touch(os.fsencode(place) + b"/" + name)
        touch(place / f"go-{n:05}")
    listing = Directory(place)
    marks, order = [], []
    while True:
        marks.append(listing.tell())
        entry = listing.next()
        if entry is None:
            break
        order.append(entry[0])
    check(len(set(order)) == len(order) == 6002, "each place has one entry", str(len(order)))
    check(len(set(marks)) == len(marks), "and no two places have the same number")
    for n in range(3000):
        (place / f"go-{n:05}").unlink() if n % 3 else os.rename(place / f"go-{n:05}", place / f"renamed-{n:05}")
        if n % 5 == 0:
            touch(place / f"come-{n:05}")
    draw = random.Random(SEED)
    for at in [0, len(marks) - 1, *(draw.randrange(len(marks)) for _ in range(40))]:
        for fresh in (False, True):
            again = Directory(place) if fresh else listing
            again.seek(marks[at])
            got = [name for name, _ in again.take() if name.startswith(b"stay")]
            want = [name for name in order[at:] if name.startswith(b"stay")]
            if got != want:
                check(False, "a place stays right", f"place {at}: {len(got)} names instead of {len(want)}")
            if fresh:
                again.close()
    check(True, "42 places lead to the same rest in this and in a new listing, though other names came and went")
    listing.rewind()
    names = [name for name, _ in listing.take()]
    fresh = len(set(names)) == len(names) == 2 + 3000 + 1000 + 600
    check(fresh, "rewinddir shows what has come and gone", str(len(names)))
    listing.close()
    return marks[3000], [n for n in order[3000:] if n.startswith(b"stay")]


def while_it_changes(place):
    """Listings against a process that creates, renames and removes all the time."""
    stay = {name for name in os.listdir(place) if name.startswith("stay")}
    stop = place.parent / "stop"

    def churn():
        rounds = 0
        while not stop.exists():
            for n in range(50):
                touch(place / f"churn-{n}")
            for n in range(50):
                os.rename(place / f"churn-{n}", place / f"churned-{n}")
            for n in range(50):
                (place / f"churned-{n}").unlink()
            rounds += 1
        return rounds

    child = Child(churn)
    listings, end = 0, time.monotonic() + (30 if FULL else 4)
    try:
        while time.monotonic() < end:
            names = [name for name in os.listdir(place) if name.startswith("stay")]
            if len(names) != len(stay) or set(names) != stay:
                check(False, "a listing beside changes", f"{len(names)} names, {len(set(names))} different")
            listings += 1
    finally:
        touch(stop)
    check(child.wait() > 0 and listings > 0, f"{listings} listings beside creating and removing are complete")


def deep(place):
    """A path far longer than PATH_MAX, by descriptors; gives how to read what lies at its end."""
    place.mkdir()
    name, depth = "d" * 255, 40
    fd = os.open(place, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir(name, dir_fd=fd)
        below = os.open(name, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    out = os.open("end", os.O_CREAT | os.O_WRONLY, dir_fd=fd)
    os.write(out, b"at the end")
    os.close(out)
    os.close(fd)
    ends_with(errno.ENAMETOOLONG, "one path of 10 KiB", lambda: os.stat(f"{place}/{'/'.join([name] * depth)}"))

    def read():
        fd = os.open(place, os.O_RDONLY)
        for _ in range(depth):
            below = os.open(name, os.O_RDONLY, dir_fd=fd)
            os.close(fd)
            fd = below
        end = os.open("end", os.O_RDONLY, dir_fd=fd)
        data = os.read(end, 100)
        os.close(end)
        os.close(fd)
        return data

    check(read() == b"at the end", f"a file {depth} directories of 255 bytes deep")
    return read


def bytes_in_names(place):
    """Every byte but / and NUL, alone and in names of 255; 256 is too long for every call."""
    place.mkdir()
    root = os.fsencode(place) + b"/"
    draw = random.Random(SEED)
    usable = [b for b in range(1, 256) if b != ord("/")]
    names = {bytes([b]) for b in usable if b != ord(".")} | {bytes(draw.choices(usable, k=255)) for _ in range(200)}
    names |= {b"...", b" ", b"-rf", b"a\\b", "\u00e4".encode(), "a\u0308".encode(), b"A", b"a"}
    for n, name in enumerate(sorted(names)):
        os.symlink(b"%d" % n, root + name)
    check(set(os.listdir(root)) == names, f"{len(names)} names of any bytes, none folded together")
    same = all(os.readlink(root + name) == b"%d" % n for n, name in enumerate(sorted(names)))
    check(same, "and each is found under its own bytes")
    long = os.fsencode(place.parent) + b"/" + b"n" * 256
    touch(place.parent / "short")
    for what, call in {
        "create": lambda: touch(long),
        "mkdir": lambda: os.mkdir(long),
        "symlink": lambda: os.symlink(b"x", long),
        "mkfifo": lambda: os.mkfifo(long),
        "link": lambda: os.link(place.parent / "short", long),
        "rename": lambda: os.rename(place.parent / "short", long),
        "stat": lambda: os.stat(long),
        "unlink": lambda: os.unlink(long),
    }.items():
        ends_with(errno.ENAMETOOLONG, f"{what} with a name of 256 bytes", call)


def renames(place):
    """The three flags, over open files and directories too."""
    place.mkdir()
    one, two, three = place / "one", place / "two", place / "three"
    one.write_bytes(b"1")
    two.write_bytes(b"2")
    ends_with(errno.EEXIST, "NOREPLACE onto a name", lambda: rename2(one, two, RENAME_NOREPLACE))
    check((one.read_bytes(), two.read_bytes()) == (b"1", b"2"), "and both files are as they were")
    rename2(one, three, RENAME_NOREPLACE)
    check(not one.exists() and three.read_bytes() == b"1", "NOREPLACE onto no name renames")
    with open(two, "r+b") as held_two, open(three, "r+b") as held_three:
        rename2(two, three, RENAME_EXCHANGE)
        check((two.read_bytes(), three.read_bytes()) == (b"1", b"2"), "EXCHANGE swaps two open files")
        held_two.write(b"two")
        held_two.flush()
        check(three.read_bytes() == b"two" and held_three.read() == b"1", "and the open files go with their contents")
    folder = place / "folder"
    (folder / "inside").mkdir(parents=True)
    other = place / "other"
    other.mkdir()
    links = os.stat(place).st_nlink, os.stat(other).st_nlink
    rename2(folder / "inside", two, RENAME_EXCHANGE)
    check(two.is_dir() and (folder / "inside").is_file(), "EXCHANGE swaps a file and a directory")
    check(os.stat(place).st_nlink == links[0] + 1 and os.stat(folder).st_nlink == 2, "and the links of both parents")
    ends_with(errno.ENOENT, "EXCHANGE with no name", lambda: rename2(two, place / "none", RENAME_EXCHANGE))
    ends_with(errno.EINVAL, "EXCHANGE with what lies below", lambda: rename2(place, folder, RENAME_EXCHANGE))
    ends_with(errno.EINVAL, "a directory into itself", lambda: os.rename(folder, folder / "x"))
    ends_with(errno.EINVAL, "NOREPLACE and EXCHANGE", lambda: rename2(two, three, RENAME_NOREPLACE | RENAME_EXCHANGE))
    with open(three, "rb") as held:
        rename2(three, place / "four", RENAME_WHITEOUT)
        info = os.lstat(three)
        check(stat.S_ISCHR(info.st_mode) and info.st_rdev == 0, "WHITEOUT leaves a whiteout behind", oct(info.st_mode))
        check((place / "four").read_bytes() == held.read() == b"two", "and renames the open file")
    over = place / "over"
    over.write_bytes(b"replaced")
    with open(over, "rb") as held:
        os.rename(place / "four", over)
        check(held.read() == b"replaced" and over.read_bytes() == b"two", "rename over an open file leaves it readable")
        check(os.fstat(held.fileno()).st_nlink == 0, "with no link")
    (folder / "sub").mkdir()
    ends_with(errno.ENOTEMPTY, "rename onto a directory with names in it", lambda: os.rename(other, folder))
    listing = os.open(other, os.O_RDONLY)
    os.rmdir(other)
    check(os.listdir(listing) == [], "a removed directory can be listed by who has it open")
    ends_with(errno.ENOENT, "a name in a removed directory", lambda: os.mkdir("x", dir_fd=listing))
    os.close(listing)


def links(place):
    place.mkdir()
    target = "t" * 4095
    os.symlink(target, place / "long")
    check(os.readlink(place / "long") == target and os.lstat(place / "long").st_size == 4095, "a symlink of 4095 bytes")
    ends_with(errno.ENAMETOOLONG, "one of 4096", lambda: os.symlink(target + "t", place / "longer"))
    ends_with(errno.ENOENT, "an empty one", lambda: os.symlink("", place / "empty"))
    os.symlink("loop", place / "loop")
    ends_with(errno.ELOOP, "one that leads to itself", lambda: open(place / "loop"))
    ends_with(errno.EPERM, "a hard link to a directory", lambda: os.link(place, place / "hard"))
    os.link(place / "long", place / "hard-symlink", follow_symlinks=False)
    check(os.lstat(place / "long").st_nlink == 2, "a hard link to a symlink")
    (place / "names").mkdir()
    touch(place / "file")
    _, took = timed(lambda: [os.link(place / "file", place / "names" / str(n)) for n in range(1, LINKS_MAX)])
    ends_with(errno.EMLINK, f"more than {LINKS_MAX} links", lambda: os.link(place / "file", place / "one-more"))
    check(os.stat(place / "file").st_nlink == LINKS_MAX, f"{LINKS_MAX} names of one file, made in {took:.1f} s")
    (place / "names" / "7").write_bytes(b"seen by all")
    check((place / "file").read_bytes() == b"seen by all", "what is written under one name is read under another")
    for n in range(1, LINKS_MAX):
        os.unlink(place / "names" / str(n))
    check(os.stat(place / "file").st_nlink == 1, "and removing them leaves one link")


def set_id_and_sticky(place):
    """What a directory's bits mean for users without privileges."""
    place.mkdir()
    shared = place / "shared"
    shared.mkdir()
    os.chown(shared, 0, BOB)
    os.chmod(shared, 0o2777)
    as_user(ALICE, lambda: (touch(shared / "file"), os.mkdir(shared / "dir"), os.mkfifo(shared / "fifo")))
    for name in ("file", "dir", "fifo"):
        info = os.stat(shared / name)
        check((info.st_uid, info.st_gid) == (ALICE, BOB), f"a {name} in a set-group-id directory has its group")
    check(os.stat(shared / "dir").st_mode & stat.S_ISGID, "and a directory there has the bit itself")
    check(not os.stat(shared / "file").st_mode & stat.S_ISGID, "but a file has not")
    as_user(ALICE, lambda: touch(shared / "set-id", 0o2775))
    plain = not os.stat(shared / "set-id").st_mode & stat.S_ISGID
    check(plain, "who is not in the group makes no set-group-id program")
    sticky = place / "sticky"
    sticky.mkdir()
    os.chmod(sticky, 0o1777)
    as_user(ALICE, lambda: (touch(sticky / "alice"), os.mkdir(sticky / "folder")))
    as_user(BOB, lambda: touch(sticky / "bob"))
    for claim, call in {
        "remove": lambda: os.unlink(sticky / "alice"),
        "rename": lambda: os.rename(sticky / "alice", sticky / "mine"),
        "replace": lambda: os.rename(sticky / "bob", sticky / "alice"),
        "exchange": lambda: rename2(sticky / "bob", sticky / "alice", RENAME_EXCHANGE),
        "remove the directory": lambda: os.rmdir(sticky / "folder"),
    }.items():
        ends_with(errno.EPERM, f"in a sticky directory another user: {claim}", lambda c=call: as_user(BOB, c))
    as_user(ALICE, lambda: (os.rename(sticky / "alice", sticky / "hers"), os.unlink(sticky / "hers")))
    say("ok  and the owner may")
    closed = place / "closed"
    closed.mkdir(mode=0o700)
    touch(closed / "file")
    look = lambda: as_user(BOB, lambda: os.stat(closed / "file") and None)  # noqa: E731
    ends_with(errno.EACCES, "a directory without search permission", look)


def main(directory):
    volume = Volume(directory)
    volume.init()
    options = ["protection=local", "allow_other"]
    home = volume.mount("home", directory / "state", options=options)
    root = home.point
    dots(root)
    mark, rest = places(root / "places")
    while_it_changes(root / "places")
    read_deep = deep(root / "deep")
    bytes_in_names(root / "names")
    renames(root / "renames")
    links(root / "links")
    set_id_and_sticky(root / "bits")
    want = trees.manifest(root, skip=lambda name: name == "d" * 255)
    (root / "large").mkdir()
    _, took = timed(lambda: fill_large(root / "large"))
    say(f"{MANY:,} entries made in {took:.1f} s")
    check_large(root / "large", "at once")
    home.umount(limit=600)

    home = volume.mount("home", directory / "state", options=options)
    check_large(home.point / "large", "after a remount")
    listing = Directory(home.point / "places")
    listing.seek(mark)
    got = [name for name, _ in listing.take() if name.startswith(b"stay")]
    listing.close()
    check(got == rest, "a place from before the remount leads to the same rest", f"{len(got)} of {len(rest)}")
    check(read_deep() == b"at the end", "the deep file is there")
    home.umount(limit=600)
    embassy = volume.embassy()
    check_large(embassy.point / "large", "in the embassy")
    shown = trees.manifest(embassy.point, skip=lambda name: name in ("d" * 255, "large"))
    # The root has one directory and a few changes more since the first look.
    check_same(without_root(want), without_root(shown), "all else is in the embassy as it was at home", ignore=())
    embassy.umount()


def without_root(tree):
    return {path: entry for path, entry in tree.items() if path}
