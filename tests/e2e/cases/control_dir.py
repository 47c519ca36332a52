"""The control directory of a mount: hidden, unchangeable, consistent, and readable while everything else stalls."""

import contextlib
import errno
import json
import os
import re
import subprocess
import threading
import time

from harness import Failed, Volume, check, program, run, s3_environment, s3_server, say, timed, wait_until
from proxy import Proxy

NAME = ".embassyfs"
TIMEOUT = 2
FILES = ["metrics", "protection", "status"]


def error_of(call, *args, **how):
    """The name of the error that a call ends with; "ok" when it succeeds."""
    try:
        call(*args, **how)
        return "ok"
    except OSError as e:
        return errno.errorcode[e.errno]


def append(path):
    with open(path, "ab", buffering=0) as file:
        file.write(b"x")


def read_within(path, seconds):
    """What a file says, asked for in a process of its own that must end in time."""
    return run("cat", path, limit=seconds).stdout


def samples(text):
    """The values of metrics by name; those with more labels than the mount's own by name and last label."""
    values = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            name, labels, value = re.fullmatch(r"(\w+)\{(.*)\} (\S+)", line).groups()
            more = labels.split(",")[2:]
            values[(name, more[-1]) if more else name] = float(value)
    return values


def hidden(point):
    """Nothing that walks the tree meets it."""
    (point / "file").write_text("x")
    (point / "directory").mkdir()
    check(NAME not in os.listdir(point), "readdir of the root does not show it")
    found = run("find", point, limit=20).stdout
    check(NAME not in found and "directory" in found, "find does not see it")
    tar = run("tar", "-C", point, "-cf", "/dev/stdout", ".", limit=20).stdout
    check(NAME not in tar and "file" in tar, "tar does not archive it")
    copy = point.parent / "copy"
    run("cp", "-a", f"{point}/.", copy, limit=20)
    check(sorted(os.listdir(copy)) == ["directory", "file"], "cp -a does not copy it")
    check(os.stat(point).st_nlink == 3, "the root does not count it as a link")
    run("bash", "-c", f"shopt -s dotglob; rm -rf -- {point}/*", limit=20)
    check(os.listdir(point) == [] and (point / NAME / "status").exists(), "rm -rf of everything does not touch it")


def unchangeable(point):
    """Nothing can be made, removed or replaced there, not even by root."""
    control, status = point / NAME, point / NAME / "status"
    (point / "f").write_text("x")
    (point / "d").mkdir()
    answers = {
        "mkdir of it": error_of(os.mkdir, control),
        "rmdir": error_of(os.rmdir, control),
        "rename": error_of(os.rename, control, point / "other"),
        "rename over it": error_of(os.rename, point / "d", control),
        "create in it": error_of(os.open, control / "new", os.O_CREAT | os.O_WRONLY),
        "mkdir in it": error_of(os.mkdir, control / "new"),
        "symlink in it": error_of(os.symlink, "x", control / "new"),
        "mknod in it": error_of(os.mknod, control / "new"),
        "link into it": error_of(os.link, point / "f", control / "new"),
        "rename into it": error_of(os.rename, point / "f", control / "new"),
        "link of a file": error_of(os.link, status, point / "linked"),
        "unlink": error_of(os.unlink, status),
        "rename of a file": error_of(os.rename, status, point / "moved"),
        "truncate": error_of(os.truncate, status, 0),
        "write": error_of(status.write_text, "x"),
        "append": error_of(append, status),
        "chmod": error_of(os.chmod, status, 0o666),
        "chmod of it": error_of(os.chmod, control, 0o777),
        "utime": error_of(os.utime, status),
        "setxattr": error_of(os.setxattr, status, "user.x", b"x"),
    }
    wrong = {what: got for what, got in answers.items() if got != ("EEXIST" if what == "mkdir of it" else "EPERM")}
    check(not wrong, f"{len(answers)} ways to change it are refused", str(wrong))
    check(os.listxattr(status) == [] and error_of(os.getxattr, status, "user.x") == "ENODATA", "no attributes")
    os.remove(point / "f")
    os.rmdir(point / "d")


def consistent(home):
    """Sizes and contents fit, and each look sees the present."""
    control = home.point / NAME
    check(sorted(os.listdir(control)) == ["at", *FILES], f"it holds at {' '.join(FILES)}")
    shown = run("ls", "-la", control, limit=20).stdout
    check(all(name in shown for name in FILES) and "?" not in shown, "ls -la shows it in full")
    for name in FILES:
        for _ in range(20):
            fd = os.open(control / name, os.O_RDONLY)
            size, data = os.fstat(fd).st_size, os.read(fd, 1 << 20)
            again = os.pread(fd, 1 << 20, 0)
            os.close(fd)
            if len(data) != size or data != again or not data.endswith(b"\n"):
                raise Failed(f"{name}: fstat says {size} bytes, read gives {len(data)}, again {len(again)}")
        check((control / name).stat().st_mode & 0o7777 == 0o444, f"{name}: 20 looks, each of one piece, mode 0444")
    held = open(control / "status", encoding="ascii")
    first = json.loads(held.read())
    (home.point / "written").write_bytes(b"x" * 100_000)
    home.sync()
    number = (first["last_commit"] or {"no": 0})["no"]

    def newer():
        now = json.loads((control / "status").read_text())
        return now if (now["last_commit"] or {"no": 0})["no"] > number else None

    after, took = timed(lambda: wait_until(newer, 2, "a new look sees a new commit"))
    check(took < 1.5, "a new look sees a new commit within a second")
    held.seek(0)
    check(json.loads(held.read()) == first, "a file held open stays as it was")
    held.close()
    asked = home.status()
    check(asked.keys() == after.keys() and asked["pid"] == after["pid"], "status is what embassyfs status --json says")
    copied = home.point / "copied"
    run("cp", control / "metrics", copied, limit=20)
    check(copied.read_text().startswith("# HELP"), "cp copies a file out")
    hold_many(control)


def hold_many(control):
    """More files held open than are kept: the newest can be read whatever others hold."""
    held = [os.open(control / name, os.O_RDONLY) for name in FILES for _ in range(200)]
    check(json.loads((control / "status").read_text())["pid"], "600 held open do not keep others from reading")
    for fd in held:
        os.close(fd)


def figures(home):
    values = samples((home.point / NAME / "metrics").read_text())
    wanted = ["lag_seconds", "unsent_bytes", "unsent_segments", "in_sync", "fenced", "failed", "fallbacks_total"]
    wanted += ["uploads_pending", "upload_failures_total", "sent_bytes_total", "spool_free_bytes", "cache_bytes"]
    wanted += ["dirty_bytes", "requests_open", "request_longest_seconds", "fetches_open", "uptime_seconds"]
    missing = [name for name in wanted if f"embassyfs_{name}" not in values]
    check(not missing, f"metrics has {len(values)} values, among them {len(wanted)} that alarms need", str(missing))
    check(values[("embassyfs_protection_level", 'level="available"')] == 1, "the level is a label")
    check(values[("embassyfs_requests_total", 'operation="write"')] > 0, "requests are counted by operation")
    check(values[("embassyfs_request_errors_total", 'errno="ENOENT"')] > 0, "errors are counted by errno")
    check(values["embassyfs_in_sync"] == 1 and values["embassyfs_sent_bytes_total"] > 0, "in sync, and sent something")
    asked = run(program(), "status", "--metrics", home.point, limit=20).stdout
    check(samples(asked).keys() == values.keys(), "embassyfs status --metrics says the same")


def protection(home):
    return (home.point / NAME / "protection").read_text()


def in_sync(home, claim):
    wait_until(lambda: protection(home).startswith("available: in sync\n"), 30, claim)
    check("unsent:  nothing that is committed\n" in protection(home), claim)


def while_stalled(proxy, home):
    """The link is silent, an fsync waits: the directory answers at once and says what is the matter."""
    in_sync(home, "protection says in sync")
    proxy.set("hang")
    fd = os.open(home.point / "stalled", os.O_CREAT | os.O_WRONLY)
    os.write(fd, b"x" * 300_000)
    sync = threading.Thread(target=os.fsync, args=(fd,))
    begin = time.monotonic()
    sync.start()
    metrics = home.point / NAME / "metrics"
    waits = ("embassyfs_fsync_waiting", "embassyfs_requests_open")
    wait_until(lambda: all(samples(metrics.read_text())[w] >= 1 for w in waits), TIMEOUT, "the waiting fsync is counted")
    longest = 0.0
    while sync.is_alive():
        _, took = timed(lambda: [read_within(home.point / NAME / name, 5) for name in FILES])
        longest = max(longest, took)
    sync.join()
    os.close(fd)
    waited = time.monotonic() - begin
    check(longest < 1.0, f"all three files are read in {longest:.2f} s at most while an fsync waits {waited:.1f} s")
    fell = r"available: FELL BACK to the local spool \d"
    words = wait_until(lambda: re.match(fell, protection(home)) and protection(home), 2, "protection says that it fell back")
    say(words.strip().replace("\n", "\n        "))
    check(re.search(r"\nunsent: +\d.* in \d+ segments?, the oldest \d", words), "protection says that it fell back, and what is unsent")
    values = samples(metrics.read_text())
    check(values["embassyfs_in_sync"] == 0 and values["embassyfs_fallbacks_total"] == 1, "metrics say so")
    check(values["embassyfs_request_longest_seconds"] >= TIMEOUT * 0.9, "and how long a request took")
    proxy.set("pass")
    in_sync(home, "in sync again by itself when the link is back")


def as_others(volume):
    """A reader's mount has it too, and with relatime opens are answered."""
    reader = volume.embassy(options=["relatime"])
    words = protection(reader)
    check(re.match(r"read-only: shows commit \d+ of ", words), f"a reader says: {words.splitlines()[0]}")
    check(json.loads((reader.point / NAME / "status").read_text())["role"] == "reader", "status says reader")
    check(samples((reader.point / NAME / "metrics").read_text())["embassyfs_in_sync"] == 1, "metrics are there")
    check(error_of(os.mkdir, reader.point / NAME / "x") == "EROFS", "changes are EROFS")
    reader.umount()
    home = volume.mount("relatime", volume.directory / "state", options=["relatime"])
    for _ in range(3):
        check(json.loads((home.point / NAME / "status").read_text())["role"] == "writer", "with relatime as well")
    with_other = subprocess.run(["find", home.point / NAME], capture_output=True, text=True, timeout=20, check=True)
    check(len(with_other.stdout.splitlines()) == 5, "find lists it when asked by name")
    home.umount()


def main(directory):
    with contextlib.ExitStack() as stack:
        _, port = stack.enter_context(s3_server(directory))
        proxy = Proxy(port)
        stack.callback(proxy.close)
        direct = Volume(directory, "s3://land/registers", s3_environment(port))
        direct.init()
        volume = direct.at(direct.url, s3_environment(proxy.port))
        home = volume.mount("home", directory / "state", options=[f"sync_timeout={TIMEOUT}s"])
        hidden(home.point)
        unchangeable(home.point)
        consistent(home)
        figures(home)
        while_stalled(proxy, home)
        home.umount()
        as_others(direct)
