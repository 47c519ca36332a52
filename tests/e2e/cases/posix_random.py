"""Changes of a file at random against a plain array, with what fsx does not do: zero ranges, sparse growth, a second
file to copy from, remounts in the middle.

Invariant: the array is changed only here, and each read of the mount is compared with it.
"""

import mmap
import os
import random

from calls import KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE, fallocate
from harness import FULL, Failed, say

SEED = int(os.environ.get("E2E_SEED", "1"))
ROUNDS = 12 if FULL else 3
CHANGES = 10_000 if FULL else 1_500
SIZE = 3 << 20
LENGTHS = (1, 100, 4096, 5000, 70_000, 131_072, 400_000)


class Model:
    """A file and what must be in it."""

    def __init__(self, seed):
        self.draw, self.want, self.other = random.Random(seed), bytearray(), bytearray()
        self.fd = self.other_fd = None

    def open(self, root):
        self.fd = os.open(root / "random", os.O_RDWR | os.O_CREAT)
        self.other_fd = os.open(root / "random-other", os.O_RDWR | os.O_CREAT)

    def close(self):
        os.close(self.fd)
        os.close(self.other_fd)

    def span(self):
        """Offset and length; often on the borders of pages and records."""
        at = self.draw.randrange(SIZE)
        length = min(self.draw.randint(1, self.draw.choice(LENGTHS)), SIZE - at)
        if self.draw.random() < 0.3:
            at -= at % self.draw.choice((4096, 131_072))
        return at, length

    def put(self, at, data):
        """What a write does to the array."""
        if at > len(self.want):
            self.want.extend(bytes(at - len(self.want)))
        self.want[at : at + len(data)] = data

    def write(self):
        at, length = self.span()
        data = self.draw.randbytes(length)
        os.pwrite(self.fd, data, at)
        self.put(at, data)

    def map_write(self):
        at, length = self.span()
        length = min(length, len(self.want) - at)
        if length > 0:
            data = self.draw.randbytes(length)
            with mmap.mmap(self.fd, len(self.want)) as pages:
                pages[at : at + length] = data
            self.want[at : at + length] = data

    def truncate(self):
        size = self.draw.randrange(SIZE)
        os.ftruncate(self.fd, size)
        del self.want[size:]
        self.want.extend(bytes(size - len(self.want)))

    def zero(self, mode, keep):
        at, length = self.span()
        fallocate(self.fd, mode | (KEEP_SIZE if keep else 0), at, length)
        end = min(at + length, len(self.want)) if keep else at + length
        if end > at:
            self.put(at, bytes(end - at))

    def allocate(self):
        at, length = self.span()
        keep = self.draw.random() < 0.5
        fallocate(self.fd, KEEP_SIZE if keep else 0, at, length)
        if not keep and at + length > len(self.want):
            self.want.extend(bytes(at + length - len(self.want)))

    def copy(self, source, from_other):
        """copy_file_range; within one file the ranges must not overlap."""
        at, length = self.span()
        to = self.draw.randrange(SIZE)
        length = min(length, len(source) - at, SIZE - to)
        if length <= 0 or (not from_other and abs(at - to) < length):
            return
        data, done = bytes(source[at : at + length]), 0
        fd = self.other_fd if from_other else self.fd
        while done < length:
            step = os.copy_file_range(fd, self.fd, length - done, at + done, to + done)
            if step == 0:
                raise Failed(f"copy_file_range gave 0 of {length - done} bytes")
            done += step
        self.put(to, data)

    def write_other(self):
        at, length = self.span()
        data = self.draw.randbytes(length)
        os.pwrite(self.other_fd, data, at)
        self.other.extend(bytes(max(0, at - len(self.other))))
        self.other[at : at + length] = data

    def read(self):
        at, length = self.span()
        got, want = os.pread(self.fd, length, at), bytes(self.want[at : at + length])
        if got != want:
            self.differ(got, want, at)

    def differ(self, got, want, at):
        first = next((n for n, (a, b) in enumerate(zip(got, want)) if a != b), min(len(got), len(want)))
        raise Failed(f"{len(got)} bytes at {at}, wanted {len(want)}; the first that differs is at {at + first}")

    def forget(self):
        """The kernel's pages go; the next reads ask the daemon."""
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def step(self):
        kinds = {
            self.write: 20,
            self.map_write: 8,
            self.truncate: 3,
            lambda: self.zero(ZERO_RANGE, keep=False): 8,
            lambda: self.zero(ZERO_RANGE, keep=True): 8,
            lambda: self.zero(PUNCH_HOLE, keep=True): 8,
            self.allocate: 4,
            lambda: self.copy(self.want, from_other=False): 8,
            lambda: self.copy(self.other, from_other=True): 8,
            self.write_other: 5,
            self.read: 25,
            self.forget: 3,
            lambda: os.fsync(self.fd): 1,
        }
        self.draw.choices(list(kinds), weights=kinds.values())[0]()
        if os.fstat(self.fd).st_size != len(self.want):
            raise Failed(f"the size is {os.fstat(self.fd).st_size}, should be {len(self.want)}")

    def whole(self):
        for fd, want in ((self.fd, self.want), (self.other_fd, self.other)):
            got = os.pread(fd, SIZE * 2, 0)
            if got != want:
                self.differ(got, bytes(want), 0)


def run(volume, home, options):
    """Rounds of changes with a remount, clean or after SIGKILL, between; gives the last mount and how to look again."""
    model, steps = Model(SEED), 0
    for number in range(ROUNDS):
        model.open(home.point)
        for _ in range(CHANGES):
            try:
                model.step()
            except Failed as failure:
                raise Failed(f"seed {SEED}, change {steps} in round {number}: {failure}") from failure
            steps += 1
        model.whole()
        kill = number % 2 == 1
        if kill:
            os.fsync(model.fd)
            home.kill()
        model.close()
        if not kill:
            home.umount(limit=300)
        home = volume.mount("home", home.state, options=options)
        model.open(home.point)
        model.whole()
        model.close()
    say(f"ok  {steps} changes at random against an array, with {ROUNDS} remounts (seed {SEED})")

    def again(point):
        if (point / "random").read_bytes() != model.want or (point / "random-other").read_bytes() != model.other:
            raise Failed("the randomly changed files differ")
        say("ok  the randomly changed files are there")

    return home, again
