"""The harness itself: a comparison that can't fail proves nothing.

Invariant: runs on the plain disk, without the program.
"""

import os

import trees
from harness import check, check_same, empty_dir


def shorten(path):
    os.truncate(path, os.path.getsize(path) - 1)


def flip(path):
    with open(path, "r+b") as out:
        first = out.read(1)[0]
        out.seek(0)
        out.write(bytes([first ^ 1]))


def fill_hole(path):
    size = os.path.getsize(path)
    with open(path, "r+b") as out:
        out.write(b"\0" * size)


def unlink_one(path):
    os.unlink(path)


def split_link(path):
    data = open(path, "rb").read()
    os.unlink(path)
    trees.write_file(path, data)


CHANGES = [
    ("odd/size-4097", flip, "content"),
    ("odd/size-4097", shorten, "size"),
    ("odd/size-4096", lambda p: os.chmod(p, 0o600), "mode"),
    ("odd/size-4096", lambda p: os.chown(p, 5, 6), "owner"),
    ("odd/size-512", lambda p: os.utime(p, ns=(0, os.stat(p).st_mtime_ns + 1)), "mtime"),
    ("odd/attributes", lambda p: os.setxattr(p, "user.short", b"w"), "xattrs"),
    ("odd/linked-1", split_link, "nlink"),
    ("hole-only", fill_hole, "sparse"),
    ("many/register-000007.json", unlink_one, "missing"),
    ("odd/dangling", lambda p: (os.unlink(p), os.symlink("else", p)), "target"),
    ("odd/empty/dirs/below", os.rmdir, "missing"),
    ("odd/new", lambda p: trees.write_file(p, b""), "should not be there"),
]


def main(directory):
    want_root = empty_dir(directory / "want")
    trees.fill(want_root, many=50, big=3_000_001)
    want = trees.manifest(want_root)
    again = empty_dir(directory / "again")
    trees.fill(again, many=50, big=3_000_001)
    check_same(want, trees.manifest(again), "the same tree made twice compares equal")
    for number, (path, change, word) in enumerate(CHANGES):
        copy = empty_dir(directory / f"copy-{number}")
        trees.fill(copy, many=50, big=3_000_001)
        change(str(copy / path))
        wrong = trees.differences(want, trees.manifest(copy))
        told = any(path in line and word in line for line in wrong)
        check(told, f"a changed {path} is told ({word})", str(wrong))
