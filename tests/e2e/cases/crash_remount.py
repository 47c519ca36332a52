"""A daemon that is killed: applications get a clean error, and `-o supervise` mounts again within seconds by itself.

The long form (E2E_FULL=1) kills often, and until the supervisor gives up.
"""

import contextlib
import errno
import os
import random
import signal
import statistics
import time
from pathlib import Path

import busy
import trees
from busy import CONTEXT, Worker
from harness import FULL, Volume, alive, check, check_same, mounted, program, run, wait_until

# Each with a supervisor of its own, whose first restart comes at once and the second after a second.
ROUNDS, KILLS = (60, 2) if FULL else (2, 2)
# What a call answers while nobody serves: the second if it was under way when the daemon died.
CLEAN = {errno.ENOTCONN, errno.ECONNABORTED}
REMOUNT_MAX = 5.0
SEED = int(os.environ.get("E2E_SEED", "0")) or random.randrange(1 << 32)


def parent(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def serving(home, before=None):
    """The process that serves the mount, another one than `before`."""

    def look():
        done = run(program(), "status", home.point, "--json", ok=None)
        found = [int(w.strip(" ,")) for line in done.stdout.splitlines() for k, _, w in [line.partition(":")] if '"pid"' in k]
        return found[0] if done.returncode == 0 and found and found[0] != before else None

    return wait_until(look, 40, "a new daemon serves the mount", pause=0.005)


def kill(home):
    """Kills the daemon; the seconds until its successor answers."""
    begin = time.monotonic()
    os.kill(home.pid, signal.SIGKILL)
    home.pid = serving(home, before=home.pid)
    return time.monotonic() - begin


def supervised(volume, state):
    """A supervised mount and its supervisor."""
    home = volume.mount("home", state, options=["protection=local", "supervise"])
    return home, parent(home.pid)


def holds_nothing(home, supervisor):
    check("mount" in Path(f"/proc/{supervisor}/cmdline").read_text(), "a supervisor stands above the daemon")
    held = [os.readlink(f"/proc/{supervisor}/fd/{fd}") for fd in os.listdir(f"/proc/{supervisor}/fd")]
    held.append(os.readlink(f"/proc/{supervisor}/cwd"))
    mine = [path for path in held if path.startswith(str(home.point)) or path == "/dev/fuse"]
    check(not mine, "which holds nothing of the mount", str(mine))


def under_load(volume, state):
    """Kills under a writer that fsyncs. The file has every line that was acknowledged."""
    chance = random.Random(SEED)
    took, pauses, seen, lines = [], [], {}, 0
    for turn in range(ROUNDS):
        home, supervisor = supervised(volume, state)
        if turn == 0:
            holds_nothing(home, supervisor)
        path = home.point / f"lines-{turn}"
        inbox, outbox = CONTEXT.Pipe(duplex=False)
        worker = Worker(busy.persisting, path, home.point, outbox)
        for _ in range(KILLS):
            done = time.monotonic() + chance.uniform(0.05, 0.4)
            wait_until(lambda: time.monotonic() > done, 5, "a moment has passed", pause=0.002)
            took.append(kill(home))
        done = time.monotonic() + 0.2
        wait_until(lambda: time.monotonic() > done, 5, "a moment has passed")
        error, _, _ = worker.stop()
        if error or not inbox.poll(30):
            check(False, "the writer goes on over all of it", f"{error}, seed {SEED}")
        acknowledged, errors, longest, strangers = inbox.recv()
        pauses.append(longest)
        seen = {e: seen.get(e, 0) + errors.get(e, 0) for e in {*seen, *errors}}
        if strangers:
            check(False, "nobody finds another directory in the mount's place", f"{strangers} times, seed {SEED}")
        there = [int(line) for line in path.read_bytes().split() if len(line) == 63]
        # A line may be there though its fsync failed; it was written once all the same.
        if there != sorted(set(there)) or acknowledged not in there:
            check(False, "no line is lost, none is there twice", f"{acknowledged}, {there[-3:]}, seed {SEED}")
        lines += len(there)
        home.umount()
        wait_until(lambda: not alive(supervisor), 10, "the supervisor ends with the mount")
    check(set(seen) <= CLEAN, f"the writer got clean errors only: {names(seen)}", f"seed {SEED}")
    check(lines > 0, f"of {lines} lines none that was acknowledged is lost, none is there twice")
    check(not list(home.point.iterdir()), "nothing was written below the mount point")
    first, second = took[::2], took[1::2]
    check(
        max(took) <= REMOUNT_MAX,
        f"{len(took)} kills: mounted again after {statistics.median(first):.2f} s in the middle, {max(first):.2f} s at most, "
        f"at the second crash in a row {statistics.median(second):.2f} s; the writer's longest pause {max(pauses):.2f} s",
    )


def names(errors):
    return ", ".join(f"{errno.errorcode[e]} {n}x" for e, n in errors.items()) or "none"


def goes_on_after_an_upgrade(home, supervisor):
    status = run(program(), "upgrade", "--json", home.point)
    before, home.pid = home.pid, serving(home, before=home.pid)
    check(before != home.pid and status, "an upgrade gives another daemon")
    # Until the old daemon has ended, it is the parent.
    wait_until(lambda: parent(home.pid) == supervisor, 10, "after an upgrade the supervisor has the new daemon")
    took = kill(home)
    check(alive(supervisor), f"which it replaces after a crash too ({took:.2f} s)")


def ends_with_the_mount(volume, state, home, supervisor):
    gone = lambda what: wait_until(lambda: not alive(supervisor), 10, f"the supervisor ends after {what}")  # noqa: E731
    want = trees.manifest(home.point)
    home.umount()
    gone("embassyfs umount")
    home, _ = supervised(volume, state)
    check_same(want, trees.manifest(home.point), "all is there after mounting again", ignore=())
    supervisor = parent(home.pid)
    run("umount", home.point)
    gone("umount(8)")
    wait_until(lambda: not alive(home.pid), 30, "so does the daemon")
    home, supervisor = supervised(volume, state)
    os.kill(supervisor, signal.SIGTERM)
    gone("SIGTERM")
    check(not mounted(home.point) and not alive(home.pid), "a supervisor that is told to stop unmounts in order")


def taken_away_while_it_waits(volume, state):
    """The second crash in a row is followed by a pause; who unmounts then means it."""
    home, supervisor = supervised(volume, state)
    kill(home)
    os.kill(home.pid, signal.SIGKILL)
    wait_until(lambda: not alive(home.pid), 10, "the daemon is dead again")
    run(program(), "umount", "--force", home.point, ok=None)
    wait_until(lambda: not alive(supervisor), 10, "a dead mount that is taken away is not mounted again")
    check(not mounted(home.point), "unmounting a dead mount ends the supervisor")


def without_supervisor(volume, state):
    """Whoever waits for a daemon that dies gets an error at once, and so does who comes later."""
    home = volume.mount("home", state, options=["protection=local"])
    (home.point / "x").write_text("x")
    fd = os.open(home.point / "x", os.O_RDONLY | os.O_DIRECT)
    begin = time.monotonic()
    os.kill(home.pid, signal.SIGKILL)
    wait_until(lambda: not alive(home.pid), 10, "the daemon is dead", pause=0.001)
    got = []
    for call in (lambda: os.pread(fd, 10, 0), lambda: os.stat(home.point / "y"), lambda: os.listdir(home.point)):
        try:
            call()
            got.append(0)
        except OSError as e:
            got.append(e.errno)
    took = time.monotonic() - begin
    check(set(got) <= CLEAN and got[-1] == errno.ENOTCONN, f"without a supervisor calls fail at once ({took:.2f} s)", str(got))
    with contextlib.suppress(OSError):
        os.close(fd)
    run(program(), "umount", home.point, ok=None)


def gives_up(volume, state):
    home, supervisor = supervised(volume, state)
    while alive(supervisor):
        os.kill(home.pid, signal.SIGKILL)
        dead = home.pid

        def settled():
            if not alive(supervisor):
                return True
            done = run(program(), "status", home.point, "--json", ok=None)
            return done.returncode == 0 and f'"pid": {dead},' not in done.stdout

        wait_until(settled, 60, "the next daemon, or the end", pause=0.2)
        if alive(supervisor):
            home.pid = serving(home, before=dead)
    check("gave up" in (state / "embassyfs.log").read_text(), "after too many crashes in a row it gives up and says so")
    check(mounted(home.point) is not None, "the dead mount stays, so that nothing is written below it")
    run(program(), "umount", home.point, ok=None)


def main(directory):
    volume = Volume(directory)
    volume.init()
    state = directory / "state"
    under_load(volume, state)
    home, supervisor = supervised(volume, state)
    goes_on_after_an_upgrade(home, supervisor)
    ends_with_the_mount(volume, state, home, supervisor)
    taken_away_while_it_waits(volume, state)
    without_supervisor(volume, state)
    if FULL:
        gives_up(volume, state)
