"""A store whose operator cheats a reader: each way is done to a directory store, refused, and called what it is.

Rollback: the newest segments are taken away. Freeze: nothing new comes. Fork: another history under the same numbers,
written with the writer's own key. Substitution: another volume's superblock, or another volume.
"""

import shutil
import time

from harness import Volume, check, empty_dir, run, program

REFUSED = 8


def main(directory):
    (directory / "land").mkdir()
    volume = Volume(directory / "land")
    volume.init()
    home = volume.mount("home", directory / "home-state", options=["heartbeat=0"])
    (home.point / "ledger").write_text("one")
    home.sync()
    before = shutil.copytree(volume.store_dir, directory / "before")
    home.umount()
    aside = shutil.copytree(directory / "home-state", directory / "fork-state")
    home = volume.mount("home", directory / "home-state", options=["heartbeat=0"])
    (home.point / "ledger").write_text("two")
    home.sync()
    home.umount()

    state = directory / "reader-state"
    volume.embassy("seen", state=state).umount()
    whole = directory / "whole"
    shutil.copytree(volume.store_dir, whole)

    def refused(words, *more, state=state):
        _, done = volume.try_mount("seen", state, *more, read_only=True)
        check(done.returncode == REFUSED, f"{words}: refused", f"{done.returncode} {done.stderr}")
        check(words in done.stderr, f"{words}: and called so", done.stderr.strip()[-400:])

    def put(store):
        shutil.rmtree(volume.store_dir)
        shutil.copytree(store, volume.store_dir)

    put(before)
    refused("ROLLBACK")
    # A host that has never seen the volume knows only what it is told.
    put(whole)
    versions = volume.versions()
    head = versions[0]["head"]
    put(before)
    refused("ROLLBACK", "--expect", head, state=empty_dir(directory / "new-state"))

    # The same writer's key, from a copy of home's state, makes another history under the same numbers.
    put(whole)
    shutil.rmtree(volume.store_dir / "log")
    shutil.rmtree(volume.store_dir / "checkpoint", ignore_errors=True)
    shutil.copytree(before / "log", volume.store_dir / "log")
    fork = volume.mount("fork", aside, options=["heartbeat=0"])
    for n in range(10):
        (fork.point / "ledger").write_text(f"other {n}")
        fork.sync()
    fork.umount()
    refused("FORK")
    refused("FORK", "--expect", head, state=empty_dir(directory / "new-state"))

    # The newest commit is older than is allowed; a larger age shows it.
    put(whole)
    time.sleep(1.1)  # an age in the past cannot be waited for in another way
    refused("FROZEN OR SILENT", "--max-age", "1s")
    done = run(program(), "versions", "--store", volume.url, "--key", volume.key("reader"), "--max-age", "1s", ok=None)
    check(done.returncode == REFUSED and "FROZEN OR SILENT" in done.stderr, "versions says it too", done.stderr)
    volume.mount("seen", state, "--max-age", "1h", read_only=True).umount()

    # Another volume under the same URL, with its own right key; and only its superblock.
    (directory / "sea").mkdir()
    other = Volume(directory / "sea")
    other.init()
    shutil.copy(other.store_dir / "volume.json", volume.store_dir / "volume.json")
    _, done = volume.try_mount("seen", state, read_only=True)
    check(done.returncode == REFUSED, "another volume's superblock: refused", f"{done.returncode} {done.stderr}")
    shutil.rmtree(volume.keys)
    shutil.copytree(other.keys, volume.keys)
    put(other.store_dir)
    refused("SUBSTITUTION")
