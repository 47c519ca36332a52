"""What a failover costs: home is killed at random moments under load, and the embassy is timed and counted.

Home and embassy are two network namespaces, 35 ms apart. Home makes files one by one and many at a time and writes large
ones, each promised by an fsync. At a random moment the cable is pulled and the daemon gets SIGKILL. Home's state
directory is not looked at any more: for the embassy a power cut, a fire and this are one and the same.

Invariant: what was promised is counted in this process, and each promised file is read in the embassy.
"""

import contextlib
import datetime
import json
import os
import random
import signal
import time

from failover import Clerks, World, contents, keep, missing, promote
from harness import alive, check, drop_caches, empty_dir, run, say, timed, wait_until
from sites import Sites

RUNS = int(os.environ.get("E2E_RUNS", "20"))
LEVELS = ("strict", "available", "local")
# What was there before the load: files for `find` to find.
FILES = int(os.environ.get("E2E_MANY", "2000"))
WORK = (1.0, 6.0)
FIGURES = ("lag", "mount", "first_byte", "find", "promote", "writer")


def main(directory):
    seed = int(os.environ.get("E2E_SEED", random.SystemRandom().randrange(1 << 32)))
    say(f"seed {seed}; load average at the start {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors")
    draw, found = random.Random(seed), []
    for n in range(RUNS):
        with contextlib.ExitStack() as stack:
            found.append(once(Sites(empty_dir(directory / "run"), stack), directory, LEVELS[n % len(LEVELS)], draw))
    report(directory, found, seed)


def once(sites, directory, level, draw):
    world = World(directory, sites, "volume")
    home = world.mount_home(f"protection={level}")
    os.mkdir(home.point / "old")
    for n in range(FILES):
        (home.point / "old" / f"{n}.json").write_bytes(contents(f"old/{n}.json", 2000))
    home.sync()
    clerks = Clerks(home.point)
    clerks.at_work(1)
    time.sleep(draw.uniform(*WORK))  # the moment is drawn, nothing is waited for
    in_sync = home.status()["fallbacks"] == 0
    sites.part()
    os.kill(home.pid, signal.SIGKILL)
    died = time.time()
    wait_until(lambda: not alive(home.pid), 20, "home's daemon is gone")
    clerks.end(30)
    run("umount", "-l", home.point, limit=20)
    promised = clerks.promised()
    return embassy(world, {"level": level, "promised": len(promised), "in_sync": in_sync}, died, promised)


def embassy(world, mine, died, promised):
    """Everything an operator does, timed from nothing in any cache."""
    mine["lag"] = max(0.0, died - newest(world.abroad.versions()))
    drop_caches()
    began = time.monotonic()
    view, mine["mount"] = timed(lambda: world.abroad.embassy("look"))
    right = (view.point / "old" / "7.json").read_bytes() == contents("old/7.json", 2000)
    mine["first_byte"] = time.monotonic() - began
    check(right, "the first file that is read is right")
    entries, mine["find"] = timed(lambda: walk(view.point))
    lost = missing(view.point, promised)
    mine["lost"], mine["lost_seconds"] = len(lost), max((died - when for _, _, when in lost), default=0.0)
    view.umount()
    state = view.state
    told, mine["promote"] = timed(lambda: promote(world.abroad, state))
    writer, took = timed(lambda: world.abroad.mount("writer", state, options=["protection=strict"]))
    mine["writer"] = mine["promote"] + took
    check(told["outcome"] == "promoted" and missing(writer.point, promised) == lost, "promoted, and the same is there")
    keep(writer.point / "new", b"new")
    writer.umount()
    held = mine["level"] == "local" or not mine["in_sync"] or not lost
    times = ", ".join(f"{figure} {mine[figure]:.2f} s" for figure in FIGURES)
    check(held, f"{mine['level']}: promised {len(promised)}, lost {len(lost)}; {entries} entries; {times}", str(lost[:5]))
    return mine


def newest(versions):
    """When the newest commit abroad was made, in seconds since 1970."""
    last = max(versions, key=lambda version: version["commit"])
    return datetime.datetime.fromisoformat(last["time"].replace("Z", "+00:00")).timestamp()


def walk(point):
    """As `find -ls`: each name with its attributes."""
    found = 0
    for directory, names, files in os.walk(point):
        for name in names + files:
            os.lstat(os.path.join(directory, name))
            found += 1
    return found


def report(directory, found, seed):
    lines = [
        f"{RUNS} kills, {FILES} files before the load, seed {seed}. In each cell p50 / max.",
        "",
        "| level | kills | promised | lost | oldest lost, s | lag, s | mount, s | first byte, s | find, s | promote, s | "
        "writing again, s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for level in LEVELS:
        runs = [one for one in found if one["level"] == level]
        if runs:
            counts = [len(runs), sum(one["promised"] for one in runs), sum(one["lost"] for one in runs)]
            cells = [*map(str, counts), f"{max(one['lost_seconds'] for one in runs):.2f}"]
            cells += [middle([one[figure] for one in runs]) for figure in FIGURES]
            lines.append(f"| {level} | " + " | ".join(cells) + " |")
    out = empty_dir(directory.parent / "rpo-rto-report")
    (out / "report.json").write_text(json.dumps({"seed": seed, "files": FILES, "runs": found}, indent=2) + "\n")
    (out / "report.md").write_text("\n".join(lines) + "\n")
    for line in lines:
        say(line)
    say(f"report: {out}/report.md")


def middle(values):
    values = sorted(values)
    return f"{values[(len(values) - 1) // 2]:.2f} / {values[-1]:.2f}"
