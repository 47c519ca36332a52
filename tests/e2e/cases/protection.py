"""The three protection levels when the link to the embassy is slow, cut or silent, and a store that takes no writes."""

import contextlib
import errno
import os
import time

import trees
from harness import Failed, Volume, check, check_same, s3_environment, s3_server, say, timed, wait_until
from proxy import Proxy

# fsync may take this long beyond what it was told to wait.
SLACK = 6.0
TIMEOUT = 3


def write_and_fsync(path, data):
    """The error number of the fsync (0 is success) and the seconds that it took."""
    fd = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
    begin = time.monotonic()
    try:
        os.write(fd, data)
        os.fsync(fd)
        return 0, time.monotonic() - begin
    except OSError as e:
        return e.errno, time.monotonic() - begin
    finally:
        with contextlib.suppress(OSError):
            os.close(fd)


def unsent(home):
    """Whether the status says that something is on this host only."""
    status = home.status()
    return status["unsent_bytes"] > 0 or status["unsent_segments"] > 0


def drained(home, what):
    def done():
        status = home.status()
        return status["in_sync"] and status["unsent_bytes"] == 0 and status["unsent_segments"] == 0

    _, took = timed(lambda: wait_until(done, 60, what, pause=0.2))
    check(True, f"{what} (after {took:.1f} s)")


class Scene:
    """A volume on S3 behind the proxy, mounted at home."""

    def __init__(self, directory, level, stack):
        root, port = stack.enter_context(s3_server(directory))
        self.proxy = Proxy(port)
        stack.callback(self.proxy.close)
        self.direct = Volume(directory, "s3://land/registers", s3_environment(port))
        self.direct.init()
        self.volume = self.direct.at(self.direct.url, s3_environment(self.proxy.port))
        options = [f"protection={level}", f"sync_timeout={TIMEOUT}s"]
        self.home = self.volume.mount("home", directory / "state", options=options)
        self.point = self.home.point
        check(self.home.status()["protection"] == level, f"status says protection {level}")

    def fsync_in_time(self, name, wanted, low, high):
        error, took = write_and_fsync(self.point / name, name.encode() * 500)
        word = errno.errorcode.get(error, "success")
        good = error == wanted and low <= took <= high
        check(good, f"{name}: fsync gives {word} after {took:.2f} s", f"wanted {wanted} within {low} to {high} s")

    def embassy_has(self, *names):
        """What a reader finds who comes to the store by another way."""
        embassy = self.direct.embassy()
        missing = [n for n in names if not (embassy.point / n).exists()]
        check(not missing, f"the embassy has {' '.join(names)}", f"missing: {missing}")
        check_same(trees.manifest(self.point), trees.manifest(embassy.point), "and is equal to home", ignore=())
        embassy.umount()


def available(scene):
    """fsync falls back to the local spool, says so, and comes back by itself."""
    scene.fsync_in_time("connected", 0, 0, TIMEOUT)
    check(scene.home.status()["in_sync"], "in sync while the link is up")
    for mode in ("hang", "cut"):
        scene.proxy.set(mode)
        scene.fsync_in_time(f"during-{mode}", 0, TIMEOUT - 0.5 if mode == "hang" else 0, TIMEOUT + SLACK)
        status = scene.home.status()
        check(not status["in_sync"], f"{mode}: status says that it is not in sync", str(status))
        check(unsent(scene.home), f"{mode}: and that something is unsent")
        time.sleep(2)
        check(scene.home.status()["lag_seconds"] >= 1, f"{mode}: the lag grows")
        check((scene.point / f"during-{mode}").read_bytes()[:6] == b"during", f"{mode}: the file can be read")
        check(scene.home.status()["last_error"], f"{mode}: the last error is there to see")
        scene.proxy.set("pass")
        drained(scene.home, f"{mode}: drains and returns to sync when the link is back")
    scene.proxy.set("pass", delay=0.1)
    scene.fsync_in_time("slow-link", 0, 0.1, TIMEOUT + SLACK)
    scene.proxy.set("pass")
    drained(scene.home, "a slow link is in sync too")
    scene.embassy_has("connected", "during-hang", "during-cut", "slow-link")
    scene.home.umount()


def strict(scene):
    """fsync fails when the embassy does not hold it, never falsely succeeds."""
    scene.fsync_in_time("connected", 0, 0, TIMEOUT)
    scene.proxy.set("hang")
    scene.fsync_in_time("during-hang", errno.EIO, TIMEOUT - 0.5, TIMEOUT + SLACK)
    check((scene.point / "during-hang").read_bytes() == b"during-hang" * 500, "the file can be read after the EIO")
    check(sorted(os.listdir(scene.point))[:2] == ["connected", "during-hang"], "and the directory be listed")
    scene.proxy.set("pass")
    drained(scene.home, "drains when the link is back")
    scene.fsync_in_time("again", 0, 0, TIMEOUT + SLACK)
    scene.embassy_has("connected", "during-hang", "again")
    scene.proxy.set("hang")
    scene.fsync_in_time("not-shipped", errno.EIO, TIMEOUT - 0.5, TIMEOUT + SLACK)
    scene.home.kill()
    scene.proxy.set("pass")
    embassy = scene.direct.embassy()
    names = set(os.listdir(embassy.point))
    check({"connected", "during-hang", "again"} <= names, "everything that strict acknowledged is in the embassy")
    embassy.umount()


def local(scene):
    """Nothing changes for the application when the link is down."""
    for mode in ("hang", "cut"):
        scene.proxy.set(mode)
        for n in range(5):
            scene.fsync_in_time(f"{mode}-{n}", 0, 0, 1.5)
        wait_until(lambda: unsent(scene.home), 5, f"{mode}: unsent is counted")
        scene.proxy.set("pass")
        drained(scene.home, f"{mode}: drains when the link is back")
    scene.embassy_has("hang-0", "cut-4")
    # Unmounting with the link down is bounded, and says what stays behind.
    scene.proxy.set("hang")
    write_and_fsync(scene.point / "left-behind", b"unsent")
    done, took = timed(lambda: umount_unsent(scene.home))
    check(took < 90, f"umount with a silent store ends after {took:.1f} s")
    check("unsent" in done.stdout + done.stderr, "umount says what is unsent", done.stdout + done.stderr)
    scene.proxy.set("pass")
    home = scene.volume.mount("home", scene.home.state, options=["protection=local"])
    check((home.point / "left-behind").read_bytes() == b"unsent", "the next mount has it")
    drained(home, "and ships it")
    home.umount()
    embassy = scene.direct.embassy()
    check((embassy.point / "left-behind").read_bytes() == b"unsent", "so that the embassy has it")
    embassy.umount()


def umount_unsent(home):
    from harness import mounted, program, run

    done = run(program(), "umount", "--timeout", "5s", home.point, limit=120, ok=None)
    if mounted(home.point):
        raise Failed(f"still mounted after umount: {done.stderr}")
    if done.returncode == 0:
        raise Failed("umount with unsent data exits 0")
    return done


def read_only_store(directory):
    """A store directory that takes no more writes: made so by mounting it read-only over itself."""
    import subprocess

    volume = Volume(directory)
    volume.init()
    home = volume.mount("home", directory / "state", options=["protection=available", f"sync_timeout={TIMEOUT}s"])
    error, _ = write_and_fsync(home.point / "before", b"before")
    check(error == 0, "fsync succeeds while the store takes writes")
    store = str(volume.store_dir)
    subprocess.run(["mount", "--bind", store, store], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", store], check=True)
        error, took = write_and_fsync(home.point / "during", b"during" * 1000)
        check(error == 0, f"fsync falls back to the local spool after {took:.1f} s", os.strerror(error))
        status = home.status()
        check(not status["in_sync"] and status["last_error"], "status says so", str(status))
        say(f"last_error: {status['last_error']}")
    finally:
        subprocess.run(["umount", "-l", store], check=True)
    drained(home, "drains when the store takes writes again")
    embassy = volume.embassy()
    check((embassy.point / "during").read_bytes() == b"during" * 1000, "the embassy has it")
    embassy.umount()
    home.umount()


def main(directory, level):
    if level == "read_only_store":
        return read_only_store(directory)
    with contextlib.ExitStack() as stack:
        {"available": available, "strict": strict, "local": local}[level](Scene(directory, level, stack))
