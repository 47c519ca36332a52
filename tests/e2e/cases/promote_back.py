"""A follower that looks on while the volume changes hands, and the way back: home accepts what the embassy hands over.

Invariant: what each writer was promised in its time is there in the end, and nothing of a time that was not shared.
"""

import json

from failover import Clerks, exported, keep, missing, promote, verified
from harness import FULL, check, mounted, program, run, timed, wait_until
from sites import ONE_WAY

# Failovers, each with its way back.
TURNS = 6 if FULL else 1
SEEN_WITHIN = 10


def onlooker(world):
    """A follower goes on over the claim, and shows what the next writer writes."""
    home = world.mount_home("protection=available")
    follower = world.abroad.embassy("follower", more=["--follow"])
    clerks = Clerks(home.point)
    clerks.at_work()
    promote(world.abroad, world.state("embassy"))
    clerks.end(30)
    embassy = world.abroad.mount("embassy", world.state("embassy"), options=["protection=strict"])
    keep(embassy.point / "from-abroad", b"1")
    seen = lambda: (follower.point / "from-abroad").exists()
    _, took = timed(lambda: wait_until(seen, SEEN_WITHIN, "the follower shows what the next writer has written"))
    status = follower.status()["follow"]
    check(status["state"] == "following", f"a follower goes over the claim; it sees what comes then after {took:.2f} s", str(status))
    lost = missing(follower.point, clerks.promised())
    check(not lost, f"and all {len(clerks.promised())} files that home was promised", str(lost[:5]))
    follower.umount()
    embassy.umount()
    run(program(), "umount", home.point, limit=120, ok=None)


class Story:
    """A volume that goes to and fro: what was promised in which epoch, and what was written to nobody's knowledge."""

    def __init__(self, world):
        self.world, self.epoch, self.promised, self.tails = world, 1, [], {}

    def work(self, mount):
        """The writer of this epoch works for a while."""
        clerks = Clerks(mount.point, mark=f"-{self.epoch}")
        clerks.at_work()
        clerks.end()
        self.promised += clerks.promised()

    def all_there(self, point, where):
        lost = missing(point, self.promised)
        check(not lost, f"{where}: all {len(self.promised)} promised files of {self.epoch} epochs", str(lost[:5]))


def there_and_back(world):
    """Failover, way back, and again: epochs 1, 2, 3, 4 and so on."""
    story = Story(world)
    home = world.mount_home("protection=strict")
    story.work(home)
    for turn in range(TURNS):
        embassy = failover(story, home)
        story.work(embassy)
        home = failback(story, embassy)
        story.work(home)
        for epoch, (name, data) in story.tails.items():
            got = exported(world, home.state, epoch)
            check(got == {name: data}, f"what home had not sent in epoch {epoch} is exported", str(sorted(got)))
    embassy = failover(story, home)
    story.all_there(embassy.point, "after the last failover")
    embassy.umount()
    verified(world, story.epoch)


def failover(story, home):
    """Home is cut off with something unsent; the embassy takes over, with the state directory that it has."""
    world = story.world
    world.link.set("hang")
    name, data = f"tail-{story.epoch}", b"unsent %d" % story.epoch
    (home.point / name).write_bytes(data)
    wait_until(lambda: home.status()["unsent_segments"] > 0, 20, "home has something unsent")
    story.tails[story.epoch] = (name, data)
    report = promote(world.abroad, world.state("embassy"))
    story.epoch += 1
    check(report["outcome"] == "promoted" and report["epoch"] == story.epoch, f"promoted: epoch {story.epoch}", str(report))
    world.link.set("pass", delay=ONE_WAY)
    wait_until(lambda: home.status()["fenced"], 30, "home hears of it")
    done = run(program(), "umount", home.point, limit=120, ok=None)
    check(done.returncode == 8, "home unmounts with exit code 8", done.stderr)
    embassy = world.abroad.mount("embassy", world.state("embassy"), options=["protection=strict"])
    story.all_there(embassy.point, "in the embassy")
    return embassy


def accept(volume, state, name, ok=True):
    done = volume.ask("accept", "--state", state, "--name", name, "--host", name, "--json", role="writer", ok=ok)
    return json.loads(done.stdout) if ok else done


def failback(story, embassy):
    """The planned way back: what the embassy gives, home takes, and nobody else."""
    world = story.world
    done = accept(world.home, world.state("home"), "tallinn", ok=False)
    check(done.returncode == 8 and "not handed it over" in done.stderr, "what was not given cannot be taken", done.stderr)
    (embassy.point / "open").write_bytes(b"")
    with open(embassy.point / "open", "rb"):
        done = run(program(), "handover", embassy.point, "--to", "tallinn", limit=120, ok=None)
        check(done.returncode == 6 and mounted(embassy.point), "a mount in use is not handed over", done.stderr)
    keep(embassy.point / "last", b"%d" % story.epoch)
    run(program(), "handover", embassy.point, "--to", "tallinn", limit=120)
    check(not mounted(embassy.point), "after the handover the embassy's mount is gone")
    _, done = world.abroad.try_mount("embassy", world.state("embassy"))
    check(done.returncode == 8 and "HANDED OVER" in done.stderr, "and it is not the writer any more", done.stderr)
    done = accept(world.abroad, world.state("embassy"), "riga", ok=False)
    check(done.returncode == 8 and "tallinn" in done.stderr, "another name cannot take it", done.stderr)
    report = accept(world.home, world.state("home"), "tallinn")
    story.epoch += 1
    check(report["epoch"] == story.epoch and report["set_aside"], f"home accepts: epoch {story.epoch}", str(report))
    again = accept(world.home, world.state("home"), "tallinn")
    check(again["outcome"] == "promoted before", "once more it says that it was done before", str(again))
    home = world.mount_home("protection=strict")
    story.all_there(home.point, "at home again")
    check((home.point / "last").read_bytes() == b"%d" % (story.epoch - 1), "with what was written last in the embassy")
    check(not list(home.point.glob("tail-*")), "and nothing of what was never shared")
    return home
