"""The registers that live in databases: taxes, land, businesses.

Invariant: a case is acknowledged when the database has said so to its client, and not before.
"""

import sqlite3
import subprocess
import time

import postgres
from harness import Failed

from registers.register import Gone, Register, body, digest, must, put, read, sync_dir

# What cases 1 to {found} entered, and what is there: what only one of them has.
DIFFERENT = """
    with wanted as
    (select n, n % 1000 + 1 a, (n * 7 + 500) % 1000 + 1 b, n % 977 + 1 m from generate_series(1, {found}::bigint) n),
    cases as (select n, a, -m from wanted union all select n, b, m from wanted)
    select count(*) from ((table cases except all table entry) union all (table entry except all table cases)) x
"""


class Client:
    """One psql that takes statements on its standard input; each is over when its number comes back."""

    def __init__(self, server):
        command = [postgres.binaries() / "psql", "-h", server.socket, "-U", "postgres", "-d", "postgres"]
        command += ["-X", "-A", "-t", "-q", "-v", "ON_ERROR_STOP=1"]
        self.process = subprocess.Popen(
            [str(c) for c in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, cwd="/",
        )  # fmt: skip

    def do(self, sql, number):
        try:
            self.process.stdin.write(f"{sql}\n\\echo done {number}\n")
            self.process.stdin.flush()
        except OSError as error:
            raise Gone("the client has gone") from error
        if self.process.stdout.readline().strip() != f"done {number}":
            raise Gone("the server has gone")

    def close(self):
        self.process.kill()
        self.process.wait(10)


class PostgresRegister(Register):
    """A register in a PostgreSQL of its own, whose data directory is `data` below the mount."""

    served = True
    protection = "strict"

    def __init__(self, directory, size):
        super().__init__(directory, size)
        self.server = self.client = None

    def serve(self, data):
        self.server = postgres.Server(data, self.directory / "server.log")

    def prepare(self, point):
        self.serve(point / "data")
        self.server.make()
        self.server.start()
        self.server.sql(self.schema)
        self.client = Client(self.server)

    def kill(self):
        self.stopping.set()
        self.server.kill()
        self.client.close()

    def check(self, point):
        """Starts a server on what is there, and asks it."""
        (point / "data" / "postmaster.pid").unlink(missing_ok=True)
        self.close()
        self.serve(point / "data")
        self.server.start()
        self.answered = time.monotonic()
        found = self.ask(point)
        self.server.stop()
        self.server.check_pages()
        return found

    def resume(self, point, cases):
        super().resume(point, cases)
        self.close()
        self.serve(point / "data")
        self.server.start()
        self.client = Client(self.server)

    def close(self):
        if self.client:
            self.client.close()
        if self.server:
            self.server.close()
        self.client = self.server = None


class Taxes(PostgresRegister):
    """A ledger with double entries: each case moves an amount from one account to another."""

    name = "taxes"
    schema = """
        create table account (id int primary key, balance bigint not null);
        create table entry (number bigint, account int references account, amount bigint not null);
        insert into account select n, 0 from generate_series(1, 1000) n;
    """

    def work(self, point):
        n = self.acknowledged + 1
        a, b, amount = n % 1000 + 1, (n * 7 + 500) % 1000 + 1, n % 977 + 1
        self.client.do(
            f"begin; insert into entry values ({n}, {a}, -{amount}), ({n}, {b}, {amount}); "
            f"update account set balance = balance - {amount} where id = {a}; "
            f"update account set balance = balance + {amount} where id = {b}; commit;",
            n,
        )
        self.acknowledged = n

    def ask(self, point):
        found, cases, total = map(int, self.server.sql(
            "select coalesce(max(number), 0), count(distinct number), coalesce(sum(amount), 0) from entry"
        ).split("|"))  # fmt: skip
        must(found == cases, self, f"cases are missing in the middle: {cases} of {found}")
        must(total == 0, self, f"the entries add up to {total} instead of 0")
        wrong = self.server.sql(
            "select count(*) from account a left join (select account, sum(amount) s from entry group by 1) e "
            "on a.id = e.account where a.balance <> coalesce(e.s, 0)"
        )
        must(wrong == "0", self, f"{wrong} accounts do not have the balance of their entries")
        # Nothing above knows that a case was entered twice, or altered on both of its sides.
        wrong = self.server.sql(DIFFERENT.format(found=found))
        must(wrong == "0", self, f"{wrong} entries are not what their cases entered")
        accounts = self.server.sql("select count(*), min(id), max(id) from account")
        must(accounts == "1000|1|1000", self, f"the accounts are not all there: {accounts}")
        return found, f"{found} cases as entered, all accounts balance"


class Filed:
    """What a register checks whose documents lie in `folder`, beside a database that has their hashes. A document is
    filed before its row: one may be there without."""

    def check_filed(self, point, rows):
        numbers = [int(number) for number, _ in rows]
        must(numbers == list(range(1, len(rows) + 1)), self, "rows are missing in the middle")
        for number, (_, wanted) in enumerate(rows, 1):
            data = self.contents(number)
            must(wanted == digest(data), self, f"row {number} is not what was entered")
            must(read(self.place(point, number)) == data, self, f"document {number} is not what was filed")
        there = {path for path in (point / self.folder).rglob("*") if not path.is_dir()}
        under_way = self.place(point, len(rows) + 1)
        there -= {under_way, under_way.with_name(f"{under_way.name}.new")}
        more = sorted(path.name for path in there - {self.place(point, n) for n in numbers})
        must(not more, self, f"documents without a row behind row {len(rows)}: {', '.join(more[:5])}")


class Land(Filed, PostgresRegister):
    """Plots in a database, deeds beside it as files: the database has their hashes."""

    name = "land"
    folder = "deeds"
    schema = "create table deed (number bigint primary key, sha256 text not null)"

    def prepare(self, point):
        (point / "deeds").mkdir()
        super().prepare(point)

    def place(self, point, n):
        return point / "deeds" / f"{n % 50:02}" / f"{n}.pdf"

    def contents(self, n):
        return body(self.name, n, 2000 + n % 60_000)

    def work(self, point):
        n = self.acknowledged + 1
        data, path = self.contents(n), self.place(point, n)
        path.parent.mkdir(exist_ok=True)
        put(path, data)
        sync_dir(path.parent)
        self.client.do(f"insert into deed values ({n}, '{digest(data)}');", n)
        self.acknowledged = n

    def ask(self, point):
        rows = [row.split("|") for row in self.server.sql("select * from deed order by number").splitlines()]
        self.check_filed(point, rows)
        return len(rows), f"{len(rows)} plots, each deed as filed"


class Businesses(Filed, Register):
    """A SQLite database in WAL mode, and documents beside it."""

    name = "businesses"
    folder = "documents"

    def prepare(self, point):
        (point / "documents").mkdir()
        self.base = None
        with sqlite3.connect(point / "register.db") as base:
            base.execute("pragma journal_mode = wal")
            base.execute("create table company (number integer primary key, sha256 text not null)")
        base.close()
        sync_dir(point)

    def resume(self, point, cases):
        super().resume(point, cases)
        self.base = None

    def place(self, point, n):
        return point / "documents" / f"{n}.xml"

    def contents(self, n):
        return body(self.name, n, 500 + n % 9000)

    def work(self, point):
        if self.base is None:
            self.base = sqlite3.connect(point / "register.db", isolation_level=None, check_same_thread=False)
            self.base.execute("pragma synchronous = full")
        n = self.acknowledged + 1
        data = self.contents(n)
        put(self.place(point, n), data)
        try:
            self.base.execute("insert into company values (?, ?)", (n, digest(data)))
        except sqlite3.Error as error:
            raise Gone("the database has gone") from error
        # SQLite passes over a directory that it cannot sync; who is promised something looks himself.
        sync_dir(point)
        self.acknowledged = n

    def check(self, point):
        # SQLite would make one.
        must((point / "register.db").exists(), self, "the database is missing")
        base = sqlite3.connect(point / "register.db")
        try:
            must(base.execute("pragma integrity_check").fetchone() == ("ok",), self, "integrity_check says no")
            rows = base.execute("select * from company order by number").fetchall()
        except sqlite3.DatabaseError as error:
            raise Failed(f"{self.name}: the database cannot be read: {error}") from error
        finally:
            base.close()
        self.check_filed(point, rows)
        return len(rows), f"{len(rows)} companies, each document as filed"

    def end(self):
        super().end()
        if self.base:
            self.base.close()


