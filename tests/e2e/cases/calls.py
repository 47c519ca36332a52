"""System calls that Python does not offer, children that run as somebody else, and ways to see how a call ended.

Invariant: a call that fails raises OSError with its errno, as those of `os` do.
"""

import ctypes
import errno
import os
import pickle
import struct

from harness import check

LIBC = ctypes.CDLL(None, use_errno=True)

RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_WHITEOUT = 1, 2, 4
KEEP_SIZE, PUNCH_HOLE, COLLAPSE_RANGE, ZERO_RANGE, INSERT_RANGE = 1, 2, 8, 16, 32
UTIME_NOW, UTIME_OMIT = (1 << 30) - 1, (1 << 30) - 2
AT_FDCWD = -100
F_OFD_SETLK = 37
# Ids that no account needs to have.
ALICE, BOB, NOBODY = 41001, 41002, 65534


def result(value):
    """What a C function gave back; -1 is an error."""
    if value == -1:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return value


def rename2(old, new, flags):
    words = (AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), ctypes.c_uint(flags))
    result(LIBC.renameat2(*words))


def fallocate(fd, mode, offset, length):
    result(LIBC.fallocate64(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)))


class Timespec(ctypes.Structure):
    _fields_ = [("seconds", ctypes.c_int64), ("nanos", ctypes.c_long)]


def utimens(path, atime, mtime):
    """utimensat(2) with (seconds, nanoseconds) twice."""
    both = (Timespec * 2)(Timespec(*atime), Timespec(*mtime))
    result(LIBC.utimensat(AT_FDCWD, os.fsencode(path), both, 0))


def getxattr_into(path, name, room):
    """getxattr(2) with room for so many bytes; gives the length."""
    buffer = ctypes.create_string_buffer(max(room, 1))
    return result(LIBC.getxattr(os.fsencode(path), os.fsencode(name), buffer, ctypes.c_size_t(room)))


def listxattr_into(path, room):
    buffer = ctypes.create_string_buffer(max(room, 1))
    return result(LIBC.listxattr(os.fsencode(path), buffer, ctypes.c_size_t(room)))


class Dirent(ctypes.Structure):
    _fields_ = [
        ("ino", ctypes.c_uint64),
        ("cookie", ctypes.c_int64),
        ("reclen", ctypes.c_ushort),
        ("type", ctypes.c_ubyte),
        ("name", ctypes.c_char * 256),
    ]


LIBC.opendir.restype = ctypes.c_void_p
LIBC.readdir64.restype = ctypes.POINTER(Dirent)
LIBC.telldir.restype = ctypes.c_long


class Directory:
    """opendir(3) and its kin: what Python's own listing hides, `.` and `..` and the places in between."""

    def __init__(self, path):
        self.stream = ctypes.c_void_p(LIBC.opendir(os.fsencode(path)))
        if not self.stream.value:
            result(-1)

    def next(self):
        """(name, inode number), or None at the end."""
        ctypes.set_errno(0)
        entry = LIBC.readdir64(self.stream)
        if not entry:
            if ctypes.get_errno():
                result(-1)
            return None
        return entry.contents.name, entry.contents.ino

    def take(self, count=None):
        """The next `count` entries, or all that are left."""
        out = []
        while count is None or len(out) < count:
            entry = self.next()
            if entry is None:
                break
            out.append(entry)
        return out

    def tell(self):
        return LIBC.telldir(self.stream)

    def seek(self, place):
        LIBC.seekdir(self.stream, ctypes.c_long(place))

    def rewind(self):
        LIBC.rewinddir(self.stream)

    def close(self):
        LIBC.closedir(self.stream)


def lock_record(kind, start=0, length=0):
    """A `struct flock` for fcntl(2)."""
    return struct.pack("hhqqi4x", kind, os.SEEK_SET, start, length, 0)


class Child:
    """A call in a process of its own, as another user if asked for; it runs while the parent goes on."""

    def __init__(self, call, user=None, groups=()):
        self.read_end, write_end = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.read_end)
            os._exit(self.inside(call, user, groups, write_end))
        os.close(write_end)

    @staticmethod
    def inside(call, user, groups, write_end):
        try:
            if user is not None:
                os.setgroups(groups)
                os.setgid(user)
                os.setuid(user)
            answer = ("value", call())
        except OSError as error:
            answer = ("errno", error.errno)
        except BaseException as other:
            answer = ("story", repr(other))
        with os.fdopen(write_end, "wb") as out:
            pickle.dump(answer, out)
        return 0

    def wait(self):
        """What the call gave; an error of the system is raised here."""
        with os.fdopen(self.read_end, "rb") as source:
            data = source.read()
        os.waitpid(self.pid, 0)
        kind, value = pickle.loads(data) if data else ("story", "it died")
        if kind == "errno":
            raise OSError(value, os.strerror(value))
        if kind == "story":
            raise RuntimeError(f"in a child: {value}")
        return value


def as_user(user, call, groups=()):
    """What `call()` gives when `user` makes it (also the number of the user's group)."""
    return Child(call, user, groups).wait()


def code_of(call):
    """The errno that a call ends with, 0 for none."""
    try:
        call()
        return 0
    except OSError as error:
        return error.errno


def named(code):
    # Two names of one number on Linux; the documents use this one.
    known = {**errno.errorcode, 0: "success", errno.EOPNOTSUPP: "EOPNOTSUPP"}
    return known.get(code, str(code))


def ends_with(code, claim, call):
    """A call that must end with an errno (0: succeed)."""
    got = code_of(call)
    check(got == code, f"{claim}: {named(code)}", f"got {named(got)}")
