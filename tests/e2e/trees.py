"""Trees of files: what is written, and how two of them are compared.

Invariant: `fill` writes the same tree into any root (names, bytes, modes, owners, times follow from the seed), so that
what a mount shows can be held against the same calls made on ext4; `manifest` never writes.
"""

import hashlib
import os
import random
import stat
import zlib

BLOCK = 1 << 20

# Times with odd nanoseconds, one of them before 1970 and one past 2038.
TIMES_NS = [1_700_000_000_123_456_789, 86_399_999_999_999, 4_102_444_800_000_000_001, -1_000_000_000_000_000_001]


def random_bytes(seed, size):
    """`size` bytes that follow from `seed`."""
    return random.Random(seed).randbytes(size)


def write_file(path, data):
    with open(path, "wb") as out:
        out.write(data)


def write_random(path, seed, size):
    """A file of random bytes, in the 1 MiB writes that a copy would make."""
    source = random.Random(seed)
    with open(path, "wb", buffering=0) as out:
        while size > 0:
            piece = source.randbytes(min(BLOCK, size))
            out.write(piece)
            size -= len(piece)


def fill_many(root, count):
    """`count` small files in one directory."""
    directory = os.path.join(root, "many")
    os.mkdir(directory)
    for n in range(count):
        write_file(f"{directory}/register-{n:06}.json", b'{"number":%d,"text":"%s"}\n' % (n, b"x" * (n % 700)))


def fill_sparse(root):
    """Files with holes: between data, at the end, and one that is nothing but a hole; one is cut and grown again."""
    with open(f"{root}/sparse", "wb") as out:
        for offset in (0, 5 << 20, (200 << 20) + 12_345):
            out.seek(offset)
            out.write(random_bytes(offset, 70_001))
    with open(f"{root}/hole-only", "wb") as out:
        out.truncate((64 << 20) + 1)
    with open(f"{root}/cut-and-grown", "wb") as out:
        out.write(random_bytes("cut", 300_000))
        out.truncate(100_001)
        out.truncate(900_000)
        out.seek(500_000)
        out.write(b"after the cut")


def fill_odd(root):
    """Names, kinds, modes, owners, times, links and attributes that a copier is likely to get wrong."""
    odd = f"{root}/odd"
    os.mkdir(odd)
    write_file(f"{odd}/{'n' * 255}", b"a name of 255 bytes")
    write_file(f"{odd}/" + "\u00e4" * 127, b"a name of 254 bytes in UTF-8")
    write_file(os.fsencode(odd) + b"/not-utf8-\xff\xfe", b"a name that is not UTF-8")
    write_file(f"{odd}/spaces and\nnewline", b"")
    os.makedirs(f"{odd}/empty/dirs/below")
    os.symlink("no/such/target", f"{odd}/dangling")
    os.symlink("x" * 1023, f"{odd}/long-symlink")
    os.symlink("../many", f"{odd}/to-many")
    os.lchown(f"{odd}/dangling", 1234, 4321)
    write_file(f"{odd}/linked-0", b"three names, one file")
    for n in (1, 2):
        os.link(f"{odd}/linked-0", f"{odd}/linked-{n}")
    os.link(f"{odd}/linked-0", f"{root}/linked-elsewhere")
    write_file(f"{odd}/renamed-away", b"renamed over another")
    write_file(f"{odd}/renamed-onto", b"lost")
    os.rename(f"{odd}/renamed-away", f"{odd}/renamed-onto")
    os.mkdir(f"{odd}/moved")
    write_file(f"{odd}/moved/inside", b"moved with its directory")
    os.rename(f"{odd}/moved", f"{root}/moved-here")
    os.mkfifo(f"{odd}/fifo", 0o640)
    for n, mode in enumerate((0o000, 0o400, 0o644, 0o755, 0o1777, 0o2755, 0o4711, 0o7777)):
        path = f"{odd}/mode-{mode:04o}"
        write_file(path, b"m" * n)
        os.chown(path, 1000 + n, 2000 + n)
        os.chmod(path, mode)
        os.mkdir(f"{odd}/dir-{mode:04o}")
        os.chmod(f"{odd}/dir-{mode:04o}", mode)
    os.chown(f"{odd}/empty", 0xFFFF_FFF0, 65_534)
    for n, size in enumerate((0, 1, 511, 512, 4095, 4096, 4097, 65_535, 131_073, 1_048_577)):
        write_file(f"{odd}/size-{size}", random_bytes(n, size))
    with open(f"{odd}/overwritten", "wb") as out:
        out.write(random_bytes("under", 400_000))
        for offset in (0, 4096, 131_000, 399_000):
            out.seek(offset)
            out.write(random_bytes(offset, 1000))
    write_file(f"{odd}/attributes", b"has attributes")
    os.setxattr(f"{odd}/attributes", "user.short", b"v")
    os.setxattr(f"{odd}/attributes", "user.empty", b"")
    os.setxattr(f"{odd}/attributes", "user.binary", bytes(range(256)))
    os.setxattr(f"{odd}/attributes", "user." + "k" * 150, random_bytes("xattr", 2000))
    os.setxattr(f"{odd}/attributes", "user.gone", b"removed again")
    os.removexattr(f"{odd}/attributes", "user.gone")
    os.setxattr(f"{odd}/empty", "user.on-a-directory", b"yes")


def fill(root, many=20_000, big=0):
    """Everything above, and a file of `big` random bytes."""
    fill_many(root, many)
    fill_sparse(root)
    fill_odd(root)
    if big:
        write_random(f"{root}/big", "big", big)
    stamp(root)


def stamp(root):
    """Fixed times that follow from the names, leaves first, so that a later change of a directory can't undo them."""
    for directory, names, files in os.walk(root, topdown=False):
        for name in names + files:
            path = os.path.join(directory, name)
            n = zlib.crc32(os.fsencode(os.path.relpath(path, root)))
            when = TIMES_NS[n % len(TIMES_NS)] + n * 1_003
            os.utime(path, ns=(when, when), follow_symlinks=False)
    stamp_root(root)


def stamp_root(root):
    """A fixed time for the root, which every new name in it changes."""
    os.utime(root, ns=(TIMES_NS[0], TIMES_NS[0]))


def digest(path):
    """A hash of a file's bytes."""
    sha = hashlib.sha256()
    with open(path, "rb", buffering=0) as source:
        while piece := source.read(BLOCK):
            sha.update(piece)
    return sha.hexdigest()


def user_xattrs(path):
    """The `user.` attributes, sorted."""
    names = [n for n in os.listxattr(path, follow_symlinks=False) if n.startswith("user.")]
    return sorted((n, os.getxattr(path, n, follow_symlinks=False).hex()) for n in names)


def record(path, info):
    """All that is compared of one file."""
    kind = stat.S_IFMT(info.st_mode)
    out = {
        "mode": oct(info.st_mode),
        "owner": (info.st_uid, info.st_gid),
        "mtime": info.st_mtime_ns,
        "nlink": info.st_nlink,
        "ino": info.st_ino,
        "ctime": info.st_ctime_ns,
    }
    if kind == stat.S_IFLNK:
        out["target"] = os.readlink(path)
    else:
        out["xattrs"] = user_xattrs(path) if kind in (stat.S_IFREG, stat.S_IFDIR) else []
    if kind == stat.S_IFREG:
        out["size"] = info.st_size
        # A file counts as sparse only when most of it is a hole: how blocks round is each file system's own affair.
        out["sparse"] = info.st_size > BLOCK and info.st_blocks * 512 < info.st_size // 2
        out["content"] = digest(path)
    return out


def manifest(root, skip=lambda name: False):
    """Relative path -> record, for the root and everything below it."""
    root = os.fsencode(root)
    found, first_name = {}, {}

    def visit(path, relative):
        info = os.lstat(path)
        entry = record(path, info)
        if info.st_nlink > 1 and not stat.S_ISDIR(info.st_mode):
            entry["same file as"] = first_name.setdefault(info.st_ino, relative)
        found[relative] = entry
        if stat.S_ISDIR(info.st_mode):
            for name in sorted(os.listdir(path)):
                if not skip(name.decode("utf-8", "replace")):
                    visit(path + b"/" + name, (relative + b"/" + name).lstrip(b"/"))

    visit(root, b"")
    return found


def without(tree, top):
    """A manifest less the directories of the first level that `top` names."""
    return {path: entry for path, entry in tree.items() if path.split(b"/")[0].decode("utf-8", "replace") not in top}


# What two copies of a tree never share; one volume seen at two places does.
IDENTITY = ("ino", "ctime")


def differences(want, got, limit=20, ignore=IDENTITY):
    """What differs, in words; empty when the two manifests agree."""
    out = []
    for path in sorted(want.keys() | got.keys()):
        if path not in got:
            out.append(f"missing: {path!r}")
        elif path not in want:
            out.append(f"should not be there: {path!r}")
        else:
            a, b = want[path], got[path]
            out += [
                f"{path!r}: {key} is {b.get(key)!r}, should be {a.get(key)!r}"
                for key in a.keys() | b.keys()
                if key not in ignore and a.get(key) != b.get(key)
            ]
    if len(out) > limit:
        out[limit:] = [f"... and {len(out) - limit} more"]
    return out
