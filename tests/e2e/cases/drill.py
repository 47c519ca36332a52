"""A drill in the embassy: against a good store, and against each thing that it has to find."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import trees
from harness import MIB, Failed, Volume, alive, check, empty_dir, mounts, program, run, say, wait_until

FOUND = 9


def our_mounts():
    """What is mounted for a drill, by anybody."""
    return [point for point, _, _, _ in mounts() if "/embassyfs-drill-" in point]


def manifest(home, out, *words, ok=True):
    """Has home make a manifest."""
    return run(program(), "manifest", home.point, "--out", out, *words, limit=60, ok=ok)


class Drills:
    """Drills of one volume, each with its own report."""

    def __init__(self, directory):
        self.directory, self.count = directory, 0
        self.key = directory / "drill.key"
        self.public = run(program(), "drill", "key", self.key).stdout.strip()

    def words(self, volume, manifest_file, *more):
        self.count += 1
        report = self.directory / f"report-{self.count}.json"
        store = ["--store", volume.url, "--key", volume.key("reader")]
        words = [program(), "drill", *store, "--manifest", manifest_file, "--report", report]
        return report, [str(w) for w in [*words, "--sign-key", self.key, *more]]

    def drill(self, volume, manifest_file, *more, ok=(0,), says=""):
        """A drill to its end; gives its report, whose signature and page hold."""
        report, words = self.words(volume, manifest_file, *more)
        done = run(*words, limit=60, ok=None)
        said = done.stdout + done.stderr
        if done.returncode not in ok or "panicked" in said or says not in said:
            raise Failed(f"drill ended with {done.returncode}, not {ok} with '{says}': {said}")
        if our_mounts():
            raise Failed(f"a drill left {our_mounts()} mounted")
        if done.returncode not in (0, FOUND):
            return None
        checked = run(program(), "drill", "check", report, "--public-key", self.public, "--json", ok=None)
        if checked.returncode != done.returncode:
            raise Failed(f"the check ended with {checked.returncode}: {checked.stdout} {checked.stderr}")
        return json.loads(checked.stdout)


def good(directory, volume, drills, file):
    """Everything is as home says."""
    found = drills.drill(volume, file)
    check(found["passed"] and found["manifest"]["compared"] == "newest", "a whole store passes", str(found))
    rto = found["rto"]
    marks = [rto[k] for k in ("mounted_ms", "first_byte_ms", "find_ms", "read_ms")]
    check(marks == sorted(marks) and marks[0] > 0, f"the RTO is measured: {marks} ms", str(rto))
    rpo = found["rpo"]
    check(rpo["newest_age_ms"] > 0 and rpo["commits_ahead"] == 0, f"the RPO is measured: {rpo}")
    check(found["read"]["entries"] == found["manifest"]["entries"], f"read: {found['read']}")
    return found


def reports(directory, drills, found):
    """The signature, and the page that goes with it."""
    report = directory / f"report-{drills.count}.json"
    text, page = report.read_bytes(), report.with_name(report.name + ".html")
    html = page.read_text()
    check("PASSED" in html and found["volume"] in html, "the page says what the report says")
    check(not re.search(r"(src|href)=", html), "and needs nothing else")
    ask = lambda key=drills.public: run(program(), "drill", "check", report, "--public-key", key, ok=None)
    check(ask().returncode == 0 and ask(drills.key).returncode == 0, "the report checks, with the key or its file")
    other = directory / "other.key"
    public = run(program(), "drill", "key", other).stdout.strip()
    done = ask(public)
    check(done.returncode == FOUND and "FORGED OR ALTERED" in done.stderr, "not with another key", done.stderr)
    report.write_bytes(text.replace(b'"missing": 0', b'"missing": 1'))
    done = ask()
    check(done.returncode == FOUND and "FORGED OR ALTERED" in done.stderr, "not when it was altered", done.stderr)
    report.write_bytes(text)
    page.write_text(html.replace("0 missing", "1 missing"))
    done = ask()
    check(done.returncode == FOUND and "ALTERED" in done.stderr, "nor when the page was", done.stderr)
    page.unlink()
    done = ask()
    check(done.returncode == 0 and "not there" in done.stderr, "a page that is gone is told of", done.stderr)


def later(directory, volume, drills, home, file):
    """Home goes on: the manifest's version is read beside the newest."""
    trees.write_file(home.point / "later", b"later")
    home.sync()
    found = drills.drill(volume, file)
    check(found["manifest"]["compared"] == "past" and found["rpo"]["commits_ahead"] > 0, "an older manifest still holds")
    done = manifest(home, directory / "again", "--at", found["manifest"]["commit"]["no"])
    lines = lambda path: path.read_text().split("\n{\n")[0]
    check(lines(directory / "again") == lines(file), "and can be made again at home", done.stdout)
    done = manifest(home, directory / "future", "--at", 999, ok=False)
    said = "there is no commit 999" in done.stderr and "versions" in done.stderr
    check(done.returncode == 1 and said, "a commit that is not there is said not to be", done.stderr)
    interrupted(directory, home)


def interrupted(directory, home):
    """A manifest that is interrupted, however, leaves nothing that is in the way of the next."""
    out = directory / "ended"
    out.mkdir()
    for sign in (signal.SIGINT, signal.SIGKILL):
        writing = subprocess.Popen(
            [program(), "manifest", home.point, "--live", "--out", out / "m"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        time.sleep(0.05)
        writing.send_signal(sign)
        ended = writing.wait(30)
        check(ended == 0 or not list(out.iterdir()), f"ended by {sign.name} ({ended}), it leaves no file", str(list(out.iterdir())))
        (out / "m").unlink(missing_ok=True)
    manifest(home, out / "m")


def forged(directory, volume, drills, file):
    """A manifest that home did not sign, of another volume, or cut."""
    text, bad = file.read_bytes(), directory / "bad"
    line = next(l for l in text.split(b"\n") if l.startswith(b"f "))
    for what, bent, says in (
        ("a line is gone", text.replace(line + b"\n", b"", 1), "ALTERED"),
        ("a size is changed", text.replace(line, line.replace(b" 0644 ", b" 0645 ", 1), 1), "ALTERED"),
        ("its end is gone", text[: len(text) // 2], "ALTERED"),
        ("its count is changed", re.sub(rb'"entries": \d+', b'"entries": 1', text), "FORGED OR ALTERED"),
    ):
        check(bent != text, f"a manifest of which {what}")
        bad.write_bytes(bent)
        drills.drill(volume, bad, ok=(8,), says=says)
    other = Volume(empty_dir(directory / "other"))
    other.init()
    drills.drill(other, file, ok=(8,), says="ANOTHER VOLUME")
    say("ok  is refused, and one of another volume")


def differs(directory, volume, drills, home):
    """What is abroad is not what the manifest says: a file that differs, one missing, one more, at one commit.

    The store is another one of the same volume: what home sent from a copy of its state, and different."""
    home.umount()
    state, store, new = directory / "fork-state", directory / "fork-store", directory / "forked.manifest"
    run("cp", "-a", directory / "home-state", state)
    run("cp", "-a", volume.store_dir, store)
    fork = volume.at(f"file://{store}")
    home = volume.mount("home", directory / "home-state")
    (home.point / "fresh").write_bytes(b"what home says")
    (home.point / "only-home").write_bytes(b"x")
    commit = json.loads(manifest(home, new, "--json").stdout)["commit"]
    home.umount()
    abroad = fork.mount("fork", state)
    (abroad.point / "fresh").write_bytes(b"what it says !")
    (abroad.point / "only-abroad").write_bytes(b"x")
    os.chmod(abroad.point / "odd" / "size-511", 0o600)
    abroad.sync()
    while abroad.status()["last_durable"]["no"] < commit:
        (abroad.point / "only-abroad").write_bytes(b"y")
        abroad.sync()
    abroad.umount()
    found = drills.drill(fork, new, ok=(FOUND,))
    kinds = {(d["kind"], d["path"]) for d in found["listed"]}
    wanted = {("differs", "fresh"), ("missing", "only-home"), ("extra", "only-abroad"), ("differs", "odd/size-511")}
    check(wanted <= kinds, "a file that differs, one that is missing, one more, another mode", str(found["listed"]))
    detail = {d["path"]: d["detail"] for d in found["listed"]}
    check("content" in detail["fresh"] and "mode" in detail["odd/size-511"], "and which of it", str(detail))
    check(any("NOT IN THE CHAIN" in f for f in found["findings"]), "and that the chain is another", str(found["findings"]))
    check("NOT PASSED" in (directory / f"report-{drills.count}.json.html").read_text(), "the page says so")
    drills.drill(volume, new)
    return new


def damaged(directory, volume, drills, file):
    """An object that is damaged, one that is missing, a store that was set back, one that is not there."""
    copy = directory / "copy"
    logs = [n for n in volume.objects() if n.startswith("log/")]
    largest = max(logs, key=lambda n: (volume.store_dir / n).stat().st_size)
    for what in ("damaged", "missing"):
        run("rm", "-rf", copy)
        run("cp", "-a", volume.store_dir, copy)
        if what == "damaged":
            data = bytearray((copy / largest).read_bytes())
            for at in range(200, len(data) - 400, 4096):
                data[at] ^= 1
            (copy / largest).write_bytes(data)
        else:
            (copy / largest).unlink()
        found = drills.drill(volume.at(f"file://{copy}"), file, ok=(FOUND,))
        bad = found["differences"]["unreadable"] + len(found["findings"])
        check(bad > 0, f"an object is {what}: {found['differences']}, {found['findings'][:2]}")
    run("rm", "-rf", copy)
    run("cp", "-a", volume.store_dir, copy)
    for name in logs[-2:]:
        (copy / name).unlink()
    for name in (copy / "checkpoint").iterdir():
        name.unlink()
    found = drills.drill(volume.at(f"file://{copy}"), file, ok=(FOUND,), says="rolled back")
    check(any("NOT IN THE CHAIN" in f for f in found["findings"]), "a store that was set back is found", str(found["findings"]))
    found = drills.drill(volume.at(f"file://{directory}/nowhere"), file, ok=(FOUND,))
    check(found["rto"]["mounted_ms"] is None, "a store that is not there is a drill that did not pass", str(found["findings"]))


def killed(directory, volume, drills, file):
    """However a drill ends, nothing stays mounted, and no process."""
    for number, code in ((signal.SIGINT, 1), (signal.SIGTERM, 1), (signal.SIGKILL, -9)):
        report, words = drills.words(volume, file)
        child = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        wait_until(lambda: our_mounts() or child.poll() is not None, 20, "the drill has mounted", pause=0.001)
        child.send_signal(number)
        begin = time.monotonic()
        child.wait(40)
        took = time.monotonic() - begin
        check(child.returncode == code, f"signal {number} ends it in {took:.1f} s", child.stdout.read().decode())
        wait_until(lambda: not our_mounts(), 30, "nothing is mounted any more")
        check(not report.exists(), "no report says that it passed")
    # The mount hangs in the middle.
    report, words = drills.words(volume, file, "--timeout", "3s")
    child = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    below = lambda: Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
    wait_until(our_mounts, 20, "the drill has mounted", pause=0.001)
    daemon = int(below()[0])
    run(program(), "status", our_mounts()[0], ok=None)  # it serves: the drill reads now
    os.kill(daemon, signal.SIGSTOP)
    check(not report.exists(), "the daemon of a drill is stopped before the end")
    child.wait(40)
    said = child.stdout.read().decode()
    check(child.returncode == FOUND and "within 3 s" in said, "a drill whose mount hangs ends in its time", said)
    check(not our_mounts() and not alive(daemon), "nothing is mounted, and no process is left")
    report, words = drills.words(volume, file, "--timeout", "1ms")
    done = run(*words, ok=None)
    check(done.returncode == FOUND and "within 0 s" in done.stdout + done.stderr, "a drill ends in its time", done.stdout)
    check(not our_mounts(), "and leaves nothing mounted")


def written_meanwhile(directory, home):
    """A manifest of the files themselves is none when somebody writes."""
    noise = "import os, sys\nwhile True:\n open(sys.argv[1], 'w').write('x')\n os.unlink(sys.argv[1])"
    writer = subprocess.Popen(
        [sys.executable, "-c", noise, home.point / "noise"],
        stdin=subprocess.DEVNULL,
    )
    try:
        wait_until((home.point / "noise").exists, 10, "somebody writes")
        # The reader meets a name that is gone, a size that is another, or neither.
        said = [manifest(home, directory / "noise.manifest", "--live", ok=False).stderr for _ in range(8)]
        others = [text for text in said if "was changed while it was read" not in text or "stop what writes" not in text]
        check(not others, "--live fails when somebody writes, and says so in each of 8 runs", others)
        check(writer.poll() is None, "as it does until the end")
        check(not (directory / "noise.manifest").exists(), "and leaves no manifest")
        manifest(home, directory / "noise.manifest")  # of a version: nobody can write there
    finally:
        writer.kill()
        writer.wait(10)
    (home.point / "noise").unlink(missing_ok=True)


def heartbeats(directory):
    """An idle writer's empty commits are no change."""
    volume = Volume(empty_dir(directory / "idle"))
    volume.init()
    home = volume.mount("home", directory / "idle" / "home-state", options=["heartbeat=20ms"])
    for n in range(2000):
        trees.write_file(home.point / f"f{n}", b"x" * n)
    home.sync()
    before = home.status()["last_durable"]["no"]
    done = json.loads(manifest(home, directory / "idle.manifest", "--live", "--json").stdout)
    check(done["commit"] > before, f"{done['commit'] - before} empty commits meanwhile are no change")
    home.umount()


def main(directory):
    os.environ["TMPDIR"] = str(empty_dir(directory / "tmp"))  # the runner finds what is left below its directory
    volume = Volume(directory)
    volume.init()
    home = volume.mount("home", directory / "home-state")
    trees.fill(str(home.point), many=400, big=8 * MIB)
    home.sync()
    drills = Drills(directory)
    file = directory / "manifest"
    manifest(home, file)
    live = directory / "live"
    manifest(home, live, "--live")
    lines = lambda path: path.read_text().split("\n{\n")[0]
    check(lines(live) == lines(file), "a manifest of the files themselves says the same as one of the version")
    done = manifest(home, file, ok=False)
    told = "choose another name" in done.stderr
    check(told, "a manifest is not written over another, and the way out is named", done.stderr)
    reports(directory, drills, good(directory, volume, drills, file))
    forged(directory, volume, drills, file)
    killed(directory, volume, drills, file)
    heartbeats(directory)
    written_meanwhile(directory, home)
    later(directory, volume, drills, home, file)
    newest = differs(directory, volume, drills, home)
    damaged(directory, volume, drills, newest)
