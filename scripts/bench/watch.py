"""Watches a daemon for checkpoints from outside: each runs on a thread that has its name.

Invariant: it looks into /proc only, never at the mount; what is shorter than the time between two looks may be missed.
"""

import contextlib
import threading
import time
from pathlib import Path

# Seconds between two looks.
TICK = 0.03


class Checkpoints:
    """The checkpoints of a process while this is entered."""

    def __init__(self, pid):
        self.tasks, self.ended = Path(f"/proc/{pid}/task"), threading.Event()
        self.seen = {}
        self.thread = threading.Thread(target=self.watch, daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        self.thread.join()

    def watch(self):
        known = set()
        while not self.ended.wait(TICK):
            with contextlib.suppress(OSError):
                tasks = {task.name for task in self.tasks.iterdir()}
                now = time.monotonic()
                for task in tasks:
                    if task in known:
                        continue
                    known.add(task)
                    with contextlib.suppress(OSError):
                        if (self.tasks / task / "comm").read_text().strip() == "checkpoint":
                            self.seen[task] = [now, now]
                known &= tasks
                for task in tasks & set(self.seen):
                    self.seen[task][1] = now

    def figures(self):
        took = [last - first + TICK for first, last in self.seen.values()]
        return {"number": len(took), "seconds": round(sum(took), 2), "longest": round(max(took, default=0), 2)}
