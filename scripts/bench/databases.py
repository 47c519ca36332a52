"""Databases as a measure: transactions per second of PostgreSQL and of SQLite on any file system.

Invariant: each transaction is made durable by `fsync` before it counts; nothing is set that makes it less so.

Environment: BENCH_PGBENCH_SECONDS (30), BENCH_PGBENCH_SCALE (10), BENCH_SQLITE (3000 transactions).
"""

import contextlib
import os
import sys

import postgres
from harness import run

SECONDS = int(os.environ.get("BENCH_PGBENCH_SECONDS", "30"))
SCALE = int(os.environ.get("BENCH_PGBENCH_SCALE", "10"))
TRANSACTIONS = int(os.environ.get("BENCH_SQLITE", "3000"))

INSERTER = """
import sqlite3, sys, time
path, journal, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
base = sqlite3.connect(path, isolation_level=None)
assert base.execute(f"pragma journal_mode={journal}").fetchone()[0] == journal
base.execute("pragma synchronous=full")
base.execute("create table deed(id integer primary key, owner text, at integer)")
begin = time.monotonic()
for n in range(count):
    base.execute("insert into deed values(?, ?, ?)", (n, f"owner {n * 7919 % 10007}", n))
print(time.monotonic() - begin)
"""


def pgbench(point, log):
    """Transactions per second of eight clients on the settings that initdb makes."""
    with contextlib.closing(postgres.Server(point / "postgres", log)) as server:
        server.make()
        server.start()
        server.fill(SCALE)
        # What filling left to write is not part of the measurement.
        server.sql("checkpoint", limit=600)
        rate, _ = server.bench(SECONDS)
        server.stop(limit=600)
    return rate


def sqlite(path, journal):
    """Transactions per second of one connection, one small insert each."""
    return TRANSACTIONS / float(run(sys.executable, "-c", INSERTER, path, journal, TRANSACTIONS, limit=1800).stdout)
