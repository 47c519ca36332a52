"""A store that refuses: full, without rights for a while, or one that forgets put-if-absent."""

import contextlib
import errno
import os
from concurrent.futures import ThreadPoolExecutor

import trees
from harness import FULL, Volume, check, check_same, run, s3_environment, timed, wait_until
from stub_s3 import StubS3

TIMEOUT = 1
LEVELS = ("strict", "available", "local")


def fsync_of(path, data):
    """The error of an fsync of new data ("ok": none)."""
    fd = os.open(path, os.O_CREAT | os.O_WRONLY)
    try:
        os.write(fd, data)
        os.fsync(fd)
        return "ok"
    except OSError as e:
        return errno.errorcode[e.errno]
    finally:
        os.close(fd)


def protection(home):
    return (home.point / ".embassyfs" / "protection").read_text()


def says(home, standing, words):
    """Waits until the control file, the status and the metric all say so."""
    told = wait_until(lambda: standing in protection(home) and words in protection(home) and protection(home), 5, standing)
    status = home.status()
    check(words in (status["store_error"] or "") and words in (status["last_error"] or ""), f"status says {words}")
    metrics = run("grep", "embassyfs_store_failing", home.point / ".embassyfs" / "metrics", limit=5).stdout
    check(metrics.splitlines()[-1].endswith(" 1"), f"so do the metric and the file: {told.splitlines()[0]}")
    log = (home.state / "embassyfs.log").read_text()
    check(words in log, "and the log")


def drains(home, what):
    _, took = timed(lambda: wait_until(lambda: protection(home).partition(": ")[2].startswith("in sync\n"), 40, what))
    check(home.status()["failed"] is False, f"{what} (after {took:.1f} s)")


def refusals(stub, volumes):
    """Every level under each refusal, all volumes at once; each drains by itself."""
    homes = {
        level: volume.mount("home", volume.directory / "state", options=[f"protection={level}", f"sync_timeout={TIMEOUT}s"])
        for level, volume in volumes.items()
    }
    wanted = {"strict": "EIO", "available": "ok", "local": "ok"}
    kinds = [(507, "InsufficientStorage"), (403, "ExpiredToken")]
    kinds += [(403, "QuotaExceeded"), (400, "EntityTooLarge"), (400, "XMinioStorageFull")] if FULL else []
    for status, code in kinds:
        stub.refusing(status, code)

        def fsync(home):
            return timed(lambda: fsync_of(home.point / f"{status}-{code}", code.encode() * 1000))

        with ThreadPoolExecutor(len(homes)) as pool:
            answers = dict(zip(homes, pool.map(fsync, homes.values())))
        for level, (got, took) in answers.items():
            check(got == wanted[level] and took < TIMEOUT + 3, f"{status} {code}: fsync at {level}: {got} in {took:.1f} s")
        says(homes["strict"], "strict: NOT SHIPPING", code)
        says(homes["available"], "available: FELL BACK", code)
        check((homes["strict"].point / f"{status}-{code}").stat().st_size > 0, "files stay readable")
        stub.willing()
        for level, home in homes.items():
            drains(home, f"{level} drains by itself when the store takes it again")
    for level, home in homes.items():
        embassy = volumes[level].embassy()
        check_same(trees.manifest(home.point), trees.manifest(embassy.point), f"{level}: the embassy is equal to home", ignore=())
        embassy.umount()
        home.umount()


def reads_while_refused(stub, volume):
    """Reads are refused too: what is not on this host is EIO at once, and works again at once."""
    reader = volume.embassy("reader")
    names = sorted(os.listdir(reader.point))
    for name in names:
        os.stat(reader.point / name)
    stub.refusing(403, "ExpiredToken", methods=("PUT", "GET", "HEAD"))
    got, took = timed(lambda: run("cat", reader.point / names[0], limit=20, ok=None))
    check(got.returncode != 0 and "Input/output error" in got.stderr, f"a read is EIO after {took:.1f} s")
    check(sorted(os.listdir(reader.point)) == names and os.statvfs(reader.point), "ls and df answer")
    stub.willing()
    check(len((reader.point / names[0]).read_bytes()) > 0, "and works again when the store answers")
    reader.umount()


def overwriting(stub, volume):
    """A store that overwrites gets nothing; a home that meets it later stops shipping, and says why."""
    before = dict(stub.objects)
    home = volume.mount("home", volume.directory / "state", options=["protection=available", f"sync_timeout={TIMEOUT}s"])
    check(fsync_of(home.point / "good", b"x" * 10_000) == "ok", "a good store takes it")
    home.umount()
    check([n for n in stub.objects if "probe" in n] == [], "trying a store out leaves nothing behind")
    stub.overwrites = True
    held = dict(stub.objects)
    _, done = volume.try_mount("refused", volume.directory / "state")
    check(done.returncode == 8 and "overwrites" in done.stderr, f"a mount to write is refused: {done.stderr.strip()[:150]}")
    check(stub.objects == held, "and has changed nothing in the store")
    embassy = volume.embassy()
    check((embassy.point / "good").stat().st_size == 10_000, "reading goes on")
    embassy.umount()
    # Home starts while the store is away, and finds out at the first contact.
    stub.refusing(503, "SlowDown", methods=("PUT", "GET", "HEAD"))
    home = volume.mount("home", volume.directory / "state", options=["protection=available", f"sync_timeout={TIMEOUT}s"])
    check(fsync_of(home.point / "offline", b"y" * 10_000) == "ok", "home starts without the store")
    stub.willing()
    says(home, "available: FELL BACK", "overwrites")
    check(stub.objects == held, "nothing is written to the store that came back")
    stub.overwrites = False
    drains(home, "when the store is put right, it drains")
    home.umount()
    check(len(stub.objects) > len(held) > len(before), "what was kept has arrived")


def new_volume(stub, directory):
    directory.mkdir()
    volume = Volume(directory, f"s3://land/{directory.name}", s3_environment(stub.port))
    volume.init()
    return volume


def refusing(directory):
    with contextlib.closing(StubS3()) as stub:
        volumes = {level: new_volume(stub, directory / level) for level in LEVELS}
        refusals(stub, volumes)
        reads_while_refused(stub, volumes["local"])
        check(stub.refused > 0, f"{stub.refused} requests were refused")


def main(directory):
    with contextlib.closing(StubS3()) as stub, ThreadPoolExecutor(1) as pool:
        # Beside the others: a start without the store waits for it first.
        overwrites = pool.submit(lambda: overwriting(stub, new_volume(stub, directory / "overwrites")))
        refusing(directory)
        overwrites.result()
