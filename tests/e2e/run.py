#!/usr/bin/env python3
"""Runs the end-to-end cases, each in a process of its own under a time limit, and counts them.

    EMBASSYFS=target/release/embassyfs python3 tests/e2e/run.py [--list] [--keep] [--full] [CASE...]

CASE is a case's name or the beginning of one (`real_input`, `real_input.s3`). Environment: EMBASSYFS (the program),
S3S_FS (the S3 server; else scripts/s3.sh finds it), E2E_DIR (where to work, target/e2e),
E2E_SEED (for what is drawn at random), E2E_FULL (1: the long form, as --full), E2E_BIG and E2E_BIG_S3 (size of the big
file in MiB), E2E_MANY (small files), E2E_TAMPER (mutations).

Invariant: this process never touches a mount, so that it can always abort one that hangs and clean up.
"""

import argparse
import importlib
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
import uuid
from pathlib import Path

sys.dont_write_bytecode = True  # nothing is left in the checkout but target/

import harness  # noqa: E402

# Module -> (limit in seconds, parameters). A case is `module` or `module.parameter`.
CASES = {
    "selfcheck": (120, [None]),
    "lifecycle": (240, [None]),
    "unmounting": (300, [None]),
    "prefix": (300, ["file", "s3"]),
    "no_plaintext": (180, [None]),
    "at_version": (180, [None]),
    "audit": (180, [None]),
    "restore": (180, [None]),
    "receipt": (120, [None]),
    "drill": (180, [None]),
    "tamper": (600, ["store", "local"]),
    "control_dir": (120, [None]),
    "store_refusals": (180, [None]),
    "credentials": (120, [None]),
    "lost_by_store": (180, [None]),
    "reader_credential": (120, [None]),
    "link": (240, ["strict", "available", "local", "reads", "drain"]),
    "real_input": (900, ["file", "s3"]),
    "applications": (300, ["postgresql", "sqlite", "git", "rsync", "tar", "rust_build", "append_log"]),
    "pjdfstest": (300, [None]),
    "acl": (120, [None]),
    "access_times": (60, [None]),
    "posix": (240, ["directories", "attributes", "files", "mounting"]),
    "upgrade": (180, [None]),
    "rehearsal": (300, [None]),
    "registers": (120, [None]),
    "follow": (120, [None]),
    "promote": (180, ["alive", "others"]),
    "malicious_host": (60, [None]),
    "crash_remount": (120, [None]),
    "spool": (180, ["full", "fails"]),
    "crash": (120, ["kill", "power", "sqlite", "postgresql"]),
    "suites": (300, ["fsx", "stress_ng", "dbench", "fio"]),
}


# What takes too long to be made ready for each change: run when it is named (docs/testing.md).
ON_DEMAND = {
    "garage": (900, [None]),
    "rpo_rto": (1800, [None]),
}


def all_cases():
    """(name, module, parameter, limit) of every case."""
    for module, (limit, parameters) in (CASES | ON_DEMAND).items():
        for parameter in parameters:
            yield f"{module}.{parameter}" if parameter else module, module, parameter, limit


def run_here(module, parameter, directory):
    """Runs one case in this process; the parent watches."""
    # Behind our own directory, whose package `registers` is not the case of that name.
    sys.path.insert(1, str(Path(__file__).parent / "cases"))
    try:
        # By its package: `posix` alone is a module of Python itself.
        importlib.import_module(f"cases.{module}").main(directory, *([parameter] if parameter else []))
    except harness.Failed as failure:
        harness.die_with_story(str(failure))
    except Exception:
        harness.die_with_story(traceback.format_exc())


def run_watched(name, limit, keep):
    """Runs one case in a child; gives whether it passed."""
    directory = harness.WORK / name
    tag = uuid.uuid4().hex
    harness.clean_up(directory, tag)
    harness.empty_dir(directory)
    print(f"--- {name}", flush=True)
    begin = time.monotonic()
    child = subprocess.Popen(
        [sys.executable, __file__, "--in-process", name],
        stdin=subprocess.DEVNULL,
        env={**os.environ, harness.RUN_TAG: tag},
        start_new_session=True,
    )
    try:
        passed = wait_for(child, limit, directory)
    finally:
        left = harness.clean_up(directory, tag)
        if child.poll() is None:
            child.kill()
    if passed and left:
        print(f"    FAILED  left mounted: {', '.join(left)}")
        passed = False
    print(f"    {'passed' if passed else 'FAILED'} in {time.monotonic() - begin:.1f} s", flush=True)
    if passed and not keep:
        shutil.rmtree(directory, ignore_errors=True)
    return passed


def wait_for(child, limit, directory):
    """Waits for the case; one that hangs has its mounts aborted, then is killed."""
    try:
        return child.wait(limit) == 0
    except subprocess.TimeoutExpired:
        print(f"    FAILED  did not end within {limit} s: aborting its mounts", flush=True)
        harness.abort_mounts(directory)
    try:
        child.wait(15)
    except subprocess.TimeoutExpired:
        child.kill()
    return False


def chosen(names):
    """The cases whose names were given, or all."""
    cases = list(all_cases())
    for name in names:
        if not any(c[0] == name or c[1] == name for c in cases):
            sys.exit(f"no such case: {name}; there are {', '.join(c[0] for c in cases)}")
    return [c for c in cases if (not names and c[1] not in ON_DEMAND) or c[0] in names or c[1] in names]


def main():
    parser = argparse.ArgumentParser(description="Runs the end-to-end cases.")
    parser.add_argument("--list", action="store_true", help="list the cases")
    parser.add_argument("--keep", action="store_true", help="keep what passed cases wrote")
    parser.add_argument("--full", action="store_true", help="the long form of the cases that have one")
    parser.add_argument("--in-process", metavar="CASE", help=argparse.SUPPRESS)
    parser.add_argument("cases", nargs="*", metavar="CASE")
    options = parser.parse_args()
    if options.in_process:
        (name, module, parameter, _), = (c for c in all_cases() if c[0] == options.in_process)
        return run_here(module, parameter, harness.WORK / name)
    if options.list:
        return print("\n".join(c[0] for c in all_cases()))
    if options.full:
        os.environ["E2E_FULL"] = "1"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    passed = failed = 0
    for name, _, _, limit in chosen(options.cases):
        if run_watched(name, limit * (20 if options.full else 1), options.keep):
            passed += 1
        else:
            failed += 1
    print(f"\n{passed} passed, {failed} failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
