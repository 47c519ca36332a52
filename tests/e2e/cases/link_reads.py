"""Reading while the link is bad: at home with a cache that is too small for the data, and in the embassy.

What is cached reads on; what needs the store is EIO within a bounded time or right, never anything else; and it reads
again at once when the link is back. Looking around never waits, and unmounting is bounded.

Invariant: every byte that a read returns is compared with what was written.
"""

import contextlib
import errno
import itertools
import mmap
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from harness import FULL, MIB, Failed, Volume, check, mounted, program, run, s3_environment, s3_server, say, timed
from harness import wait_until
from proxy import Proxy

FAULTS = ["cut", "hang", "trickle", "reset", "500", "503", "403", "garbage", "wrong"]
FILES, SIZE = 24, MIB
# What the program promises for a read that needs the store, and what a busy machine may add.
READ_TIMEOUT, SLACK = 30, 5
HOLD = 180 if FULL else READ_TIMEOUT + SLACK + 2
# "At once", when the link is back.
RETURN = 5


def body(n):
    return random.Random(n).randbytes(SIZE)


class Readers:
    """Threads on one mount: some read cold files over and over, one reads a warm file and looks around."""

    def __init__(self, mount, name):
        self.point, self.name, self.ended, self.trouble = mount.point, name, False, None
        self.cold = []  # (begin, end, error number)
        self.stalls = {}
        # Two at a time want the same file: who waits for what another asks for must not wait longer than that one.
        self.lock, self.next = threading.Lock(), itertools.cycle(n for n in range(1, FILES) for _ in range(2))
        # Past the kernel's cache, and through it, where what could not be read ahead is asked for once more.
        self.direct = itertools.cycle([True, False, False])
        self.warm = os.open(self.point / "file-0", os.O_RDONLY)
        # Mapped, its pages stay in the kernel's cache, whoever drops that.
        self.mapped = mmap.mmap(self.warm, SIZE, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, prot=mmap.PROT_READ)
        # Metadata of what is looked at is here before the fault; the contents of the others are not.
        self.look_once()
        jobs = [self.read_cold] * 3 + [self.look]
        self.threads = [threading.Thread(target=self.guard, args=(job,), daemon=True) for job in jobs]
        for thread in self.threads:
            thread.start()

    def guard(self, job):
        try:
            while not self.ended:
                job()
        except Exception as e:
            self.trouble = self.trouble or f"{self.name}: {job.__name__}: {e!r}"

    def read_cold(self):
        with self.lock:
            n, direct = next(self.next), next(self.direct)
        fd = os.open(self.point / f"file-{n}", os.O_RDONLY | (os.O_DIRECT if direct else 0))
        begin, error, at = time.monotonic(), 0, random.randrange(SIZE // 2)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            data = b""
            # Through the cache a read ends before the first page that failed.
            while len(data) < SIZE // 2 and (more := os.pread(fd, SIZE // 2 - len(data), at + len(data))):
                data += more
            if data != body(n)[at : at + SIZE // 2]:
                raise Failed(f"file-{n} reads wrong at {at}")
        except OSError as e:
            error = e.errno
        finally:
            os.close(fd)
        self.cold.append((begin, time.monotonic(), error))
        time.sleep(0.1)

    def look(self):
        self.look_once()
        time.sleep(0.05)

    def look_once(self):
        for kind, call in (
            ("ls", lambda: len(os.listdir(self.point)) == FILES),
            ("stat", lambda: os.stat(self.point / "file-1").st_size == SIZE),
            ("df", lambda: os.statvfs(self.point)),
            ("warm read", lambda: os.pread(self.warm, SIZE, 0) == body(0)),
        ):
            right, took = timed(call)
            if not right:
                raise Failed(f"{kind} gives something wrong")
            self.stalls[kind] = max(took, self.stalls.get(kind, 0))

    def between(self, begin, end):
        """What began and ended in that time."""
        return [c for c in list(self.cold) if c[0] > begin and c[1] < end]

    def end(self):
        self.ended = True
        for thread in self.threads:
            thread.join(READ_TIMEOUT + 120)
        self.mapped.close()
        os.close(self.warm)
        if self.trouble or any(thread.is_alive() for thread in self.threads):
            raise Failed(self.trouble or f"{self.name}: a read does not come back")


class Scene:
    """One volume behind its own proxy: at home with a small cache, and abroad."""

    def __init__(self, directory, port, fault):
        self.directory, self.fault = directory / fault, fault
        self.directory.mkdir()
        direct = Volume(self.directory, f"s3://land/reads-{fault}", s3_environment(port))
        direct.init()
        self.proxy = Proxy(port)
        self.volume = direct.at(direct.url, s3_environment(self.proxy.port))
        small = ["cache_size=1M", "memory_size=8M", "read_ahead=64K"]
        home = self.volume.mount("home", self.directory / "state", options=small)
        for n in range(FILES):
            (home.point / f"file-{n}").write_bytes(body(n))
            if n % 6 == 5:
                home.sync()  # a segment for each few files, so that there is something to evict
        home.umount()
        # Mounted anew, and with a wide berth in its caches, it has hardly any contents.
        self.mounts = {
            "home": self.volume.mount("home", self.directory / "state", options=small),
            "embassy": self.volume.embassy(options=small),
        }
        self.readers = {name: Readers(mount, f"{fault}, {name}") for name, mount in self.mounts.items()}

    def run(self):
        time.sleep(1)
        self.proxy.set(self.fault)
        began = time.monotonic()
        time.sleep(HOLD)
        lifted = time.monotonic()
        if not FULL and self.fault in ("cut", "hang", "500"):
            return self.unmount_under_fault()
        self.proxy.set("pass")
        for name, readers in self.readers.items():
            self.judge(name, readers, began, lifted)
            readers.end()
            # Those that were under way when the link came back count, too: HOLD is longer than they may take.
            longest = max((end - begin for begin, end, _ in readers.cold), default=0)
            check(longest < READ_TIMEOUT + SLACK, f"{self.fault}, {name}: the longest took {longest:.1f} s")
        met = self.proxy.count()[self.fault]
        check(met > 0, f"{self.fault}: the proxy met {met} of them")
        for mount in self.mounts.values():
            mount.umount()
        return self.results()

    def judge(self, name, readers, began, lifted):
        def again():
            return [c for c in readers.cold if c[0] > lifted and c[2] == 0]

        wait_until(lambda: again() or readers.trouble, RETURN, f"{self.fault}, {name}: cold reads work again")
        if readers.trouble:
            raise Failed(readers.trouble)
        during = readers.between(began, lifted)
        errors = {c[2] for c in during} - {0}
        back = min(end for _, end, _ in again()) - lifted
        check(errors <= {errno.EIO}, f"{self.fault}, {name}: {len(during)} cold reads are right or EIO", str(errors))
        check(any(c[2] for c in readers.cold), f"{self.fault}, {name}: some needed the store")
        say(f"{self.fault}, {name}: {back:.1f} s after the link was back cold reads worked again")

    def unmount_under_fault(self):
        """Unmounting does not wait for reads that wait for the store."""
        for name, readers in self.readers.items():
            readers.ended = True
        for name, mount in self.mounts.items():
            # Reads are under way: --force is what an operator uses then.
            words = [program(), "umount", "--force", "--timeout", "3s", mount.point]
            done, took = timed(lambda: run(*words, limit=120, ok=None, env=self.volume.env))
            check(not mounted(mount.point) and took < 60, f"{self.fault}, {name}: umount --force ends after {took:.1f} s",
                  done.stderr)  # fmt: skip
        return self.results()

    def results(self):
        self.proxy.close()
        stalls = {}
        for readers in self.readers.values():
            for kind, took in readers.stalls.items():
                stalls[kind] = max(took, stalls.get(kind, 0))
        check(max(stalls.values()) < SLACK, f"{self.fault}: looking around took at most "
              f"{max(stalls.values()):.2f} s", str(stalls))  # fmt: skip
        return stalls


def main(directory):
    with s3_server(directory) as (_, port), contextlib.ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(len(FAULTS)))
        runs = {f: pool.submit(lambda f=f: Scene(directory, port, f).run()) for f in FAULTS}
        stalls, failures = {}, []
        for future in runs.values():
            try:
                for kind, took in future.result().items():
                    stalls[kind] = max(round(took, 2), stalls.get(kind, 0))
            except Failed as e:
                failures.append(str(e))
                say(f"FAILED  {e}")
        if failures:
            raise Failed("; ".join(failures))
    say(f"longest stalls of all, in seconds: {stalls}")
