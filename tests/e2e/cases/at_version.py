"""Every synced state can be looked at again, by its commit number and by a time."""

import contextlib
import datetime
import errno
import os
import re
import shutil
import time

import trees
from harness import Failed, Volume, check, check_same, say


def states(root):
    """Three states of the tree: made, changed, cut down."""
    (root / "kept").mkdir()
    for n in range(30):
        trees.write_file(root / "kept" / f"{n}", trees.random_bytes(n, n * 997))
    trees.write_random(root / "large", "large", 3_000_000)
    yield
    with open(root / "large", "r+b") as out:
        out.seek(1_500_000)
        out.write(b"overwritten in the middle")
    trees.write_file(root / "new", b"of the second state")
    (root / "kept" / "3").rename(root / "three")
    yield
    shutil.rmtree(root / "kept")
    (root / "large").unlink()
    trees.write_file(root / "new", b"of the third state")
    yield


def instant(text):
    """Seconds since 1970 of an RFC 3339 time; Python's own parser takes no nanoseconds."""
    parts = re.fullmatch(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(\.\d+)?(Z|[+-]\d\d:\d\d)", text)
    if not parts:
        raise Failed(f"not an RFC 3339 time: {text!r}")
    whole = datetime.datetime.fromisoformat(parts[1] + parts[3].replace("Z", "+00:00"))
    return whole.timestamp() + float(parts[2] or 0)


def rfc3339(seconds):
    """A time as RFC 3339 in UTC, to the millisecond."""
    return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).isoformat(timespec="milliseconds")


def inside(mount, seen, where):
    """The same states, below the control directory of a mount that shows another one."""
    at = mount.point / ".embassyfs" / "at"
    check(".embassyfs" not in os.listdir(mount.point), f"{where}: its listing does not show the control directory")
    for n, (commit, when, want) in enumerate(seen):
        for name in (str(commit), rfc3339(when)):
            check_same(want, trees.manifest(at / name), f"{where}: at/{name} shows state {n + 1}", ignore=("ino",))
    opened = os.open(at / str(seen[0][0]) / "large", os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            for n in range(40):
                os.stat(at / str(n + 1))  # more versions than can be open
        os.lseek(opened, 2_000_000, os.SEEK_SET)
        read = os.read(opened, 500)
        again = (at / str(seen[0][0]) / "large").read_bytes()[2_000_000:2_000_500]
        check(read == again and len(read) == 500, f"{where}: an open file of a version stays readable")
    finally:
        os.close(opened)
    for name, wanted in (("nonsense", errno.ENOENT), ("1999-01-01T00:00:00Z", errno.ENOENT),
                         ("2999-01-01T00:00:00Z", errno.ENOENT), ("99999999", errno.ENOENT)):  # fmt: skip
        try:
            os.stat(at / name)
        except OSError as error:
            check(error.errno == wanted, f"{where}: there is no at/{name}", str(error))
        else:
            check(False, f"{where}: there is no at/{name}")
    refused = (
        lambda: (at / str(seen[0][0]) / "made").write_bytes(b""), lambda: (at / str(seen[0][0]) / "large").unlink(),
        lambda: (at / "made").mkdir(), lambda: os.rename(mount.point / "new", at / str(seen[0][0]) / "new"),
    )  # fmt: skip
    for change in refused:
        try:
            change()
        except OSError:
            continue
        check(False, f"{where}: the past cannot be changed")
    say(f"ok  {where}: the past cannot be changed")


def main(directory):
    volume = Volume(directory)
    volume.init()
    home = volume.mount("home", directory / "state")
    seen = []
    for _ in states(home.point):
        home.sync()
        time.sleep(0.6)
        versions = volume.versions()
        seen.append((versions[0]["commit"], time.time(), trees.manifest(home.point)))
        time.sleep(0.6)
    inside(home, seen, "home's mount")
    home.kill()
    versions = volume.versions()
    say(f"{len(versions)} versions, of which synced states: {[commit for commit, _, _ in seen]}")
    for version in versions:
        if not {"commit", "time", "seq", "checkpoint"} <= version.keys():
            check(False, "a version says commit, time, seq and checkpoint", str(version))
    numbers = [v["commit"] for v in versions]
    newest_first = sorted(set(numbers), reverse=True)
    check(numbers == newest_first, "versions are listed newest first, each once", str(numbers))
    times = [instant(v["time"]) for v in versions]
    check(times == sorted(times, reverse=True), "their times are in order", str(times))
    check({c for c, _, _ in seen} <= set(numbers), "every synced state is among them", str(numbers))
    for n, (commit, when, want) in enumerate(seen):
        for at in (str(commit), rfc3339(when)):
            embassy = volume.embassy(more=["--at", at])
            check_same(want, trees.manifest(embassy.point), f"--at {at} shows state {n + 1}", ignore=())
            embassy.umount()
    embassy = volume.embassy()
    check_same(seen[-1][2], trees.manifest(embassy.point), "without --at it is the newest", ignore=())
    inside(embassy, seen, "the embassy's mount")
    embassy.umount()
    for at in ("1999-01-01T00:00:00Z", "18446744073709551614", "nonsense"):
        point, done = volume.try_mount("embassy", directory / "s", "--at", at, read_only=True)
        told = done.returncode != 0 and len(done.stderr.strip().splitlines()) >= 1
        check(told, f"--at {at} is refused: {done.stderr.strip()[:120]}", f"exit {done.returncode}")
