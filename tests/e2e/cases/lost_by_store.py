"""A store that loses what it had confirmed: the newest objects (a bucket put back to yesterday's state), or some of them.

Home sends again what lies whole on it, or says ROLLBACK and puts nothing over the hole; a reader and a promotion refuse a
store whose newest checkpoint stands on nothing; a follower stays stopped until the hole is gone; no receipt is signed
for contents that the store does not give, and none holds whose history has a hole. And what a `promote` has begun no
mount ends.
"""

import os
import shutil

from harness import Volume, check, empty_dir, program, run, wait_until

STORE, REFUSED, FOUND = 7, 8, 9
SIZE = 300_000


def main(directory):
    for scene in (sent_again, not_here, while_home_runs, checkpoint_on_nothing, follower_stays, unfinished):
        scene(directory / scene.__name__)


def volume_in(directory):
    directory.mkdir()
    volume = Volume(directory)
    volume.init()
    return volume


def write(mount, name):
    (mount.point / name).write_bytes(os.urandom(SIZE))
    mount.sync()
    return (mount.point / name).read_bytes()


def segments(volume):
    return sorted(name for name in volume.objects() if name.startswith("log/"))


def lose(volume, names):
    for name in names:
        (volume.store_dir / name).unlink()


def snapshot(volume):
    copy = volume.directory / "yesterday"
    shutil.copytree(volume.store_dir, copy)
    return copy


def put_back(volume, copy):
    shutil.rmtree(volume.store_dir)
    shutil.copytree(copy, volume.store_dir)


def sent_again(directory):
    """Put back while home was unmounted, and home has everything."""
    volume = volume_in(directory)
    home = volume.mount("home", directory / "state")
    write(home, "first")
    copy = snapshot(volume)
    content = write(home, "second")
    home.umount()
    put_back(volume, copy)
    log = directory / "log"
    home = volume.mount("home", directory / "state", "--log-file", log)
    check("ROLLBACK" in log.read_text(), "home says that the store has lost something")
    write(home, "third")
    embassy = volume.embassy()
    check((embassy.point / "second").read_bytes() == content, "and has sent it again: all of it is abroad")
    embassy.umount()
    volume.ask("verify", "--full")
    receipt = directory / "receipt"
    run(program(), "receipt", home.point, "second", "--out", receipt)
    home.umount()
    volume.ask("promote", "--state", empty_dir(directory / "promoted"), "--reason", "test", role="writer")


def not_here(directory):
    """Put back, and home has not kept it."""
    volume = volume_in(directory)
    home = volume.mount("home", directory / "state")
    write(home, "first")
    copy = snapshot(volume)
    write(home, "second")
    home.umount()
    put_back(volume, copy)
    before = volume.objects()
    for name in (directory / "state" / "cache").rglob("*"):
        if name.is_file():
            name.unlink()
    _, done = volume.try_mount("home", directory / "state")
    check(done.returncode == REFUSED and "ROLLBACK" in done.stderr, "what is lost here too is named", done.stderr)
    check(volume.objects() == before, "and nothing is put over it")


def while_home_runs(directory):
    """What home has sent is gone while it works."""
    volume = volume_in(directory)
    home = volume.mount("home", directory / "state")
    write(home, "first")
    write(home, "second")
    receipt = directory / "receipt"
    run(program(), "receipt", home.point, "first", "--out", receipt)
    holder = segments(volume)[0]
    kept = (volume.store_dir / holder).read_bytes()
    lose(volume, [holder])
    done = run(program(), "receipt", home.point, "first", "--out", directory / "no", ok=None)
    check(done.returncode != 0 and holder in done.stderr, "no receipt for what the store does not give", done.stderr)
    words = ["--public-key", volume.key("auditor"), "--store", volume.url, "--key", volume.key("auditor")]
    told = run(program(), "receipt", "check", receipt, *words, ok=None)
    check(told.returncode == FOUND, "and none holds over a hole", told.stdout + told.stderr)
    (volume.store_dir / holder).write_bytes(kept)
    home.umount()


def checkpoint_on_nothing(directory):
    """The newest segment is gone, and a checkpoint stands on it."""
    volume = volume_in(directory)
    home = volume.mount("home", directory / "state")
    for name in ("first", "second"):
        content = write(home, name)
    home.umount()
    newest = volume.versions()[0]["commit"]
    lose(volume, segments(volume)[-1:])
    _, done = volume.try_mount("newest", empty_dir(directory / "new"), read_only=True)
    check(done.returncode == REFUSED and "ROLLBACK" in done.stderr, "a mount is refused and says why", done.stderr)
    before = volume.objects()
    state = empty_dir(directory / "promoted")
    done = volume.ask("promote", "--state", state, "--reason", "test", role="writer", ok=None)
    check(done.returncode == REFUSED and "ROLLBACK" in done.stderr, "so is a promotion", done.stderr)
    check(volume.objects() == before, "which puts nothing")
    old = volume.embassy("old", more=["--at", newest])
    check((old.point / "second").read_bytes() == content, "what the log still has can be mounted")
    old.umount()
    checkpoint = next(word for word in done.stderr.split() if word.startswith("checkpoint/")).rstrip(",:;")
    lose(volume, [checkpoint])
    volume.ask("promote", "--state", state, "--reason", "test", role="writer")
    writer = volume.mount("writer", state)
    check((writer.point / "second").read_bytes() == content, "and the way out that is named is one")
    writer.umount()


def follower_stays(directory):
    """A hole that home goes on behind."""
    volume = volume_in(directory)
    home = volume.mount("home", directory / "state", options=["heartbeat=0"])
    write(home, "first")
    follower = volume.embassy("standby", more=["--follow"], options=["follow_interval=200ms"])
    write(home, "second")
    write(home, "third")
    wait_until(lambda: (follower.point / "third").exists(), 20, "it follows")
    gone = segments(volume)[-2:]
    kept = {name: (volume.store_dir / name).read_bytes() for name in gone}
    lose(volume, gone)
    stopped = lambda: "ROLLBACK" in str(follower.status()["last_error"])
    wait_until(stopped, 30, "the follower sees that something is gone")
    write(home, "fourth")
    check(not follower_moves(follower, "fourth"), "it does not go on over the hole")
    check(stopped(), "and still says so")
    for name, body in kept.items():
        (volume.store_dir / name).write_bytes(body)
    wait_until(lambda: (follower.point / "fourth").exists(), 30, "it goes on when what was lost is back")
    follower.umount()
    home.umount()


def follower_moves(follower, name):
    """Whether a follower shows a name within some of its rounds (it looks each 5 s while it is stopped)."""
    try:
        wait_until(lambda: (follower.point / name).exists(), 12, "moves")
        return True
    except Exception:  # noqa: BLE001: the harness's own failure
        return False


def unfinished(directory):
    """A promotion that the store refused is not ended by a mount."""
    volume = volume_in(directory)
    home = volume.mount("home", directory / "state")
    write(home, "first")
    state = empty_dir(directory / "promoted")
    shut = directory / "read-only"
    shut.mkdir()
    run("mount", "--bind", volume.store_dir, shut)
    try:
        run("mount", "-o", "remount,ro,bind", shut)
        words = ["--state", state, "--reason", "test"]
        done = volume.at(f"file://{shut}").ask("promote", *words, role="writer", ok=None)
        check(done.returncode == STORE, "a promotion that cannot put fails", f"{done.returncode}: {done.stderr}")
    finally:
        run("umount", shut)
    before = volume.objects()
    _, done = volume.try_mount("there", state)
    check(done.returncode == REFUSED and "promote" in done.stderr, "a mount does not go on with it", done.stderr)
    check(volume.objects() == before, "and puts nothing")
    write(home, "second")
    home.umount()
    volume.ask("promote", *words, role="writer")
    volume.mount("there", state).umount()
