"""Many writers with fsync, whose every change has a number: what is found later must be one of the states that were.

A change is one call that is one request: a record appended, pages overwritten in place, a name made, moved, removed.
Changes happen one at a time (the numbers are their order), fsyncs beside them, as many as there are writers. For each
change its effect on a plain map of the tree is noted, so that the tree after change n is known for every n. A tree
that is found after a crash is right if it is the tree after some n, and n is not below what an fsync had acknowledged.

Invariant: the notes lie outside the mount, in this process; an acknowledgement counts only for changes that had
returned before the fsync was called.
"""

import errno
import os
import random
import struct
import threading
import zlib
from pathlib import Path

from harness import Failed

PAGE = 4096
BLOCKS = 16
APPENDED, PAGED, NAMES = 6, 4, 150
# How a call ends when the daemon dies under it, or has died, or its disk has.
GONE = (errno.ENOTCONN, errno.ECONNABORTED, errno.EIO, errno.ENODEV, errno.ENOENT, errno.EROFS)


def read_tree(root):
    """The tree as the notes would have it."""
    found, root = {}, Path(root)
    for directory, names, files in os.walk(root):
        names[:] = [n for n in names if n != "lost+found"]
        for name in names:
            found[os.path.relpath(os.path.join(directory, name), root)] = "dir"
        for name in files:
            path = os.path.join(directory, name)
            found[os.path.relpath(path, root)] = "-> " + os.readlink(path) if os.path.islink(path) else content(path)
    return found


def content(path):
    """What a file's bytes say."""
    with open(path, "rb") as source:
        data = source.read()
    if not os.path.basename(path).startswith("p"):
        return (len(data), zlib.crc32(data))
    pages = []
    for at in range(0, len(data), PAGE):
        number = data[at : at + 8]
        if data[at : at + PAGE] != number * (PAGE // 8):
            raise Failed(f"{path}: the page at {at} is torn")
        pages.append(struct.unpack("<Q", number)[0])
    return tuple(pages)


class Load:
    """The notes, and the writers of one life of the mount at a time."""

    def __init__(self, seed, writers=6):
        self.seed, self.writers, self.lock = seed, writers, threading.Lock()
        self.tree, self.base, self.base_tree, self.history = {}, 0, {}, []
        self.acknowledged, self.fsyncs, self.life = 0, 0, 0
        self.threads, self.trouble, self.ending, self.doomed = [], None, False, False

    @property
    def number(self):
        return self.base + len(self.history)

    def start(self, point):
        """Writers begin on what the tree holds now."""
        self.ending, self.doomed, self.life = False, False, self.life + 1
        # Names are looked up from here: below a mount point that has lost its mount nothing is written.
        self.root, self.fds = os.open(point, os.O_DIRECTORY), {}
        self.draw = random.Random(f"{self.seed}.{self.life}")
        for k in range(APPENDED):
            self.fds[f"a{k}"] = None
        for k in range(PAGED):
            self.fds[f"p{k}"] = None
        self.threads = [threading.Thread(target=self.write, args=(k,), daemon=True) for k in range(self.writers)]
        for thread in self.threads:
            thread.start()

    def write(self, k):
        draw = random.Random(f"{self.seed}.{self.life}.{k}")
        try:
            while not self.ending:
                for _ in range(draw.choice([1, 1, 2, 5, 20])):
                    self.change()
                self.fsync(draw)
        except OSError as e:
            if not (self.doomed and e.errno in GONE):
                self.trouble = self.trouble or f"writer {k}: {e}"
        except Failed as e:
            self.trouble = self.trouble or str(e)

    def fsync(self, draw):
        with self.lock:
            upto = self.number
            fds = [fd for fd in self.fds.values() if fd is not None]
        if not fds:
            return
        os.fsync(draw.choice(fds))
        with self.lock:
            self.acknowledged = max(self.acknowledged, upto)
            self.fsyncs += 1

    def change(self):
        """One change: done, then noted; one that fails as the daemon dies may have happened, and is the last."""
        with self.lock:
            if self.ending:
                return
            call, effects = self.choose(self.number + 1)
            try:
                call()
            except OSError:
                self.ending = True
                self.note(effects)
                raise
            self.note(effects)

    def note(self, effects):
        self.history.append(effects)
        for path, value in effects:
            if value is None:
                del self.tree[path]
            else:
                self.tree[path] = value

    def choose(self, n):
        """(the call, what it does to the tree) of change n."""
        kind = self.draw.choices(("append", "page", "name"), (4, 3, 4))[0]
        if kind == "name":
            return self.choose_name(n)
        name = f"a{self.draw.randrange(APPENDED)}" if kind == "append" else f"p{self.draw.randrange(PAGED)}"
        if name not in self.tree:
            return lambda: self.open(name), [(name, (0, 0) if kind == "append" else ())]
        fd = self.fds[name] if self.fds[name] is not None else self.open(name)
        if kind == "append":
            length, crc = self.tree[name]
            if length > 50_000:
                return lambda: os.ftruncate(fd, 0), [(name, (0, 0))]
            record = b"%031d\n" % n
            return lambda: os.write(fd, record), [(name, (length + len(record), zlib.crc32(record, crc)))]
        return self.choose_pages(n, name, fd)

    def choose_pages(self, n, name, fd):
        at, count = self.draw.randrange(BLOCKS), self.draw.choice([1, 1, 1, 4])
        pages = list(self.tree[name])
        pages += [0] * (at + count - len(pages))
        pages[at : at + count] = [n] * count
        data = struct.pack("<Q", n) * (PAGE // 8 * count)
        return lambda: os.pwrite(fd, data, at * PAGE), [(name, tuple(pages))]

    def open(self, name):
        flags = os.O_CREAT | os.O_RDWR | (os.O_APPEND if name.startswith("a") else 0)
        self.fds[name] = os.open(name, flags, 0o644, dir_fd=self.root)
        return self.fds[name]

    def choose_name(self, n):
        """Names in two directories; what they stand for is an empty file, a link or a directory."""
        root, draw = self.root, self.draw
        for directory in ("d0", "d1"):
            if directory not in self.tree:
                return lambda: os.mkdir(directory, dir_fd=root), [(directory, "dir")]
        new = f"d{draw.randrange(2)}/n{n}"
        old = [p for p in self.tree if "/" in p]
        what = draw.choice(["file", "link", "dir", "move", "move", "remove"])
        if len(old) > NAMES or (old and what == "remove"):
            path = draw.choice(old)
            remove = os.rmdir if self.tree[path] == "dir" else os.unlink
            return lambda: remove(path, dir_fd=root), [(path, None)]
        if old and what == "move":
            path = draw.choice(old)
            return lambda: os.rename(path, new, src_dir_fd=root, dst_dir_fd=root), [(path, None), (new, self.tree[path])]
        if what == "dir":
            return lambda: os.mkdir(new, dir_fd=root), [(new, "dir")]
        if what == "link":
            return lambda: os.symlink(str(n), new, dir_fd=root), [(new, f"-> {n}")]
        return lambda: os.mknod(new, 0o100644, dir_fd=root), [(new, (0, 0))]

    def stop(self):
        """Ends the writers; what went wrong with them, other than the death of the daemon, fails the case."""
        self.ending = True
        for thread in self.threads:
            thread.join(60)
            if thread.is_alive():
                raise Failed("a writer does not come back from its call")
        for name, fd in self.fds.items():
            if fd is not None:
                try:
                    os.close(fd)
                except OSError:
                    pass
            self.fds[name] = None
        os.close(self.root)
        if self.trouble:
            raise Failed(self.trouble)

    def find(self, found, least, when):
        """The number of the last change after which the tree was as found; at least `least`."""
        tree = dict(self.base_tree)
        wrong = {p for p in tree.keys() | found.keys() if tree.get(p) != found.get(p)}
        last, nearest = (self.base, 0) if not wrong else (None, len(wrong))
        for n, effects in enumerate(self.history, self.base + 1):
            for path, value in effects:
                tree[path] = value
                (wrong.discard if value == found.get(path) else wrong.add)(path)
            nearest = min(nearest, len(wrong))
            if not wrong:
                last = n
        if last is None:
            raise Failed(f"{when}: the tree is no state that was (the nearest differs in {nearest} names)")
        if last < least:
            raise Failed(f"{when}: {least} changes were acknowledged, {last} are there")
        return last

    def go_on_from(self, number):
        """What was changed behind `number` did not survive, and is forgotten."""
        for effects in self.history[: number - self.base]:
            for path, value in effects:
                if value is None:
                    self.base_tree.pop(path, None)
                else:
                    self.base_tree[path] = value
        del self.history[: number - self.base]
        self.base = number

    def forget_rest(self):
        """After a crash: the changes behind the base never happened."""
        self.history, self.tree = [], dict(self.base_tree)
        self.acknowledged = self.base
