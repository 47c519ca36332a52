"""What link.py and growth.py share beyond common.py: the stage they stand on, compiled programs, meters, the link.

Invariant: all that is mounted, started or written lies below the stage's directory or carries the run's tag, and is
gone at the end, however the measurement ends.

Environment: BENCH_DIR (target/bench/work-NAME): where to work.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import common
import harness
import postgres
from harness import empty_dir, run


def stage(name, measure):
    """Calls `measure(directory)`, and leaves neither mounts nor processes nor data."""
    common.WORK = Path(os.environ.get("BENCH_DIR", common.OUT / f"work-{name}"))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that all is taken away then too

    def watched():
        try:
            measure(empty_dir(common.WORK))
        except harness.Failed:
            for log in common.WORK.rglob("embassyfs.log"):  # it goes with the directory
                print(f"{log}:", *log.read_text(errors="replace").splitlines()[-10:], sep="\n", flush=True)
            raise

    common.run_and_clean(name, watched)


def compiled(directory, name):
    """A program of ours in C."""
    program = directory / name
    run("cc", "-O2", "-Wall", "-Wextra", "-pthread", "-o", program, Path(__file__).with_name(f"{name}.c"))
    return program


class Meter:
    """What the daemon of a mount uses from here on: processor seconds, and the most memory. Its children count."""

    def __init__(self, pid):
        self.pids = [pid, *postgres.children(pid)]
        for one in self.pids:
            common.forget_peak(one)
        self.before = common.cpu_seconds(self.pids)

    def read(self):
        spent, peak = common.cpu_seconds(self.pids) - self.before, sum(map(common.peak_memory, self.pids))
        return {"processor seconds": round(spent, 2), "peak MiB": round(peak, 1)}


class Wire:
    """The link of wire.c before the port `target`."""

    def __init__(self, program, target):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([program, str(target)], **pipes)
        self.port = json.loads(self.process.stdout.readline())["port"]

    def ask(self, order):
        self.process.stdin.write(order + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def shape(self, one_way, rate):
        self.ask(f"shape {one_way * 1e6:.0f} {rate:.0f}")

    def count(self):
        count = self.ask("count")
        count["requests"] = sum(count[kind] for kind in ("put", "get", "head", "other"))
        return count

    def since(self, before):
        return {key: value - before[key] for key, value in self.count().items()}

    def close(self):
        self.process.kill()
        self.process.wait(10)


def verdict(value, wanted, at_least=True):
    """`0.91 (at least 0.85: met)`."""
    met = value >= wanted if at_least else value <= wanted
    return f"{value:,.2f} ({'at least' if at_least else 'at most'} {wanted}: {'met' if met else 'MISSED'})"


def write(name, text, everything, show=True):
    """The table for people, and every number."""
    common.OUT.mkdir(parents=True, exist_ok=True)
    (common.OUT / f"{name}.md").write_text(text + "\n")
    (common.OUT / f"{name}.json").write_text(json.dumps(everything, indent=1) + "\n")
    if show:
        print(f"\n{text}", flush=True)
