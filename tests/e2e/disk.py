"""A disk with a volatile write cache that can lose its power and can fail: ext4 on a loop device on one file, which
this program serves through FUSE.

What is written is pending until the kernel flushes the device (the loop driver turns a flush into fsync). `cut(image)`
writes what a power cut leaves: all that was flushed, and of each pending write none, all,
or some of its sectors. `fail(...)` answers flushes or writes with an I/O error from then on.

Invariant: requests are handled one at a time under one lock, so an image is of one instant. The serving process is
not the one that uses the disk: it never waits for itself.
"""

import ctypes
import errno
import json
import os
import queue
import random
import stat
import struct
import sys
import threading
import time
from pathlib import Path

SECTOR = 512
PAGE = 4096
MAX_WRITE = 1 << 20
FILE = 2
LOOKUP, FORGET, GETATTR, SETATTR, OPEN, READ, WRITE, STATFS, RELEASE = 1, 2, 3, 4, 14, 15, 16, 17, 18
FSYNC, FLUSH, INIT, INTERRUPT, DESTROY, BATCH_FORGET = 20, 25, 26, 36, 38, 42
NO_ANSWER = (FORGET, INTERRUPT, BATCH_FORGET)


def memory_file(size):
    fd = os.memfd_create("disk")
    os.truncate(fd, size)
    return fd


def copy_sparse(source, path):
    """The file in memory as a file on disk, holes left out; gives its descriptor."""
    size = os.fstat(source).st_size
    sink = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_RDWR, 0o600)
    os.truncate(sink, size)
    at = 0
    while at < size:
        try:
            at = os.lseek(source, at, os.SEEK_DATA)
        except OSError:
            break
        end = os.lseek(source, at, os.SEEK_HOLE)
        while at < end:
            at += os.pwrite(sink, os.pread(source, min(MAX_WRITE, end - at), at), at)
    return sink


class Served:
    """The disk's contents and its faults; answers the kernel's requests on `fd`."""

    def __init__(self, fd, size):
        self.fd, self.size, self.lock = fd, size, threading.Lock()
        self.now, self.flushed, self.pending = memory_file(size), memory_file(size), []
        self.fail = {"write": False, "flush": False}
        self.count = {"writes": 0, "flushes": 0, "failed": 0}
        # A cut that waits for so many more writes; what it found is put into `done`.
        self.armed, self.done = None, queue.Queue()

    def serve(self):
        buffer = bytearray(MAX_WRITE + 2 * PAGE)
        view = memoryview(buffer)
        while True:
            try:
                length = os.readv(self.fd, [buffer])
            except OSError as e:
                if e.errno in (errno.EINTR, errno.EAGAIN, errno.ENOENT):
                    continue
                return  # unmounted or aborted
            _, code, unique, node = struct.unpack_from("<IIQQ", buffer)
            if code in NO_ANSWER:
                continue
            with self.lock:
                error, body = self.handle(code, node, view[40:length])
            try:
                os.writev(self.fd, [struct.pack("<IiQ", 16 + len(body), -error, unique), body])
            except OSError:
                pass  # the request was given up
            if code == DESTROY:
                return

    def handle(self, code, node, body):
        """(error number, answer) of one request."""
        if code == WRITE:
            return self.write(body)
        if code == READ:
            _, offset, length = struct.unpack_from("<QQI", body)
            return 0, os.pread(self.now, length, offset)
        if code in (FSYNC, FLUSH):
            return self.flush() if code == FSYNC else (0, b"")
        if code == INIT:
            # Big writes, many pages a request; nothing is cached by the kernel, see OPEN.
            return 0, struct.pack("<IIIIHHIIHHI28x", 7, 31, 0, 1 << 5 | 1 << 22, 16, 12, MAX_WRITE, 1, 256, 0, 0)
        if code == LOOKUP:
            found = bytes(body).rstrip(b"\0") == b"disk"
            return (0, struct.pack("<QQQQII", FILE, 0, 3600, 3600, 0, 0) + self.attr(FILE)) if found else (2, b"")
        if code in (GETATTR, SETATTR):
            return 0, struct.pack("<QII", 3600, 0, 0) + self.attr(node)
        if code == OPEN:
            return 0, struct.pack("<QII", 0, 1, 0)  # FOPEN_DIRECT_IO
        if code == STATFS:
            return 0, struct.pack("<QQQQQIIII24x", self.size // PAGE, 0, 0, 1, 0, PAGE, 255, PAGE, 0)
        return (0, b"") if code in (RELEASE, DESTROY) else (errno.ENOSYS, b"")

    def attr(self, node):
        mode = stat.S_IFREG | 0o600 if node == FILE else stat.S_IFDIR | 0o700
        size = self.size if node == FILE else 0
        return struct.pack("<QQQQQQIIIIIIIIII", node, size, size // 512, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, PAGE, 0)

    def write(self, body):
        _, offset, length = struct.unpack_from("<QQI", body)
        self.count["writes"] += 1
        if self.fail["write"]:
            self.count["failed"] += 1
            return errno.EIO, b""
        data = bytes(body[40 : 40 + length])
        os.pwrite(self.now, data, offset)
        self.pending.append((offset, data))
        if self.armed:
            writes, order = self.armed
            self.armed = (writes - 1, order) if writes > 1 else None
            if not self.armed:
                self.done.put(self.cut(order))
        return 0, struct.pack("<II", length, 0)

    def flush(self):
        self.count["flushes"] += 1
        if self.fail["flush"]:
            self.count["failed"] += 1
            return errno.EIO, b""
        for offset, data in self.pending:
            os.pwrite(self.flushed, data, offset)
        self.pending = []
        return 0, b""

    def cut(self, order):
        """Writes what a power cut leaves, with the lock held. `keep`: of what is pending "none", "all" or "some"."""
        draw, kept, sectors = random.Random(order["seed"]), 0, 0
        sink = copy_sparse(self.flushed, order["cut"])
        share = {"none": 0.0, "all": 1.0, "some": draw.random()}[order["keep"]]
        for offset, data in self.pending:
            whole = draw.random() < 0.5  # else sector by sector: a torn write
            take = draw.random() < share
            for at in range(0, len(data), SECTOR):
                sectors += 1
                if take if whole else draw.random() < share:
                    os.pwrite(sink, data[at : at + SECTOR], offset + at)
                    kept += 1
        os.close(sink)
        return {"pending": sectors, "kept": kept}

    def obey(self, order):
        if "cut" in order:
            with self.lock:
                if not order["after"]:
                    return self.cut(order)
                self.armed = (order["after"], order)
            return self.done.get()
        with self.lock:
            self.fail.update(order.get("fail", {}))
            return dict(self.count, pending=len(self.pending))


def main():
    """Serves the disk at the mount point given; orders come as lines of JSON, and so do the answers."""
    point, size = sys.argv[1], int(sys.argv[2])
    fd = os.open("/dev/fuse", os.O_RDWR)
    libc = ctypes.CDLL(None, use_errno=True)
    options = f"fd={fd},rootmode=40000,user_id=0,group_id=0".encode()
    if libc.mount(b"disk", point.encode(), b"fuse.e2edisk", 0, options) != 0:
        sys.exit(f"mount of {point}: {os.strerror(ctypes.get_errno())}")
    served = Served(fd, size)
    # The process ends with the mount, whoever took it away.
    threading.Thread(target=lambda: (served.serve(), os._exit(0)), daemon=True).start()
    print(json.dumps({}), flush=True)
    for line in sys.stdin:
        print(json.dumps(served.obey(json.loads(line))), flush=True)
    while True:  # its user is gone: the disk stays until it is unmounted
        time.sleep(3600)


class Disk:
    """A file system on such a disk, at `directory/NAME`; to be closed, or cleaned up by the runner."""

    def __init__(self, directory, name="disk", mib=512):
        from harness import Helper, empty_dir

        self.raw, self.point = empty_dir(Path(directory) / f"{name}-raw"), empty_dir(Path(directory) / name)
        self.helper = Helper(__file__, self.raw, mib << 20)
        try:
            # Without a barrier less: what the file system writes is what any ext4 writes.
            mount_image(self.raw / "disk", self.point, make=True)
        except BaseException:
            self.close()
            raise

    def cut(self, image, keep, seed=0, after=0):
        """The power goes now, or right after so many more writes, which must come: between a write and its flush."""
        return self.helper.ask({"cut": str(image), "keep": keep, "seed": seed, "after": after})

    def fail(self, **what):
        return self.helper.ask({"fail": what})

    def remount(self):
        """Takes the file system off and puts it on again: what only the kernel's memory held is gone."""
        unmount(self.point)
        mount_image(self.raw / "disk", self.point)

    def close(self):
        from harness import mounted

        if mounted(self.point):
            unmount(self.point)
        unmount(self.raw)
        self.helper.close()


def mount_image(image, point, make=False):
    """Mounts ext4 in a file; the kernel replays its journal. The loop device goes with the mount."""
    from harness import run

    if make:
        run("mkfs.ext4", "-q", "-F", "-E", "nodiscard,lazy_itable_init=1,lazy_journal_init=1", image, limit=120)
    Path(point).mkdir(exist_ok=True)
    run("mount", "-t", "ext4", "-o", "loop,noinit_itable", image, point, limit=120)


def unmount(point):
    from harness import run, wait_until

    # A daemon that has just ended may still be closing its files.
    wait_until(lambda: run("umount", point, ok=None).returncode == 0, 30, f"umount of {point}", pause=0.1)


if __name__ == "__main__":
    main()
