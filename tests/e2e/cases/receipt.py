"""Receipts: what the writer signs about one file, while it is being written, and each way in which one does not hold."""

import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile

import trees
from harness import Failed, Volume, check, empty_dir, program, run, say, wait_until

FOUND = 9
# BLAKE3 of no bytes, as its authors give it.
EMPTY = "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
# Overwrites a file in place, in pieces, with one content after another: content n is n in decimal, again and again.
OVERWRITE = """
import os, sys
out = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
n = 0
while True:
    text = content(n)
    for at in range(0, len(text), 100_000):
        os.pwrite(out, text[at : at + 100_000], at)
    n += 1
"""
CONTENT = """
def content(n):
    return (b"%019d\\n" % n) * 25_000
"""
exec(CONTENT)  # the same text here and in the process that writes


def receipt(mount, path, *words, ok=(0,)):
    """Asks for a receipt; gives the finished command."""
    done = run(program(), "receipt", mount.point, path, *words, ok=None, limit=90)
    if done.returncode not in ok or "panicked" in done.stderr:
        raise Failed(f"receipt {path} ended with {done.returncode}: {done.stdout} {done.stderr}")
    return done


def checked(file, key, *words, ok=(0,), says=""):
    """Checks a receipt; gives what was printed."""
    done = run(program(), "receipt", "check", file, "--public-key", key, *words, ok=None, limit=60)
    said = done.stdout + done.stderr
    if done.returncode not in ok or says not in said or "panicked" in said:
        raise Failed(f"check of {file} {words} ended with {done.returncode}, not {ok} with '{says}': {said}")
    return done.stdout


def body(text):
    return json.loads(text)["receipt"]


def of_files(directory, volume, home):
    """Files that lie still: small, empty, sparse, with an odd name."""
    (home.point / "deeds").mkdir()
    odd = os.fsencode(home.point / "deeds") + b"/back\\slash\xff\n"
    files = {"deeds/17": b"a deed", "deeds/empty": b"", "deeds/large": trees.random_bytes(3, 9 << 20)}
    for name, data in files.items():
        (home.point / name).write_bytes(data)
    with open(odd, "wb") as out:
        out.write(b"odd")
    with open(home.point / "deeds/sparse", "wb") as out:
        out.truncate(300 << 20)
        out.seek(123_456_789)
        out.write(b"in the middle")
    for name, data in {**files, "deeds/sparse": None}.items():
        file = directory / "plain.receipt"
        file.unlink(missing_ok=True)
        receipt(home, name, "--out", file)
        checked(file, volume.key("auditor"), "--content", home.point / name)
        said = body(file.read_text())
        check(said["path"] == name and said["size"] == os.stat(home.point / name).st_size, f"a receipt for {name}")
        if not data and data is not None:
            check(said["blake3"] == EMPTY, "the hash of nothing is the known one", said["blake3"])
    command = [program().encode(), b"receipt", os.fsencode(home.point), odd]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
    check(done.returncode == 0, "with an odd name, given with the mount point", done.stderr.decode())
    check(body(done.stdout)["path"] == "deeds/back\\\\slash\\xff\\x0a", "the name is shown so that it is plain")
    return directory / "plain.receipt"


def while_written(directory, volume, home):
    """Another process overwrites the file all the time: the receipt is for one state of it, that of its commit."""
    path = home.point / "busy"
    path.write_bytes(content(0))
    writer = subprocess.Popen([sys.executable, "-c", CONTENT + OVERWRITE, path], stdin=subprocess.DEVNULL)
    try:
        seen = set()
        for i in range(5):
            before = path.read_bytes()[:20]
            wait_until(lambda: path.read_bytes()[:20] != before, 10, "the file is overwritten", pause=0.005)
            file = directory / f"busy-{i}.receipt"
            receipt(home, "busy", "--out", file)
            said = body(file.read_text())
            commit = said["commit"]["no"]
            # That version, from the store alone: the same content.
            dest = empty_dir(directory / f"busy-{i}")
            volume.ask("restore", "--at", commit, "busy", dest)
            checked(file, volume.key("auditor"), "--content", dest / "busy")
            seen.add((commit, said["blake3"]))
        check(writer.poll() is None, f"{len(seen)} receipts while it is overwritten: each is its commit's content")
        check(len({c for c, _ in seen}) == 5, "each of another commit", str(seen))
    finally:
        writer.kill()
        writer.wait(10)


def still_states(directory, volume, home):
    """Each content is written whole, and synced: the receipt is for one of those."""
    path = home.point / "renamed"
    code = CONTENT + (
        "import os, sys\n"
        "n = 0\n"
        "while True:\n"
        "    n += 1\n"
        "    with open(sys.argv[1] + '.new', 'wb') as out:\n"
        "        out.write(content(n))\n"
        "    os.rename(sys.argv[1] + '.new', sys.argv[1])\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, path], stdin=subprocess.DEVNULL)
    try:
        wait_until(path.exists, 10, "the file is there")
        for i in range(3):
            file = directory / f"whole-{i}.receipt"
            receipt(home, "renamed", "--out", file)
            dest = empty_dir(directory / f"whole-{i}")
            volume.ask("restore", "--at", body(file.read_text())["commit"]["no"], "renamed", dest)
            data = (dest / "renamed").read_bytes()
            check(data == content(int(data[:19])), f"content {int(data[:19])} is one of those that were written, whole")
            checked(file, volume.key("auditor"), "--content", dest / "renamed")
    finally:
        writer.kill()
        writer.wait(10)


def refused(directory, volume, home):
    """What no receipt is given for."""
    for name, why in (("no/such", "not in the newest commit"), ("deeds", "no regular file"), ("../x", "holds '..'")):
        done = receipt(home, name, ok=(1, 2))
        check(why in done.stderr and not done.stdout, f"no receipt for '{name}', and why", done.stderr)
    old = directory / "plain.receipt"
    text = old.read_text()
    done = receipt(home, "deeds/17", "--out", old, ok=(1,))
    check(old.read_text() == text, "a file that is there is not written over", done.stderr)
    embassy = volume.embassy("reading")
    done = receipt(embassy, "deeds/17", ok=(1,))
    check("no key that signs" in done.stderr, "a mount that reads signs nothing", done.stderr)
    embassy.umount()


def not_durable(volume, home):
    """The store takes nothing: no receipt, in time, and which code."""
    log = volume.store_dir / "log"
    aside = volume.store_dir / "aside"
    log.rename(aside)
    log.write_text("in the way")
    try:
        (home.point / "late").write_bytes(b"late")
        done = receipt(home, "late", "--timeout", "2s", ok=(5,))
        check("not everything is durable" in done.stderr, "no receipt for what is not abroad", done.stderr)
    finally:
        log.unlink()
        aside.rename(log)
    receipt(home, "late")


def false_receipts(directory, volume, file):
    """Each byte bent, another key, another volume, other contents, an older store."""
    key = volume.key("auditor")
    text = file.read_bytes()
    draw = random.Random(os.environ.get("E2E_SEED", "1"))
    bent = directory / "bent.receipt"
    for at in [*draw.sample(range(len(text)), 40), 0, len(text) - 1]:
        bent.write_bytes(text[:at] + bytes([text[at] ^ 1]) + text[at + 1 :])
        checked(bent, key, ok=(FOUND,))
    said = body(text)
    bent.write_bytes(text.replace(said["blake3"].encode(), hashlib.sha256(b"x").hexdigest().encode()))
    checked(bent, key, ok=(FOUND,), says="FORGED OR ALTERED")
    bent.write_text(json.dumps(json.loads(text)))
    checked(bent, key, ok=(FOUND,), says="altered or written anew")
    say("ok  an altered receipt is refused")

    other = Volume(empty_dir(directory / "other"))
    other.init()
    checked(file, other.key("auditor"), ok=(FOUND,), says="ANOTHER VOLUME")
    hexkey = lambda v: json.loads(v.key("auditor").read_text())["writer_public"]
    checked(file, hexkey(other), ok=(FOUND,), says="FORGED OR ALTERED")
    checked(file, hexkey(volume))
    say("ok  another volume's key is told from a forgery")

    where = lambda v: ["--store", v.url, "--key", v.key("auditor")]
    checked(file, hexkey(volume), *where(other), ok=(FOUND,), says="ANOTHER VOLUME")
    checked(file, key, *where(volume))
    with tempfile.NamedTemporaryFile(dir=directory) as content_file:
        content_file.write(b"b deed")
        content_file.flush()
        checked(file, key, "--content", content_file.name, ok=(FOUND,), says="CONTENT DIFFERS")
    checked(file, key, *where(volume.at(f"file://{directory}/nowhere")), ok=(7, 8))
    return where


def rolled_back(directory, volume, home):
    """A store that was set back to before the receipt, and one that has something else there."""
    copy = directory / "copy"
    run("cp", "-a", volume.store_dir, copy)
    (home.point / "deeds/new").write_bytes(b"new")
    file = directory / "new.receipt"
    receipt(home, "deeds/new", "--out", file)
    key = volume.key("auditor")
    checked(file, key, "--store", volume.url, "--key", volume.key("reader"))
    checked(file, key, "--store", f"file://{copy}", "--key", key, ok=(FOUND,), says="NOT IN THE CHAIN")
    seq = body(file.read_text())["head"].split(":")[0]
    (copy / "log" / seq).write_bytes((volume.store_dir / "log" / f"{int(seq, 16) - 1:016x}").read_bytes())
    checked(file, key, "--store", f"file://{copy}", "--key", key, ok=(FOUND,), says="NOT IN THE CHAIN")
    say("ok  a store that was set back does not hold it, nor one with another segment there")


def main(directory):
    volume = Volume(directory)
    volume.init()
    home = volume.mount("home", directory / "home-state")
    of_files(directory, volume, home)
    still = directory / "still.receipt"
    receipt(home, "deeds/17", "--out", still)
    checked(still, volume.key("auditor"), "--content", home.point / "deeds/17")
    while_written(directory, volume, home)
    still_states(directory, volume, home)
    refused(directory, volume, home)
    not_durable(volume, home)
    false_receipts(directory, volume, still)
    rolled_back(directory, volume, home)
    # The time allowed is that of the command, not of the daemon.
    wait_until(lambda: home.status()["uptime"] > 2, 10, "the daemon is older than the time allowed")
    receipt(home, "deeds/17", "--timeout", "2s")
    home.umount()
    checked(still, volume.key("auditor"), "--store", volume.url, "--key", volume.key("auditor"))
