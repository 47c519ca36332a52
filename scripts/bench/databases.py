"""Databases as a measure: transactions per second of PostgreSQL and of SQLite on any file system.

Invariant: each transaction is made durable by `fsync` before it counts; nothing is set that makes it less so.

Environment: BENCH_PGBENCH_SECONDS (15), BENCH_PGBENCH_SCALE (10), BENCH_SQLITE (6000 transactions at the most).
"""

import contextlib
import sys

import common  # noqa: F401  (makes the end-to-end tests' modules known)
import postgres
from common import setting
from harness import run

PGBENCH_SECONDS = setting("BENCH_PGBENCH_SECONDS", 15, 2)
SCALE = setting("BENCH_PGBENCH_SCALE", 10, 1)
TRANSACTIONS = setting("BENCH_SQLITE", 6000, 200)

INSERTER = """
import sqlite3, sys, time
path, journal, count, limit = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
base = sqlite3.connect(path, isolation_level=None)
assert base.execute(f"pragma journal_mode={journal}").fetchone()[0] == journal
base.execute("pragma synchronous=full")
base.execute("create table deed(id integer primary key, owner text, at integer)")
begin, done = time.monotonic(), 0
while done < count and time.monotonic() - begin < limit:
    base.execute("insert into deed values(?, ?, ?)", (done, f"owner {done * 7919 % 10007}", done))
    done += 1
print(done, time.monotonic() - begin)
"""


def pgbench(point, log, begin=lambda: None):
    """(transactions, seconds) of eight clients on the settings that initdb makes; calls `begin` before they start."""
    with contextlib.closing(postgres.Server(point / "postgres", log)) as server:
        server.make()
        server.start()
        server.fill(SCALE)
        # What filling left to write is not part of the measurement.
        server.sql("checkpoint", limit=600)
        begin()
        rate, count = server.bench(PGBENCH_SECONDS)
        server.stop(limit=600)
    return count, count / rate


def sqlite(path, journal, limit=1e9):
    """(transactions, seconds) of one connection, one small insert each, for so many seconds at the most."""
    words = [sys.executable, "-c", INSERTER, path, journal, TRANSACTIONS, limit]
    count, seconds = run(*words, limit=1800).stdout.split()
    return int(count), float(seconds)
