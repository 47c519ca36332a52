"""Killed at a random moment: abroad there is a prefix of what was done, at home everything that was acknowledged.

Each writer does, in this order, for n = 1, 2, 3, ...: append record n to file A; append record n to file B; replace
file S (written beside and renamed over, never fsynced) by "n"; make the directory entry d/n. Now and then it fsyncs
and then notes outside the mount that n is safe. Any state of the whole tree that existed at one instant therefore has
A whole up to a, B whole up to b with b <= a <= b + 1, S = s with s <= b <= s + 1, and d/1..e with e <= s <= e + 1.
"""

import contextlib
import os
import random
import subprocess
import sys
import time
from pathlib import Path

from harness import Failed, check, run, say, volume_on, wait_until, program

ROUNDS = 3
WRITERS = 3
# A divisor of the page: a write that crosses pages may be two requests, and then be cut between them.
RECORD = 32

# After a crash a writer goes on where each of its files ended, so that none of them ever gets a gap.
WRITER = r"""
import os, sys
root, log, every = sys.argv[1], sys.argv[2], int(sys.argv[3])
has_a, has_b, has_s, has_d = map(int, sys.argv[4:])
appending = os.O_CREAT | os.O_APPEND | os.O_WRONLY
a, b = os.open(f"{root}/A", appending), os.open(f"{root}/B", appending)
outside = os.open(log, appending)
n = min(has_a, has_b, has_s, has_d)
while True:
    n += 1
    record = b"%031d\n" % n
    if n > has_a:
        os.write(a, record)
    if n > has_b:
        os.write(b, record)
    if n > has_s:
        with open(f"{root}/S.new", "w") as out:
            out.write(str(n))
        os.rename(f"{root}/S.new", f"{root}/S")
    if n > has_d:
        os.mkdir(f"{root}/d/{n}")
    if n % every == 0:
        os.fsync(a)
        os.fsync(b)
        os.write(outside, b"%d\n" % n)
"""

SYNCER = r"""
import os, subprocess, sys
program, point, log, n = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
outside = os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
marks = os.open(f"{point}/marks", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
while True:
    n += 1
    os.write(marks, b"%031d\n" % n)
    if subprocess.run([program, "sync", point], stdin=subprocess.DEVNULL, capture_output=True).returncode == 0:
        os.write(outside, b"%d\n" % n)
"""


def last_noted(log):
    """The last number a process noted outside the mount."""
    lines = Path(log).read_bytes().split() if os.path.exists(log) else []
    return int(lines[-1]) if lines else 0


def count_records(path):
    """How many records the file holds; they must be whole, in order and without a gap."""
    data = path.read_bytes() if path.exists() else b""
    lines = data.split(b"\n")
    if lines.pop() != b"":
        raise Failed(f"{path}: the last record is torn: {data[-40:]!r}")
    for n, line in enumerate(lines, 1):
        if len(line) != RECORD - 1 or int(line) != n:
            raise Failed(f"{path}: record {n} is {line!r}")
    return len(lines)


def look(root):
    """What one writer's directory holds: records in A and B, the number in S, the last of d."""
    a, b = count_records(root / "A"), count_records(root / "B")
    text = (root / "S").read_text() if (root / "S").exists() else "0"
    if not text.isdigit():
        raise Failed(f"{root}/S holds {text!r}: renamed before its contents")
    entries = sorted(int(name) for name in os.listdir(root / "d")) if (root / "d").exists() else []
    if entries != list(range(1, len(entries) + 1)):
        raise Failed(f"{root}/d has a gap among its {len(entries)} entries")
    return a, b, int(text), len(entries)


def check_prefix(point, where):
    """The order between files holds for every writer; gives what was found."""
    found = {}
    for k in range(WRITERS):
        root = point / f"writer-{k}"
        a, b, s, e = found[k] = look(root) if root.exists() else (0, 0, 0, 0)
        if not (b <= a <= b + 1 and s <= b <= s + 1 and e <= s <= e + 1):
            raise Failed(f"{where}: writer {k} is no prefix: A={a} B={b} S={s} d={e}")
    found["marks"] = count_records(point / "marks")
    check(True, f"{where}: every writer's files are a prefix: {found}")
    return found


class Round:
    """One life of the home daemon: writers start where the volume ended, the daemon dies, both sides look."""

    def __init__(self, volume, directory, number, seed):
        self.volume, self.directory, self.number = volume, directory, number
        self.random = random.Random(f"{seed}.{number}")
        self.logs = {k: directory / f"noted-{k}" for k in [*range(WRITERS), "marks"]}

    def start(self, home, found):
        """The writers' processes."""
        processes = []
        for k in range(WRITERS):
            root = home.point / f"writer-{k}"
            (root / "d").mkdir(parents=True, exist_ok=True)
            begin = [str(n) for n in (found[k] if found else (0, 0, 0, 0))]
            every = self.random.choice([1, 7, 40])
            processes.append([sys.executable, "-c", WRITER, root, self.logs[k], str(every), *begin])
        begin = found["marks"] if found else 0
        processes.append([sys.executable, "-c", SYNCER, program(), home.point, self.logs["marks"], str(begin)])
        return [
            subprocess.Popen([os.fspath(c) for c in command], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
            for command in processes
        ]

    def live_and_die(self, found):
        home = self.volume.mount("home", self.directory / "state", options=["protection=local"])
        if found:
            self.check_home(home, found)
        processes = self.start(home, None if found is None else check_prefix(home.point, "before the next round"))
        wait_until(lambda: all(last_noted(log) for log in self.logs.values()), 60, "every writer is acknowledged")
        pause = self.random.uniform(0.3, 3.5)
        time.sleep(pause)
        early = [p for p in processes[:-1] if p.poll() is not None]
        if early:
            raise Failed(f"a writer ended before the kill: {early[0].stderr.read().decode()}")
        home.kill()
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            process.kill()
            process.wait()
        noted = {k: last_noted(log) for k, log in self.logs.items()}
        say(f"round {self.number}: killed after {pause:.2f} s; acknowledged: {noted}")
        return noted

    def look_abroad(self, noted):
        embassy = self.volume.embassy("embassy")
        found = check_prefix(embassy.point, f"round {self.number}, embassy")
        check(found["marks"] >= noted["marks"], "the embassy has every marker that `sync` confirmed")
        embassy.umount()
        return found

    def check_home(self, home, abroad):
        found = check_prefix(home.point, f"round {self.number}, home recovered")
        behind = [k for k, log in self.logs.items() if (found[k][1] if k != "marks" else found[k]) < last_noted(log)]
        check(not behind, "home has everything that was fsynced at `local`", f"writers {behind}: {found}")
        for k in range(WRITERS):
            if found[k][0] < abroad[k][0]:
                raise Failed(f"the embassy is ahead of home for writer {k}: {abroad[k]} and {found[k]}")
        check(found["marks"] >= abroad["marks"], "home is never behind the embassy")


def main(directory, kind):
    seed = os.environ.get("E2E_SEED") or f"{random.SystemRandom().getrandbits(32)}"
    say(f"E2E_SEED={seed}")
    with contextlib.ExitStack() as stack:
        volume = volume_on(kind, directory, stack)
        abroad = None
        for number in range(ROUNDS):
            this = Round(volume, directory, number, seed)
            noted = this.live_and_die(abroad)
            abroad = this.look_abroad(noted)
        home = volume.mount("home", directory / "state", options=["protection=local"])
        this.check_home(home, abroad)
        check_prefix(home.point, "at the end")
        home.umount()
        embassy = volume.embassy("embassy")
        check(check_prefix(embassy.point, "after a clean unmount, embassy")["marks"] >= abroad["marks"], "all of it")
        embassy.umount()
