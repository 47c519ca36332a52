"""The commands as an operator meets them: mounting in every way, refusals with a clear line, unmounting."""

import errno
import json
import os
import subprocess
import threading
from pathlib import Path

import trees
from harness import (
    FS_TYPE,
    REPO,
    Volume,
    alive,
    check,
    check_abroad,
    mount_helper,
    mounted,
    mounts,
    program,
    run,
    wait_until,
)

STATUS_FIELDS = {
    "pid": int,
    "protection": str,
    "in_sync": bool,
    "lag_seconds": (int, float),
    "unsent_bytes": int,
    "unsent_segments": int,
    "last_durable": (int, dict, type(None)),
    "cache_bytes": int,
    "last_error": (str, type(None)),
}


def refused(done, claim, *words):
    """A command that failed with one clear line that holds `words`."""
    text = done.stderr.strip()
    lines = [line for line in text.splitlines() if not line.startswith("embassyfs: note:")]
    good = 0 < done.returncode < 100 and len(lines) == 1 and all(w in text for w in words) and "panicked" not in text
    check(good, f"{claim}: {text[:160]}", f"exit {done.returncode}, wanted one line with {words}")


def initialising(volume):
    again = run(program(), "init", "--store", volume.url, "--keys", volume.directory / "keys-2", ok=None)
    refused(again, "init on an existing volume is refused")
    check(not list((volume.directory / "keys-2").glob("*.key")), "and it leaves no keys of a volume that is not")
    other = volume.directory / "other-store"
    other.mkdir()
    done = run(program(), "init", "--store", f"file://{other}", "--keys", volume.keys, ok=None)
    refused(done, "init never writes over key files")
    check(not list(other.rglob("*.*")), "and leaves no volume behind", str(list(other.rglob("*"))))
    for role in ("writer", "reader", "auditor"):
        mode = volume.key(role).stat().st_mode & 0o777
        check(mode == 0o600, f"{role}.key has mode 0600", oct(mode))


def wrong_mounts(volume, state):
    for option in ("protection=loose", "no_such_option", "cache_size=big"):
        _, done = volume.try_mount("home", state, options=[option])
        refused(done, f"-o {option} is refused", option.split("=")[0])
    stranger = Volume.__new__(Volume)
    stranger.__dict__.update(volume.__dict__, keys=volume.directory / "strange-keys")
    stranger.url = f"file://{volume.directory}/strange-store"
    (volume.directory / "strange-store").mkdir()
    stranger.init()
    wrong_key = stranger.at(volume.url)
    _, done = wrong_key.try_mount("home", volume.directory / "state-x")
    refused(done, "another volume's key is refused")
    _, done = volume.at(f"file://{volume.directory}/no-such-dir").try_mount("home", volume.directory / "state-y")
    refused(done, "a store that is not there is refused")
    reader = [program(), "mount", "--store", volume.url, "--key", volume.key("reader")]
    done = run(*reader, "--state", volume.directory / "state-z", volume.directory / "home", ok=None)
    refused(done, "a reader's key cannot mount read-write")
    check(mounted(volume.directory / "home") is None, "none of them left a mount behind")


def home_life(volume, state):
    home = volume.mount("home", state, options=["protection=local", "fsname=land-registry"])
    line = [line for line in Path("/proc/mounts").read_text().splitlines() if str(home.point) in line]
    check(len(line) == 1 and line[0].split()[2] == FS_TYPE, f"the mount table has type {FS_TYPE}", str(line))
    check(line[0].split()[0] == "land-registry", "and the fsname that was asked for", line[0])
    status = home.status()
    for field, kind in STATUS_FIELDS.items():
        if not isinstance(status.get(field, ...), kind):
            check(False, f"status --json has {field}", str(status))
    check(status["protection"] == "local" and alive(status["pid"]), f"status --json has {', '.join(STATUS_FIELDS)}")
    text = run(program(), "status", home.point).stdout
    check("local" in text and str(home.point) in text, "status for people names mount and level")
    store_status = run(program(), "status", "--store", volume.url, "--key", volume.key("reader"), "--json").stdout
    check(isinstance(json.loads(store_status), dict), "status of a store that nobody mounts is JSON too")
    return home


def while_mounted(volume, home):
    command = [program(), "mount", "--store", volume.url, "--key", volume.key("writer")]
    done = run(*command, "--state", volume.directory / "state-2", home.point, ok=None)
    refused(done, "a second mount at the same place is refused")
    count = sum(1 for point, _, _, _ in mounts() if point == str(home.point))
    check(count == 1, "and nothing is mounted over the first", f"{count} mounts")
    _, done = volume.try_mount("second", home.state)
    refused(done, "a second daemon on the same state directory is refused")
    check(alive(home.pid) and (home.point / "hello").read_text() == "hello", "the first is not disturbed")
    with open(home.point / "hello") as held:
        done = run(program(), "umount", home.point, ok=None)
        refused(done, "umount of a mount in use is refused")
        check(held.read() == "hello", "and the file in use can still be read")
    embassy = volume.embassy()
    for name, call in {
        "create": lambda p: trees.write_file(p / "new", b""),
        "write": lambda p: os.open(p / "hello", os.O_WRONLY),
        "mkdir": lambda p: (p / "dir").mkdir(),
        "unlink": lambda p: (p / "hello").unlink(),
        "rename": lambda p: (p / "hello").rename(p / "other"),
        "chmod": lambda p: (p / "hello").chmod(0o600),
        "setxattr": lambda p: os.setxattr(p / "hello", "user.a", b"b"),
        "utimes": lambda p: os.utime(p / "hello"),
    }.items():
        try:
            call(embassy.point)
            got = 0
        except OSError as e:
            got = e.errno
        check(got == errno.EROFS, f"read-only mount: {name} gives EROFS", errno.errorcode.get(got, "success"))
    embassy.umount()


def config_file(volume, state):
    point = volume.directory / "by-config"
    point.mkdir()
    config = volume.directory / "land.toml"
    config.write_text(
        f'store = "{volume.url}"\nkey = "{volume.key("writer")}"\nstate = "{state}"\n'
        f'mountpoint = "{point}"\noptions = ["protection=local"]\n'
    )
    run(program(), "mount", "--config", config)
    check(mounted(point) == FS_TYPE, "a config file says all that a mount needs")
    check((point / "hello").read_text() == "hello", "and it is the same volume")
    check(json.loads(run(program(), "status", point, "--json").stdout)["protection"] == "local", "options count")
    run(program(), "umount", point)
    config.write_text(config.read_text() + "unknown-key = 1\n")
    refused(run(program(), "mount", "--config", config, ok=None), "an unknown key is refused", "unknown-key")


def by_mount8(volume, state):
    """mount(8) with /sbin/mount.embassyfs, and remounting with /sbin/mount.fuse.embassyfs."""
    point = volume.directory / "by-mount"
    point.mkdir()
    options = f"key={volume.key('writer')},state={state},protection=local"
    with mount_helper("mount.embassyfs"), mount_helper("mount.fuse.embassyfs"):
        run("mount", "-t", "embassyfs", volume.url, point, "-o", options)
        check(mounted(point) == FS_TYPE, "mount -t embassyfs works")
        check((point / "hello").read_text() == "hello", "and it is the same volume")
        pid = json.loads(run(program(), "status", point, "--json").stdout)["pid"]
        remounting(point)
        run("umount", point)
        wait_until(lambda: not alive(pid), 30, "the daemon ends after umount(8)")
        table = volume.directory / "fstab"
        table.write_text(f"{volume.url} {point} embassyfs {options},noauto 0 0\n")
        run("mount", "-T", table, point)
        check(mounted(point) == FS_TYPE, "a line in fstab works")
        run(program(), "umount", point)
    reader = volume.embassy()
    with mount_helper("mount.fuse.embassyfs"):
        done = run("mount", "-o", "remount,rw", reader.point, ok=False)
    check("mounted to read only" in done.stderr, "a mount that only reads cannot become another by a remount")
    reader.umount()


def remounting(point):
    options = lambda: next(o.split(",") for at, _, _, o in mounts() if at == os.fspath(point))  # noqa: E731
    run("mount", "-o", "remount,ro,noexec", point)
    check({"ro", "noexec", "nosuid", "nodev", "noatime"} <= set(options()), "mount -o remount changes what it names")
    try:
        (point / "hello").write_text("changed")
        written = True
    except OSError as e:
        written = e.errno != errno.EROFS
    check(not written, "nothing is written to what was remounted ro")
    run("mount", "-o", "remount,rw,exec", point)
    check("rw" in options() and "noexec" not in options(), "and changes it back")
    (point / "hello").write_text("hello")


def scripts(volume, state):
    point = volume.directory / "by-script"
    point.mkdir()
    flags = ["--store", volume.url, "--key", volume.key("writer"), "--state", state]
    run(REPO / "scripts" / "mount.sh", *flags, point, env={"EMBASSYFS": program()})
    check(mounted(point) == FS_TYPE, "scripts/mount.sh mounts")
    run(REPO / "scripts" / "umount.sh", point, env={"EMBASSYFS": program()})
    check(mounted(point) is None, "scripts/umount.sh unmounts")


def foreground(volume, state):
    point = volume.directory / "foreground"
    point.mkdir()
    command = [program(), "mount", "--foreground", "--store", volume.url, "--key", volume.key("writer")]
    command += ["--state", state, point]
    server = subprocess.Popen([os.fspath(c) for c in command], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
    # Read, so that it can never wait for room in the pipe.
    threading.Thread(target=server.stderr.read, daemon=True).start()
    wait_until(lambda: mounted(point) == FS_TYPE, 30, "--foreground mounts")
    wait_until(lambda: (point / "hello").exists(), 30, "and serves")
    trees.write_file(point / "before-sigterm", b"kept")
    server.terminate()
    check(server.wait(60) == 0, "SIGTERM ends it in order")
    check(mounted(point) is None, "and unmounts")
    embassy = volume.embassy()
    check((embassy.point / "before-sigterm").read_bytes() == b"kept", "and what was written is in the store")
    embassy.umount()


def dead_daemon(volume, state):
    home = volume.mount("home", state)
    os.kill(home.pid, 9)
    wait_until(lambda: not alive(home.pid), 10, "the daemon is dead")
    done = run(program(), "status", home.point, ok=None)
    refused(done, "status of a dead daemon says so")
    done = run(program(), "sync", home.point, ok=None)
    refused(done, "sync never succeeds on a dead mount")
    run(program(), "umount", home.point, ok=None)
    check(mounted(home.point) is None, "umount takes the dead mount away")
    refused(run(program(), "sync", home.point, ok=None), "sync of what is no mount is refused")


def main(directory):
    volume = Volume(directory)
    volume.init("--name", "land")
    state = directory / "state"
    initialising(volume)
    wrong_mounts(volume, state)
    home = home_life(volume, state)
    trees.write_file(home.point / "hello", b"hello")
    home.sync()
    while_mounted(volume, home)
    home.umount()
    for part in (config_file, by_mount8, scripts, foreground, dead_daemon):
        part(volume, state)
    check_abroad(volume, state)
