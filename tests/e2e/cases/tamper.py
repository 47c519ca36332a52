"""Damage anywhere: an error that names the object, or EIO on the files concerned; never wrong data, never a crash.

The volume's history is made of steps after each of which every visible file is whole (files come by rename), so that
any earlier state of the volume is one where each file is as of step i or i + 1. Taking the newest objects away can
only be told from a shorter history by who has seen the longer one, so with an empty state directory a *deleted*
object may lead to an earlier state, as a whole; nothing else may.
"""

import errno
import os
import random
import shutil
import time
from pathlib import Path

import trees
from harness import Failed, Volume, alive, check, empty_dir, run, say

PIECES = {"tiny": 100, "small": 3_000, "middle": 150_000, "large": 2_500_000}


def put(root, name, data):
    """A file that is there whole or not at all."""
    trees.write_file(root / f"{name}.tmp", data)
    os.rename(root / f"{name}.tmp", root / name)


def step(root, n):
    """Step `n` of the history: some files new, some replaced, the rest left."""
    for name, size in PIECES.items():
        put(root, f"{name}-{n}", trees.random_bytes(f"{name}{n}", size + n))
        put(root, f"{name}-replaced", trees.random_bytes(f"{name}{n}r", size))
    put(root, f"text-{n}", b"the same line of text, again and again\n" * 5000)
    directory = root / f"dir-{n}"
    directory.mkdir()
    for k in range(40):
        put(directory, f"{k}", b"%d %d" % (n, k) * (k * 9))


def contents(root):
    """Relative path -> bytes digest, or "EIO" for what can't be read. A listing that fails makes its directory EIO."""
    found = {}

    def visit(path, relative):
        try:
            names = sorted(os.listdir(path))
        except OSError as e:
            return note(e, f"{relative}/")
        for name in names:
            below, where = f"{relative}/{name}", os.path.join(path, name)
            if name.endswith(".tmp"):
                continue
            try:
                if os.path.isdir(where) and not os.path.islink(where):
                    found[f"{below}/"] = "directory"
                    visit(where, below)
                else:
                    found[below] = trees.digest(where)
            except OSError as e:
                note(e, below)

    def note(e, where):
        if e.errno != errno.EIO:
            raise Failed(f"{where or '/'}: {e.strerror} instead of EIO or the data") from e
        found[where] = "EIO"

    visit(str(root), "")
    return found


def errors_in(found):
    return [path for path, what in found.items() if what == "EIO"]


def wrong_against(want, found):
    """What is neither right nor an error. Names below a directory that can't be listed may be missing."""
    unlisted = [path for path in errors_in(found) if path.endswith("/")]
    out = [f"{path} is not the original" for path, what in found.items() if what not in ("EIO", want.get(path))]
    for path in want.keys() - found.keys():
        if path not in errors_in(found) and not any(path.startswith(u) for u in unlisted):
            if f"{path}/" not in errors_in(found) and path.rstrip("/") not in errors_in(found):
                out.append(f"{path} has vanished without an error")
    return out


def earlier_state(history, found):
    """Whether this is, as a whole, a state between two steps of the history."""
    for before, after in zip(history, history[1:]):
        allowed = lambda p: {before.get(p, "absent"), after.get(p, "absent")}
        if all(found.get(p, "absent") in allowed(p) for p in found.keys() | before.keys() | after.keys()):
            return True
    return False


class Damage:
    """One way of damaging a copy of a store (or of a state directory)."""

    def __init__(self, kind, name, detail=None):
        self.kind, self.name, self.detail = kind, name, detail

    def __str__(self):
        return f"{self.kind} {self.name}{'' if self.detail is None else f' {self.detail}'}"

    def apply(self, root):
        path = root / self.name
        data = path.read_bytes()
        if self.kind == "flip":
            at, bit = self.detail
            changed = data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :]
        elif self.kind == "truncate":
            changed = data[: self.detail]
        elif self.kind == "grow":
            changed = data + b"\0" * self.detail
        elif self.kind == "delete":
            path.unlink()
            return
        elif self.kind == "replay":
            changed = (root / self.detail).read_bytes()
        elif self.kind == "swap":
            changed = (root / self.detail).read_bytes()
            self.write(root / self.detail, data)
        self.write(path, changed)

    @staticmethod
    def write(path, data):
        # The copy shares its files with the original by hard links: never write into one.
        path.unlink()
        path.write_bytes(data)

    def names(self):
        """What an error has to name one of: the last part of an object's name, or for a local file any part."""
        both = [self.name] + ([self.detail] if self.kind in ("swap", "replay") else [])
        return {Path(name).name for name in both} | set(Path(self.name).parts[:-1]) - {"log", "checkpoint"}


def flips(draw, root, name, count):
    """Flips in the header, in the trailer and somewhere within."""
    size = (root / name).stat().st_size
    if size == 0:
        return []
    places = {0, min(9, size - 1), size // 2, size - 1, max(0, size - 70)}
    places |= {draw.randrange(min(size, 160)) for _ in range(2)} | {draw.randrange(size) for _ in range(count)}
    return [Damage("flip", name, (at, draw.randrange(8))) for at in sorted(places)]


def damages(draw, root, names):
    """A sample of everything that can be done to a store."""
    out = []
    for name in names:
        size = (root / name).stat().st_size
        out += flips(draw, root, name, 6 if size > 100_000 else 3)
        cuts = {0, size // 2, max(0, size - 1), draw.randrange(size + 1)}
        out += [Damage("truncate", name, cut) for cut in sorted(cuts) if cut < size]
        out += [Damage("delete", name), Damage("grow", name, 1)]
    by_folder = {}
    for name in names:
        by_folder.setdefault(os.path.dirname(name), []).append(name)
    for same in by_folder.values():
        pairs = [(a, b) for a in same for b in same if a < b]
        for a, b in draw.sample(pairs, min(len(pairs), 8)):
            out += [Damage("swap", a, b), Damage("replay", b, a), Damage("replay", a, b)]
    return out


def thin(draw, out):
    """At most E2E_TAMPER of them, drawn at random."""
    most = int(os.environ.get("E2E_TAMPER", "260"))
    return out if len(out) <= most else draw.sample(out, most)


def copy_linked(source, target):
    shutil.rmtree(target, ignore_errors=True)
    run("cp", "-al", source, target)


class Judge:
    """Looks at a damaged volume, and says what it found or fails."""

    def __init__(self, history):
        self.history, self.tally, self.wrong = history, {}, []

    def count(self, what):
        self.tally[what] = self.tally.get(what, 0) + 1

    def fault(self, damage, what):
        """A claim that does not hold; the others are looked at all the same."""
        self.count("WRONG")
        self.wrong.append(f"{damage}: {what}")

    def verdict(self, where):
        """Ends the case when there was a fault."""
        some = "".join(f"\n      {line}" for line in self.wrong[:15])
        check(not self.wrong, f"{where}: {self.tally}", f"{len(self.wrong)} faults:{some}")

    def refusal(self, damage, done):
        """A mount that was refused: in time, with a message that names an object."""
        text = done.stderr.strip()
        if done.returncode < 0 or done.returncode > 100 or "panicked" in text:
            return self.fault(damage, f"mount crashed with {done.returncode}: {text[-500:]}")
        # What a reader has seen last is kept in the file `head`; when that is damaged, the store no longer matches it.
        seen = damage.name == "head" and "this host has seen" in text
        if not seen and not any(name in text for name in damage.names()):
            return self.fault(damage, f"the refusal names none of {sorted(damage.names())}: {text[-500:]!r}")
        self.count("refused")

    def mounted(self, damage, mount, allow_earlier):
        """A mount that came up."""
        try:
            found = contents(mount.point)
        except Failed as failure:
            return self.fault(damage, str(failure))
        if not alive(mount.pid):
            return self.fault(damage, "the daemon died")
        wrong = wrong_against(self.history[-1], found)
        if wrong and allow_earlier and earlier_state(self.history, found):
            return self.count("an earlier state")
        if wrong:
            return self.fault(damage, f"wrong data: {wrong[:3]}; errors: {errors_in(found)[:3]}")
        if not errors_in(found):
            return self.count("whole")
        told = str(mount.status()["last_error"])
        if not any(name in told for name in damage.names()):
            return self.fault(damage, f"EIO, but last_error does not name the object: {told!r}")
        self.count("EIO")


def make_volume(directory, draw):
    """A volume with clean unmounts, kills and several synced steps behind it; gives it and its history."""
    volume = Volume(directory)
    volume.init()
    history = [{}]
    state = directory / "home-state"
    for n in range(4):
        home = volume.mount("home", state)
        step(home.point, n)
        home.sync()
        history.append(contents(home.point))
        time.sleep(draw.uniform(0, 0.5))
        if n in (0, 2):
            home.umount()
        else:
            home.kill()
    say(f"{len(volume.objects())} objects: {' '.join(volume.objects())[:200]}")
    return volume, history


def against_store(directory, draw):
    """Damage in the store, looked at by a reader with an empty state directory."""
    volume, history = make_volume(directory, draw)
    judge = Judge(history)
    embassy = volume.embassy()
    judge.mounted(Damage("nothing done to", "-"), embassy, False)
    check(judge.tally == {"whole": 1}, "the undamaged store mounts and is whole")
    embassy.umount()
    todo = thin(draw, damages(draw, volume.store_dir, volume.objects()))
    newest = max(name for name in volume.objects() if name.startswith("log/"))
    copy = directory / "damaged"
    for damage in todo:
        copy_linked(volume.store_dir, copy)
        damage.apply(copy)
        # A hole in the middle shows; that the end is missing can't, to one who has never seen it.
        end_gone = damage.kind == "delete" and damage.name == newest
        judge_store(volume.at(f"file://{copy}"), judge, damage, directory, end_gone)
    judge.verdict(f"{len(todo)} damages of the store")
    check(judge.tally.get("refused") and judge.tally.get("EIO"), "some were refused at mount, some gave EIO")


def judge_store(volume, judge, damage, directory, end_gone):
    state = empty_dir(directory / "embassy-state")
    point, done = volume.try_mount("embassy", state, read_only=True)
    if done.returncode != 0:
        return judge.refusal(damage, done)
    mount = adopt(point, state)
    judge.mounted(damage, mount, allow_earlier=end_gone)
    mount.umount()


def adopt(point, state):
    """The mount at `point` as an object."""
    from harness import Mount

    mount = Mount(point, state, 0)
    mount.pid = mount.status()["pid"]
    return mount


def against_local(directory, draw):
    """Damage in the state directories: home's own log and cache, and a reader's cache."""
    volume, history = make_volume(directory, draw)
    embassy = volume.embassy("reader", directory / "reader-state")
    contents(embassy.point)
    embassy.umount()
    judges = {}
    for role, name in (("home", "home-state"), ("reader", "reader-state")):
        judge = judges[f"local damages, {role}"] = Judge(history)
        original, copy = directory / name, directory / "damaged-state"
        files = [str(p.relative_to(original)) for p in sorted(original.rglob("*")) if p.is_file() and p.stat().st_size]
        files = [f for f in files if Path(f).name not in ("lock", "pid") and not f.endswith(".log")]
        say(f"{role}: {len(files)} files in the state directory")
        todo = [d for f in files for d in flips(draw, original, f, 4)]
        todo = draw.sample(todo, min(len(todo), 80))
        store = directory / "store-copy"
        for damage in todo:
            # Both are copied: a home mount writes, into its state and into the store.
            for source, target in ((original, copy), (volume.store_dir, store)):
                shutil.rmtree(target, ignore_errors=True)
                run("cp", "-a", "--sparse=always", source, target)
            damage.apply(copy)
            judge_local(volume.at(f"file://{store}"), judge, damage, role, copy)
    for where, judge in judges.items():
        judge.verdict(where)


def judge_local(volume, judge, damage, role, state):
    point, done = volume.try_mount(role, state, read_only=role == "reader")
    if done.returncode != 0:
        return judge.refusal(damage, done)
    mount = adopt(point, state)
    judge.mounted(damage, mount, allow_earlier=False)
    mount.kill()


def main(directory, where):
    seed = os.environ.get("E2E_SEED") or f"{random.SystemRandom().getrandbits(32)}"
    say(f"E2E_SEED={seed}")
    {"store": against_store, "local": against_local}[where](directory, random.Random(seed))
