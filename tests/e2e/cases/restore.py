"""What restore and its kin do when things are not as they should be: names that are links, what is there already and
differs, signals, wrong addresses, objects that are no files."""

import json
import os
import shutil
import signal
import socket
import subprocess

import trees
from harness import Failed, Volume, check, empty_dir, program, run, timed, wait_until

WRONG, NO_STORE, REFUSED, FOUND = 2, 7, 8, 9


def ask(volume, command, *words, key="reader", code=0, limit=60, **more):
    """A command on the store, which must end with `code`; gives all that it said."""
    words = ["--store", volume.url, "--key", volume.key(key), *words]
    done = run(program(), command, *words, limit=limit, ok=None, **more)
    said = done.stdout + done.stderr
    if done.returncode != code or "panicked" in said:
        raise Failed(f"{command} {words} ended with {done.returncode}, not {code}: {said[-2000:]}")
    return said


def report(volume, *words, code=0):
    """What a restore reports as JSON."""
    said = ask(volume, "restore", *words, "--json", code=code)
    return json.loads(said[said.index("{") : said.rindex("}") + 1])["report"]


def fill(home):
    """Files with several names, attributes, and enough of everything that it takes a while."""
    top = home.point
    (top / "links").mkdir()
    (top / "else").mkdir()
    trees.write_file(top / "links" / "a", b"data\n")
    os.symlink("a", top / "links" / "s")
    for kind in ("a", "s"):
        for name in (f"links/{kind}2", f"links/{kind}3", f"else/{kind}4"):
            os.link(top / "links" / kind, top / name, follow_symlinks=False)
    trees.write_file(top / "register", b"x" * 10_000)
    os.setxattr(top / "register", "user.seal", b"1")
    run("setfacl", "-m", "u:1234:rw", top / "register")
    trees.write_file(top / "plain", b"plain")
    with open(top / "holes", "wb") as out:
        out.truncate(8 << 20)
        out.seek(5 << 20)
        out.write(b"between")
    (top / "many").mkdir()
    for n in range(3000):
        trees.write_file(top / "many" / f"{n:04}", b"%d\n" % n)
    trees.write_file(top / "big", trees.random_bytes(1, 48 << 20))
    home.sync()


def links(directory, volume):
    """All names come back, as links to one inode; also those whose first name cannot be made."""
    out = directory / "links-out"
    found = report(volume, "links", "else", out)
    check(found["problem_count"] == 0, "files with several names are restored", str(found))
    for kind in ("a", "s"):
        paths = [out / "links" / f"{kind}{n}" for n in ("", 2, 3)] + [out / "else" / f"{kind}4"]
        inodes = {os.lstat(path).st_ino for path in paths}
        check(len(inodes) == 1 and os.lstat(paths[0]).st_nlink == 4, f"the four names of {kind} are one inode", str(inodes))
    check((out / "links" / "a3").read_text() == "data\n" and os.readlink(out / "links" / "s3") == "a", "with what it holds")
    check((found["files"], found["others"], found["links"]) == (1, 1, 6), "the report counts them", str(found))
    again = report(volume, "links", "else", out)
    check((again["files"], again["links"], again["present"]) == (0, 0, 8), "a second run makes none of them", str(again))
    os.unlink(out / "links" / "a")
    os.unlink(out / "else" / "s4")
    found = report(volume, "links", "else", out, code=1)
    why = [why for _, why in found["problems"]]
    check(len(why) == 3 and all("other name" in text for text in why), "what is no link of the new file is told of", str(found))
    out = directory / "blocked"
    (out / "links" / "a").mkdir(parents=True)
    found = report(volume, "links", out, code=1)
    check([path for path, _ in found["problems"]] == ["links/a"], "a name that is taken is told of by its path", str(found))
    check(os.stat(out / "links" / "a2").st_nlink == 2, "and the other names are made")
    twice = directory / "twice"
    found = report(volume, ".", "plain", twice)
    check(found["problem_count"] == 0 and (twice / "plain").read_text() == "plain", "a path that was asked for twice", str(found))
    return twice


def hurt(path, at):
    """Another byte, at the same time of modification."""
    times = os.stat(path)
    with open(path, "r+b") as out:
        out.seek(at)
        out.write(b"#")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def there_already(volume, out):
    """What is there and differs is found: attributes always, contents on demand."""
    said = ask(volume, "restore", ".", out)
    check("--verify reads them" in said, "the summary says how what was there is known", said)
    hurt(out / "register", 5000)
    hurt(out / "holes", 1 << 20)
    check(report(volume, ".", out)["problem_count"] == 0, "by size and time a damaged file is not seen, as the help says")
    found = report(volume, "--verify", ".", out, code=1)
    bad = {path: why for path, why in found["problems"]}
    check(set(bad) == {"register", "holes"} and all("(contents)" in why for why in bad.values()), "--verify finds it", str(bad))
    check(found["compared"] > 3000 and found["files"] == 0, "after it has read all files", str(found["compared"]))
    access = os.stat(out / "plain").st_atime_ns
    found = report(volume, "--verify", "--overwrite", ".", out)
    check((found["files"], found["problem_count"]) == (2, 0), "with --overwrite they are replaced", str(found))
    check((out / "register").read_bytes() == b"x" * 10_000 and os.stat(out / "holes").st_blocks < 1024, "and whole again")
    said = ask(volume, "restore", "--verify", ".", out)
    check("compared" in said and os.stat(out / "plain").st_atime_ns == access, "comparing leaves times of access alone", said)
    os.setxattr(out / "register", "user.seal", b"2")
    run("setfacl", "-m", "u:77:r", out / "plain")
    os.setxattr(out / "many" / "0001", "user.extra", b"")
    found = report(volume, ".", out, code=1)
    names = {path for path, why in found["problems"] if "extended attributes or access list" in why}
    check(names == {"register", "plain", "many/0001"}, "attributes and access lists are compared always", str(found["problems"]))
    check(report(volume, "--overwrite", ".", out)["files"] == 3, "and made anew with --overwrite")
    os.unlink(out / "plain")
    run("setfacl", "-d", "-m", "u:77:rwx", out)
    ask(volume, "restore", ".", out)
    lists = [run("getfacl", "-cnp", path).stdout for path in (out / "plain", out)]
    check("77" not in "".join(lists), "no list of the directory there is handed down", str(lists))


def interrupted(directory, volume):
    """A signal leaves nothing in the place for temporary files, and a line that says how to go on."""
    place = empty_dir(directory / "temporary")
    for sent in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        for command, words in (("restore", [".", directory / f"out-{sent}"]), ("verify", ["--full"])):
            command = [program(), command, "--store", volume.url, "--key", volume.key("reader"), *words]
            pipe = subprocess.PIPE
            # A shell's background job may have had us ignore SIGINT.
            usual = lambda: [signal.signal(s, signal.SIG_DFL) for s in (signal.SIGINT, signal.SIGHUP)]
            begun = subprocess.Popen(
                [str(c) for c in command], env={**os.environ, "TMPDIR": str(place)}, stdout=pipe, stderr=pipe, text=True,
                preexec_fn=usual,
            )
            wait_until(lambda: list(place.rglob("volume.json")) or begun.poll() is not None, 20, "it has begun", pause=0.001)
            begun.send_signal(sent)
            _, said = begun.communicate(timeout=20)
            what = f"{command[1]} ended by {sent.name}"
            check(begun.returncode == -sent, what, f"{begun.returncode} {said}")
            check(sent.name in said and "again" in said, f"{what} says that it can be run again", said)
            check(not os.listdir(place), f"{what} leaves no copies", str(os.listdir(place)))
    ignoring = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)
    command = [program(), "verify", "--full", "--store", volume.url, "--key", volume.key("reader")]
    begun = subprocess.Popen([str(c) for c in command], stdout=subprocess.DEVNULL, preexec_fn=ignoring)
    for _ in range(20):
        begun.send_signal(signal.SIGHUP)
        wait_until(lambda: True, 1, "a moment")
    check(begun.wait(60) == 0, "under nohup SIGHUP ends nothing", str(begun.returncode))


def versions(directory, volume):
    """newest, and times to come."""
    ask(volume, "restore", "--at", "newest", "plain", directory / "newest")
    volume.embassy("newest-mount", more=["--at", "newest"]).umount()
    far = "2999-01-01T00:00:00Z"
    for said in (
        ask(volume, "restore", "--at", far, "plain", directory / "never", code=WRONG),
        ask(volume, "diff", far, "newest", code=WRONG),
        ask(volume, "mount", "--read-only", "--at", far, "--state", directory / "never", directory, code=WRONG),
    ):
        check("still to come" in said and "newest" in said, "a time to come is refused, and why", said)
    soon = run("date", "-u", "-d", "+2 min", "+%Y-%m-%dT%H:%M:%SZ").stdout.strip()
    ask(volume, "restore", "--at", soon, "plain", directory / "soon")
    said = ask(volume, "diff", "1", "newest", "no/such", code=WRONG)
    check("no/such" in said and "neither" in said, "diff of a path that no version has is an error", said)
    ask(volume, "diff", "newest", "newest", "many/0001")
    for command, words in (("versions", []), ("diff", ["1", "newest"]), ("restore", ["plain", directory / "never"])):
        said = ask(volume, command, *words, key="auditor", code=REFUSED)
        check("'verify'" in said and "reader.key" in said, f"{command} says what auditor.key is for", said)
    check("auditor.key" in run(program(), "verify", "--help").stdout, "verify --help speaks of auditor.key")


def nowhere(directory, volume):
    """An address at which there is no volume is not a damaged one."""
    empty = empty_dir(directory / "empty")
    (directory / "point").mkdir()
    for place in (directory / "no-such-directory", empty):
        other = volume.at(f"file://{place}")
        mount = ["--read-only", "--state", directory / "nowhere-state", directory / "point"]
        for command, words in (
            ("restore", [".", directory / "never"]), ("verify", []), ("verify", ["--full", "--json"]), ("versions", []),
            ("diff", ["1", "newest"]), ("status", []), ("mount", mount),
        ):
            said = ask(other, command, *words, code=NO_STORE)
            if "holds no volume" not in said or str(place) not in said or "check the URL" not in said:
                raise Failed(f"{command} on {place} says {said}")
        said = ask(other, "mount", *mount[1:], key="writer", code=NO_STORE)
        check("holds no volume" in said, f"nothing reads or writes a volume in {place.name}", said)
    check(not os.listdir(empty), "and nothing is put there")


def copy_of(directory, volume):
    copy = directory / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    run("cp", "-a", volume.store_dir, copy)
    return copy, volume.at(f"file://{copy}")


def lost(directory, volume):
    """A part of the volume is gone, or something else stands in its place."""
    names = volume.objects()
    log = [name for name in names if name.startswith("log/")]
    copy, other = copy_of(directory, volume)
    (copy / "volume.json").unlink()
    said = ask(other, "restore", ".", directory / "never", code=REFUSED)
    check("volume.json" in said and "init" not in said, "a volume without volume.json is damaged", said)
    check("volume.json" in ask(other, "verify", code=FOUND), "and verify tells of it")

    copy, other = copy_of(directory, volume)
    (copy / log[-1]).unlink()
    for words in (["--full"], ["--full", "--json"]):
        said = ask(other, "verify", *words, code=FOUND)
        check(log[-1] in said and "no volume" not in said, f"verify {words} names the segment that is gone", said[-600:])

    copy, other = copy_of(directory, volume)
    for name in ("zzz", "0" * 16, "f" * 16, "fffffffffffffff0"):
        (copy / "checkpoint" / name).write_bytes(os.urandom(700))
    os.mkfifo(copy / "checkpoint" / "fffffffffffffff1")
    (copy / "checkpoint" / "fffffffffffffff2").symlink_to("nowhere")
    said = ask(other, "verify", "--full", "--json", code=FOUND)
    found = json.loads(said)
    check(found["inodes"] > 3000, "junk among the checkpoints keeps verify from no part of the tree", str(found["inodes"]))
    check(len(found["findings"]) == 6, "and all of it is told of", str(found["findings"]))
    other.embassy("beside-junk").umount()

    for kind in ("pipe", "loop", "dangling", "directory", "device", "socket"):
        for name in (log[1], log[-1], names[0], "volume.json"):
            copy, other = copy_of(directory, volume)
            path = copy / name
            path.unlink()
            if kind == "pipe":
                os.mkfifo(path)
            elif kind == "loop":
                path.symlink_to(path.name)
            elif kind == "dangling":
                path.symlink_to("nowhere")
            elif kind == "directory":
                path.mkdir()
            elif kind == "device":
                os.mknod(path, 0o020600, os.makedev(1, 5))
            else:
                os.chdir(path.parent)  # the name of a socket is short
                socket.socket(socket.AF_UNIX).bind(path.name)
                os.chdir("/")
            told(other, kind, name)
    check(True, "whatever has an object's name and is no file is told of at once")


def told(volume, kind, name):
    """Nothing waits for what is no object; verify names it."""
    said, took = timed(lambda: run(program(), "verify", "--full", "--store", volume.url, "--key", volume.key("reader"), ok=None))
    # A checkpoint that is a directory is not seen at all, and no harm.
    good = said.returncode == FOUND or (kind == "directory" and name.startswith("checkpoint/"))
    if not good or took > 8 or (said.returncode == FOUND and name not in said.stdout):
        raise Failed(f"{kind} as {name}: verify ended with {said.returncode} after {took:.1f} s: {said.stdout} {said.stderr}")
    words = ["--store", volume.url, "--key", volume.key("reader"), "plain", volume.directory / f"out-{kind}"]
    said, took = timed(lambda: run(program(), "restore", *words, ok=None))
    if said.returncode not in (0, 1, REFUSED) or took > 8:
        raise Failed(f"{kind} as {name}: restore ended with {said.returncode} after {took:.1f} s: {said.stderr}")
    if said.returncode and name not in said.stderr:
        raise Failed(f"{kind} as {name}: restore does not name it: {said.stderr}")


def main(directory):
    volume = Volume(directory)
    volume.init()
    home = volume.mount("home", directory / "home-state")
    fill(home)
    home.umount()
    out = links(directory, volume)
    there_already(volume, out)
    interrupted(directory, volume)
    versions(directory, volume)
    nowhere(directory, volume)
    lost(directory, volume)
