"""The embassy takes a volume over while home lives: home is fenced at its next upload, and nothing is lost.

Home and embassy are two network namespaces, 35 ms apart (sites.py). Home writes as fast as it can, each file promised by
an fsync that waits for the embassy; in the middle of it the embassy promotes itself: over a good link, over one that
flaps, with uploads that are long under way, and while home is cut off. Then others: two promotions at once, killed ones,
ones without a store (promote_again.py), a follower that looks on, and the way back (promote_back.py).

Invariant: what was promised at home, before, during and after the promotion, is compared with what the embassy has.
"""

import contextlib
import errno
import os
import threading
import time

from cases import promote_again, promote_back
from failover import FOUND, REASON, STREAM, Clerks, World, contents, divergence, exported, keep, missing, promote, verified
from harness import FULL, check, program, run, side_by_side, timed, wait_until
from sites import ONE_WAY, Sites

ROUNDS = 10 if FULL else 1
# Home hears of it with its next upload: what is under way goes first, then it looks twice at what lies in its place.
FENCED_WITHIN = 5
# One way, where uploads are to be under way for long. Each look takes twice that.
FAR = 0.3


def main(directory, scene):
    with contextlib.ExitStack() as stack:
        sites = Sites(directory, stack)
        if scene == "others":
            return others(directory, sites)
        for n in range(ROUNDS):
            alive(directory, sites, n)


def alive(directory, sites, n):
    """Home is alive, over links of each kind."""
    world = lambda name: World(directory, sites, f"{name}{n}")
    side_by_side({
        "good link": lambda: under_load(world("good"), "a good link", good, FENCED_WITHIN),
        "flapping link": lambda: under_load(world("flaps"), "a link that flaps", flapping, 3 * FENCED_WITHIN),
        "slow uploads": lambda: under_load(world("slow"), "uploads under way", slow, FENCED_WITHIN + 10 * FAR),
        "cut off": lambda: cut_off(world("silent")),
    })  # fmt: skip


def others(directory, sites):
    """What else can be in the way. Nothing waits for the other."""
    world = lambda name: World(directory, sites, name)
    side_by_side({
        "race": lambda: promote_again.races(world("races")),
        "killed": lambda: promote_again.killed(world("killed")),
        "refused": lambda: promote_again.refusals(world("refused")),
        "from afar": lambda: promote_again.from_afar(world("far")),
        "onlooker": lambda: promote_back.onlooker(world("onlooker")),
        "there and back": lambda: promote_back.there_and_back(world("back")),
    })  # fmt: skip


@contextlib.contextmanager
def good(_):
    yield


@contextlib.contextmanager
def flapping(link):
    """The link is cut, silent and good in turn, a few times a second."""
    over = threading.Event()

    def flap():
        while not over.is_set():
            for mode, held in (("cut", 0.2), ("pass", 0.4), ("hang", 0.3), ("pass", 0.4)):
                link.set(mode, delay=ONE_WAY)
                over.wait(held)

    thread = threading.Thread(target=flap)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        link.set("pass", delay=ONE_WAY)


@contextlib.contextmanager
def slow(link):
    """What home sends is on its way for long, so that there is always something on the way."""
    link.set("pass", delay=FAR, open="resume")
    try:
        yield
    finally:
        link.set("pass", delay=ONE_WAY, open="resume")


def under_load(world, what, disturbance, limit):
    """Promotion while home works, and all that must hold then."""
    home = world.mount_home("protection=available")
    clerks = Clerks(home.point)
    clerks.at_work()
    opened = os.open(home.point / "a/0", os.O_WRONLY)
    with disturbance(world.link):
        before = len(clerks.promised())
        wait_until(lambda: len(clerks.promised()) > before, 30, f"{what}: home goes on")
        report, took = timed(lambda: promote(world.abroad, world.state("embassy")))
        promoted = time.monotonic()
        wait_until(lambda: fenced(home), 30, f"{what}: home is fenced")
        heard = time.monotonic() - promoted
    check(report["outcome"] == "promoted" and report["epoch"] == 2,
          f"{what}: promoted in {took:.2f} s; {report['places_lost']} places lost, {report['barriers']} barriers")
    check(heard < limit, f"home is fenced {heard:.2f} s later")
    is_latched(home, clerks, opened)
    check(home.status()["fallbacks"] == 0, "its level had not fallen back: what was promised is abroad")
    embassy = writer_abroad(world)
    promised = clerks.promised()
    lost = missing(embassy.point, promised)
    check(not lost, f"all {len(promised)} files that home was promised are in the embassy", f"{lost[:5]}")
    embassy.umount()
    home_stays_out(world, home)
    unsent = exported(world, home.state)
    names = {path for path, _, _ in promised}
    whole = [path for path, data in unsent.items() if contents(path, STREAM).startswith(data) and path not in names]
    check(len(whole) == len(unsent), f"{len(unsent)} files that were not sent are exported", f"{sorted(unsent)}")
    verified(world, 2)


def fenced(mount):
    return mount.status()["fenced"]


def is_latched(home, clerks, opened):
    """Home says why, refuses every change, and lets nobody wait."""
    clerks.end(limit=20)
    ends = {clerk.error for clerk in clerks.clerks}
    check(ends <= {errno.EIO, errno.EROFS}, f"every clerk got an error, and none hangs: {clerks.ends()}")
    said = home.status()["last_error"]
    check("FENCED" in said and "luxembourg" in said and REASON in said, "the status says that, by whom, and why", said)
    check("FENCED" in run(program(), "status", home.point).stdout, "also to people")
    got = [error_of(lambda: os.mkdir(home.point / "more")), error_of(lambda: os.write(opened, b"more"))]
    check(set(got) <= {errno.EROFS, errno.EIO}, f"names and data are refused: {[os.strerror(e) for e in got]}")
    got, took = timed(lambda: error_of(lambda: os.fsync(opened)))
    check(got == errno.EIO and took < 5, f"an fsync fails at once ({took:.2f} s)", os.strerror(got))
    os.close(opened)
    check((home.point / "a/0").read_bytes() == contents("a/0", 700), "and what is there can be read")


def error_of(call):
    """The error number of a call; 0 when it has none."""
    try:
        call()
    except OSError as error:
        return error.errno
    return 0


def writer_abroad(world, name="embassy"):
    """The embassy mounts as the writer, and writes; a second mount, from the store alone, has it."""
    embassy, took = timed(lambda: world.abroad.mount(name, world.state(name), options=["protection=strict"]))
    path = embassy.point / "written-abroad"
    keep(path, b"written abroad")
    look = world.abroad.embassy(f"{name}-look")
    check((look.point / path.name).read_bytes() == b"written abroad", f"the embassy is the writer, mounted in {took:.2f} s")
    look.umount()
    return embassy


def home_stays_out(world, home):
    """What home did not send stays there, and it cannot come back by itself."""
    unsent = home.status()["unsent_segments"]
    kept = [name for name in os.listdir(home.state / "log") if name > world.segments()[0]]
    check(unsent <= len(kept), f"{unsent} segments that were not sent are kept in its state directory")
    done = run(program(), "umount", home.point, limit=120, ok=None)
    check(done.returncode == 8, "home unmounts with exit code 8", f"{done.returncode}: {done.stderr}")
    _, done = world.home.try_mount("home", home.state)
    refused = done.returncode == 8 and "FENCED" in done.stderr and REASON in done.stderr
    check(refused, "and is not mounted for writing again", f"{done.returncode}: {done.stderr}")


def cut_off(world):
    """Home is cut off and goes on; what it writes then is promised to nobody, and kept."""
    home = world.mount_home("protection=strict")
    (home.point / "before").write_bytes(b"before")
    home.sync()
    world.link.set("hang")
    ends = {}

    def insist(n):
        fd = os.open(home.point / f"tail{n}", os.O_WRONLY | os.O_CREAT)
        os.write(fd, contents(f"tail{n}", 5000))
        ends[n] = timed(lambda: error_of(lambda: os.fsync(fd)))
        os.close(fd)

    threads = [threading.Thread(target=insist, args=(n,), daemon=True) for n in range(3)]
    for thread in threads:
        thread.start()
    wait_until(lambda: home.status()["waiting"] == 3 and home.status()["unsent_segments"] > 0, 20, "three wait")
    report, took = timed(lambda: promote(world.abroad, world.state("embassy")))
    check(not report["home_alive"] and not ends, f"cut off: promoted in {took:.2f} s, while three wait in fsync at home")
    world.link.set("pass", delay=ONE_WAY)
    back = time.monotonic()
    wait_until(lambda: len(ends) == 3, 30, "the three fsyncs end")
    errors = {error for error, _ in ends.values()}
    check(errors == {errno.EIO}, f"they fail {time.monotonic() - back:.2f} s after the link is back", str(ends))
    check(fenced(home), "and home is fenced")
    embassy = writer_abroad(world)
    there = sorted(os.listdir(embassy.point))
    check(there == ["before", "written-abroad"], "nothing that came behind the claim is in the embassy", str(there))
    embassy.umount()
    home_stays_out(world, home)
    listed = divergence(world.abroad, "list", home.state)
    check(listed.returncode == FOUND and REASON in listed.stdout, "divergence list says that there is something, and why", listed.stdout)
    shown = divergence(world.abroad, "show", home.state)
    want = {f"A tail{n}" for n in range(3)}
    check(shown.returncode == FOUND and set(shown.stdout.splitlines()) == want, "show names the three files", shown.stdout)
    want = {f"tail{n}": contents(f"tail{n}", 5000) for n in range(3)}
    check(exported(world, home.state) == want, "export has them, with all that was in them")
    verified(world, 2)
