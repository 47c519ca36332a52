"""The main job on real input: written through the mount, the daemon killed, everything read abroad from the store.

Invariant: what the embassy shows is compared with a plain copy on the disk that was made by the same calls, and with
what home itself showed before it died.
"""

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import trees
from harness import Failed, check, check_same, run, say, timed, volume_on
from harness import MIB

# What the two sides write each in its own way (index stamps, object packing) is compared between home and the embassy
# only; SQLite's shared memory file is no data: it is rebuilt from the log.
OWN_WAY = {"clone", "base"}
SOURCES_MIN = 3_000
GIT_ENV = {
    "GIT_AUTHOR_NAME": "Registrar",
    "GIT_AUTHOR_EMAIL": "registrar@example.org",
    "GIT_COMMITTER_NAME": "Registrar",
    "GIT_COMMITTER_EMAIL": "registrar@example.org",
    "GIT_AUTHOR_DATE": "2024-05-06T07:08:09+00:00",
    "GIT_COMMITTER_DATE": "2024-05-06T07:08:09+00:00",
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_SYSTEM": "/dev/null",
}

# A database in WAL mode whose log is not checkpointed when home dies: the connection stays open until then.
DATABASE_WRITER = """
import sqlite3, sys
base = sqlite3.connect(sys.argv[1], isolation_level=None)
assert base.execute("pragma journal_mode=wal").fetchone()[0] == "wal"
base.execute("pragma synchronous=full")
base.execute("pragma wal_autocheckpoint=200")
base.execute("create table land(id integer primary key, owner text, deed blob)")
for block in range(20):
    base.execute("begin")
    for n in range(100):
        base.execute("insert into land values(?, ?, ?)", (block * 100 + n, f"owner {block}.{n}", bytes([n]) * 900))
    base.execute("update land set owner = owner || '*' where id % 7 = ?", (block % 7,))
    base.execute("delete from land where id % 50 = ?", (block,))
    base.execute("commit")
print(base.execute("select count(*) from land").fetchone()[0], flush=True)
sys.stdin.read()
"""

DATABASE_READER = """
import hashlib, sqlite3, sys
base = sqlite3.connect(sys.argv[1])
assert base.execute("pragma integrity_check").fetchall() == [("ok",)]
rows = base.execute("select id, owner, hex(deed) from land order by id").fetchall()
print(len(rows), hashlib.sha256(repr(rows).encode()).hexdigest())
"""


def git(where, *words, limit=120):
    return run("git", "-C", where, "-c", "safe.directory=*", *words, limit=limit, env=GIT_ENV).stdout.strip()


def collect_sources(target):
    """Real sources out of Cargo's registry: whole crates until there are enough files."""
    home = Path(os.environ.get("CARGO_HOME", Path.home() / ".cargo"))
    crates = sorted(home.glob("registry/src/*/*"))
    target.mkdir()
    files = 0
    for crate in crates:
        if files >= SOURCES_MIN:
            return files
        # aws-lc-sys alone is 70 MB of tables: one crate must not be most of the tree.
        count = sum(len(names) for _, _, names in os.walk(crate))
        if count <= 800:
            run("cp", "-a", crate, target / crate.name)
            files += count
    raise Failed(f"only {files} files of sources in {home}: run `cargo fetch` first")


def make_origin(origin, sources):
    """A repository with a history to clone."""
    origin.mkdir()
    git(origin, "init", "-q", "-b", "main")
    for n, crate in enumerate(sorted(sources.iterdir())[:12]):
        shutil.copytree(crate, origin / crate.name, symlinks=True)
        git(origin, "add", "-A", "-f")
        git(origin, "commit", "-q", "-m", f"crate {n}")


def clone_and_commit(origin, clone):
    """What a user of git does; gives the commit it ends at."""
    run("git", "clone", "-q", "--no-hardlinks", origin, clone, limit=120, env=GIT_ENV)
    top = sorted(p for p in clone.iterdir() if p.is_dir() and p.name != ".git")
    git(clone, "mv", top[0].name, "renamed")
    (clone / "NOTES").write_text("a change of our own\n")
    git(clone, "add", "NOTES")
    git(clone, "commit", "-q", "-m", "rename and add")
    git(clone, "checkout", "-q", "-b", "other", "HEAD~3")
    git(clone, "checkout", "-q", "main")
    git(clone, "gc", "-q")
    return git(clone, "rev-parse", "HEAD")


def start_database(path):
    """A process that has committed to a database and keeps it open."""
    writer = subprocess.Popen(
        [sys.executable, "-c", DATABASE_WRITER, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    if not writer.stdout.readline().strip().isdigit():
        raise Failed("the database writer did not commit")
    return writer


def rows(database, scratch):
    """Integrity and contents of a database, read from a copy with its log but without its shared memory."""
    scratch.mkdir(exist_ok=True)
    for suffix in ("", "-wal"):
        (scratch / f"land.db{suffix}").unlink(missing_ok=True)
        if os.path.exists(f"{database}{suffix}"):
            shutil.copyfile(f"{database}{suffix}", scratch / f"land.db{suffix}")
    for leftover in scratch.glob("*-shm"):
        leftover.unlink()
    return run(sys.executable, "-c", DATABASE_READER, scratch / "land.db").stdout


def not_data(name):
    return name.endswith("-shm")


class Story:
    """One run of the case: the plain reference, the volume, and what home showed."""

    def __init__(self, directory, kind, stack):
        self.directory, self.scratch = directory, directory / "scratch"
        self.reference = directory / "reference"
        self.reference.mkdir()
        big = os.environ.get("E2E_BIG_S3" if kind == "s3" else "E2E_BIG", "256" if kind == "s3" else "1024")
        self.many, self.big = int(os.environ.get("E2E_MANY", "20000")), int(big) * MIB
        self.volume = volume_on(kind, directory, stack)
        self.home_state = directory / "home-state"
        self.home_shows = None

    def write(self, root, sources, origin):
        """All the input, by the same calls into a mount or a plain directory; gives commit and database writer."""
        trees.fill(str(root), self.many, self.big)
        run("cp", "-a", sources, root / "sources", limit=300)
        commit = clone_and_commit(origin, root / "clone")
        (root / "base").mkdir()
        database = start_database(root / "base" / "land.db")
        trees.stamp_root(root)
        return commit, database

    def prepare(self):
        """The reference on the plain disk; its own database is closed again at once."""
        sources, origin = self.directory / "sources", self.directory / "origin"
        files = collect_sources(sources)
        make_origin(origin, sources)
        (self.commit, database), took = timed(lambda: self.write(self.reference, sources, origin))
        self.rows = rows(self.reference / "base" / "land.db", self.scratch)
        database.kill()
        database.wait()
        self.want = trees.without(trees.manifest(self.reference), OWN_WAY)
        say(f"reference: {files} sources, {self.many} small files, {self.big // MIB} MiB file: {took:.1f} s on the disk")
        return sources, origin

    def live(self, sources, origin):
        """Home: write, compare, sync."""
        home = self.volume.mount("home", self.home_state)
        (commit, self.database), took = timed(lambda: self.write(home.point, sources, origin))
        say(f"written through the mount in {took:.1f} s")
        check(commit == self.commit, "git through the mount makes the commit that git on the disk makes")
        self.home_shows = trees.manifest(home.point, not_data)
        self.against_reference(self.home_shows, "home shows what the same calls make on the disk")
        _, took = timed(home.sync)
        status = home.status()
        check(
            status["unsent_bytes"] == 0 and status["unsent_segments"] == 0 and status["lag_seconds"] < 5,
            f"sync returned after {took:.1f} s with nothing unsent",
            str(status),
        )
        return home

    def against_reference(self, shown, claim):
        check_same(self.want, trees.without(shown, OWN_WAY), claim)

    def compare(self, mount, where):
        """Everything, against the disk and against what home showed."""
        shown = trees.manifest(mount.point, not_data)
        self.against_reference(shown, f"{where}: equal to the reference on the disk")
        check_same(self.home_shows, shown, f"{where}: equal to home, inode numbers and ctime too", ignore=())
        git(mount.point / "clone", "fsck", "--full", "--strict", "--no-progress")
        check(git(mount.point / "clone", "rev-parse", "HEAD") == self.commit, f"{where}: git fsck is clean")
        status = git(mount.point / "clone", "-c", "core.checkStat=minimal", "status", "--porcelain")
        check(status == "", f"{where}: git sees a clean work tree", status)
        same = rows(mount.point / "base" / "land.db", self.scratch) == self.rows
        check(same, f"{where}: the database passes integrity_check with all its rows")

    def abroad(self, name, when):
        """A read-only mount from the store alone with an empty state directory."""
        embassy, took = timed(lambda: self.volume.embassy(name))
        say(f"{when}: mounted read-only from the store alone in {took:.2f} s")
        self.compare(embassy, when)
        embassy.umount()
        shutil.rmtree(embassy.state)


def main(directory, kind):
    with contextlib.ExitStack() as stack:
        story = Story(directory, kind, stack)
        home = story.live(*story.prepare())
        home.kill()
        story.database.kill()
        story.database.wait()
        story.abroad("embassy", "after SIGKILL")
        home, took = timed(lambda: story.volume.mount("home", story.home_state))
        say(f"home mounted again after SIGKILL in {took:.2f} s")
        story.compare(home, "home after recovery")
        (home.point / "after recovery").write_text("writable again\n")
        story.home_shows = trees.manifest(home.point, not_data)
        story.want = trees.without(story.home_shows, OWN_WAY)
        _, took = timed(home.umount)
        say(f"clean unmount in {took:.1f} s")
        story.abroad("embassy-2", "after a clean unmount")
