"""rsync and tar carry a tree with everything in it onto a mount and back, and nothing is different.

Invariant: each case first does the same on the plain disk, so that what the tool itself can't carry is told apart from
what the file system loses.
"""

import os
import shutil
import stat
import struct

import trees
from harness import FULL, Volume, check, empty_dir, run, say, timed

MANY = 20_000 if FULL else 1_000
# VFS_CAP_REVISION_2 with cap_net_bind_service permitted, as setcap writes it.
CAPABILITY = struct.pack("<IIIII", 0x0200_0000, 1 << 10, 0, 0, 0)


def set_acl(path, *words):
    run("setfacl", *words, path)


def fill(root, sockets=True):
    """The trees' odd files, and what only archivers and backups meet: devices, sockets, ACLs, root's attributes."""
    trees.fill_many(root, MANY)
    trees.fill_sparse(root)
    trees.fill_odd(root)
    rare = f"{root}/rare"
    os.mkdir(rare)
    os.mknod(f"{rare}/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(f"{rare}/large-numbers", stat.S_IFBLK | 0o640, os.makedev(4000, 700_000))
    os.mknod(f"{rare}/pipe", stat.S_IFIFO | 0o622)
    if sockets:
        os.mknod(f"{rare}/socket", stat.S_IFSOCK | 0o755)
    for n in range(2):
        trees.write_file(f"{rare}/root-{n}", b"root's")
        os.setxattr(f"{rare}/root-{n}", "trusted.embassy", bytes(range(n, 200)))
    os.setxattr(f"{rare}/root-1", "security.capability", CAPABILITY)
    os.link(f"{rare}/root-1", f"{root}/odd/root-1-linked")
    fill_acls(f"{rare}/acl")
    trees.stamp(root)


def fill_acls(acl):
    """Access and default ACLs: on files, on directories, inherited, with a mask that takes away."""
    os.mkdir(acl)
    for n in range(3):
        trees.write_file(f"{acl}/plain-{n}", b"p")
    set_acl(f"{acl}/plain-0", "-m", "u:1234:rw,g:4321:r")
    set_acl(f"{acl}/plain-1", "-m", "u:1234:rwx,m::r")
    os.mkdir(f"{acl}/shared")
    set_acl(f"{acl}/shared", "-m", "u:1234:rwx,d:u:1234:rwx,d:g:4321:r-x,d:o::-")
    trees.write_file(f"{acl}/shared/inherits", b"i")
    os.makedirs(f"{acl}/shared/below/deeper")
    trees.write_file(f"{acl}/shared/below/deeper/inherits", b"i")
    os.mkdir(f"{acl}/removed")
    set_acl(f"{acl}/removed", "-m", "u:1234:rwx,d:u:1234:rwx")
    set_acl(f"{acl}/removed", "-b")


def attributes(root):
    """Path -> the attributes of every name space that an archiver carries."""
    found = {}
    for directory, names, files in os.walk(os.fsencode(root)):
        for name in [b".", *names, *files]:
            path = os.path.join(directory, name)
            listed = [n for n in os.listxattr(path, follow_symlinks=False) if not n.startswith("system.")]
            values = sorted((n, os.getxattr(path, n, follow_symlinks=False)) for n in listed)
            if values:
                found[os.path.relpath(path, os.fsencode(root))] = values
    return found


def acls(root):
    """What getfacl says of the whole tree, in an order that does not depend on the file system's."""
    blocks = run("getfacl", "-R", "-P", "-n", "-p", ".", cwd=root).stdout.split("\n\n")
    return sorted(block for block in blocks if block.strip())


class Shown:
    """All that is compared of a tree."""

    def __init__(self, root):
        self.manifest, self.attributes, self.acls = trees.manifest(root), attributes(root), acls(root)
        self.devices = {
            path: os.lstat(os.fsencode(root) + b"/" + path).st_rdev
            for path, entry in self.manifest.items()
            if stat.S_ISCHR(int(entry["mode"], 8)) or stat.S_ISBLK(int(entry["mode"], 8))
        }

    def check_against(self, want, claim, **how):
        wrong = trees.differences(want.manifest, self.manifest, **how)
        for what in ("attributes", "devices"):
            a, b = getattr(want, what), getattr(self, what)
            other = [p for p in a.keys() | b.keys() if a.get(p) != b.get(p)]
            wrong += [f"{what} of {p!r}: {b.get(p)}, should be {a.get(p)}" for p in other]
        wrong += [f"ACL lost: {text!r}" for text in want.acls if text not in self.acls]
        wrong += [f"ACL too much: {text!r}" for text in self.acls if text not in want.acls]
        check(not wrong, claim, "\n      " + "\n      ".join(wrong[:20]))


def rsync_once(source, target, *more):
    """One run; gives what it changed, a line each."""
    # Without -@-1 times that differ by less than a second count as equal.
    words = ["-aHAXS", "-@-1", "--delete", "-i", *more, f"{source}/", f"{target}/"]
    return run("rsync", *words, limit=1800).stdout


def rsync_over(source, target, where):
    """A copy, after which there is nothing left to copy, neither by times and sizes nor by contents."""
    target.mkdir()
    changed, took = timed(lambda: rsync_once(source, target))
    check(changed.count("\n") > MANY, f"rsync {where}: {changed.count(chr(10))} changes in {took:.1f} s")
    for more in ([], ["--checksum"]):
        again = rsync_once(source, target, *more)
        check(again == "", f"rsync {where}: nothing left to copy {' '.join(more)}", again[:1000])


def rsync_there_and_back(tree, want, place, back):
    """Onto `place`, a change carried after it, and from there to `back`."""
    rsync_over(tree, place, "there")
    Shown(place).check_against(want, "the copy there is equal")
    rsync_over(place, back, "back")
    Shown(back).check_against(want, "the copy back is equal")


def change(tree):
    """What happens between two backups."""
    trees.write_file(f"{tree}/many/register-000003.json", b"changed")
    os.unlink(f"{tree}/many/register-000004.json")
    os.rename(f"{tree}/many/register-000005.json", f"{tree}/many/renamed")
    os.chmod(f"{tree}/odd/size-4096", 0o4750)
    os.setxattr(f"{tree}/odd/attributes", "user.short", b"another value")
    os.removexattr(f"{tree}/odd/attributes", "user.binary")
    os.unlink(f"{tree}/odd/linked-2")
    set_acl(f"{tree}/rare/acl/plain-0", "-m", "u:77:r")
    set_acl(f"{tree}/rare/acl/plain-1", "-b")
    # In place, by rsync's own way of writing into a file that is there.
    with open(f"{tree}/sparse", "r+b") as out:
        out.seek(100 << 20)
        out.write(b"into the hole")


def rsync(directory):
    """First on the disk, then on a mount; then a change is carried over."""
    tree = empty_dir(directory / "tree")
    fill(tree)
    want = Shown(tree)
    rsync_there_and_back(tree, want, directory / "plain", directory / "plain-back")
    say("all of that on the plain disk; now on the mount")
    volume = Volume(directory)
    volume.init()
    home = volume.mount("home", directory / "state")
    rsync_there_and_back(tree, want, home.point / "copy", directory / "back")
    change(tree)
    for source, target in ((tree, home.point / "copy"), (home.point / "copy", directory / "back")):
        rsync_once(source, target)
        check(rsync_once(source, target, "--checksum") == "", "a change was carried over, nothing is left")
    want = Shown(tree)
    Shown(directory / "back").check_against(want, "the changed copy is equal")
    seen_again(volume, home, want, lambda place: check(rsync_once(tree, place, "-n") == "", "rsync finds no change"))


def seen_again(volume, home, want, more):
    """The copy is the same in the next mount of home, and in the embassy."""
    shown = Shown(home.point / "copy")
    home.umount()
    home = volume.mount("home", home.state)
    for mount, where in ((home, "after another mount"), (volume.embassy("embassy"), "embassy")):
        again = Shown(mount.point / "copy")
        again.check_against(want, f"{where}: the copy is equal")
        again.check_against(shown, f"{where}: inode numbers and ctime are those of before", ignore=())
        more(mount.point / "copy")
        mount.umount()


def tar_pack(source, archive):
    # posix: the format that holds nanoseconds, long names and attributes; -S: holes.
    words = ["--format=posix", "--xattrs", "--xattrs-include=*", "--acls", "-S", "--sort=name", "--numeric-owner"]
    run("tar", *words, "-cf", archive, "-C", source, ".", limit=1800)


def tar_unpack(archive, target):
    target.mkdir()
    words = ["--xattrs", "--xattrs-include=*", "--acls", "--numeric-owner", "-p", "-S", "--warning=no-timestamp"]
    done, took = timed(lambda: run("tar", *words, "-xf", archive, "-C", target, limit=1800))
    check(done.stderr == "", f"tar unpacked in {took:.1f} s without a word", done.stderr[:2000])


def tar_there_and_back(archive, want, place, scratch):
    """Unpacked at `place`, packed from there, and unpacked on the plain disk again."""
    tar_unpack(archive, place)
    Shown(place).check_against(want, "the unpacked tree is equal")
    tar_pack(place, scratch / "again.tar")
    tar_unpack(scratch / "again.tar", scratch / "again")
    Shown(scratch / "again").check_against(want, "packed from there and unpacked on the disk: equal")
    shutil.rmtree(scratch)


def tar(directory):
    """First on the disk, then on a mount. A tar archive can't hold a socket."""
    tree = empty_dir(directory / "tree")
    fill(tree, sockets=False)
    want = Shown(tree)
    archive = directory / "tree.tar"
    tar_pack(tree, archive)
    tar_there_and_back(archive, want, directory / "plain", empty_dir(directory / "scratch"))
    say("all of that on the plain disk; now on the mount")
    volume = Volume(directory)
    volume.init()
    home = volume.mount("home", directory / "state")
    tar_there_and_back(archive, want, home.point / "copy", empty_dir(directory / "scratch"))
    seen_again(volume, home, want, lambda place: compare_archive(archive, place))


def compare_archive(archive, place):
    done = run("tar", "--numeric-owner", "-df", archive, "-C", place, limit=1800, ok=None)
    check(done.returncode == 0, "tar -d finds no difference", (done.stdout + done.stderr)[:1000])
