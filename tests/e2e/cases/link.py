"""The link to the embassy in every bad state, at each protection level, while applications write, read and look.

Each level runs under all faults of proxy.py at once, each fault with a volume of its own: some time without it, some
time with it, then without it again. `reads` and `drain` are in modules of their own.

Invariant: what the store holds is read by another way than the one that is disturbed; the longest stall of every kind
of call is measured throughout, by threads that do nothing else.
"""

import contextlib
import errno
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from cases import link_drain, link_reads
from harness import FULL, Failed, Volume, check, mounted, program, run, s3_environment, s3_server, say, timed, wait_until
from proxy import Proxy

# Puts do not arrive.
BROKEN = ["cut", "hang", "trickle", "reset", "500", "503", "403", "garbage"]
# Puts take effect: at no level may anybody notice.
HARMLESS = ["wrong", "lost"]
# Home is killed under these, and unmounted under the others.
KILLED = ["cut", "trickle", "503"]
TIMEOUT = 20 if FULL else 2
# How long a fault is held.
HOLD = 180 if FULL else 3 * TIMEOUT
# fsync, and every other call, may take this long beyond what it was told to wait.
SLACK = 3.0
# Until all is shipped again: minutes of it, in the long form. A store that refuses is asked again every 30 s only.
RETURN, RETURN_REFUSED = (60, 90) if FULL else (15, 45)


@dataclass
class Fsync:
    """One fsync: of which writer's record, when, and how it ended."""

    writer: int
    number: int
    begin: float
    end: float
    error: int

    @property
    def took(self):
        return self.end - self.begin


class Users:
    """Threads that use a mount: writers that fsync each record, and one that looks around and reads."""

    def __init__(self, point, writers=2):
        self.point, self.fsyncs, self.stalls, self.trouble, self.ended = point, [], {}, None, False
        self.warm = os.urandom(1 << 20)
        (point / "warm").write_bytes(self.warm)
        self.looker = os.open(point / "warm", os.O_RDONLY | os.O_DIRECT)
        jobs = [(self.write, k) for k in range(writers)] + [(self.look, None)]
        self.threads = [threading.Thread(target=self.guard, args=job, daemon=True) for job in jobs]
        for thread in self.threads:
            thread.start()

    def guard(self, job, k):
        try:
            job(k)
        except Exception as e:  # whatever it was, the case must not take it for silence
            self.trouble = self.trouble or f"{job.__name__}: {e!r}"

    def write(self, k):
        fd, number = os.open(self.point / f"w{k}", os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o644), 0
        while not self.ended:
            number += 1
            self.note("write", lambda: os.write(fd, b"%031d\n" % number))
            begin = time.monotonic()
            error = fsync_error(fd)
            self.fsyncs.append(Fsync(k, number, begin, time.monotonic(), error))
            time.sleep(0.05)
        os.close(fd)

    def look(self, _):
        """What an operator and an application do that waits for nobody abroad; one read goes past the page cache."""
        while not self.ended:
            self.note("ls", lambda: os.listdir(self.point))
            self.note("stat", lambda: os.stat(self.point / "warm"))
            self.note("df", lambda: os.statvfs(self.point))
            self.note("create", lambda: (self.point / "made").write_bytes(b"made"))
            self.note("rename", lambda: os.rename(self.point / "made", self.point / "moved"))
            if self.note("read", lambda: (self.point / "warm").read_bytes()) != self.warm:
                raise Failed("a cached file reads wrong")
            if self.note("read", lambda: os.pread(self.looker, 65536, 65536)) != self.warm[65536:131072]:
                raise Failed("a cached file reads wrong past the page cache")
            time.sleep(0.03)
        os.close(self.looker)

    def note(self, kind, call):
        result, took = timed(call)
        self.stalls[kind] = max(took, self.stalls.get(kind, 0))
        return result

    def promised(self):
        """The newest record of each writer whose fsync succeeded."""
        return {f.writer: f.number for f in list(self.fsyncs) if f.error == 0}

    def between(self, begin, end):
        return [f for f in list(self.fsyncs) if f.begin > begin and f.end < end]

    def end(self):
        self.ended = True
        for thread in self.threads:
            thread.join(60)
        if self.trouble or any(thread.is_alive() for thread in self.threads):
            raise Failed(self.trouble or "a call on the mount does not come back")


def fsync_error(fd):
    try:
        os.fsync(fd)
        return 0
    except OSError as e:
        return e.errno


class Scene:
    """A volume behind a proxy of its own, mounted at home, in use."""

    def __init__(self, directory, port, level, fault):
        self.directory, self.level, self.fault = directory / fault, level, fault
        self.directory.mkdir()
        self.broken, self.claims = fault in BROKEN, []
        self.direct = Volume(self.directory, f"s3://land/{level}-{fault}", s3_environment(port))
        self.direct.init()
        self.proxy = Proxy(port)
        self.volume = self.direct.at(self.direct.url, s3_environment(self.proxy.port))
        self.options = [f"protection={level}", f"sync_timeout={TIMEOUT}s"]
        self.home = self.volume.mount("home", self.directory / "state", options=self.options)
        self.users = Users(self.home.point)

    def check(self, holds, claim, detail=""):
        """As harness.check, told at the end and in one line: the scenes run side by side."""
        if not holds:
            raise Failed(f"{self.fault}: {claim}: {detail}")
        self.claims.append(claim)

    def log(self):
        return (self.home.state / "embassyfs.log").read_text()

    def embassy_holds(self, when):
        """Another mount, past the proxy: it has each record whose fsync has succeeded by now."""
        promised = self.users.promised()
        embassy = self.direct.embassy()
        for k, number in promised.items():
            held = (embassy.point / f"w{k}").stat().st_size // 32
            if held < number:
                raise Failed(f"{self.fault}, {when}: fsync of record {number} succeeded, the embassy has {held}")
        embassy.umount()
        self.check(promised, f"{when}: the embassy holds what fsync acknowledged: {promised}")

    def run(self):
        self.users_work(1.0 if not FULL else 10)
        if self.level != "local":
            self.embassy_holds("before")
        self.check(not [f for f in self.users.fsyncs if f.error], "fsync succeeds without the fault")
        # The link is as long as the real one while it works.
        self.proxy.set("pass", delay=0.0175, open="resume")
        self.users_work(0.5)
        self.proxy.set(self.fault)
        began = time.monotonic()
        self.users_work(HOLD)
        self.during(self.users.between(began, time.monotonic()))
        met = self.proxy.count()[self.fault]
        self.check(met, f"the proxy met {met} of them")
        self.proxy.set("pass")
        self.after()
        self.check(self.home.status()["pid"] == self.home.pid, "all that with one daemon")
        if self.level == "local":
            leave_and_come_back(self)
        else:
            self.home.umount()
        stalls = {kind: round(took, 2) for kind, took in sorted(self.users.stalls.items())}
        self.check(max(stalls.values()) < SLACK, f"longest stalls in seconds: {stalls}")
        self.proxy.close()
        check(True, f"{self.fault}: {'; '.join(self.claims)}")
        return {"met": met, "stalls": self.users.stalls}

    def users_work(self, seconds):
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self.users.trouble:
            time.sleep(0.05)
        if self.users.trouble:
            raise Failed(f"{self.fault}: {self.users.trouble}")

    def during(self, fsyncs):
        {"strict": strict, "available": available, "local": local}[self.level](self, fsyncs)

    def after(self):
        """It drains by itself, fsync works as before, and the embassy is equal to home."""
        began = time.monotonic()
        wait_until(self.in_sync, RETURN_REFUSED if self.fault == "403" else RETURN, f"{self.fault}: drains", pause=0.2)
        took = time.monotonic() - began
        again = time.monotonic()
        wait_until(lambda: len(self.users.between(again, time.monotonic())) >= 4, 20, f"{self.fault}: fsyncs go on")
        late = [f for f in self.users.between(again, time.monotonic()) if f.error]
        self.check(not late, f"back in sync {took:.1f} s after the fault was gone, and fsync succeeds")
        if self.level == "available" and self.broken:
            wait_until(lambda: "back in sync" in self.log(), 10, f"{self.fault}: the log says so")
        self.users.end()
        self.home.sync()
        embassy = self.direct.embassy()
        for name in ("w0", "w1", "warm"):
            if (embassy.point / name).read_bytes() != (self.home.point / name).read_bytes():
                raise Failed(f"{self.fault}: {name} is not the same abroad")
        embassy.umount()

    def in_sync(self):
        """Up to what the writers, who go on, have just written."""
        status = self.home.status()
        return status["in_sync"] and status["lag_seconds"] < 2 and not status["last_error"]


def strict(scene, fsyncs):
    """fsync never succeeds for what the embassy does not hold; it fails in time, and the mount stays usable."""
    longest = max((f.took for f in fsyncs), default=0)
    if not scene.broken:
        scene.check(fsyncs and not any(f.error for f in fsyncs), f"{len(fsyncs)} fsyncs succeed meanwhile")
        return scene.embassy_holds("meanwhile")
    false = [f for f in fsyncs if f.error == 0]
    scene.check(not false, "no fsync succeeds", str(false[:1]))
    scene.check(fsyncs and all(f.error == errno.EIO for f in fsyncs), f"{len(fsyncs)} give EIO")
    early = [f for f in fsyncs if f.took < TIMEOUT - 0.3]
    scene.check(longest < TIMEOUT + SLACK and not early, f"after {longest:.1f} s at the latest", str(early))
    scene.embassy_holds("meanwhile")


def available(scene, fsyncs):
    """fsync falls back in time, and everybody can see it."""
    failed = [f for f in fsyncs if f.error]
    longest = max((f.took for f in fsyncs), default=0)
    scene.check(fsyncs and not failed, f"{len(fsyncs)} fsyncs succeed, the slowest after {longest:.1f} s", str(failed[:3]))
    status = scene.home.status()
    if not scene.broken:
        return scene.check(status["in_sync"] and status["fallbacks"] == 0, "it stays in sync", str(status))
    scene.check(longest < TIMEOUT + SLACK, "it falls back in time", f"{longest:.1f} s")
    scene.check(fsyncs[-1].took < SLACK / 2, "then fsync waits for the spool only", f"{fsyncs[-1].took:.1f} s")
    scene.check(not status["in_sync"] and status["fallbacks"] == 1, "status says OUT OF SYNC", str(status))
    # Over a trickle something small may have arrived since, and then there is no error since.
    why = status["last_error"] or scene.fault == "trickle"
    told = status["unsent_bytes"] > 0 and status["lag_seconds"] > 1 and why
    scene.check(told, f"and how far behind, and why: {status['last_error']}", str(status))
    scene.check("OUT OF SYNC" in scene.log(), "and so does the log")


def local(scene, fsyncs):
    """Applications see nothing; the lag does."""
    failed = [f for f in fsyncs if f.error]
    longest = max((f.took for f in fsyncs), default=0)
    fine = len(fsyncs) > HOLD and not failed and longest < SLACK
    scene.check(fine, f"{len(fsyncs)} fsyncs succeed, the slowest after {longest:.2f} s", str(failed[:3]))
    status = scene.home.status()
    if scene.broken:
        scene.check(status["lag_seconds"] > HOLD / 2, f"the lag is {status['lag_seconds']:.1f} s", str(status))


def unmount_in_time(scene):
    command = [program(), "umount", "--timeout", "1s", scene.home.point]
    done, took = timed(lambda: run(*command, limit=120, ok=None, env=scene.volume.env))
    scene.check(not mounted(scene.home.point) and took < 30, f"umount ends after {took:.1f} s")
    if scene.broken:
        told = done.returncode == 5 and "unsent" in done.stderr and "the next mount" in done.stderr
        scene.check(told, "and says what stays in the spool and will be sent", f"{done.returncode}: {done.stderr}")
    else:
        scene.check(done.returncode == 0, "with everything shipped", done.stderr)


def leave_and_come_back(scene):
    """Unmounting with a bad link is bounded and says what stays; mounting works from the spool, with everything, also
    when home was killed."""
    scene.proxy.set(scene.fault)
    with open(scene.home.point / "left", "wb") as out:
        out.write(b"unsent")
        out.flush()
        scene.check(fsync_error(out.fileno()) == 0, "the last fsync")
    if scene.fault in KILLED:
        scene.home.kill()
    else:
        unmount_in_time(scene)
    home, took = timed(lambda: scene.volume.mount("home", scene.home.state, options=scene.options, limit=200))
    scene.check((home.point / "left").read_bytes() == b"unsent", f"the next mount takes {took:.1f} s and has it")
    scene.check((home.point / "warm").read_bytes() == scene.users.warm, "and the rest")
    with open(home.point / "more", "wb") as out:
        out.write(b"more")
        out.flush()
        scene.check(fsync_error(out.fileno()) == 0, "and takes more")
    scene.proxy.set("pass")
    wait_until(lambda: home.status()["unsent_segments"] == 0, RETURN_REFUSED, f"{scene.fault}: the rest is shipped")
    home.umount()
    embassy = scene.direct.embassy()
    there = (embassy.point / "left").read_bytes() + (embassy.point / "more").read_bytes()
    scene.check(there == b"unsentmore", "and the embassy has all of it")
    embassy.umount()


def level(directory, name):
    """All faults side by side: most of it is waiting."""
    with s3_server(directory) as (_, port), contextlib.ExitStack() as stack:
        # A store that refuses is asked again every 30 s; the short form has that time in `reads` only.
        faults = [f for f in BROKEN + HARMLESS if FULL or f != "403"]
        pool = stack.enter_context(ThreadPoolExecutor(len(faults)))
        runs = {f: pool.submit(lambda f=f: Scene(directory, port, name, f).run()) for f in faults}
        results, failures = {}, []
        for fault, future in runs.items():
            try:
                results[fault] = future.result()
            except Failed as e:
                failures.append(str(e))
                say(f"FAILED  {e}")
        if failures:
            raise Failed("; ".join(failures))
    met = {fault: result["met"] for fault, result in results.items()}
    stalls = {}
    for result in results.values():
        for kind, took in result["stalls"].items():
            stalls[kind] = max(round(took, 2), stalls.get(kind, 0))
    say(f"faults met: {met}")
    say(f"longest stalls of all, in seconds: {stalls}")


def read_only_store(directory):
    """A store directory that takes no more writes: made so by mounting it read-only over itself."""
    directory.mkdir()
    volume = Volume(directory)
    volume.init()
    home = volume.mount("home", directory / "state", options=["protection=available", f"sync_timeout={TIMEOUT}s"])
    with open(home.point / "deed", "wb") as out:
        check(fsync_error(out.fileno()) == 0, "fsync succeeds while the store takes writes")
        run("mount", "--bind", volume.store_dir, volume.store_dir)
        try:
            run("mount", "-o", "remount,bind,ro", volume.store_dir)
            out.write(b"during" * 1000)
            out.flush()
            error, took = timed(lambda: fsync_error(out.fileno()))
            check(error == 0, f"fsync falls back to the local spool after {took:.1f} s")
            status = home.status()
            check(not status["in_sync"] and status["last_error"], f"status says so: {status['last_error']}", str(status))
        finally:
            run("umount", "-l", volume.store_dir)
    wait_until(lambda: home.status()["in_sync"], RETURN_REFUSED, "drains when the store takes writes again")
    home.umount()
    embassy = volume.embassy()
    check((embassy.point / "deed").read_bytes() == b"during" * 1000, "the embassy has it")
    embassy.umount()


def reads(directory):
    """With them, for they take as long, stores that refuse."""
    aside = directory / "refused"
    aside.mkdir()
    with s3_server(aside) as (_, port), ThreadPoolExecutor(2) as pool:
        refused = [pool.submit(read_only_store, aside / "directory")]
        if not FULL:
            refused.append(pool.submit(lambda: Scene(aside, port, "available", "403").run()))
        link_reads.main(directory)
        for scene in refused:
            scene.result()


def main(directory, which):
    others = {"reads": reads, "drain": link_drain.main}
    if which in others:
        return others[which](directory)
    level(directory, which)
