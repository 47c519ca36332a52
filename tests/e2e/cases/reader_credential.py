"""A credential that may only get and list: enough for everything a reader does, and no way to write.

The store answers whatever else this credential asks for with 403 AccessDenied, and notes it: a reader asks for nothing
else. Then the other half: the reader's key with a credential that may write.
"""

import contextlib
import json
import os

import trees
from harness import Volume, check, check_same, empty_dir, program, run, s3_environment, wait_until
from stub_s3 import StubS3

STORE, REFUSED, FOUND = 7, 8, 9


def main(directory):
    with contextlib.closing(StubS3()) as stub:
        stub.keys, stub.readers = {"embassy", "reader"}, {"reader"}
        volume = Volume(directory, "s3://land/registers", s3_environment(stub.port))
        volume.init()
        home = volume.mount("home", directory / "state")
        trees.fill(str(home.point), many=200, big=4 << 20)
        home.sync()
        reader = volume.at(volume.url, {"AWS_ACCESS_KEY_ID": "reader"})
        reads(directory, home, reader)
        check(not stub.tried, "none of them asks to write anything", str(stub.tried[:5]))
        home.sync()
        writes(directory, reader, stub)
        stolen(directory, volume, stub)
        home.umount()


def reads(directory, home, reader):
    """All that a reader does, with home at work."""
    want = trees.manifest(home.point)
    first = home.status()["last_durable"]["no"]
    follower = reader.embassy("standby", more=["--follow"], options=["follow_interval=200ms"])
    check_same(want, trees.manifest(follower.point), "a read-only mount that follows has it all")
    (home.point / "many" / "later").write_text("later")
    home.sync()
    there = follower.point / "many" / "later"
    wait_until(lambda: there.exists() and there.read_text() == "later", 20, "it follows")
    check((follower.point / ".embassyfs" / "at" / str(first) / "many").is_dir(), "an older version in it can be listed")
    follower.umount()
    plain = reader.embassy("newest")
    check((plain.point / "many" / "later").read_text() == "later", "a read-only mount has the newest")
    plain.umount()
    old = reader.embassy("old", more=["--at", first])
    check_same(want, trees.manifest(old.point), "--at mounts an older version")
    old.umount()

    check(any(v["commit"] == first for v in reader.versions()), "versions lists them")
    told = reader.ask("diff", first, "newest", ok=None)
    check(told.returncode == FOUND and "A many/later" in told.stdout, "diff says what changed", told.stdout + told.stderr)
    dest = directory / "restored"
    reader.ask("restore", "--at", first, ".", dest)
    check_same(want, trees.manifest(dest), "restore copies out what was there")
    for role in ("auditor", "reader"):
        found = json.loads(reader.ask("verify", "--json", role=role).stdout)
        check(found["findings"] == [], f"verify with the {role}'s key", str(found)[:500])
    reader.ask("verify", "--full")
    manifest, key = directory / "manifest.json", directory / "drill.key"
    run(program(), "manifest", home.point, "--out", manifest)
    run(program(), "drill", "key", key)
    reader.ask("drill", "--manifest", manifest, "--report", directory / "report.json", "--sign-key", key)
    check((directory / "report.json").exists(), "drill reads everything and reports")
    receipt = directory / "receipt.json"
    receipt.write_text(run(program(), "receipt", home.point, "many/later").stdout)
    public = json.loads(receipt.read_text())
    check(public["receipt"], "a receipt is about what the reader sees")


def writes(directory, reader, stub):
    """The writer's key is of no use with this credential: each command ends, and says what the store refuses."""
    before = dict(stub.objects)

    def refused(done, claim):
        said = done.stdout + done.stderr
        check(done.returncode == STORE and "panicked" not in said, claim, f"{done.returncode}: {said}")
        check("AccessDenied" in said, f"... and says why: {said.strip().splitlines()[-1][:150]}", said)

    other = Volume(directory / "other", "s3://land/other", reader.env)
    other.directory.mkdir()
    refused(other.init(ok=None), "init is refused")
    check(not other.keys.exists() or not list(other.keys.iterdir()), "and leaves no keys of a volume that is not there")
    words = ["--reason", "stolen", "--state", directory / "promote-state"]
    refused(reader.ask("promote", *words, role="writer", ok=None), "promote is refused")
    words = ["--state", empty_dir(directory / "accept-state")]
    done = reader.ask("accept", *words, role="writer", ok=None)
    check(done.returncode not in (0, 101), "accept is refused", done.stdout + done.stderr)
    _, done = reader.try_mount("writer", empty_dir(directory / "writer-state"))
    told = f"{done.returncode}: {done.stderr}"
    check(done.returncode == REFUSED and "promote" in done.stderr, "a mount that would be a takeover is refused", told)
    check(stub.objects == before and stub.tried, f"the store is as it was after {len(stub.tried)} requests to write")
    embassy = reader.embassy("after")
    check((embassy.point / "many" / "later").read_text() == "later", "and is read as before")
    embassy.umount()


def stolen(directory, volume, stub):
    """A reader who has the writer's credential has no key that signs; what he puts there is refused."""
    thief = volume.at(volume.url)
    thief.keys = directory / "thief"
    thief.keys.mkdir()
    for role in ("writer", "reader"):
        thief.key(role).write_bytes(volume.key("reader").read_bytes())
        thief.key(role).chmod(0o600)
    before = dict(stub.objects)
    _, done = thief.try_mount("stolen", empty_dir(directory / "thief-state"))
    check(done.returncode == REFUSED and "reader" in done.stderr, "the reader's key mounts nothing for writing",
          f"{done.returncode}: {done.stderr}")  # fmt: skip
    for words in (["promote", "--reason", "theft"], ["accept"]):
        done = thief.ask(*words, "--state", empty_dir(directory / "thief-state"), role="writer", ok=None)
        check(done.returncode == REFUSED, f"nor does it {words[0]}", f"{done.returncode}: {done.stderr}")
    check(stub.objects == before, "the store is as it was")

    state = empty_dir(directory / "pinned-state")
    volume.embassy("pinned", state=state).umount()
    segments = sorted(name for name in stub.objects if "/log/" in name)
    newest = segments[-1]
    folder, number = newest.rsplit("/", 1)
    width = len(number)
    for what, forged in {
        "a copy of the newest segment": stub.objects[newest],
        "the newest segment with a bit changed": flipped(stub.objects[newest]),
        "noise": os.urandom(len(stub.objects[newest])),
    }.items():
        name = f"{folder}/{int(number, 16) + 1:0{width}x}"
        stub.objects[name] = forged
        for where in (state, empty_dir(directory / "fresh-state")):
            point, done = volume.try_mount("forged", where, read_only=True)
            told = f"{done.returncode}: {done.stderr}"
            check(done.returncode == REFUSED, f"{what} as the next one is refused", told)
        del stub.objects[name]
    volume.embassy("pinned", state=state).umount()


def flipped(data):
    """One bit in the middle changed."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
