"""A PostgreSQL server on a data directory of our choice, for the cases and for the bench.

Invariant: the server listens on a Unix socket outside the data directory only, its log lies outside too, and `close`
leaves no process of it and no socket, however it ended before.
"""

import os
import pwd
import re
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from harness import Failed, alive, run, wait_until

SUMS = """
select coalesce((select sum(abalance) from pgbench_accounts), 0),
       coalesce((select sum(tbalance) from pgbench_tellers), 0),
       coalesce((select sum(bbalance) from pgbench_branches), 0), coalesce((select sum(delta) from pgbench_history), 0),
       (select count(*) from pgbench_history)
"""


def binaries():
    """The newest installed version's directory of programs; Debian does not put them into PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda p: float(p.parts[-3]))
    if not found:
        raise Failed("PostgreSQL is not installed: scripts/install-deps.sh test")
    return found[-1].parent


def as_postgres(*command):
    """A command as the user `postgres`, for the server refuses to run as root. The checkout may lie below a directory
    that only root may enter: the capability to search directories takes nothing from what is tested."""
    user = pwd.getpwnam("postgres")
    capability = "+dac_read_search"
    ids = ["--reuid", user.pw_uid, "--regid", user.pw_gid, "--clear-groups"]
    # In an IPC namespace of its own, so that a server that was killed leaves no shared memory to the machine.
    return ["unshare", "--ipc", "setpriv", *ids, "--inh-caps", capability, "--ambient-caps", capability, *command]


def children(pid):
    """The ids of the processes that `pid` started."""
    try:
        tasks = Path(f"/proc/{pid}/task").iterdir()
        return [int(n) for task in tasks for n in (task / "children").read_text().split()]
    except OSError:
        return []


class Server:
    """One server; `data` may lie on any file system."""

    def __init__(self, data, log):
        self.data, self.log, self.process = Path(data), Path(log), None
        self.log.touch()
        # A socket's path may be 107 bytes long: the directory of a case is too deep for that.
        self.socket = Path(tempfile.mkdtemp(prefix="embassyfs-pg-", dir="/tmp"))
        shutil.chown(self.socket, "postgres", "postgres")

    def make(self):
        """A new data directory, with checksums."""
        self.data.mkdir(mode=0o700)
        shutil.chown(self.data, "postgres", "postgres")
        run(
            *as_postgres(binaries() / "initdb", "-D", self.data, "--data-checksums", "-U", "postgres", "-A", "trust"),
            *["--locale=C", "-E", "UTF8"],
            limit=300,
            cwd="/",
        )

    def start(self, limit=120):
        """Starts the server and waits until it answers, recovery included."""
        settings = ["listen_addresses=", f"unix_socket_directories={self.socket}", "dynamic_shared_memory_type=sysv"]
        words = [word for setting in settings for word in ("-c", setting)]
        command = as_postgres(binaries() / "postgres", "-D", self.data, *words)
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [str(c) for c in command], stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/"
            )
        wait_until(self.answers, limit, "PostgreSQL answers")

    def answers(self):
        if self.process.poll() is not None:
            raise Failed(f"PostgreSQL ended with {self.process.returncode}: {self.log.read_text()[-2000:]}")
        return self.client("pg_isready", "-q", ok=None).returncode == 0

    def client(self, name, *words, limit=60, ok=True):
        return run(binaries() / name, "-h", self.socket, "-U", "postgres", *words, limit=limit, ok=ok, cwd="/")

    def sql(self, text, limit=120):
        """What a query gives, as unaligned text."""
        words = ["-X", "-A", "-t", "-q", "-v", "ON_ERROR_STOP=1", "-d", "postgres", "-c", text]
        return self.client("psql", *words, limit=limit).stdout.strip()

    def fill(self, scale):
        self.client("pgbench", "-i", "-q", "-s", scale, "postgres", limit=1800)

    def bench_command(self, seconds):
        """-n: without it pgbench empties the history first, and the sums would not agree any more."""
        words = ["-h", self.socket, "-U", "postgres", "-n", "-c", "8", "-j", "2", "-T", seconds, "postgres"]
        return [str(w) for w in [binaries() / "pgbench", *words]]

    def bench(self, seconds):
        """(transactions per second, transactions) of a run that must succeed."""
        return bench_result(run(*self.bench_command(seconds), limit=seconds + 120, cwd="/").stdout)

    def start_bench(self, seconds=600):
        """A load that runs until the server or its time ends it; returns when it has got under way."""
        before = self.transactions()
        load = subprocess.Popen(
            self.bench_command(seconds),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd="/",
        )
        wait_until(lambda: self.transactions() > before + 100, 60, "load is under way")
        return load

    def transactions(self):
        return int(self.sql("select count(*) from pgbench_history"))

    def sums(self):
        """(accounts, tellers, branches, history, rows of history)."""
        return tuple(int(n) for n in self.sql(SUMS).split("|"))

    def stop(self, limit=120):
        """The orderly end: open connections are cut off, a checkpoint is written."""
        self.process.send_signal(signal.SIGINT)
        try:
            code = self.process.wait(limit)
        except subprocess.TimeoutExpired as late:
            raise Failed(f"PostgreSQL did not stop within {limit} s") from late
        if code != 0:
            raise Failed(f"PostgreSQL ended with {code}: {self.log.read_text()[-2000:]}")

    def check_pages(self, limit=300):
        """Every page of the stopped server's files, also those that no query reads, is as it was written."""
        run(*as_postgres(binaries() / "pg_checksums", "--check", "-D", self.data), limit=limit, cwd="/")

    def kill(self):
        """SIGKILL to all of it, the first one stopped before, so that it starts no more."""
        if self.process is None or self.process.poll() is not None:
            return
        self.process.send_signal(signal.SIGSTOP)
        doomed = children(self.process.pid)
        for pid in [*doomed, self.process.pid]:
            os.kill(pid, signal.SIGKILL)
        self.process.wait(60)
        wait_until(lambda: not any(alive(pid) for pid in doomed), 60, "all of PostgreSQL is gone")

    def close(self):
        self.kill()
        shutil.rmtree(self.socket, ignore_errors=True)


def bench_result(said):
    """(transactions per second, transactions) from what pgbench said."""
    tps = re.search(r"^tps = ([0-9.]+)", said, re.M)
    count = re.search(r"^number of transactions actually processed: (\d+)", said, re.M)
    if not tps or not count:
        raise Failed(f"pgbench said no result: {said[-2000:]}")
    return float(tps[1]), int(count[1])


def end_of(load, limit=120):
    """How many transactions a load had acknowledged when its server died."""
    begin = time.monotonic()
    try:
        said, _ = load.communicate(timeout=limit)
    except subprocess.TimeoutExpired as late:
        load.kill()
        raise Failed(f"pgbench did not end within {time.monotonic() - begin:.0f} s of its server's death") from late
    return bench_result(said)[1]
