"""Promotions that meet others, or themselves: two at once, done twice, killed, without a store, without the right.

Invariant: how often the volume has changed hands is read off the claims in the store, not off what the commands say.
"""

import json
import os
import random
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

from failover import Clerks, missing, promote, verified
from harness import FULL, check, mounted, program, run, say, timed, wait_until
from sites import ONE_WAY

RACES, KILLS = (25, 60) if FULL else (3, 8)
# One way: far enough that two promotions that begin together overlap, and a kill hits the middle of one.
FAR = 0.06
# Where home puts several segments in the time that one question takes.
VERY_FAR = 0.12
# How long a promotion may try to reach a store that is not there.
GIVES_UP = 60
# Behind a barrier home has no place to win; without one it would win on and on.
FAR_LOSSES = 60
DOWN = ("cut", "hang", "503", "403", "garbage") if FULL else ("cut", "hang")


def no_store(world, mode):
    """The command where the store does not answer: how it ends, and after how long."""
    link = world.sites.another_link()
    link.set(mode)
    volume = world.home.at(world.home.url, world.sites.environment(at_home=True, link=link))
    return timed(lambda: promote(volume, world.state(mode), ok=None, limit=GIVES_UP))


def from_afar(world):
    """As far from the store as home, and home fast: the one that takes over must not run after it for ever."""
    home = world.mount_home("protection=strict")
    clerks = Clerks(home.point)
    clerks.at_work()
    world.link.set("pass", delay=VERY_FAR, open="resume")
    report, took = timed(lambda: promote(world.home, world.state("far"), limit=120))
    barred = f"{report['places_lost']} places lost, {report['barriers']} barriers"
    check(report["places_lost"] < FAR_LOSSES, f"from as far as home: promoted after {took:.1f} s, {barred}")
    wait_until(lambda: home.status()["fenced"], 30, "home is fenced")
    clerks.end(30)
    world.link.set("pass", delay=ONE_WAY, open="resume")
    embassy = world.abroad.embassy()
    lost = missing(embassy.point, clerks.promised())
    check(not lost, f"all {len(clerks.promised())} files that home was promised are there", str(lost[:5]))
    embassy.umount()
    run(program(), "umount", home.point, limit=120, ok=None)


def epoch(world):
    """How often the volume has changed hands, by the store."""
    return 1 + len(claims(world))


def claims(world):
    """The segments that are claims: small, signed, and with that kind in the trailer."""
    found = []
    for name in world.segments():
        with open(world.objects / "log" / name, "rb") as segment:
            trailer = segment.read()[-344:]
        if trailer[10] == 1:
            found.append(name)
    return found


def command(volume, state, host):
    words = [*volume.inside, program(), "promote", "--store", volume.url, "--key", volume.key("writer")]
    return [str(word) for word in [*words, "--state", state, "--host", host, "--reason", "race", "--json"]]


def start(volume, state, host):
    return subprocess.Popen(
        command(volume, state, host), env={**os.environ, **volume.env},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def races(world):
    """Two at once, again and again; home is alive in the first of them."""
    home = world.mount_home("protection=strict")
    clerks = Clerks(home.point)
    clerks.at_work()
    met = 0
    for n in range(RACES):
        before = epoch(world)
        states = [world.state(f"{host}{n}") for host in ("left", "right")]
        # Without home they are far from the store, so that they meet.
        both = [start(world.home if n else world.abroad, state, state.name) for state in states]
        said = [one.communicate(timeout=120) for one in both]
        codes = [one.returncode for one in both]
        won = [k for k, code in enumerate(codes) if code == 0]
        check(len(won) == epoch(world) - before, f"race {n}: as many claims as winners, {len(won)}", f"{codes} {said}")
        # One that has begun when the other was done takes over from it: no race. The newest epoch has it.
        best = max(won, key=lambda k: json.loads(said[k][0])["epoch"])
        if len(won) == 1:
            met += 1
            lost = said[1 - best][1]
            told = "taken over" in lost and states[best].name in lost and "panicked" not in lost
            check(codes[1 - best] == 8 and told, f"race {n}: the other ends with code 8, and is told by whom", lost)
        _, done = world.abroad.try_mount("loser", states[1 - best])
        check(done.returncode == 8, "the loser's state directory cannot be mounted for writing", done.stderr)
        winner = world.abroad.mount("winner", states[best], options=["protection=strict"])
        (winner.point / f"won{n}").write_bytes(b"won")
        winner.umount()
        if n == 0:
            clerks.end(30)
            run(program(), "umount", home.point, limit=120, ok=None)
            world.link.set("pass", delay=FAR, open="resume")
    check(met > RACES // 2, f"in {met} of {RACES} races the two met")
    world.link.set("pass", delay=ONE_WAY, open="resume")
    embassy = world.abroad.embassy()
    lost = missing(embassy.point, clerks.promised())
    there = [n for n in range(RACES) if (embassy.point / f"won{n}").read_bytes() == b"won"]
    check(not lost and len(there) == RACES, "all that was promised is there, home's and each winner's", str(lost[:5]))
    embassy.umount()
    verified(world, epoch(world))
    twice(world, states[best])


def twice(world, state):
    """Done again, it says that it was done, and does nothing."""
    before = world.segments()
    report = promote(world.abroad, state)
    check(report["outcome"] != "promoted" and world.segments() == before, f"once more: {report['outcome']}", str(report))
    fresh = world.state("fresh")
    first, again = promote(world.abroad, fresh), promote(world.abroad, fresh)
    same = again["outcome"] == "promoted before" and again["epoch"] == first["epoch"] and again["place"] == first["place"]
    check(same, "twice in a row: the second time says that it was done before", str(again))
    # The one that was the writer till now is none any more.
    _, done = world.abroad.try_mount("loser", state)
    check(done.returncode == 8, "and who was the writer before is refused", done.stderr)


def killed(world):
    """Killed at any moment, it is done again; the volume changes hands once, not twice."""
    home = world.mount_home("protection=strict")
    (home.point / "file").write_bytes(b"file")
    home.umount()
    world.link.set("pass", delay=FAR, open="resume")
    _, whole = timed(lambda: promote(world.home, world.state("measured")))
    draw, ends = random.Random(os.environ.get("E2E_SEED")), {}
    for n in range(KILLS):
        before, state = epoch(world), world.state(f"killed{n}")
        one = start(world.home, state, f"killed{n}")
        # The claim comes late in it.
        time.sleep(draw.uniform(n % 2 * 0.7 * whole, whole))  # the moment is drawn, nothing is waited for
        one.send_signal(signal.SIGKILL)
        one.communicate(timeout=20)
        landed = epoch(world) - before
        report = promote(world.home, state)
        ends[report["outcome"]] = ends.get(report["outcome"], 0) + 1
        check(epoch(world) == before + 1 == report["epoch"], f"killed {n}: one claim, {report['outcome']}", str(report))
        check(not landed or report["outcome"] == "promoted before", "what had been put counts", str(report))
        if n % 4 == 0 or n == KILLS - 1:
            mount = world.abroad.mount("after", state, options=["protection=strict"])
            check((mount.point / "file").read_bytes() == b"file", "and it is the writer")
            mount.umount()
    world.link.set("pass", delay=ONE_WAY, open="resume")
    say(f"{KILLS} kills in {whole:.2f} s: {ends}")
    verified(world, epoch(world))


def refusals(world):
    """Without the right, without a store or beside a mount nothing is changed."""
    home = world.mount_home("protection=strict")
    (home.point / "file").write_bytes(b"file")
    home.sync()
    before = world.segments()
    with ThreadPoolExecutor(len(DOWN)) as pool:
        without_store = {mode: pool.submit(no_store, world, mode) for mode in DOWN}
    for mode, down in without_store.items():
        (done, took), state = down.result(), world.state(mode)
        said = done.stderr.strip()
        told = done.returncode == 7 and "panicked" not in said and "the store" in said and "gave up" in said
        check(told, f"the store {mode}: exit code 7 after {took:.1f} s", f"{done.returncode} {said}")
        left = list((state / "log").iterdir()) if (state / "log").exists() else []
        check(not left, "nothing lies in its log")
    more = ["--state", world.state("reader"), "--json"]
    refused = world.abroad.ask("promote", *more, role="reader", ok=None)
    check(refused.returncode == 8 and "key" in refused.stderr, "a reader's key is refused", str(refused))
    done = promote(world.home, home.state, ok=None)
    held = done.returncode == 8 and f"process {home.pid}" in done.stderr
    check(held, "beside a mount it is refused, which is named", str(done))
    check(world.segments() == before and not home.status()["fenced"], "and nothing was changed by all that")
    # The store is back, and the same command does it.
    report = promote(world.home, world.state("hang"))
    check(report["outcome"] == "promoted", "with the store back the same command succeeds")
    run(program(), "umount", home.point, limit=120, ok=None)
    check(not mounted(home.point), "home is unmounted")
