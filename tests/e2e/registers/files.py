"""The registers that are files: identity documents, pensions, legislation, census.

Invariant: a case is acknowledged when an fsync behind its last change has returned.
"""

import os
import zlib

from harness import run

from registers.register import Gone, Register, body, must, put, sync_dir

CENSUS_BLOCK = 1 << 20


class Identity(Register):
    """Very many small files with owners and modes that matter: nobody but the owner's office may read them."""

    name = "identity"
    # Entered together, then promised together.
    batch = 40

    def place(self, point, n):
        return point / f"{n % 64:02x}" / f"{n // 64 % 64:02x}" / f"EE{n:09}.json"

    @staticmethod
    def rights(n):
        return (0o640 if n % 3 else 0o600), (20_000 + n % 7, 30_000 + n % 5)

    def contents(self, n):
        return b'{"number": %d, "photo": "%s"}\n' % (n, body(self.name, n, 200 + n % 3000).hex().encode())

    def work(self, point):
        first = self.acknowledged + 1
        for n in range(first, first + self.batch):
            path = self.place(point, n)
            path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                mode, owner = self.rights(n)
                os.fchown(fd, *owner)
                os.write(fd, self.contents(n))
                os.fchmod(fd, mode)
            finally:
                os.close(fd)
        sync_dir(point)
        self.acknowledged += self.batch

    def resume(self, point, cases):
        """What was begun behind the last whole document is begun anew."""
        super().resume(point, cases)
        for n in range(cases + 1, cases + self.batch + 1):
            self.place(point, n).unlink(missing_ok=True)

    def check(self, point):
        found = {}
        for directory, _, names in os.walk(point):
            for name in names:
                found[int(name[2:11])] = os.path.join(directory, name)
        whole = 0
        for n in sorted(found):
            if n != whole + 1:
                break
            state = os.lstat(found[n])
            mode, owner = self.rights(n)
            with open(found[n], "rb") as source:
                right = source.read() == self.contents(n)
            if not right or (state.st_mode & 0o7777, (state.st_uid, state.st_gid)) != (mode, owner):
                break  # the last one can have been under way
            whole = n
        must(len(found) - whole <= 1, self, f"{len(found) - whole} documents behind number {whole} are not whole")
        return whole, f"{whole} documents with owner and mode"


class Pensions(Register):
    """Payment files that only grow, a line at a time, each line promised before the next."""

    name = "pensions"
    protection = "strict"
    files = 5

    def line(self, n):
        text = f"{n:010} EE{n * 7919 % 10**11:011} {n % 4000 + 100}.{n % 100:02}"
        return f"{text} {zlib.crc32(text.encode()):08x}\n".encode()

    def work(self, point):
        n = self.acknowledged + 1
        fd = os.open(point / f"payments-{n % self.files}.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)
        try:
            os.write(fd, self.line(n))
            os.fsync(fd)
        finally:
            os.close(fd)
        self.acknowledged = n

    def check(self, point):
        numbers = []
        for k in range(self.files):
            path = point / f"payments-{k}.txt"
            if not path.exists():
                continue
            with open(path, "rb") as source:
                lines = source.read().splitlines(keepends=True)
            for i, line in enumerate(lines):
                n = int(line[:10])
                must(line == self.line(n) and n % self.files == k, self, f"line {i + 1} of {path.name} is not right")
                numbers.append(n)
        must(sorted(numbers) == list(range(1, len(numbers) + 1)), self, "payments are missing in the middle")
        return len(numbers), f"{len(numbers)} payments in order"


class Legislation(Register):
    """A git repository: each act is a commit, and every tenth a signed tag."""

    name = "legislation"

    def git(self, point, *words, ok=True):
        key = self.directory / "signing"
        settings = {
            "user.name": "State Gazette", "user.email": "gazette@example.org", "gpg.format": "ssh",
            "user.signingkey": f"{key}.pub", "gpg.ssh.allowedSignersFile": str(self.directory / "signers"),
            "core.fsync": "all", "gc.auto": "0", "safe.directory": "*",
        }  # fmt: skip
        settings = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        return run("git", *settings, "-C", point / "acts", *words, ok=ok, limit=120)

    def prepare(self, point):
        key = self.directory / "signing"
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "gazette@example.org", "-f", key)
        (self.directory / "signers").write_text(f"gazette@example.org {key.with_suffix('.pub').read_text()}")
        (point / "acts").mkdir()
        self.git(point, "init", "-q", "-b", "main")

    def work(self, point):
        n = self.acknowledged + 1
        try:
            put(point / "acts" / f"act-{n % 200}.txt", f"Act {n}\n".encode() + body(self.name, n, 3000).hex().encode())
            self.git(point, "add", "-A")
            self.git(point, "commit", "-q", "-m", f"act {n}")
            if n % 10 == 0:
                self.git(point, "tag", "-s", "-m", f"collection {n}", f"collection-{n}")
        except Exception as error:
            raise Gone("git has failed") from error
        # The last thing that git does is a rename, which it does not sync.
        sync_dir(point / "acts" / ".git")
        self.acknowledged = n

    def resume(self, point, cases):
        """Whoever held a lock is dead."""
        super().resume(point, cases)
        for lock in (point / "acts" / ".git").rglob("*.lock"):
            lock.unlink()

    def check(self, point):
        self.git(point, "fsck", "--full", "--strict")
        log = self.git(point, "log", "--format=%s", "main").stdout.splitlines()
        found = len(log)
        must(log == [f"act {n}" for n in range(found, 0, -1)], self, "the history has holes")
        tags = self.git(point, "tag", "-l").stdout.split()
        must(len(tags) in (found // 10, found // 10 - 1), self, f"{len(tags)} tags for {found} acts")
        for tag in tags:
            self.git(point, "tag", "-v", tag)
        return found, f"{found} acts, {len(tags)} signed tags, fsck clean"


class Census(Register):
    """A bulk load: columns of many megabytes, each promised when it is complete."""

    name = "census"
    protection = "local"

    def block(self, column, i):
        return body(self.name, column * 100_000 + i, CENSUS_BLOCK)

    def work(self, point):
        column = self.acknowledged + 1
        if column > self.size["columns"]:
            self.stopping.wait(1)
            return
        with open(point / f"column-{column:04}.bin", "wb", buffering=0) as out:
            for i in range(self.size["column_mib"]):
                if self.stopping.is_set():
                    return
                out.write(self.block(column, i))
            os.fsync(out.fileno())
        sync_dir(point)
        self.acknowledged = column

    def resume(self, point, cases):
        """The embassy has some more to load."""
        super().resume(point, cases)
        self.size = {**self.size, "columns": cases + 2}

    def check(self, point):
        columns = sorted(point.glob("column-*.bin"))
        found = 0
        for k, path in enumerate(columns, 1):
            must(path.name == f"column-{k:04}.bin", self, f"column {k} is missing")
            with open(path, "rb") as source:
                size, i = os.fstat(source.fileno()).st_size, 0
                while data := source.read(CENSUS_BLOCK):
                    must(data == self.block(k, i)[: len(data)], self, f"block {i} of {path.name} is not right")
                    i += 1
            if size < self.size["column_mib"] * CENSUS_BLOCK:
                must(k == len(columns), self, f"{path.name} is short")
                break
            found = k
        return found, f"{found} columns of {self.size['column_mib']} MiB"
