"""PostgreSQL and SQLite on a mount: killed under load, again and again, they have every acknowledged transaction.

Invariant: what counts as acknowledged is noted outside the mount after the database said so; what is compared with it
is read by a process that did not write it.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import postgres
from harness import FULL, Failed, Volume, check, empty_dir, run, say, timed, wait_until

OPTIONS = ["protection=local", "allow_other"]
SCALE, SECONDS = (10, 30) if FULL else (1, 5)


class Bank:
    """pgbench's four tables, and how many of its transactions were acknowledged."""

    def __init__(self, directory, server):
        self.directory, self.server, self.acknowledged = directory, server, 0

    def check_sums(self, when):
        """Every transaction changes an account, a teller, a branch and adds a row, all by the same amount."""
        accounts, tellers, branches, history, rows = self.server.sums()
        check(accounts == tellers == branches == history, f"{when}: the four sums agree", str(self.server.sums()))
        return rows

    def check_all(self, when):
        """The sums, and no acknowledged transaction is missing."""
        rows = self.check_sums(when)
        # Each of the eight clients may have had one transaction committed of which it was not told.
        fine = self.acknowledged <= rows <= self.acknowledged + 8
        check(fine, f"{when}: all {self.acknowledged} acknowledged transactions", f"{rows} rows")
        self.acknowledged = rows

    def recover(self, when):
        """Starts a server that died: it must have noticed that it has to recover."""
        seen = self.server.log.stat().st_size
        _, took = timed(self.server.start)
        said = self.server.log.read_bytes()[seen:]
        check(b"automatic recovery in progress" in said, f"{when}: recovered in {took:.1f} s")

    def copy_and_check(self, mount, when, died):
        """The data directory as another mount shows it, copied to the plain disk and started there."""
        copy = self.directory / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        run("cp", "-a", mount.point / "data", copy, limit=600)
        (copy / "postmaster.pid").unlink(missing_ok=True)
        other = postgres.Server(copy, self.directory / "copy.log")
        try:
            bank = Bank(self.directory, other)
            if died:
                bank.recover(when)
                check(bank.check_sums(when) > 0, f"{when}: there are transactions")
            else:
                self.checksums(copy, when)
                other.start()
                bank.acknowledged = self.acknowledged
                bank.check_all(when)
            other.stop()
        finally:
            other.close()
            shutil.rmtree(copy, ignore_errors=True)

    @staticmethod
    def checksums(data, when):
        command = postgres.as_postgres(postgres.binaries() / "pg_checksums", "--check", "-D", data)
        done = run(*command, limit=600, cwd="/")
        check("Bad checksums:  0\n" in done.stdout, f"{when}: no bad checksum", done.stdout)


def postgresql(directory):
    """initdb, load, and every way to end, one after the other."""
    volume = Volume(directory)
    volume.init()
    home = volume.mount("home", directory / "state", options=OPTIONS)
    server = postgres.Server(home.point / "data", directory / "server.log")
    with contextlib.closing(server):
        bank = Bank(directory, server)
        server.make()
        server.start()
        server.fill(SCALE)
        tps, bank.acknowledged = server.bench(SECONDS)
        say(f"{tps:.0f} transactions/s")
        bank.check_all("after load")
        die_under_load(volume, bank)
        home = home_dies_under_load(volume, home, bank)
        home = end_in_order(volume, home, bank)
        server.stop()
        home.umount()
        embassy = volume.embassy("embassy")
        bank.copy_and_check(embassy, "embassy, after a clean stop", died=False)
        embassy.umount()


def die_under_load(volume, bank):
    """The embassy has a state to start from while home works; then the server is killed."""
    load = bank.server.start_bench()
    embassy = volume.embassy("embassy")
    bank.copy_and_check(embassy, "embassy, while home works", died=True)
    embassy.umount()
    bank.server.kill()
    bank.acknowledged += postgres.end_of(load)
    bank.recover("server killed under load")
    bank.check_all("server killed under load")


def home_dies_under_load(volume, home, bank):
    """The file system itself is killed; the server, which can't go on, after it."""
    load = bank.server.start_bench()
    home.kill()
    bank.server.kill()
    bank.acknowledged += postgres.end_of(load)
    home = volume.mount("home", home.state, options=OPTIONS)
    bank.recover("daemon killed under load")
    bank.check_all("daemon killed under load")
    return home


def end_in_order(volume, home, bank):
    """Indexes and heap against each other, checksums after a clean stop, and the same after another mount."""
    # A row that is only in an index, or only in the heap, is what lost or mixed pages leave.
    words = ["--all", "--install-missing", "--heapallindexed", "--parent-check"]
    bank.server.client("pg_amcheck", *words, limit=600)
    check(True, "pg_amcheck finds nothing")
    bank.server.stop()
    bank.checksums(bank.server.data, "after a clean stop")
    home.umount()
    home = volume.mount("home", home.state, options=OPTIONS)
    bank.checksums(bank.server.data, "after another mount")
    bank.server.start()
    bank.check_all("after another mount")
    tps, more = bank.server.bench(2)
    bank.acknowledged += more
    bank.check_all(f"goes on ({tps:.0f} transactions/s)")
    return home


# SQLite: writers of both journals, each with a number of its own in every transaction.

WRITERS = 3
ROUNDS = 25 if FULL else 4
JOURNALS = ("wal", "delete")

CREATE = """
import sqlite3, sys
base = sqlite3.connect(sys.argv[1], isolation_level=None)
assert base.execute(f"pragma journal_mode={sys.argv[2]}").fetchone()[0] == sys.argv[2]
base.execute("create table deed(writer text, n integer, body blob, primary key(writer, n)) without rowid")
base.execute("create table total(writer text primary key, n integer, bytes integer)")
"""

WRITER = """
import os, sqlite3, sys, time
path, writer, log = sys.argv[1:]
base = sqlite3.connect(path, timeout=60, isolation_level=None)
# With a rollback journal "full" leaves the removal of the journal, which is the commit, to the next fsync.
base.execute("pragma synchronous=extra")
base.execute("pragma wal_autocheckpoint=40")
base.execute("pragma cache_size=20")
outside = os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
# SQLite syncs the directory after the journal's removal, but takes a directory that it cannot open for one that
# needs no sync: a commit on a mount that dies in between "succeeds". So the writer does not take its word.
directory = os.open(os.path.dirname(path), os.O_RDONLY)
n = 0
while True:
    n += 1
    body = bytes([n % 256]) * (n * 37 % 5000)
    base.execute("begin immediate")
    base.execute("insert into deed values(?, ?, ?)", (writer, n, body))
    base.execute("insert into total values(?, 1, ?) on conflict(writer) do update set n = n + 1, bytes = bytes + ?",
                 (writer, len(body), len(body)))
    base.execute("commit")
    os.fsync(directory)
    os.write(outside, b"%d\\n" % n)
    # A waiting writer looks at the lock only now and then: without a break the others might never get it.
    time.sleep(0.003)
"""

READER = """
import json, sqlite3, sys
base = sqlite3.connect(sys.argv[1], timeout=60)
assert base.execute("pragma integrity_check").fetchall() == [("ok",)]
found = {}
for writer, n, body in base.execute("select writer, n, body from deed order by writer, n"):
    count, total = found.get(writer, (0, 0))
    assert n == count + 1, f"{writer}: {n} follows {count}"
    assert body == bytes([n % 256]) * (n * 37 % 5000), f"{writer}: body of {n}"
    found[writer] = (n, total + len(body))
assert found == {w: (n, b) for w, n, b in base.execute("select * from total")}, "totals"
print(json.dumps({w: n for w, (n, _) in found.items()}))
"""


def python(script, *words, limit=120):
    return run(sys.executable, "-c", script, *words, limit=limit).stdout


def last_noted(log):
    """The last number that a writer noted outside the mount."""
    return int(log.read_bytes().split()[-1]) if log.exists() and log.stat().st_size else 0


class Ledger:
    """The two databases, and what every writer of every round was told."""

    def __init__(self, directory):
        self.notes = empty_dir(directory / "notes")
        self.scratch = directory / "scratch"

    def write(self, point, number):
        """Starts the writers of a round; returns when each has had some transactions acknowledged."""
        processes, logs = [], []
        for journal in JOURNALS:
            for k in range(WRITERS):
                name = f"round-{number}.{k}"
                logs.append(self.notes / f"{journal}.{name}")
                words = [sys.executable, "-c", WRITER, point / f"{journal}.db", name, logs[-1]]
                processes.append(subprocess.Popen(words, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE))
        try:
            wait_until(lambda: self.under_way(processes, logs), 120, "every writer is acknowledged")
        except Failed:
            self.end(processes)
            raise
        return processes

    @staticmethod
    def under_way(processes, logs):
        for process in processes:
            if process.poll() is not None:
                raise Failed(f"a writer ended: {process.stderr.read().decode()}")
        return all(last_noted(log) >= 3 for log in logs)

    @staticmethod
    def end(processes):
        """SIGKILL to all, wherever they are in their transactions."""
        for process in processes:
            process.send_signal(signal.SIGKILL)
        for process in processes:
            process.wait(60)
            process.stderr.close()

    def look(self, place, when):
        """Both databases whole, each writer's transactions without a gap, and none that was acknowledged missing."""
        for journal in JOURNALS:
            found = {w: int(n) for w, n in json.loads(python(READER, place / f"{journal}.db")).items()}
            for log in self.notes.glob(f"{journal}.*"):
                writer, noted = log.name.removeprefix(f"{journal}."), last_noted(log)
                have = found.pop(writer, 0)
                if not noted <= have <= noted + 1:
                    raise Failed(f"{when}: {journal}: {writer} was told {noted}, there are {have}")
            check(not found, f"{when}: {journal}: whole, and no acknowledged transaction is missing", str(found))

    def look_at_copy(self, point, when):
        """The same of a mount that can't be written: recovery, if there is any to do, happens in a copy."""
        empty_dir(self.scratch)
        for journal in JOURNALS:
            for suffix in ("", "-wal", "-journal"):
                with contextlib.suppress(FileNotFoundError):
                    shutil.copyfile(point / f"{journal}.db{suffix}", self.scratch / f"{journal}.db{suffix}")
        self.look(self.scratch, when)


def sqlite(directory):
    """Writers are killed in each round, the daemon in every other as well."""
    seed = os.environ.get("E2E_SEED") or f"{random.SystemRandom().getrandbits(32)}"
    say(f"E2E_SEED={seed}")
    draw = random.Random(seed)
    volume, ledger = Volume(directory), Ledger(directory)
    volume.init()
    home = volume.mount("home", directory / "state", options=["protection=local"])
    for journal in JOURNALS:
        python(CREATE, home.point / f"{journal}.db", journal)
    for number in range(ROUNDS):
        processes = ledger.write(home.point, number)
        # A moment that no one chose.
        time.sleep(draw.uniform(0.0, 0.5))
        if number % 2:
            home.kill()
        ledger.end(processes)
        if number % 2:
            home = volume.mount("home", home.state, options=["protection=local"])
        ledger.look(home.point, f"round {number}, {'daemon and ' if number % 2 else ''}writers killed")
    home.umount()
    home = volume.mount("home", home.state, options=["protection=local"])
    ledger.look(home.point, "after another mount")
    processes = ledger.write(home.point, ROUNDS)
    ledger.end(processes)
    home.umount()
    embassy = volume.embassy("embassy")
    ledger.look_at_copy(embassy.point, "embassy, writers killed before the unmount")
    embassy.umount()
