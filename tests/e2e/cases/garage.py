"""A distributed store of three machines: one of them fails under load and comes back, home dies, the embassy opens.

Garage has no put if absent: without the option that says so the volume is refused, and the refusal names the option.

Invariant: all states that are found are compared with the notes of the writers (load.py).
"""

import contextlib
import random
import time

from cluster import Garage
from harness import FULL, Volume, check, say, wait_until
from load import Load, read_tree

# Seconds of work before, during and after the failure of a node.
WORK = 30 if FULL else 4


def main(directory):
    with contextlib.ExitStack() as stack:
        cluster = Garage(directory / "cluster", stack)
        say(f"three nodes, each object on all of them; S3 on ports {cluster.s3}")
        refused = Volume(directory / "refused", "s3://land/refused", cluster.environment())
        refused.directory.mkdir()
        told = refused.init(ok=False).stderr
        check("put_if_absent=emulated" in told, "without its option the store is refused, and the option named", told)
        volume = Volume(directory, "s3://land/registers", cluster.environment(),
                        store_options=["put_if_absent=emulated"])  # fmt: skip
        volume.init()
        fail_and_return(cluster, volume, directory)


def fail_and_return(cluster, volume, directory):
    home = volume.mount("home", directory / "state", options=["protection=strict", "sync_timeout=60s"])
    check("emulated" in home.status()["store"], "the status says that put if absent is emulated")
    load = Load(random.SystemRandom().randrange(1 << 32))
    load.start(home.point)
    at_work(load, "with three nodes")
    cluster.kill(2)
    at_work(load, "with one node dead")
    cluster.start(2)
    at_work(load, "with the node back")
    load.doomed = True
    acknowledged = load.acknowledged
    home.kill()
    load.stop()
    wait_until(lambda: "land" in cluster.order("bucket", "list", node=1), 30, "the node that readers ask answers")
    # Another node than the one home wrote through; and another one fails.
    abroad = volume.at(volume.url, cluster.environment(1))
    embassy = abroad.embassy()
    load.find(read_tree(embassy.point), acknowledged, "in the embassy")
    check(True, f"the embassy has all {load.fsyncs} acknowledged fsyncs of a strict volume")
    embassy.umount()
    cluster.kill(0)
    embassy = abroad.embassy("second")
    load.find(read_tree(embassy.point), acknowledged, "with the first node dead")
    check(True, "the same with the node gone that home wrote through")
    embassy.umount()


def at_work(load, when):
    """The writers get on."""
    before = load.fsyncs
    end = time.monotonic() + WORK
    wait_until(lambda: load.fsyncs > before + 5 and time.monotonic() > end, 60 + WORK, f"{when}: fsyncs return")
    check(load.trouble is None, f"{when}: {load.fsyncs - before} fsyncs acknowledged", repr(load.trouble))
