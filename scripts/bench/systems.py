"""The file systems under test, each on a directory of its own: how to mount one, to bring it to rest, and to ask what
it has used and sent.

Invariant: after `settle` nothing that was written waits any more, neither in the kernel nor in the daemon (an upload, a
write-back), so that no row pays for the one before it; after `cold` the kernel and the daemon have forgotten all
content and all names, as after a restart: what is on the local disk, caches included, stays.
"""

import contextlib
import json
import os
import subprocess
import time
from pathlib import Path

import common
import harness
import postgres
from harness import drop_caches, empty_dir, run, wait_until

PASSPHRASE = "a passphrase for the bench"


class System:
    """What a plain directory needs; the others say what differs."""

    name = ""
    # What a reader of the table has to know.
    note = ""

    def __init__(self, directory):
        self.directory = Path(directory)
        self.point = self.directory / "mount"
        self.point.mkdir()
        self.server = None

    def command(self):
        """The daemon in the foreground: words, environment."""
        raise NotImplementedError

    def mount(self):
        """Seconds until it is there."""
        words, more = self.command()
        words, env = [str(w) for w in words], {**os.environ, **more}
        begin = time.monotonic()
        with open(self.directory / "daemon.log", "ab") as log:
            self.server = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, cwd="/")
        wait_until(self.mounts, 60, f"{self.name} mounts", pause=0.005)
        return time.monotonic() - begin

    def mounts(self):
        if self.server.poll() is not None:
            said = (self.directory / "daemon.log").read_text(errors="replace")
            raise harness.Failed(f"{self.name} ended with {self.server.returncode}: {said[-2000:]}")
        return self.there()

    def there(self):
        """Whether what is written below `point` goes to this system."""
        return harness.mounted(self.point) is not None

    def settle(self):
        run("sync", limit=600)

    def umount(self):
        self.settle()
        run("umount", self.point, limit=600)
        for insist in (None, self.server.terminate, self.server.kill):
            if insist:
                insist()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.server.wait(30)
                return
        raise harness.Failed(f"{self.name} does not end")

    def cold(self):
        """As after a restart; gives the seconds of the mount, None where there was none."""
        self.umount()
        drop_caches()
        return self.mount()

    def pids(self):
        """The processes that serve it, helpers included."""
        if self.server is None:
            return []
        found, todo = [], [self.server.pid]
        while todo:
            found.append(todo.pop())
            todo += postgres.children(found[-1])
        return found

    def sent(self):
        """(bytes, requests) that went to the store since some moment before the last `mount`, or None where there is no
        such thing."""
        return None


class Ext4(System):
    """A directory on the disk: the limit of the disk."""

    name = "ext4"

    def mount(self):
        return None

    def there(self):
        return True

    def umount(self):
        self.settle()


class NullFuse(System):
    """The ceiling that FUSE sets: scripts/bench/null_fuse.rs. It would forget everything at an unmount, so only the
    kernel forgets."""

    name = "null"
    note = "keeps everything in memory, nothing on a disk; `fsync` is asked and answered at once"

    def command(self):
        usual = common.REPO / "target" / "release" / "examples" / "null_fuse"
        return [os.environ.get("NULL_FUSE", usual), self.point], {}

    def mount(self):
        took = super().mount()
        # As EmbassyFS asks of the kernel.
        device = os.stat(self.point).st_dev
        Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb").write_text("2048")
        return took

    def cold(self):
        drop_caches()


class Gocryptfs(System):
    """Local encryption only."""

    name = "gocryptfs"

    def __init__(self, directory):
        super().__init__(directory)
        self.cipher, self.secret = self.directory / "cipher", self.directory / "secret"
        self.cipher.mkdir()
        self.secret.write_text(f"{PASSPHRASE}\n")
        run("gocryptfs", "-q", "-init", "-passfile", self.secret, self.cipher)

    def command(self):
        words = ["gocryptfs", "-fg", "-q", "-nosyslog", "-allow_other", "-passfile", self.secret]
        return [*words, self.cipher, self.point], {}


class JuiceFS(System):
    """Metadata in SQLite, content in an object store of any kind: a directory unless `store` says otherwise.

    `store`: words for `juicefs format` that name the storage, such as `--storage s3 --bucket URL`; `env`: for every
    command, such as keys; `inside`: the words with which a command is run where the store can be reached; `writeback`:
    writes are acknowledged by the local disk and sent later; `mount_options`: more words for `juicefs mount`.
    """

    name = "juicefs"
    version = "1.4.2"

    def __init__(self, directory, store=None, env=None, inside=(), writeback=False, mount_options=()):
        super().__init__(directory)
        self.inside, self.writeback, self.mount_options = list(inside), writeback, list(mount_options)
        self.meta = f"sqlite3://{self.directory}/meta.db"
        key, home = self.directory / "key.pem", self.directory / "home"
        home.mkdir()
        self.env = {"HOME": str(home), "JFS_RSA_PASSPHRASE": PASSPHRASE, **(env or {})}
        run("openssl", "genrsa", "-traditional", "-aes256", "-passout", f"pass:{PASSPHRASE}", "-out", key, "2048")
        store = store or ["--storage", "file", "--bucket", f"{self.directory}/objects/"]
        # No trash: what is removed is to go, as everywhere else.
        words = ["--no-agent", "--trash-days", "0", *store, "--encrypt-rsa-key", key, self.meta, "bench"]
        run(*self.inside, self.program(), "format", *words, env=self.env)

    @classmethod
    def program(cls):
        return os.environ.get("JUICEFS", str(common.TOOLS / f"juicefs-{cls.version}" / "bin" / "juicefs"))

    def command(self):
        quiet = ["--no-usage-report", "--no-agent", "--no-syslog", "--backup-meta", "0", "--metrics", "127.0.0.1:0"]
        words = ["--cache-dir", self.directory / "cache", *self.mount_options, *["--writeback"] * self.writeback]
        return [*self.inside, self.program(), "mount", *quiet, *words, self.meta, self.point], self.env

    def figures(self):
        """What it counts itself."""
        lines = (line.rsplit(" ", 1) for line in (self.point / ".stats").read_text().splitlines())
        return {pair[0]: float(pair[1]) for pair in lines if len(pair) == 2}

    def settle(self):
        super().settle()
        if self.writeback:
            sent_all = lambda: not self.figures().get("juicefs_staging_blocks")  # noqa: E731
            wait_until(sent_all, 1800, "JuiceFS has sent all", pause=0.02)

    def sent(self):
        seen = self.figures()
        requests = seen.get("juicefs_object_request_durations_histogram_seconds_PUT_total", 0)
        return int(seen.get("juicefs_object_request_data_bytes_PUT", 0)), int(requests)


class Rclone(System):
    """`rclone mount` of a crypt remote over a directory, with its cache for writes and reads."""

    name = "rclone"
    note = "answers `fsync` without doing it and caches plain text on the disk; its uploads are waited for between rows"

    def __init__(self, directory):
        super().__init__(directory)
        self.config, self.port = self.directory / "rclone.conf", harness.free_port()
        obscured = run("rclone", "obscure", PASSPHRASE).stdout.strip()
        store = empty_dir(self.directory / "store")
        self.config.write_text(f"[crypt]\ntype = crypt\nremote = {store}\npassword = {obscured}\n")

    def command(self):
        words = ["rclone", "mount", "crypt:", self.point, "--config", self.config, "--allow-other"]
        # Uploads at once would have it trip over names that git and SQLite rename and remove.
        words += ["--vfs-cache-mode", "full", "--vfs-write-back", "1s", "--cache-dir", self.directory / "cache"]
        return [*words, "--rc", "--rc-no-auth", "--rc-addr", f"127.0.0.1:{self.port}"], {}

    def idle(self):
        said = run("rclone", "rc", "--rc-addr", f"127.0.0.1:{self.port}", "vfs/stats", ok=None)
        cache = json.loads(said.stdout)["diskCache"] if said.returncode == 0 else {"uploadsQueued": 1}
        return not cache["uploadsQueued"] and not cache["uploadsInProgress"]

    def settle(self):
        wait_until(self.idle, 1800, "rclone has sent all", pause=0.05)
        super().settle()


class EmbassyFs(System):
    """The real thing at `local`, the store a directory on the same disk."""

    name = "embassyfs"

    def __init__(self, directory):
        super().__init__(directory)
        self.volume = harness.Volume(directory)
        self.volume.init()
        self.state = self.directory / "state"
        self.seen, self.mounted = {}, None

    def mount(self):
        begin = time.monotonic()
        self.mounted = self.volume.mount("mount", self.state, options=["protection=local", "allow_other"])
        return time.monotonic() - begin

    def settle(self):
        self.mounted.sync()
        super().settle()

    def umount(self):
        self.settle()
        self.mounted.umount(limit=600)
        self.mounted = None

    def pids(self):
        return [self.mounted.pid] if self.mounted else []

    def look(self):
        """Notes the objects that are there; one that is deleted later was sent all the same."""
        for path in self.volume.store_dir.rglob("*"):
            if path not in self.seen and path.is_file():
                self.seen[path] = path.stat().st_size

    def sent(self):
        """Each put makes one object; the volume's own figures leave the checkpoints' bytes out."""
        self.look()
        return sum(self.seen.values()), len(self.seen)


SYSTEMS = {s.name: s for s in (Ext4, NullFuse, Gocryptfs, JuiceFS, Rclone, EmbassyFs)}
