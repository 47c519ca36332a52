"""The daemon dies under load, and the power goes, again and again: nothing that fsync acknowledged is ever missing.

`kill`: SIGKILL at random moments, of serving, mounting and unmounting daemons, at every level, with the machine's page
cache dropped now and then. `power`: the state directory lies on a disk with a volatile write cache (disk.py), and
images of what a power cut leaves are taken while the writers run. `sqlite`, `postgresql`: SIGKILL under databases.

Invariant: the tree that is found is compared whole with the states that were (load.py); what was acknowledged is read
off before the blow.
"""

import contextlib
import os
import random
import shutil
import subprocess
import time
import zlib

import postgres
from cases import apps_databases
from disk import Disk, mount_image, unmount
from harness import FS_TYPE, FULL, Failed, Volume, check, mounted, program, run, say, wait_until
from load import Load, read_tree

KILLS = 400 if FULL else 25
CUTS = 150 if FULL else 8
# Of the sectors that were written and not flushed.
KEEP = ("none", "some", "some", "all")
AFTER = b"the power is back"
DATABASE_KILLS = 60 if FULL else 3


class Daemon:
    """A mount whose daemon is our child, so that it can be killed from its first moment on."""

    def __init__(self, volume, point, state, protection):
        point.mkdir(exist_ok=True)
        self.point, self.log = point, volume.directory / "daemon.log"
        options = f"protection={protection},sync_timeout=20s,cache_size=16M,dirty_size=4M,allow_other"
        command = [program(), "mount", "--foreground", "--store", volume.url, "--state", state]
        command += ["--key", volume.key("writer"), "-o", options, point]
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [str(c) for c in command], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def ready(self):
        def up():
            if self.process.poll() is not None:
                raise Failed(f"the mount ended with {self.process.returncode}: {self.log.read_text()[-2000:]}")
            return mounted(self.point) == FS_TYPE

        wait_until(up, 60, f"{self.point} is mounted", pause=0.003)
        return self

    def kill(self):
        self.process.kill()
        self.process.wait(20)
        if mounted(self.point):
            run("umount", "-l", self.point, limit=20)

    def umount(self):
        run(program(), "umount", self.point, limit=120)
        self.process.wait(20)


def kill(directory):
    """SIGKILL, mount, look, go on."""
    draw, load = seeded()
    volume = Volume(directory)
    volume.init()
    point, state = directory / "home", directory / "state"
    daemon = Daemon(volume, point, state, "local").ready()
    began, changes, kills = time.monotonic(), 0, 0
    while kills < KILLS:
        load.start(point)
        time.sleep(draw.uniform(0.02, 0.6))
        load.doomed = True
        kills += die(daemon, draw, volume, state)
        load.stop()
        changes += len(load.history)
        # What the kernel has in memory of the state directory has mostly been synced; the rest it keeps.
        if draw.random() < 0.2:
            drop_only_caches()
        level = draw.choice(["local", "local", "available", "strict"])
        daemon = Daemon(volume, point, state, level).ready()
        load.go_on_from(load.find(read_tree(point), load.acknowledged, f"after kill {kills}"))
        load.forget_rest()
    took = time.monotonic() - began
    check(load.fsyncs > KILLS, f"{kills} kills survived ({kills / took * 60:.0f}/min): {load.fsyncs} fsyncs "
          f"acknowledged, {changes} changes, the whole tree compared after each")  # fmt: skip
    daemon.umount()
    embassy = volume.embassy()
    check(read_tree(embassy.point) == load.tree, "the embassy has the same tree")
    embassy.umount()


def die(daemon, draw, volume, state):
    """One blow or two: at work, while unmounting, or while the next mount recovers. Gives how many."""
    how = draw.choice(["work", "work", "work", "umount", "mount"])
    if how == "umount":
        # The unmount commits, ships and makes a checkpoint; the writers still hold their files.
        leaving = subprocess.Popen(
            [program(), "umount", "--lazy", daemon.point],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        time.sleep(draw.uniform(0, 0.15))
        daemon.kill()
        leaving.wait(60)
        return 1
    daemon.kill()
    if how == "mount":
        second = Daemon(volume, daemon.point, state, "local")
        time.sleep(draw.uniform(0, 0.12))
        second.kill()
        return 2
    return 1


def drop_only_caches():
    """As harness.drop_caches, but what was not synced is not synced now."""
    with open("/proc/sys/vm/drop_caches", "w") as knob:
        knob.write("3\n")


def seeded():
    seed = os.environ.get("E2E_SEED") or f"{random.SystemRandom().getrandbits(32)}"
    say(f"E2E_SEED={seed}")
    return random.Random(seed), Load(seed)


def power(directory):
    """Images of the disk at random moments; each is mounted, recovers its journal, and must have what was promised."""
    draw, load = seeded()
    volume = Volume(directory)
    volume.init()
    disk = Disk(directory)
    daemon = Daemon(volume, directory / "home", disk.point / "state", "local").ready()
    load.start(daemon.point)
    sectors = kept = 0
    for number in range(CUTS):
        time.sleep(draw.uniform(0.1, 0.8))
        image, promised, lost = cut(volume, disk, load, draw, number)
        sectors, kept = sectors + lost["pending"], kept + lost["kept"]
        look_at_image(volume, image, load, promised, number)
    check(sectors > kept, f"{CUTS} power cuts survived: {load.fsyncs} fsyncs acknowledged; of {sectors} unflushed "
          f"sectors {kept} were kept")  # fmt: skip
    put_back_later(volume, disk, load, draw)
    load.stop()
    check(load.find(read_tree(daemon.point), load.number, "home itself") == load.number, "home never noticed")
    daemon.umount()
    disk.close()


def cut(volume, disk, load, draw, number):
    """The store at one moment, then the disk at a later one: a segment is never sent before it is on the disk."""
    shutil.rmtree(volume.directory / "store-then", ignore_errors=True)
    # What is being uploaded has no name yet: it may be gone before it is copied.
    shutil.copytree(volume.store_dir, volume.directory / "store-then", copy_function=os.link,
                    ignore=shutil.ignore_patterns(".tmp"))  # fmt: skip
    with load.lock:
        promised = load.acknowledged
    image = volume.directory / "image"
    return image, promised, disk.cut(image, draw.choice(KEEP), draw.getrandbits(30), draw.randrange(12))


def look_at_image(volume, image, load, promised, number):
    then = volume.at(f"file://{volume.directory}/store-then")
    mount_image(image, volume.directory / "after")
    try:
        daemon = Daemon(then, volume.directory / "recovered", volume.directory / "after" / "state", "strict").ready()
        found = read_tree(daemon.point)
        with load.lock:
            load.find(found, promised, f"power cut {number}")
            load.go_on_from(promised)
        # It goes on, and what it recovered reaches the embassy.
        with open(daemon.point / "after", "wb") as out:
            out.write(AFTER)
            out.flush()
            os.fsync(out.fileno())
        daemon.kill()
        embassy = then.embassy()
        found["after"] = (len(AFTER), zlib.crc32(AFTER))
        check(read_tree(embassy.point) == found, f"cut {number}: {promised} acknowledged changes are at home and abroad")
        embassy.umount()
    finally:
        if mounted(volume.directory / "recovered"):
            daemon.kill()
        unmount(volume.directory / "after")


def put_back_later(volume, disk, load, draw):
    """An old image beside a store that went on is no power cut: home must refuse it, not fork the history."""
    image = volume.directory / "image"
    disk.cut(image, "none")
    newest = volume.versions()[0]["commit"]
    wait_until(lambda: volume.versions()[0]["commit"] > newest + 2, 60, "the store goes on")
    mount_image(image, volume.directory / "after")
    try:
        point, done = volume.try_mount("recovered", volume.directory / "after" / "state")
        check(done.returncode == 8, "an old image of the disk is refused", f"{done.returncode}: {done.stderr}")
        say(done.stderr.strip()[:200])
    finally:
        unmount(volume.directory / "after")


def sqlite(directory):
    """Writers of both journals; each round the daemon is killed under them, and then they."""
    draw, _ = seeded()
    volume, ledger, state = Volume(directory), apps_databases.Ledger(directory), directory / "state"
    volume.init()
    daemon = Daemon(volume, directory / "home", state, "local").ready()
    for journal in apps_databases.JOURNALS:
        apps_databases.python(apps_databases.CREATE, daemon.point / f"{journal}.db", journal)
    for number in range(DATABASE_KILLS):
        processes = ledger.write(daemon.point, number)
        time.sleep(draw.uniform(0.0, 0.5))
        daemon.kill()
        ledger.end(processes)
        daemon = Daemon(volume, daemon.point, state, draw.choice(["local", "available"])).ready()
        ledger.look(daemon.point, f"kill {number + 1}")
    noted = sum(apps_databases.last_noted(log) for log in ledger.notes.iterdir())
    check(noted > 0, f"{DATABASE_KILLS} kills survived, {noted} acknowledged transactions checked")
    daemon.umount()


def postgresql(directory):
    """pgbench runs while the daemon is killed; the server, which cannot go on, is killed after it and recovers."""
    draw, _ = seeded()
    volume, state = Volume(directory), directory / "state"
    volume.init()
    daemon = Daemon(volume, directory / "home", state, "local").ready()
    server = postgres.Server(daemon.point / "data", directory / "server.log")
    with contextlib.closing(server):
        bank = apps_databases.Bank(directory, server)
        server.make()
        server.start()
        server.fill(1)
        for number in range(DATABASE_KILLS):
            load = server.start_bench()
            time.sleep(draw.uniform(0.0, 1.0))
            daemon.kill()
            server.kill()
            bank.acknowledged += postgres.end_of(load)
            daemon = Daemon(volume, daemon.point, state, draw.choice(["local", "available"])).ready()
            bank.recover(f"kill {number + 1}")
            bank.check_all(f"kill {number + 1}")
        server.stop()
        bank.checksums(server.data, f"{DATABASE_KILLS} kills survived, {bank.acknowledged} transactions checked")
        daemon.umount()


def main(directory, which):
    {"kill": kill, "power": power, "sqlite": sqlite, "postgresql": postgresql}[which](directory)
