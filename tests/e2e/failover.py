"""What the cases of a failover share: clerks who write at home and note what they were promised, a volume that two
sites reach, and the command that takes it over.

Invariant: a file is noted as promised when an fsync behind its last change has returned, in this process, outside every
mount; what it must hold anybody can compute again.
"""

import json
import os
import threading
import time
from dataclasses import dataclass, field

from harness import Failed, Volume, check, empty_dir, program, run, wait_until
from registers.register import GONE, body

REASON = "the ministry is under water"
# Exit code of commands that found what they look for.
FOUND = 9
BLOCK, STREAM = 256 << 10, 8 << 20


@dataclass
class Clerk:
    """One thread at home. `promised`: (path below the mount, size, when), in order; `error`: how it ended."""

    name: str
    batch: int = 1
    size: int = 700
    promised: list = field(default_factory=list)
    error: int = 0
    trouble: str = ""


def contents(path, size):
    return body("promised", path, size)


class Clerks:
    """All who write on one mount: some promise each file, one many at a time, one a large one."""

    def __init__(self, point, mark=""):
        # Names are looked up from here: below a mount point that has lost its mount nothing is written.
        self.root, self.mark, self.ending = os.open(point, os.O_DIRECTORY), mark, False
        self.clerks = [Clerk("a"), Clerk("b"), Clerk("many", batch=25), Clerk("stream", size=STREAM)]
        self.threads = [threading.Thread(target=self.work, args=(clerk,), daemon=True) for clerk in self.clerks]
        for thread in self.threads:
            thread.start()

    def work(self, clerk):
        n = 0
        try:
            os.mkdir(clerk.name + self.mark, dir_fd=self.root)
            while not self.ending:
                done = [f"{clerk.name}{self.mark}/{n + k}" for k in range(clerk.batch)]
                for path in done:
                    self.write(path, clerk.size, last=path == done[-1])
                n, now = n + clerk.batch, time.time()
                clerk.promised += [(path, clerk.size, now) for path in done]
        except OSError as error:
            clerk.error = error.errno
            clerk.trouble = "" if error.errno in GONE else repr(error)
        except Exception as error:  # whatever it was, the case must not take it for silence
            clerk.trouble = repr(error)

    def write(self, path, size, last):
        """A file; with the last one of a batch all of it is made durable."""
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644, dir_fd=self.root)
        data = contents(path, size)
        try:
            for at in range(0, size, BLOCK):
                os.write(fd, data[at : at + BLOCK])
            if last:
                os.fsync(fd)
        finally:
            os.close(fd)

    def at_work(self, files=40, limit=60):
        """They have all been promised something."""
        busy = lambda: len(self.promised()) >= files and all(clerk.promised for clerk in self.clerks)
        wait_until(lambda: busy() or not self.going(), limit, "the clerks at home work")
        if not self.going():
            raise Failed(f"the clerks at home have stopped: {self.ends()}")

    def going(self):
        return all(thread.is_alive() for thread in self.threads)

    def promised(self):
        return [file for clerk in self.clerks for file in list(clerk.promised)]

    def ends(self):
        return {clerk.name: clerk.trouble or os.strerror(clerk.error) for clerk in self.clerks}

    def end(self, limit=60):
        """Waits for them all; nobody may hang."""
        self.ending = True
        deadline = time.monotonic() + limit
        for thread in self.threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        hanging = [clerk.name for clerk, thread in zip(self.clerks, self.threads, strict=True) if thread.is_alive()]
        if hanging or any(clerk.trouble for clerk in self.clerks):
            raise Failed(f"clerks that hang: {hanging}; others ended with {self.ends()}")
        os.close(self.root)


def missing(point, promised):
    """Of what was promised, what is not there as it was written."""
    return [file for file in promised if not holds(point / file[0], file[1])]


def holds(path, size):
    try:
        return path.read_bytes() == contents(f"{path.parent.name}/{path.name}", size)
    except FileNotFoundError:
        return False


class World:
    """A volume: home writes to it over a long link of its own, the embassy lives beside it."""

    def __init__(self, directory, sites, name):
        self.directory, self.sites, self.link = empty_dir(directory / name), sites, sites.another_link()
        environment = sites.environment(at_home=True, link=self.link)
        self.home = Volume(self.directory, f"s3://land/{name}", environment, inside=sites.home)
        self.home.init()
        self.abroad = self.home.at(self.home.url, sites.environment(at_home=False), inside=sites.embassy)
        self.objects = sites.root / "land" / name

    def state(self, name):
        return self.directory / f"{name}-state"

    def mount_home(self, *options, name="home"):
        return self.home.mount(name, self.state(name), options=["sync_timeout=60s", *options])

    def segments(self):
        """The segments that the store holds."""
        return sorted(os.listdir(self.objects / "log"))


def promote(volume, state, *words, host="luxembourg", ok=True, limit=60):
    """Takes the volume over; gives what the command says, as an object, or the finished command where it is to fail."""
    more = ["--state", state, "--host", host, "--reason", REASON, "--json", *words]
    done = volume.ask("promote", *more, role="writer", ok=ok, limit=limit)
    return json.loads(done.stdout) if ok else done


def divergence(volume, what, state, *words, epoch=None):
    """What a host had not sent when it lost the volume: the finished command."""
    command = [*volume.inside, program(), "divergence", what, "--state", state]
    if what != "list":
        command += ["--store", volume.url, "--key", volume.key("reader")]
        command += ["--epoch", epoch] if epoch else []
    return run(*command, *words, limit=120, ok=None, env=volume.env)


def exported(world, state, epoch=None):
    """The files of an export, by their paths: their contents."""
    dest = empty_dir(world.directory / "export")
    done = divergence(world.abroad, "export", state, dest, epoch=epoch)
    if done.returncode not in (0, FOUND):
        raise Failed(f"divergence export ended with {done.returncode}: {done.stderr}")
    files = dest / "files"
    return {str(path.relative_to(files)): path.read_bytes() for path in files.rglob("*") if path.is_file()}


def verified(world, epoch):
    """There is one chain, says who has only the auditor's key."""
    done = world.abroad.ask("verify", "--json", role="auditor", ok=None)
    whole = done.returncode == 0 and not json.loads(done.stdout)["findings"]
    check(whole, f"one chain, up to epoch {epoch}, verified without keys", done.stdout + done.stderr)


def keep(path, data):
    """A file that is durable when this returns."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        os.write(fd, data)
        os.fsync(fd)
    finally:
        os.close(fd)
