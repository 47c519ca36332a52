"""The disk below the state directory is full, or fails: writers are told in time, and nothing acknowledged is lost.

`full`: a small ext4 fills up, with a backlog that cannot be sent and with somebody else's files. `fails`: flushes or
writes of the disk (disk.py) give I/O errors; the volume latches, and stays latched when the disk works again.

Invariant: what was acknowledged is read back after the daemon was killed and the disk mounted anew.
"""

import errno
import os
import random
import time

from disk import Disk, mount_image, unmount
from harness import MIB, Failed, Volume, check, program, run, s3_environment, s3_server, say, timed, wait_until
from load import Load, read_tree
from proxy import Proxy

DISK = 200 * MIB
# The volume keeps twice this and 64 MiB free.
DIRTY = 8 * MIB
RESERVE = 2 * DIRTY + 64 * MIB
OPTIONS = ["protection=available", "sync_timeout=2s", f"dirty_size={DIRTY}", "cache_size=1M"]


def body(n):
    """Nothing that compression could make smaller."""
    return random.Random(n).randbytes(MIB)


def write_one(point, n):
    """A file of 1 MiB with fsync: 0 or the error number."""
    fd = None
    try:
        fd = os.open(point / f"deed-{n}", os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o644)
        os.write(fd, body(n))
        os.fsync(fd)
        return 0
    except OSError as e:
        return e.errno
    finally:
        if fd is not None:
            os.close(fd)


def fill(point, first):
    """Writes until it is refused; gives the numbers that were acknowledged, and the error."""
    done = []
    for n in range(first, first + 4 * DISK // MIB):
        if error := write_one(point, n):
            return done, error
        done.append(n)
    raise Failed("a disk of that size never fills up")


def check_all(point, numbers, when):
    for n in numbers:
        if (point / f"deed-{n}").read_bytes() != body(n):
            raise Failed(f"{when}: deed-{n} is not what was acknowledged")
    check(True, f"{when}: all {len(numbers)} acknowledged files read as written")


def free(point):
    found = os.statvfs(point)
    return found.f_bavail * found.f_frsize


def writes_again(point, n, limit, what):
    _, took = timed(lambda: wait_until(lambda: write_one(point, n) == 0, limit, what, pause=0.2))
    check(True, f"{what} (after {took:.1f} s)")


def full(directory):
    """Filled by a backlog, then by somebody else, then to the last byte."""
    image, spool = directory / "image", directory / "spool"
    with open(image, "wb") as out:
        out.truncate(DISK)
    mount_image(image, spool, make=True)
    with s3_server(directory) as (_, port):
        proxy = Proxy(port)
        direct = Volume(directory, "s3://land/full", s3_environment(port))
        direct.init()
        volume = direct.at(direct.url, s3_environment(proxy.port))
        home = volume.mount("home", spool / "state", options=OPTIONS)
        done = full_of_backlog(volume, home, proxy, spool)
        home = volume.mount("home", spool / "state", options=OPTIONS)
        check_all(home.point, done, "killed with a full disk")
        proxy.set("pass")
        writes_again(home.point, 1, 60, "the link is back: the backlog goes, its room returns, writers go on")
        done += full_of_other_things(home, spool)
        full_to_the_last_byte(home, spool)
        check_all(home.point, done, "at the end")
        home.umount()
        embassy = direct.embassy()
        check_all(embassy.point, done, "embassy")
        embassy.umount()
        proxy.close()
    unmount(spool)


def full_of_backlog(volume, home, proxy, spool):
    proxy.set("cut")
    done, error = fill(home.point, 1)
    check(error == errno.ENOSPC, f"ENOSPC after {len(done)} MiB that cannot be sent", os.strerror(error))
    # It says so while there is room for all that it has accepted.
    check(free(spool) > RESERVE - 3 * DIRTY, f"with {free(spool) >> 20} MiB of the disk left")
    status = home.status()
    check(status["unsent_bytes"] > len(done) * MIB * 0.9, "all of it is unsent, so nothing of it was evicted")
    check_all(home.point, done, "full")
    os.unlink(home.point / f"deed-{done.pop()}")
    fd = os.open(home.point, os.O_DIRECTORY)
    os.fsync(fd)
    os.close(fd)
    check(True, "removing a name works, and its fsync")
    home.kill()
    return done


def full_of_other_things(home, spool):
    """Somebody else's file takes the room; when it is gone, writers go on by themselves."""
    filler = spool / "filler"
    run("fallocate", "-l", free(spool) - RESERVE // 2, filler)
    wait_until(lambda: write_one(home.point, 900) == errno.ENOSPC, 10, "ENOSPC when the room is gone", pause=0.2)
    os.unlink(filler)
    writes_again(home.point, 900, 10, "the room is back: writers go on")
    return [900]


def full_to_the_last_byte(home, spool):
    """The disk is full at once, and something is not committed yet: it is not acknowledged, and nothing else is lost."""
    filler = spool / "filler"
    with open(home.point / "late", "wb", buffering=0) as late:
        late.write(os.urandom(4 * MIB))
        with open(filler, "wb", buffering=0) as out:
            try:
                while out.write(bytes(MIB)):
                    pass
            except OSError as e:
                check(e.errno == errno.ENOSPC, "the disk is full to the last byte")
        begin = time.monotonic()
        os.unlink(filler)
        writes_again(home.point, 901, 20, "the room is back: writers go on")
        os.fsync(late.fileno())
        say(f"and the fsync of what was written before is answered after {time.monotonic() - begin:.1f} s")


def fails(directory):
    """Each kind of error in its turn, on one volume."""
    volume, disk, load = Volume(directory), Disk(directory), Load("spool")
    volume.init()
    home = volume.mount("home", disk.point / "state", options=["protection=local"])
    for kind in ("flush", "write"):
        load.start(home.point)
        wait_until(lambda: load.fsyncs > 50 or load.trouble, 60, "writers are acknowledged")
        load.doomed = True
        disk.fail(**{kind: True})
        wait_until(lambda: not any(t.is_alive() for t in load.threads), 60, f"{kind}s fail: every writer is told")
        promised, fsyncs = load.acknowledged, load.fsyncs
        load.stop()
        status = home.status()
        check(status["last_error"], f"{kind}s fail: status says: {status['last_error']}")
        disk.fail(**{kind: False})
        stays_latched(home, kind)
        check(disk.fail()["failed"] > 0, f"the disk refused {disk.fail()['failed']} requests")
        check(load.fsyncs == fsyncs and promised > 0, f"{promised} changes were acknowledged before")
        done = run(program(), "umount", home.point, limit=120, ok=None)
        check(done.returncode in (1, 5), f"umount says: {(done.stdout + done.stderr).strip()}", str(done.returncode))
        disk.remount()
        home = volume.mount("home", disk.point / "state", options=["protection=local"])
        load.go_on_from(load.find(read_tree(home.point), promised, f"{kind}s failed, after a mount"))
        load.forget_rest()
        check(True, f"{kind}s failed: on the healthy disk everything acknowledged is there")
    load.start(home.point)
    before = load.fsyncs
    wait_until(lambda: load.fsyncs > before + 20 or load.trouble, 60, "it goes on")
    load.stop()
    home.umount()
    embassy = volume.embassy()
    check(read_tree(embassy.point) == load.tree, "and the embassy has the same tree")
    embassy.umount()
    disk.close()


def stays_latched(home, kind):
    """The disk works again; what the kernel would now call synced was never written, so nothing is believed."""
    for name in ("a0", "p0"):
        fd = os.open(home.point / name, os.O_RDONLY)
        try:
            os.fsync(fd)
            raise Failed(f"{kind}s failed: a second fsync pretends that all is well")
        except OSError as e:
            check(e.errno == errno.EIO, f"{kind}s failed, the disk works again: fsync of {name} is EIO still", str(e))
        finally:
            os.close(fd)
    try:
        (home.point / "new").write_bytes(b"x")
        raise Failed(f"{kind}s failed: it takes changes again")
    except OSError as e:
        check(e.errno == errno.EROFS, "changes are EROFS", str(e))
    check(len(os.listdir(home.point)) > 2 and (home.point / "a0").read_bytes(), "what is there can be read")


def main(directory, which):
    {"full": full, "fails": fails}[which](directory)
