"""What all parts of the bench share: where things lie, sizes, the compiled helper, what a process has used, the end.

Invariant: nothing is written outside target/, and whatever ends a run, neither mounts nor processes nor data stay.

Environment: BENCH_QUICK=1 makes everything tiny: it shows that the bench works, not how fast anything is.
"""

import os
import shutil
import sys
import uuid
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
OUT = REPO / "target" / "bench"
WORK = OUT / "work"
HELPER = OUT / "work-helper"
TOOLS = Path(os.environ.get("EMBASSYFS_TOOLS", REPO / "target" / "tools"))
os.environ.setdefault("E2E_DIR", str(WORK))
sys.path.insert(0, str(REPO / "tests" / "e2e"))
sys.dont_write_bytecode = True  # nothing is left in the checkout but target/

import harness  # noqa: E402
from harness import MIB, run  # noqa: E402

QUICK = os.environ.get("BENCH_QUICK") == "1"
TICKS = os.sysconf("SC_CLK_TCK")


def setting(name, usual, quick):
    """A size: of the environment, or the usual or the quick one."""
    return int(os.environ.get(name, quick if QUICK else usual))


def chosen(name, known):
    """Systems: those that the environment names, or all."""
    names = os.environ.get(name, ",".join(known)).split(",")
    if unknown := set(names) - set(known):
        sys.exit(f"{name}: no such systems: {', '.join(sorted(unknown))}; there are {','.join(known)}")
    return names


ROUNDS = setting("BENCH_ROUNDS", 3, 1)
FILES = setting("BENCH_FILES", 20000, 500)
BYTES = setting("BENCH_MIB", 2048, 64) * MIB


def build_helper():
    """Compiles what issues the system calls."""
    OUT.mkdir(parents=True, exist_ok=True)
    run("cc", "-O2", "-Wall", "-Wextra", "-pthread", "-o", HELPER, Path(__file__).with_name("work.c"))


def counted(*words):
    """(operations, seconds) of the compiled helper."""
    seconds, count = run(HELPER, *words, limit=1800).stdout.split()
    return int(count), float(seconds)


def helper(*words):
    """Seconds that the compiled helper took."""
    return counted(*words)[1]


def status(pid, key):
    """A line of /proc/PID/status in MiB; 0 for a process that has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{key}:")), 0.0)


def peak_memory(pid):
    """The most that a process was resident, in MiB, so far or since `forget_peak`."""
    return status(pid, "VmHWM")


def forget_peak(pid):
    """The peak begins anew."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def cpu_seconds(pids):
    """Processor time that processes have taken."""
    total = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        total += int(fields[11]) + int(fields[12])
    return total / TICKS


def disk_written(pids):
    """Bytes that processes have made the kernel write to disks."""
    lines = (line for pid in pids for line in Path(f"/proc/{pid}/io").read_text().splitlines())
    return sum(int(line.split()[1]) for line in lines if line.startswith("write_bytes:"))


def machine():
    """What a result stands on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return {
        "kernel": os.uname().release,
        "cpu": cpu[0] if cpu else "?",
        "cores": os.cpu_count(),
        "load before": os.getloadavg(),
        "rounds": ROUNDS,
        "files": FILES,
        "bytes": BYTES,
        "quick": QUICK,
    }


def run_and_clean(name, measure):
    """Measures, and leaves neither mounts nor processes nor data."""
    tag = uuid.uuid4().hex
    os.environ[harness.RUN_TAG] = tag
    try:
        measure()
    except harness.Failed as failure:
        sys.exit(f"{name}: {failure}")
    finally:
        harness.clean_up(WORK, tag)
        shutil.rmtree(WORK, ignore_errors=True)
