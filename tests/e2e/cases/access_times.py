"""Access times: none by default, and with `relatime` those that mount(8) describes, over what the kernel caches.

Invariant: no step depends on time that passes; what is compared are the stamps themselves.
"""

import mmap
import os

from harness import Volume, check, mounts

DAY = 86_400 * 10**9


def atime(path):
    return os.stat(path, follow_symlinks=False).st_atime_ns


def mapped(path):
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view:
        return view[0]


def content(path):
    return path.read_bytes()


def moves(path, read):
    """Whether reading in this way changes the access time."""
    before = atime(path)
    read(path)
    return atime(path) > before


def relatime(point):
    file, directory, link = point / "file", point / "directory", point / "link"
    file.write_bytes(b"hello")
    check(moves(file, content), "the first read after a write sets it")
    check(atime(file) > os.stat(file).st_mtime_ns, "to the time of the read")
    check(not moves(file, content), "the second does not")
    for read, name in ((content, "a read"), (mapped, "a page that is mapped")):
        with open(file, "ab") as out:
            out.write(b"more")
        check(moves(file, read), f"after another write {name} does")
        check(not moves(file, read), "once")
    os.utime(file, ns=(atime(file) + DAY, 0))
    check(not moves(file, content), "a time that is newer than the last change stays")

    with open(file, "ab") as out:
        out.write(b"again")
    fd = os.open(file, os.O_RDONLY | os.O_NOATIME)
    check(not moves(file, lambda _: os.read(fd, 10)), "reading with O_NOATIME does not")
    os.close(fd)

    directory.mkdir()
    for name in ("a", "b"):
        (directory / name).touch()
        check(moves(directory, os.listdir), "listing a directory that has changed sets its time")
        check(not moves(directory, os.listdir), "once")
    link.symlink_to("file")
    check(moves(link, os.readlink) and not moves(link, os.readlink), "so does the first reading of a link")


def main(directory):
    volume = Volume(directory)
    volume.init()
    home = volume.mount("home", directory / "state", options=["protection=local", "relatime"])
    options = next(o for at, _, _, o in mounts() if at == os.fspath(home.point)).split(",")
    check("relatime" in options, "the mount table says relatime")
    relatime(home.point)
    kept = {name: atime(home.point / name) for name in ("file", "directory", "link")}
    home.umount()
    home = volume.mount("home", home.state, options=["protection=local"])
    options = next(o for at, _, _, o in mounts() if at == os.fspath(home.point)).split(",")
    check("noatime" in options, "without the option it says noatime")
    for name, time in kept.items():
        check(atime(home.point / name) == time, f"the access time of the {name} is kept over a remount")
    (home.point / "file").write_bytes(b"changed")
    (home.point / "directory" / "c").touch()
    still = not moves(home.point / "file", content) and not moves(home.point / "directory", os.listdir)
    check(still, "and reading changes none")
    home.umount()
    embassy = volume.embassy(options=["relatime"])
    check(not moves(embassy.point / "file", content), "nor does it in the embassy, whatever the option")
    embassy.umount()
