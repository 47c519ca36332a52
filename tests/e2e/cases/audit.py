"""What an auditor and an operator do with a store alone: diff, restore, verify, receipt, drill."""

import json
import os
import signal
import subprocess
import threading

import trees
from harness import Failed, Volume, check, check_same, empty_dir, program, run, say, wait_until

FOUND = 9


def ask(volume, command, *words, key="reader", ok=(0,), limit=60):
    """A command on the store; gives the finished process, whose exit code must be one of `ok`."""
    done = run(
        program(), command, "--store", volume.url, "--key", volume.key(key), *words, limit=limit, ok=None
    )
    if done.returncode not in ok or "panicked" in done.stderr:
        raise Failed(f"{command} {words} ended with {done.returncode}: {done.stdout[-1500:]} {done.stderr[-1500:]}")
    return done


def newest(mount):
    """The newest commit, after all of it is in the store."""
    mount.sync()
    return mount.status()["last_durable"]["no"]


def fill(home):
    """A tree with everything in it; gives the commit that holds it."""
    trees.fill(str(home.point), many=1500, big=24 << 20)
    run("setfacl", "-m", "u:1234:rw", home.point / "odd" / "attributes")
    run("setfacl", "-d", "-m", "u:1234:rwx", home.point / "moved-here")
    trees.stamp(str(home.point))
    return newest(home)


def change(root):
    """One of each change; gives what diff must say of them."""
    with open(root / "many" / "register-000700.json", "r+b") as out:
        out.write(b"[")
    os.chmod(root / "odd" / "size-511", 0o600)
    os.setxattr(root / "odd" / "size-512", "user.new", b"1")
    os.rename(root / "moved-here", root / "odd" / "moved-again")
    os.rename(root / "odd" / "size-1", root / "size-one")
    os.unlink(root / "odd" / "size-4095")
    (root / "fresh").mkdir()
    trees.write_file(root / "fresh" / "file", b"new")
    os.symlink("file", root / "fresh" / "link")
    return {
        "M many/register-000700.json",
        "m odd/size-511",
        "m odd/size-512",
        "R moved-here/ -> odd/moved-again/",
        "R odd/size-1 -> size-one",
        "D odd/size-4095",
        "A fresh/",
        "A fresh/file",
        "A fresh/link",
    }


def diffs(volume, old, new, want):
    """What changed, told in paths."""
    done = ask(volume, "diff", old, new, ok=(FOUND,))
    got = set(done.stdout.splitlines())
    check(got == want, f"diff says the {len(want)} changes and no others", f"{sorted(got ^ want)}")
    found = json.loads(ask(volume, "diff", old, "newest", "--json", ok=(FOUND,)).stdout)
    check(found["pages_read"] <= 40, f"it read {found['pages_read']} pages for {found['keys']} keys")
    check(len(found["changes"]) == len(want), "--json says as many")
    below = ask(volume, "diff", old, new, "/fresh/", ok=(FOUND,)).stdout.splitlines()
    check(sorted(below) == ["A fresh/", "A fresh/file", "A fresh/link"], "diff of a path", str(below))
    back = set(ask(volume, "diff", new, old, "odd", ok=(FOUND,)).stdout.splitlines())
    check("A odd/size-4095" in back and "R size-one -> odd/size-1" in back, "and backwards", str(back))
    ask(volume, "diff", new, "newest", ok=(0,))
    ask(volume, "diff", new, new + 1000, ok=(8,))


def between_checkpoints(directory, volume, second):
    """Each unmount makes a checkpoint: then pages are compared, and hardly any of them are read."""
    home = volume.mount("home", directory / "home-state")
    with open(home.point / "many" / "register-000701.json", "r+b") as out:
        out.write(b"[")
    third = newest(home)
    home.umount()
    checkpoints = [v["commit"] for v in volume.versions() if v["checkpoint"]]
    check({second, third} <= set(checkpoints), "both versions have a checkpoint", str(checkpoints))
    found = json.loads(ask(volume, "diff", second, third, "--json", ok=(FOUND,)).stdout)
    told = [(c["change"], c["path"]) for c in found["changes"]]
    check(told == [("M", "many/register-000701.json")], "one change between two checkpoints is one line", str(told))
    check(0 < found["pages_read"] <= 12, f"{found['pages_read']} pages were compared for it", str(found))


def restored_all(directory, volume, commit, want):
    """The whole volume, killed in the middle and gone on with."""
    dest = directory / "restored"
    state = directory / "restore-state"
    words = ["--at", commit, "--state", state, ".", dest]
    command = [program(), "restore", "--store", volume.url, "--key", volume.key("reader"), *words]
    first = subprocess.Popen([str(c) for c in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    some = lambda: dest.is_dir() and sum(len(files) for _, _, files in os.walk(dest)) > 300 or first.poll() is not None
    wait_until(some, 30, "the restore has begun", pause=0.001)
    first.send_signal(signal.SIGKILL)
    first.wait(10)
    check(first.returncode == -signal.SIGKILL, "a restore is killed in the middle")
    names = [n for _, _, files in os.walk(dest) for n in files]
    whole = [n for n in names if not n.endswith(".part")]
    report = json.loads(ask(volume, "restore", *words, "--json").stdout)["report"]
    check(report["present"] >= len(whole) - 10 > 0, f"{report['present']} files are not copied again", str(report))
    check(report["files"] > 0 and report["problem_count"] == 0, f"{report['files']} are copied now", str(report))
    check_same(want, trees.manifest(dest), "what was restored is what was written")
    check(not list(dest.rglob("*.part")), "nothing half made is left")
    sparse = os.stat(dest / "sparse")
    check(sparse.st_blocks * 512 < 2 << 20 < sparse.st_size, "holes are kept")
    lists = [run("getfacl", "-cnp", dest / name).stdout for name in ("odd/attributes", "moved-here")]
    check("user:1234:rw-" in lists[0] and "default:user:1234:rwx" in lists[1], "access lists are there", str(lists))
    again = json.loads(ask(volume, "restore", *words, "--json").stdout)["report"]
    check(again["files"] == 0 and again["others"] == 0, "a third run copies nothing", str(again))
    return dest


def restored_some(directory, volume, commit, dest):
    """Single paths; what differs stays, and no symbolic link is followed."""
    trees.write_file(dest / "sparse", b"somebody else's")
    outside = empty_dir(directory / "outside")
    (dest / "fresh").symlink_to(outside)
    done = ask(volume, "restore", "sparse", "fresh", "no/such", dest, ok=(1,))
    check("--overwrite" in done.stderr and "no/such" in done.stderr, "what differs or is missing is told of", done.stderr)
    check((dest / "sparse").read_bytes() == b"somebody else's", "and left as it is")
    check(not os.listdir(outside), "nothing is written through a symbolic link")
    ask(volume, "restore", "--overwrite", "--at", commit, "sparse", dest)
    check(os.stat(dest / "sparse").st_size > 100 << 20, "--overwrite replaces it")
    some = directory / "some"
    ask(volume, "restore", "odd/size-511", "fresh", some)
    check(sorted(os.listdir(some)) == ["fresh", "size-511"], "single paths come under their last names")


def verify(volume, *words, key="auditor", ok=(0,)):
    """What verify says, as JSON."""
    return json.loads(ask(volume, "verify", *words, "--json", key=key, ok=ok).stdout)


def verified(directory, volume):
    """The undamaged store, with both keys."""
    for key, words in (("auditor", []), ("auditor", ["--full"]), ("reader", ["--full"])):
        found = verify(volume, *words, key=key)
        check(found["findings"] == [], f"{key} {words} finds nothing in a whole store", str(found["findings"][:3]))
        say(f"{found['requests']} requests, {found['bytes_read']} bytes, {found['frames']} frames, {found['keys']} keys")
    check(found["inodes"] > 1500 and found["extents"] > 100, "the reader's walk saw the tree", str(found))
    old = verify(volume, "--max-age", "1ms", ok=(FOUND, 0))
    check(old["findings"] == [] or "old" in old["findings"][0]["detail"], "an age limit is held against the newest commit")
    ask(volume.at(f"file://{directory}/nowhere"), "verify", key="auditor", ok=(7,))


def verified_at_work(directory, volume):
    """While home writes and ships: what comes later is no damage."""
    home = volume.mount("home", directory / "home-state")
    end = threading.Event()

    def write():
        n = 0
        while not end.is_set():
            trees.write_file(home.point / f"at-work-{n % 50}", trees.random_bytes(n, 300_000))
            home.sync()
            n += 1

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(3):
            before = len(volume.objects())
            found = verify(volume, "--full", key="reader")
            check(found["findings"] == [], "a volume at work is whole", str(found["findings"][:3]))
            say(f"{len(volume.objects()) - before} objects came meanwhile")
    finally:
        end.set()
        writer.join()
    home.umount()


def damage(store, kind, name, other=None):
    """Damages one object of a copy, whose files are shared with the original."""
    path = store / name
    data = path.read_bytes()
    path.unlink()
    if kind == "flip":
        data = data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 4]) + data[len(data) // 2 + 1 :]
    elif kind == "truncate":
        data = data[: len(data) // 2]
    elif kind == "swap":
        second = (store / other).read_bytes()
        (store / other).unlink()
        (store / other).write_bytes(data)
        data = second
    if kind != "delete":
        path.write_bytes(data)


def verified_damage(directory, volume):
    """Each kind of object in each kind of damage, with both keys."""
    names = volume.objects()
    logs = [n for n in names if n.startswith("log/")]
    points = [n for n in names if n.startswith("checkpoint/")]
    check(len(logs) >= 3 and points, f"{len(logs)} segments, {len(points)} checkpoints")
    todo = [(kind, n, None) for kind in ("flip", "truncate", "delete") for n in (logs[0], logs[1], "volume.json")]
    todo += [("flip", points[0], None), ("truncate", points[0], None), ("swap", logs[0], logs[1])]
    copy = directory / "damaged"
    for kind, name, other in todo:
        run("rm", "-rf", copy)
        run("cp", "-al", volume.store_dir, copy)
        damage(copy, kind, name, other)
        hurt = volume.at(f"file://{copy}")
        for key in ("auditor", "reader"):
            found = verify(hurt, "--full", key=key, ok=(FOUND,))["findings"]
            if not any(name in (f["object"] + f["detail"]) for f in found):
                raise Failed(f"{kind} {name}: {key} names {found[:5]}")
    say(f"ok  {len(todo)} damages are found by both keys, and named")
    # The newest of the log is gone: only who has seen it knows, or who reads the checkpoint that stands on it.
    state = directory / "auditor-state"
    verify(volume, "--state", state)
    run("rm", "-rf", copy)
    run("cp", "-al", volume.store_dir, copy)
    damage(copy, "delete", logs[-1])
    found = verify(volume.at(f"file://{copy}"), "--state", state, ok=(FOUND,))["findings"]
    check(any("rolled back" in f["detail"] for f in found), "with --state a rolled-back store is found out", str(found))
    two = directory / "two"
    run("cp", "-al", volume.store_dir, two)
    for name in logs[:2]:
        damage(two, "flip", name)
    found = verify(volume.at(f"file://{two}"), "--full", ok=(FOUND,))["findings"]
    check({logs[0], logs[1]} <= {f["object"] for f in found}, "two damages are two findings", str(found))


def main(directory):
    volume = Volume(directory)
    volume.init()
    home = volume.mount("home", directory / "home-state")
    first = fill(home)
    want = trees.manifest(home.point)
    expected = change(home.point)
    second = newest(home)
    say(f"commits {first} and {second}")
    diffs(volume, first, second, expected)
    dest = restored_all(directory, volume, first, want)
    restored_some(directory, volume, first, dest)
    home.umount()
    between_checkpoints(directory, volume, second)
    verified(directory, volume)
    verified_at_work(directory, volume)
    verified_damage(directory, volume)
