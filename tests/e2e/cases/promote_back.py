"""A follower that looks on while the volume changes hands, and the way back: home accepts what the embassy hands over.

Invariant: what each writer was promised in its time is there in the end, and nothing of a time that was not shared.
"""

import errno
import os
import time

from failover import Clerks, World, contents, missing, promote
from harness import FULL, check, mounted, program, run, timed, wait_until
from sites import ONE_WAY

TURNS = 4 if FULL else 1
SEEN_WITHIN = 10


def main(directory, sites):
    onlooker(World(directory, sites, "onlooker"))


def onlooker(world):
    """A follower goes on over the claim, and shows what the next writer writes."""
    home = world.mount_home("protection=available")
    follower = world.abroad.embassy("follower", more=["--follow"])
    clerks = Clerks(home.point)
    clerks.at_work()
    promote(world.abroad, world.state("embassy"))
    clerks.end(30)
    embassy = world.abroad.mount("embassy", world.state("embassy"), options=["protection=strict"])
    (embassy.point / "from-abroad").write_bytes(b"1")
    fd = os.open(embassy.point / "from-abroad", os.O_WRONLY)
    os.fsync(fd)
    os.close(fd)
    seen = lambda: (follower.point / "from-abroad").exists()
    _, took = timed(lambda: wait_until(seen, SEEN_WITHIN, "the follower shows what the next writer has written"))
    status = follower.status()["follow"]
    check(status["state"] == "following", f"a follower goes over the claim; it sees what comes then after {took:.2f} s", str(status))
    lost = missing(follower.point, clerks.promised())
    check(not lost, f"and all {len(clerks.promised())} files that home was promised", str(lost[:5]))
    follower.umount()
    embassy.umount()
    run(program(), "umount", home.point, limit=120, ok=None)
