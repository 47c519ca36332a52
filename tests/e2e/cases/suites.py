"""What others use to try out file systems, run on a real mount: fsx, stress-ng, dbench, fio.

Invariant: a suite passes only by its own word (exit code and the line that says so), and what it left behind is read
again after a remount with dropped caches and in the embassy.
"""

import filecmp
import os
import re
import shutil

import trees
from harness import FULL, MIB, Failed, Volume, check, check_same, drop_caches, empty_dir, run, say, timed, tool

SEED = int(os.environ.get("E2E_SEED", "1"))


def new_volume(directory):
    volume = Volume(directory)
    volume.init()
    return volume


def remount(volume, home, *options):
    """The same volume, with nothing left in memory: neither the kernel's nor the daemon's."""
    home.umount(limit=600)
    drop_caches()
    return volume.mount("home", home.state, options=["protection=local", *options])


# --- fsx -----------------------------------------------------------------------------------------------------------

FSX_VERSION = "0.3.2"
# Mount options with hardly any memory: reads come from the spool and the store, and commits are many.
SCARCE = ("memory_size=8M", "dirty_size=8M", "cache_size=32M")
# Name -> largest size of the file.
FSX_FILES = {"small": 256 << 10, "large": 64 << 20}
# Runs for each. Many short ones: fsx never unmaps what it has read through a mapping, and slows down with them.
FSX_SEEDS, FSX_OPERATIONS = (40, 25_000) if FULL else (3, 10_000)
FSX_CONFIG = """
flen = {flen}
nomsyncafterwrite = {lazy}
[opsize]
min = 1
max = 65536
[weights]
close_open = 1
invalidate = 1
mapread = 10
mapwrite = 10
read = 10
write = 10
truncate = 3
fsync = 0.3
fdatasync = 0.3
posix_fallocate = 3
punch_hole = 5
sendfile = 5
posix_fadvise = 5
copy_file_range = 5
"""


def fsx_run(program, config, operations, seed, path, artifacts):
    """One run to its end. fsx compares each read with its own copy of the file."""
    done, took = timed(
        lambda: run(program, "-f", config, "-N", operations, "-S", seed, "-P", artifacts, path, limit=3000, ok=None)
    )
    good = done.returncode == 0 and "All operations completed A-OK!" in done.stdout
    told = (done.stderr + done.stdout).strip()
    # The whole list of operations goes into a file: it is what a failure is looked into with.
    if not good:
        (artifacts / f"{path.name}.log").write_text(told)
    check(good, f"fsx {path.name}: {operations} operations in {took:.1f} s", f"exit {done.returncode}: {told[:1500]}")


def same_files(plain, shown, when, names=None):
    """Each file that fsx made on the disk with the same seed is byte for byte that of the mount."""
    names = names or sorted(p.name for p in plain.iterdir())
    wrong = [n for n in names if not filecmp.cmp(plain / n, shown / n, shallow=False)]
    filecmp.clear_cache()
    check(not wrong, f"{when}: {len(names)} files as fsx made them on the disk", str(wrong))


def fsx_config(directory, kind, flen, lazy):
    path = directory / f"{kind}-{'lazy' if lazy else 'eager'}.toml"
    path.write_text(FSX_CONFIG.format(flen=flen, lazy=str(lazy).lower()))
    return path


def fsx(directory):
    """fsx follows from its seed alone, so the same run on the plain disk gives what the file must hold in the end."""
    program = tool("fsx", FSX_VERSION)
    for kind, flen in FSX_FILES.items():
        volume = new_volume(empty_dir(directory / kind))
        home = volume.mount("home", volume.directory / "state", options=["protection=local"])
        plain = empty_dir(volume.directory / "plain")
        for number in range(FSX_SEEDS):
            # With and without msync after a mapped write, with plenty of memory and with hardly any.
            seed, name = SEED * 1000 + number, f"{kind}-{number}"
            config = fsx_config(volume.directory, kind, flen, lazy=number % 2 == 0)
            fsx_run(program, config, FSX_OPERATIONS, seed, home.point / name, volume.directory)
            config = fsx_config(volume.directory, kind, flen, lazy=True)
            fsx_run(program, config, FSX_OPERATIONS, seed, plain / name, volume.directory)
            home = remount(volume, home, *(SCARCE if number % 4 in (0, 1) else ()))
            same_files(plain, home.point, "after a remount", [name])
        same_files(plain, home.point, "after all remounts")
        home.umount(limit=600)
        drop_caches()
        embassy = volume.embassy()
        same_files(plain, embassy.point, "in the embassy")
        embassy.umount()
        shutil.rmtree(volume.directory)


# --- stress-ng -----------------------------------------------------------------------------------------------------

# Of the class `filesystem`, with the reason why not here.
STRESS_NOT_HERE = {
    "bind-mount": "mounts over directories of the machine; stress-ng itself calls it pathological",
    "binderfs": "mounts a file system of its own",
    "fiemap": "an ioctl that the kernel does not hand to FUSE file systems; it skips itself",
    "procfs": "reads /proc, not the mount",
    "verity": "fs-verity, which is not supported (semantics.md); it skips itself",
}
# Beside the class: what else goes through files.
STRESS_BESIDES = ["aio", "mmap", "readahead", "revio", "seek", "sendfile", "splice"]
STRESS_OPTIONS = {"mmap": ["--mmap-file", "--mmap-bytes", "32M"], "aio": ["--aio-requests", "32"]}


def stress_list():
    """The class as this version of stress-ng has it, less what can't run here, and what goes besides."""
    done = run("stress-ng", "--class", "filesystem?", ok=None)
    text = done.stdout + done.stderr
    if "stressors:" not in text:
        raise Failed(f"stress-ng does not list its class: {text[:300]}")
    names = text.split("stressors:")[1].split()
    unknown = [n for n in STRESS_NOT_HERE if n not in names]
    check(not unknown and len(names) > 30, f"stress-ng lists {len(names)} stressors of files", str(unknown))
    return [n for n in names if n not in STRESS_NOT_HERE] + STRESS_BESIDES


def stress_ng(directory):
    volume = new_volume(directory)
    home = volume.mount("home", directory / "state", options=["protection=local", "dev", "suid"])
    place = home.point / "stress"
    place.mkdir(mode=0o777)
    workers, seconds = (4, 30) if FULL else (2, 1)
    for name, reason in STRESS_NOT_HERE.items():
        say(f"not run: {name}: {reason}")
    wrong, names = [], stress_list()
    for name in names:
        more = STRESS_OPTIONS.get(name, [])
        command = ["stress-ng", f"--{name}", workers, *more, "-t", seconds, "--verify", "--temp-path", place]
        done = run(*command, limit=seconds * 4 + 60, ok=None)
        text = done.stdout + done.stderr
        bad = re.findall(r".*(?:fail:|\bfailed\b|unsuccessful|skipping|verification).*", text)
        if done.returncode != 0 or bad or "successful run completed" not in text:
            wrong.append(f"{name}: exit {done.returncode}: {' | '.join(bad)[:500] or text[-300:]}")
    check(not wrong, f"stress-ng: {len(names)} stressors, {workers} workers, {seconds} s each", "\n      ".join(wrong))
    same_at_home_and_abroad(volume, home)


def same_at_home_and_abroad(volume, home):
    """What is left is the same after a remount and in the embassy, to the inode numbers."""
    want = trees.manifest(home.point)
    home = remount(volume, home)
    check_same(want, trees.manifest(home.point), f"the {len(want)} files left are the same after a remount", ignore=())
    home.umount(limit=600)
    embassy = volume.embassy()
    check_same(want, trees.manifest(embassy.point), "and in the embassy", ignore=())
    embassy.umount()


# --- dbench --------------------------------------------------------------------------------------------------------

# What is told on the command line; the second opens all files with O_SYNC, the third syncs directory changes.
DBENCH_FORMS = {"plain": [], "with O_SYNC": ["-s"], "with synced directories and attributes": ["-S", "-x"]}

# It takes the first semaphore of a kernel, whose id is 0, for a failure.
NOT_THE_FIRST = ["unshare", "--ipc", "sh", "-c", 'ipcmk -S 1 >&2 && exec "$@"', "sh"]


def dbench(directory):
    volume = new_volume(directory)
    home = volume.mount("home", directory / "state", options=["protection=local"])
    clients, seconds = (20, 60) if FULL else (4, 5)
    for number, (form, more) in enumerate(DBENCH_FORMS.items()):
        place = home.point / f"dbench-{number}"
        place.mkdir()
        command = [*NOT_THE_FIRST, "dbench", "-c", "/usr/share/dbench/client.txt", "-t", seconds, "--skip-cleanup", *more]
        done = run(*command, "-D", place, clients, limit=seconds * 5 + 120, ok=None)
        text = done.stdout + done.stderr
        figure = re.search(r"^Throughput ([0-9.]+ MB/sec).*", text, re.M)
        (directory / f"dbench-{number}.log").write_text(text)
        wrong = re.findall(r".*(?:fail|ERROR|expected|succeeded|No such).*", text)
        good = done.returncode == 0 and figure and not wrong
        said = figure.group(1) if figure else "?"
        detail = f"exit {done.returncode}: {wrong or text[-800:]}"
        check(good, f"dbench {form}: {clients} clients, {seconds} s: {said}", detail)
    same_at_home_and_abroad(volume, home)


# --- fio -----------------------------------------------------------------------------------------------------------

# Each writes its own two files and reads them back; the block's checksum and place stand in the block.
FIO_JOBS = {
    "sequential, buffered": ["--rw=write", "--bs=128k"],
    "random, buffered": ["--rw=randwrite", "--bs=4k", "--fsync=512"],
    "reads and writes, buffered": ["--rw=randrw", "--bs=16k"],
    "sequential, direct": ["--rw=write", "--bs=1m", "--direct=1"],
    "random, direct, several at once": [
        "--rw=randwrite",
        "--bs=4k",
        "--direct=1",
        "--ioengine=libaio",
        "--iodepth=16",
    ],
    "reads and writes, direct": ["--rw=randrw", "--bs=4k", "--direct=1"],
    "odd blocks": ["--rw=randwrite", "--bs=5000"],
    "mapped": ["--rw=randwrite", "--bs=4k", "--ioengine=mmap"],
}


def fio_run(place, number, size, *more):
    words = list(FIO_JOBS.values())[number]
    command = ["fio", f"--name=job{number}", f"--directory={place}", f"--size={size}", "--numjobs=2", "--thread"]
    command += ["--verify=crc32c", "--verify_fatal=1", "--allrandrepeat=1", f"--randseed={SEED + number}"]
    # No state files: without them each pass draws the same blocks from the seed.
    command += ["--verify_state_save=0", "--end_fsync=1", "--group_reporting", *words, *more]
    done = run(*command, limit=1800, ok=None)
    text = done.stdout + done.stderr
    if done.returncode != 0 or "err= 0" not in text:
        raise Failed(f"fio {' '.join(words + list(more))}: exit {done.returncode}: {text[:1500]}")


def fio(directory):
    volume = new_volume(directory)
    home = volume.mount("home", directory / "state", options=["protection=local"])
    size = (512 if FULL else 16) * MIB
    for number, name in enumerate(FIO_JOBS):
        _, took = timed(lambda number=number: fio_run(home.point, number, size, "--do_verify=1"))
        say(f"ok  fio, {name}: 2 x {size // MIB} MiB written and verified in {took:.1f} s")
    home = remount(volume, home)
    for number in range(len(FIO_JOBS)):
        fio_run(home.point, number, size, "--verify_only=1")
    say("ok  after a remount fio verifies all of it again")
    same_at_home_and_abroad(volume, home)


SUITES = {"fsx": fsx, "stress_ng": stress_ng, "dbench": dbench, "fio": fio}


def main(directory, suite):
    SUITES[suite](directory)
