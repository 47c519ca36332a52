"""What every end-to-end case stands on: the program under test, volumes and mounts, checks, cleaning up.

Invariant: nothing is written below a mount point before the mount table says that the mount is there, every command
has a time limit, and whatever a case starts carries `EMBASSYFS_E2E_RUN` in its environment so that it can be found.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
WORK = Path(os.environ.get("E2E_DIR", REPO / "target" / "e2e"))
RUN_TAG = "EMBASSYFS_E2E_RUN"
FS_TYPE = os.environ.get("E2E_FS_TYPE", "fuse.embassyfs")
FUSECTL = Path("/sys/fs/fuse/connections")
MIB = 1 << 20
# The long form of the cases that have one: what a release is held to, too long for each change.
FULL = os.environ.get("E2E_FULL") == "1"


class Failed(Exception):
    """A claim of a case that does not hold."""


def program():
    """The binary under test."""
    path = os.environ.get("EMBASSYFS", str(REPO / "target" / "release" / "embassyfs"))
    if not os.access(path, os.X_OK):
        raise Failed(f"no program at {path}: build it, or set EMBASSYFS")
    return path


# Which of several scenes that run side by side a thread belongs to.
LANE = threading.local()


def say(text):
    """One line of the case's story."""
    lane = getattr(LANE, "name", "")
    print(f"    {lane}{text}\n", end="", flush=True)  # in one piece: scenes run side by side


def side_by_side(scenes):
    """Runs scenes, by their names, at once: most of each is waiting. All come to their end before one fails the case."""

    def scene(name, call):
        LANE.name = f"{name}: "
        return call()

    with ThreadPoolExecutor(len(scenes)) as pool:
        running = {name: pool.submit(scene, name, call) for name, call in scenes.items()}
    failures = []
    for name, future in running.items():
        try:
            future.result()
        except Failed as e:
            failures.append(f"{name}: {e}")
            say(f"FAILED  {failures[-1]}")
    if failures:
        raise Failed("; ".join(failures))


def check(holds, claim, detail=""):
    """A claim: printed when it holds, the end of the case when it does not."""
    if not holds:
        raise Failed(f"{claim}{': ' if detail else ''}{detail}")
    say(f"ok  {claim}")


def check_same(want, got, claim, **how):
    """Two manifests agree."""
    import trees

    wrong = trees.differences(want, got, **how)
    check(not wrong, claim, "\n      " + "\n      ".join(wrong) if wrong else "")


def run(*command, limit=60, ok=True, env=None, **how):
    """Runs a command to its end. `ok`: True demands exit 0, False demands another, None takes any."""
    command = [str(c) for c in command]
    how.setdefault("stdin", subprocess.DEVNULL)
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=limit,
            env={**os.environ, **(env or {})},
            **how,
        )
    except subprocess.TimeoutExpired as late:
        raise Failed(f"{' '.join(command)} did not end within {limit} s") from late
    if ok is not None and ok != (done.returncode == 0):
        said = (done.stdout + done.stderr).strip()
        raise Failed(f"{' '.join(command)} ended with {done.returncode}: {said[-2000:]}")
    return done


def mounts():
    """The mount table: (mount point, type, connection number, options), without touching any mount."""
    out = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, right = line.split(" - ", 1)
        fields = left.split()
        point = fields[4].encode().decode("unicode_escape")
        out.append((point, right.split()[0], int(fields[2].split(":")[1]), fields[5]))
    return out


def mounted(point):
    """The type mounted at `point`, or None."""
    types = [kind for at, kind, _, _ in mounts() if at == os.fspath(point)]
    return types[-1] if types else None


def wait_until(condition, limit, what, pause=0.05):
    """Waits for `condition()` to be true; fails after `limit` seconds."""
    end = time.monotonic() + limit
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise Failed(f"{what}: not within {limit} s")
        time.sleep(pause)


def alive(pid):
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def empty_dir(path):
    """A new, empty directory."""
    path = Path(path)
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def drop_caches():
    """Nothing of any file stays in the kernel's memory."""
    run("sync", limit=300)
    Path("/proc/sys/vm/drop_caches").write_text("3\n")


def timed(call):
    """The result of `call()` and how long it took, in seconds."""
    begin = time.monotonic()
    result = call()
    return result, time.monotonic() - begin


class Helper:
    """A program of ours beside the case, in a process of its own: orders and answers are lines of JSON."""

    def __init__(self, script, *words, inside=()):
        command = [*inside, sys.executable, script, *words]
        self.process = subprocess.Popen(
            [str(c) for c in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.lock, self.first = threading.Lock(), self.answer()

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise Failed(f"{self.process.args[1]} has ended")
        return json.loads(line)

    def ask(self, order):
        with self.lock:
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()
            return self.answer()

    def close(self):
        self.process.kill()
        self.process.wait(10)
        self.process.stdin.close()
        self.process.stdout.close()


class Mount:
    """One mounted view of a volume."""

    def __init__(self, point, state, pid):
        self.point, self.state, self.pid = Path(point), Path(state), pid

    def status(self, limit=30):
        return json.loads(run(program(), "status", self.point, "--json", limit=limit).stdout)

    def sync(self, limit=600):
        return run(program(), "sync", self.point, limit=limit)

    def umount(self, limit=120):
        done = run(program(), "umount", self.point, limit=limit)
        if mounted(self.point):
            raise Failed(f"{self.point} is still in the mount table after umount")
        wait_until(lambda: not alive(self.pid), 30, f"the daemon {self.pid} ends after umount")
        return done

    def kill(self):
        """SIGKILL, then the dead mount is taken out of the mount table, as an operator would."""
        os.kill(self.pid, signal.SIGKILL)
        wait_until(lambda: not alive(self.pid), 10, f"the daemon {self.pid} is gone after SIGKILL")
        run("umount", "-l", self.point, limit=20)


class Volume:
    """A volume in a store, its keys, and the mounts made of it."""

    def __init__(self, directory, url=None, env=None, inside=(), store_options=()):
        self.directory = Path(directory)
        self.store_options = [word for option in store_options for word in ("--store-option", option)]
        # The words with which a command is run where the store can be reached, such as in a network namespace.
        self.inside = list(inside)
        self.store_dir = self.directory / "store"
        self.url = url or f"file://{self.store_dir}"
        self.env = env or {}
        self.keys = self.directory / "keys"
        if url is None:
            empty_dir(self.store_dir)

    def key(self, role):
        return self.keys / f"{role}.key"

    def init(self, *more, ok=True):
        where = ["--store", self.url, *self.store_options, "--keys", self.keys]
        return run(*self.inside, program(), "init", *where, *more, env=self.env, ok=ok)

    def at(self, url, env=None, inside=None):
        """The same volume and keys, reached through another URL, another endpoint or from another place."""
        other = Volume.__new__(Volume)
        inside = self.inside if inside is None else list(inside)
        other.__dict__.update(self.__dict__, url=url, env={**self.env, **(env or {})}, inside=inside)
        if url.startswith("file://"):
            other.store_dir = Path(url.removeprefix("file://"))
        return other

    def try_mount(self, name, state, *more, options=(), read_only=False, limit=60):
        """Asks for a mount at `directory/name`; gives the finished command."""
        point = self.directory / name
        if mounted(point):
            raise Failed(f"{point} is mounted already")
        point.mkdir(exist_ok=True)
        Path(state).mkdir(parents=True, exist_ok=True)
        command = [*self.inside, program(), "mount", "--store", self.url, "--state", state]
        command += [*self.store_options, "--key", self.key("reader" if read_only else "writer")]
        command += ["--read-only"] if read_only else []
        command += ["-o", ",".join(options)] if options else []
        return point, run(*command, *more, point, limit=limit, ok=None, env=self.env)

    def mount(self, name, state, *more, **how):
        """A mount that must succeed."""
        point, done = self.try_mount(name, state, *more, **how)
        if done.returncode != 0:
            raise Failed(f"mount of {point} ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
        if mounted(point) != FS_TYPE:
            raise Failed(f"mount said yes, but the mount table has {mounted(point)} at {point}")
        pid = json.loads(run(program(), "status", point, "--json").stdout)["pid"]
        return Mount(point, state, pid)

    def embassy(self, name="embassy", state=None, more=(), **how):
        """A read-only mount from the store alone, with an empty state directory unless one is given."""
        state = state or empty_dir(self.directory / f"{name}-state")
        return self.mount(name, state, *more, read_only=True, **how)

    def versions(self):
        return json.loads(self.ask("versions", "--json").stdout)

    def ask(self, command, *words, role="reader", limit=120, ok=True):
        """A command that works on the store, with a key."""
        store = ["--store", self.url, *self.store_options, "--key", self.key(role)]
        return run(*self.inside, program(), command, *store, *words, limit=limit, ok=ok, env=self.env)

    def objects(self):
        """The names of the objects in a directory store."""
        return sorted(str(p.relative_to(self.store_dir)) for p in self.store_dir.rglob("*") if p.is_file())


def check_abroad(volume, state):
    """In the embassy there is what home has."""
    import trees

    home = volume.mount("home", state)
    want = trees.manifest(home.point)
    home.umount()
    embassy = volume.embassy()
    check_same(want, trees.manifest(embassy.point), "after all of it home and embassy are equal", ignore=())
    embassy.umount()


@contextlib.contextmanager
def mount_helper(name):
    """The program as `/sbin/NAME`, where mount(8) finds it; the link is taken away again whatever happens."""
    helper = Path("/sbin") / name
    if helper.exists() or helper.is_symlink():
        helper.unlink()
    helper.symlink_to(Path(program()).resolve())
    try:
        yield
    finally:
        helper.unlink()


def tool(name, version, *flags):
    """A program from its registry, built once for a checkout."""
    build = f'. "{REPO}/scripts/lib.sh"; need_cargo; tool {name} {version} {name} {" ".join(flags)}'
    return run("bash", "-c", build, limit=900).stdout.strip()


def free_port():
    """A loopback port that was free a moment ago, and that the kernel gives to no connection by itself meanwhile."""
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for port in random.sample(range(10_000, max(first, 10_500)), 500):
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port
    raise Failed("no port of the loopback is free")


def s3_environment(port, host="127.0.0.1"):
    """What the usual AWS variables say about the server on `port`."""
    endpoint = f"http://{host}:{port}"
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ENDPOINT": endpoint,
        "AWS_ALLOW_HTTP": "true",
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "embassy",
        "AWS_SECRET_ACCESS_KEY": "embassy-secret",
    }


@contextlib.contextmanager
def s3_server(directory, inside=()):
    """An S3 server on loopback with the bucket `land`; gives (directory of the objects, port). `inside`: as in
    `Volume`."""
    root = empty_dir(Path(directory) / "s3")
    (root / "land").mkdir()
    binary = os.environ.get("S3S_FS") or run(REPO / "scripts" / "s3.sh", "path").stdout.strip()
    port = free_port()
    credentials = s3_environment(port)
    with open(Path(directory) / "s3.log", "ab") as log:
        server = subprocess.Popen(
            [*inside, binary, "--host", "127.0.0.1", "--port", str(port)]
            + ["--access-key", credentials["AWS_ACCESS_KEY_ID"]]
            + ["--secret-key", credentials["AWS_SECRET_ACCESS_KEY"], str(root)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, "RUST_LOG": "warn"},
        )
    try:
        def up():
            if server.poll() is not None:
                raise Failed(f"the S3 server ended: {(Path(directory) / 's3.log').read_text(errors='replace')[-500:]}")
            return listens(port, inside)

        wait_until(up, 20, "the S3 server listens")
        yield root, port
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()


def listens(port, inside=()):
    """Whether something accepts connections on `port` of the loopback there."""
    if inside:
        look = f"import socket; socket.create_connection(('127.0.0.1', {port}), 1)"
        return run(*inside, sys.executable, "-c", look, ok=None).returncode == 0
    with socket.socket() as s:
        s.settimeout(1)
        return s.connect_ex(("127.0.0.1", port)) == 0


def volume_on(kind, directory, stack):
    """A new, initialised volume on a `file` or `s3` store; what must be ended later goes on `stack`."""
    if kind == "file":
        volume = Volume(directory)
    else:
        root, port = stack.enter_context(s3_server(directory))
        volume = Volume(directory, "s3://land/registers", s3_environment(port))
        volume.store_dir = root
    volume.init()
    return volume


def tagged_processes(tag):
    """Ids of the processes started by the run with this tag, ours aside."""
    found, wanted = [], f"{RUN_TAG}={tag}".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                pass
    return found


def mount_fusectl():
    """The kernel's control files for connections, where nobody has mounted them."""
    if not mounted(FUSECTL):
        subprocess.run(["mount", "-t", "fusectl", "fusectl", FUSECTL], check=False)


def abort_mounts(below):
    """Ends the FUSE connections of the mounts below a directory: whoever waits on one gets an error."""
    doomed = [m for m in mounts() if m[0].startswith(f"{below}/") and m[1].startswith("fuse")]
    if doomed:
        mount_fusectl()
    for _, _, minor, _ in doomed:
        with contextlib.suppress(OSError):
            (FUSECTL / str(minor) / "abort").write_text("1")


def clean_up(below, tag):
    """Leaves no mount below a directory and no process of the run; says what it had to take away."""
    abort_mounts(below)
    left = [point for point, _, _, _ in mounts() if point.startswith(f"{below}/")]
    for point in reversed(left):
        subprocess.run(["umount", "-l", point], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    for pid in tagged_processes(tag):
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    for device in loop_devices(below):
        subprocess.run(["losetup", "-d", device], stdin=subprocess.DEVNULL, check=False)
    return left


def loop_devices(below):
    """The loop devices whose files lie, or lay, below a directory."""
    listed = run("losetup", "--list", "--noheadings", "--output", "NAME,BACK-FILE", ok=None).stdout
    pairs = (line.split(None, 1) for line in listed.splitlines())
    return [pair[0] for pair in pairs if len(pair) == 2 and pair[1].startswith(f"{below}/")]


def die_with_story(story):
    """Ends a case as failed."""
    print(f"    FAILED  {story}", flush=True)
    sys.exit(1)
