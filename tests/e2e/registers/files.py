"""The registers that are files: identity documents, pensions, legislation, census.

Invariant: a case is acknowledged when an fsync behind its last change has returned.
"""

import hashlib
import os
import zlib

from harness import run

from registers.register import Gone, Register, body, must, put, read, sync_dir

CENSUS_BLOCK = 1 << 20


def only_these(register, point, names):
    """Nothing lies there that no clerk made."""
    more = sorted(set(os.listdir(point)) - names)
    must(not more, register, f"there is what no clerk made: {', '.join(more[:5])}")


def blob_id(data):
    """The name that git gives to a file's contents."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


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
                path, n = os.path.join(directory, name), int(name[2:11]) if name[2:11].isdigit() else 0
                must(path == str(self.place(point, n)), self, f"{path} is no document, or not in its place")
                found[n] = path
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
        more = sorted(n for n in found if not 1 <= n <= whole + 1)
        must(not more, self, f"document {whole + 1} is not right, and {len(more)} others are there: {more[:5]}")
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
        only_these(self, point, {f"payments-{k}.txt" for k in range(self.files)})
        for k in range(self.files):
            path = point / f"payments-{k}.txt"
            if not path.exists():
                continue
            last = 0
            for i, line in enumerate(read(path).splitlines(keepends=True), 1):
                n = int(line[:10]) if line[:10].isdigit() else 0
                must(line == self.line(n) and n % self.files == k, self, f"line {i} of {path.name} is not right")
                must(n > last, self, f"line {i} of {path.name} is out of order")
                last = n
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

    @staticmethod
    def file(n):
        return f"act-{n % 200}.txt"

    def contents(self, n):
        return f"Act {n}\n".encode() + body(self.name, n, 3000).hex().encode()

    def prepare(self, point):
        key = self.directory / "signing"
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "gazette@example.org", "-f", key)
        (self.directory / "signers").write_text(f"gazette@example.org {key.with_suffix('.pub').read_text()}")
        (point / "acts").mkdir()
        self.git(point, "init", "-q", "-b", "main")

    def work(self, point):
        n = self.acknowledged + 1
        try:
            put(point / "acts" / self.file(n), self.contents(n))
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
        log = self.git(point, "log", "--reverse", "--format=%H %s", "main").stdout.splitlines()
        commits, subjects = [line[:40] for line in log], [line[41:] for line in log]
        found = len(log)
        must(subjects == [f"act {n}" for n in range(1, found + 1)], self, "the history has holes")
        self.check_acts(point, found)
        tags = self.check_tags(point, commits)
        return found, f"{found} acts, {tags} signed tags, fsck clean"

    def check_acts(self, point, found):
        """The newest state, in the history and beside it; the next act may lie there and not be in the history."""
        acts = {self.file(n): self.contents(n) for n in range(max(1, found - 199), found + 1)}
        wanted = {f"100644 {blob_id(data)} {name}" for name, data in acts.items()}
        tree = self.git(point, "ls-tree", "-r", "--format=%(objectmode) %(objectname) %(path)", "main")
        wrong = sorted(line.split()[-1] for line in wanted ^ set(tree.stdout.splitlines()))
        must(not wrong, self, f"in the newest commit is not what was passed: {', '.join(wrong[:5])}")
        following = self.file(found + 1)
        there = set(os.listdir(point / "acts")) - {".git", f"{following}.new"}
        for name in sorted(there | set(acts)):
            right = (acts.get(name), self.contents(found + 1)) if name == following else (acts.get(name),)
            must(read(point / "acts" / name) in right, self, f"the file {name} is not the act that was passed")

    def check_tags(self, point, commits):
        """Each tenth act has its own tag and signature; only the newest act may be without."""
        form = "--format=%(refname:strip=2) %(tag) %(*objectname)"
        tags = set(self.git(point, "for-each-ref", form, "refs/tags").stdout.splitlines())
        wanted = {f"collection-{n} collection-{n} {commits[n - 1]}": n for n in range(10, len(commits) + 1, 10)}
        wrong = {tag for tag in tags.symmetric_difference(wanted) if tag in tags or wanted[tag] != len(commits)}
        must(not wrong, self, f"the tags are not those that were made: {', '.join(sorted(wrong)[:5])}")
        for tag in tags:
            self.git(point, "tag", "-v", tag.split()[0])
        return len(tags)


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
        only_these(self, point, {path.name for path in columns})
        found = 0
        for k, path in enumerate(columns, 1):
            must(path.name == f"column-{k:04}.bin", self, f"column {k} is missing")
            with open(path, "rb") as source:
                size, i = os.fstat(source.fileno()).st_size, 0
                while data := source.read(CENSUS_BLOCK):
                    must(data == self.block(k, i)[: len(data)], self, f"block {i} of {path.name} is not right")
                    i += 1
            must(size <= self.size["column_mib"] * CENSUS_BLOCK, self, f"{path.name} is long")
            if size < self.size["column_mib"] * CENSUS_BLOCK:
                must(k == len(columns), self, f"{path.name} is short")
                break
            found = k
        return found, f"{found} columns of {self.size['column_mib']} MiB"
