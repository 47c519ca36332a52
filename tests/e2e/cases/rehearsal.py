"""Seven registers work at home, home dies, and the embassy shows that it can do what it is for.

Each register has a volume of its own and clerks that write without pause. Home is killed at a random moment: the cable
is pulled, then every process dies. In the embassy each volume is mounted read-only; the databases are started on it
through an overlay, so that nothing is written into it; every register is checked by its own rules, and what its clerks
were promised is compared with what is there. A second round takes the volumes over and goes on working in them.

Invariant: what was acknowledged is counted before home is killed, in this process; the embassy has the store and the
keys, and nothing else.
"""

import contextlib
import datetime
import json
import os
import random
import signal
import time

from failover import promote
from harness import FULL, Volume, alive, check, drop_caches, empty_dir, run, say, timed, wait_until
from registers.databases import Businesses, Land, Taxes
from registers.files import Census, Identity, Legislation, Pensions
from sites import Sites

REGISTERS = (Taxes, Land, Businesses, Identity, Pensions, Legislation, Census)
SIZE = {"columns": 24, "column_mib": 96} if FULL else {"columns": 6, "column_mib": 8}
# For how long home works before it is killed, in seconds.
WORK = (60, 120) if FULL else (8, 14)
OPTIONS = ("allow_other", "sync_timeout=30s", "cache_size=1G")


class Office:
    """One register, its volume, and where it is mounted."""

    def __init__(self, register, volume):
        self.register, self.volume, self.mount, self.report = register, volume, None, {}
        self.promised = 0

    def open(self, directory):
        options = (*OPTIONS, f"protection={self.register.protection}")
        self.mount = self.volume.mount("home", directory / "home-state", options=options)

    @property
    def in_sync(self):
        """Whether home was last heard to say that the store has all it was promised to have."""
        log = (self.mount.state / "embassyfs.log").read_text()
        return "falls back" not in log and "fell back" not in log


def main(directory):
    seed = int(os.environ.get("E2E_SEED", random.SystemRandom().randrange(1 << 32)))
    draw = random.Random(seed)
    say(f"seed {seed}")
    with contextlib.ExitStack() as stack:
        sites = Sites(directory, stack)
        offices = [found(kind, directory, sites, stack) for kind in REGISTERS]
        for office in offices:
            office.register.start(office.mount.point)
        time.sleep(draw.uniform(*WORK))  # the moment is drawn, nothing is waited for
        died = kill_home(sites, offices)
        report = {"seed": seed, "died": stamp(died), "registers": {}}
        look(directory, sites, offices, died, report)
        take_over(offices, report)
        conclude(directory, report)


def found(kind, directory, sites, stack):
    """A register at home, ready to work."""
    place = empty_dir(directory / kind.name)
    volume = Volume(place, f"s3://land/{kind.name}", sites.environment(at_home=True), inside=sites.home)
    volume.init()
    office = Office(kind(directory / "registers", SIZE), volume)
    stack.callback(office.register.close)
    office.open(place)
    office.register.prepare(office.mount.point)
    office.mount.sync()
    return office


def kill_home(sites, offices):
    """The end of home; gives when it was."""
    for office in offices:
        must_live = office.register.thread.is_alive() and office.register.acknowledged > 0
        check(must_live, f"{office.register.name}: at work, {office.register.acknowledged} cases promised",
              repr(office.register.trouble))  # fmt: skip
    for office in offices:
        office.promised = office.register.acknowledged
    sites.part()
    died = time.time()
    for office in offices:
        os.kill(office.mount.pid, signal.SIGKILL)
    for office in offices:
        office.register.kill()
    for office in offices:
        office.register.end()
        wait_until(lambda office=office: not alive(office.mount.pid), 20, "home's daemon is gone")
        run("umount", "-l", office.mount.point, limit=20)
    return died


def look(directory, sites, offices, died, report):
    """Every volume, read-only, through an overlay."""
    drop_caches()
    began = time.monotonic()
    for office in offices:
        office.abroad = office.volume.at(office.volume.url, sites.environment(at_home=False), inside=sites.embassy)
        office.view, took = timed(lambda office=office: office.abroad.embassy(options=["allow_other"]))
        office.report = {"level": office.register.protection, "mount_seconds": round(took, 3)}
    first = time.monotonic() - began
    say(f"all seven mounted read-only after {first:.2f} s")
    for office in offices:
        register, mine = office.register, office.report
        with overlay(office.volume.directory, office.view.point) as upper:
            (cases, what), took = timed(lambda register=register, upper=upper: register.check(upper))
        newest = office.abroad.versions()
        mine |= {"checked_seconds": round(took, 2), "promised": office.promised, "found": cases, "what": what}
        mine["lost"] = register.lost(office.promised, cases)
        mine["rpo_seconds"] = max(0.0, round(died - newest_time(newest), 2))
        check(register.holds(mine["lost"]), f"{register.name}: {what}; promised {office.promised}, lost {mine['lost']} at "
              f"{register.protection}, newest commit {mine['rpo_seconds']} s before the end")  # fmt: skip
        report["registers"][register.name] = mine
        office.view.umount()
    report["mounted_seconds"], report["checked_seconds"] = round(first, 2), round(time.monotonic() - began, 2)


def take_over(offices, report):
    """Every volume changes hands; the databases start on it, every register is checked, and goes on in the embassy."""
    drop_caches()
    began = time.monotonic()
    for office in offices:
        register, mine, state = office.register, office.report, office.view.state
        office.began = time.monotonic()
        mine["promote_seconds"] = round(promote(office.abroad, state)["seconds"], 3)
        options = (*OPTIONS, f"protection={register.protection}")
        office.mount, took = timed(lambda o=office: o.abroad.mount("writer", state, options=options))
        mine["writer_mount_seconds"] = round(took, 3)
    report["promoted_seconds"] = round(time.monotonic() - began, 2)
    say(f"all seven promoted and mounted for writing after {report['promoted_seconds']:.2f} s")
    for office in offices:
        register, mine = office.register, office.report
        (cases, what), took = timed(lambda r=register, o=office: r.check(o.mount.point))
        mine["checked_again_seconds"] = round(took, 2)
        mine["answered_seconds"] = round(register.answered - office.began, 2) if register.served else ""
        check(cases == mine["found"], f"{register.name}: as it was found before, on the volume itself: {what}")
        register.resume(office.mount.point, cases)
        register.start(office.mount.point)
    enough = lambda: all(o.register.acknowledged > o.report["found"] or not o.register.thread.is_alive() for o in offices)
    wait_until(enough, 60, "every register goes on in the embassy")
    for office in offices:
        office.register.end()
        # A register whose server is ended hard must be found whole once more.
        (cases, what), _ = timed(lambda o=office: o.register.check(o.mount.point))
        new = office.register.acknowledged - office.report["found"]
        office.report["new"] = new
        check(new > 0 and cases >= office.register.acknowledged, f"{office.register.name}: {new} new cases: {what}")
        office.register.close()
        office.mount.umount()
    report["resumed_seconds"] = round(time.monotonic() - began, 2)


def newest_time(versions):
    """When the newest commit was made, in seconds since 1970."""
    listed = versions["versions"] if isinstance(versions, dict) else versions
    newest = max(listed, key=lambda version: version["commit"])
    return datetime.datetime.fromisoformat(newest["time"].replace("Z", "+00:00")).timestamp()


@contextlib.contextmanager
def overlay(directory, lower):
    """A writable view of a read-only mount; what is written lands on the plain disk and is thrown away."""
    upper, work, point = (empty_dir(directory / name) for name in ("upper", "work", "overlay"))
    options = f"lowerdir={lower},upperdir={upper},workdir={work}"
    run("mount", "-t", "overlay", "overlay", "-o", options, point)
    try:
        yield point
    finally:
        run("umount", point, limit=60)


def stamp(seconds):
    return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).isoformat(timespec="seconds")


def conclude(directory, report):
    """The report, for programs and for people."""
    out = empty_dir(directory.parent / "rehearsal-report")
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    lines = [
        "# Rehearsal of a failover",
        "",
        f"Home died at {report['died']}. All volumes were mounted read-only {report['mounted_seconds']} s later, all",
        f"registers checked after {report['checked_seconds']} s. In the second round all were promoted and mounted for",
        f"writing after {report['promoted_seconds']} s, and all had worked on after {report['resumed_seconds']} s.",
        f"Seed {report['seed']}.",
        "",
        "| register | level | promised | found | lost | RPO, s | mount, s | check, s | what was found |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, mine in report["registers"].items():
        figures = ("level", "promised", "found", "lost", "rpo_seconds", "mount_seconds", "checked_seconds", "what")
        lines.append(f"| {name} | " + " | ".join(str(mine[figure]) for figure in figures) + " |")
    lines += [
        "",
        "| register | promote, s | mount for writing, s | database answers after, s | check, s | new cases |",
        "|---|---|---|---|---|---|",
    ]
    figures = ("promote_seconds", "writer_mount_seconds", "answered_seconds", "checked_again_seconds", "new")
    for name, mine in report["registers"].items():
        lines.append(f"| {name} | " + " | ".join(str(mine[figure]) for figure in figures) + " |")
    (out / "report.md").write_text("\n".join(lines) + "\n")
    say(f"report: {out}/report.md")


