"""Mount options that show and act, and mounts of users without privileges.

Invariant: `/etc/fuse.conf` and `/dev/fuse` are in the end as they were in the beginning, and no user's mount is left.
"""

import contextlib
import errno
import json
import os
import re
import shutil
from pathlib import Path

from calls import ALICE, NOBODY, as_user, code_of, ends_with
from harness import FS_TYPE, Failed, Volume, alive, check, empty_dir, mounted, mounts, program, run, say, wait_until

CONF = Path("/etc/fuse.conf")
# Between these lines stands what a run put into the file: one that was killed is undone by the next.
MARKS = "# begin: end-to-end tests\n", "# end: end-to-end tests\n"


def options_of(point):
    """What the mount table says of a mount."""
    (options,) = [options for at, _, _, options in mounts() if at == str(point)]
    return options.split(",")


# --- options -------------------------------------------------------------------------------------------------------


def run_as(user, path):
    """What a program prints; starting it fails as the kernel says."""
    return as_user(user, lambda: run(path, "-u", limit=20).stdout.strip())


def acts(home, words):
    """Each of these words stands for something that can be tried."""
    root, table = home.point, options_of(home.point)
    if "rw" in words:
        ends_with(0, "rw: writing", lambda: (root / "new").write_bytes(b"x"))
        os.unlink(root / "new")
    if "ro" in words:
        for call in (
            lambda: (root / "new").write_bytes(b"x"),
            lambda: os.unlink(root / "id"),
            lambda: os.chmod(root / "id", 0o700),
            lambda: os.utime(root / "id"),
        ):
            ends_with(errno.EROFS, "ro: a change", call)
        check((root / "text").read_text() == "readable", "ro: reading")
    device = lambda: os.close(os.open(root / "null", os.O_RDONLY))  # noqa: E731
    word, code = ("dev", 0) if "dev" in words else ("nodev", errno.EACCES)
    ends_with(code, f"{word}: opening a device", device)
    if "noexec" in words:
        ends_with(errno.EACCES, "noexec: running a program", lambda: run_as(ALICE, root / "id"))
    else:
        want = "0" if "suid" in words else str(ALICE)
        got = run_as(ALICE, root / "id")
        check(got == want, f"{'suid' if 'suid' in words else 'nosuid'}: a set-user-id program runs as {want}", got)
    shown = {w for w in ("ro", "rw", "nosuid", "nodev", "noexec", "noatime", "relatime") if w in table}
    should = {w for w in ("nosuid", "nodev") if w[2:] not in words} | {"noexec"} & set(words)
    should |= {"ro"} if "ro" in words else {"rw"}
    should |= {w for w in ("noatime", "relatime") if w in words} or {"noatime"}
    check(shown == should, f"{','.join(words)}: the mount table says {','.join(table)}", f"wanted {sorted(should)}")


def each_option(volume, state):
    """Mounts with all words that change what the kernel allows."""
    home = volume.mount("home", state, options=["protection=local"])
    shutil.copy("/usr/bin/id", home.point / "id")
    os.chmod(home.point / "id", 0o4755)
    (home.point / "text").write_text("readable")
    os.mknod(home.point / "null", 0o020666, os.makedev(1, 3))
    os.chmod(home.point / "null", 0o666)
    home.umount()
    for words in (["rw"], ["suid"], ["dev"], ["noexec", "nodev", "nosuid"], ["ro"], ["exec", "suid", "dev", "relatime"]):
        home = volume.mount("home", state, options=["allow_other", *words])
        acts(home, words)
        home.umount()
    home = volume.mount("home", state, options=["noexec,nosuid", "exec"])
    check("noexec" not in options_of(home.point), "a later word wins")
    home.umount()


# --- users ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def fuse_conf(*lines):
    """`/etc/fuse.conf` with more lines for a while."""
    before = CONF.read_text() if CONF.exists() else None
    plain = re.sub(f"{MARKS[0]}.*?{MARKS[1]}", "", before or "", flags=re.S)
    plain = "".join(line for line in plain.splitlines(True) if line.strip() != "user_allow_other")
    CONF.write_text(plain + MARKS[0] + "".join(line + "\n" for line in lines) + MARKS[1])
    try:
        yield
    finally:
        if before is None:
            CONF.unlink()
        else:
            CONF.write_text(re.sub(f"{MARKS[0]}.*?{MARKS[1]}", "", before, flags=re.S))


@contextlib.contextmanager
def fuse_device():
    """`/dev/fuse` open to all, as udev makes it; containers and small machines without udev have it for root only."""
    before = os.stat("/dev/fuse").st_mode & 0o7777
    if before != 0o666:
        say(f"/dev/fuse has mode {before:04o} here; 0666 for a while, as it has elsewhere")
    os.chmod("/dev/fuse", 0o666)
    try:
        yield
    finally:
        os.chmod("/dev/fuse", before)


class Resident:
    """A user without privileges, with a directory, keys, a volume and mounts of its own."""

    def __init__(self, directory, user):
        self.user, self.directory = user, empty_dir(directory)
        os.chmod(self.directory, 0o755)
        os.chown(self.directory, user, user)
        self.env = {"EMBASSYFS_RUN_DIR": str(self.directory / "run"), "HOME": str(self.directory)}
        self.point = self.directory / "mount"
        self.do(lambda: [(self.directory / name).mkdir() for name in ("store", "run", "mount", "state")])
        self.run("init", *self.store(), "--keys", self.directory / "keys")

    def store(self):
        return "--store", f"file://{self.directory}/store"

    def do(self, call):
        return as_user(self.user, call)

    def run(self, *words, ok=True, user=None):
        """The program as this user, or as another."""
        user = self.user if user is None else user
        how = {"user": user, "group": user, "extra_groups": []}
        return run(program(), *words, env=self.env, ok=ok, limit=90, **how)

    def mount(self, *options, ok=True):
        command = ["mount", *self.store(), "--key", self.directory / "keys" / "writer.key"]
        command += ["--state", self.directory / "state"]
        command += ["-o", ",".join(options)] if options else []
        done = self.run(*command, self.point, ok=ok)
        if ok:
            check(mounted(self.point) == FS_TYPE, f"user {self.user} mounts {' '.join(options)}".rstrip())
        return done

    def umount(self):
        """By the user; nothing stays."""
        pid = json.loads(self.run("status", self.point, "--json").stdout)["pid"]
        self.run("umount", self.point)
        if mounted(self.point):
            raise Failed(f"{self.point} is still in the mount table")
        wait_until(lambda: not alive(pid), 30, "the user's daemon ends")


def alone(resident):
    """Without allow_other nobody else comes in, root neither."""
    resident.mount("protection=local")
    point = resident.point
    write = lambda: resident.do(lambda: (point / "mine").write_text("written by a user") and None)  # noqa: E731
    ends_with(0, "a user writes into a volume of the user's own", write)
    check(resident.do(lambda: (point / "mine").read_text()) == "written by a user", "and reads it")
    owner = resident.do(lambda: os.stat(point / "mine").st_uid)
    check(owner == resident.user, "files belong to who made them", str(owner))
    for who, user in (("another user", ALICE), ("root", 0)):
        for what, call in (("look in", lambda: os.listdir(point)), ("read", lambda: (point / "mine").read_text())):
            ends_with(errno.EACCES, f"{who} may not {what} without allow_other", lambda c=call, u=user: as_user(u, c))
    table = options_of(point)
    check({"nosuid", "nodev"} <= set(table), "a user's mount has nosuid and nodev", ",".join(table))
    device = lambda: resident.do(lambda: os.mknod(point / "null", 0o020666, os.makedev(1, 3)))  # noqa: E731
    ends_with(errno.EPERM, "a user makes no devices", device)
    others_leave_it(resident)
    said = json.loads(resident.run("status", point, "--json").stdout)
    check(said["mountpoint"] == str(point), "the user sees the mount's status")
    resident.run("sync", point)
    resident.umount()
    check(mounted(point) is None, "and unmounts it")


def others_leave_it(resident):
    """What another user tries against the mount."""
    point = resident.point
    done = resident.run("umount", point, ok=None, user=ALICE)
    check(done.returncode != 0 and mounted(point) == FS_TYPE, "another user does not unmount it", done.stderr.strip())
    done = run("fusermount3", "-u", point, ok=None, user=ALICE, group=ALICE, extra_groups=[])
    check(done.returncode != 0 and mounted(point) == FS_TYPE, "nor by fusermount3", done.stderr.strip())
    key = resident.directory / "keys" / "writer.key"
    ends_with(errno.EACCES, "nor reads the keys", lambda: as_user(ALICE, key.read_bytes))


def together(resident):
    """With allow_other everybody comes in, and meets permissions."""
    with fuse_conf():
        done = resident.mount("allow_other", ok=None)
        refused = done.returncode != 0 and mounted(resident.point) is None
        check(refused and "allow_other" in done.stderr, "allow_other without user_allow_other is refused", done.stderr)
    with fuse_conf("user_allow_other"):
        resident.mount("allow_other", "protection=local")
        point = resident.point
        resident.do(lambda: (point / "closed").write_text("for me"))
        resident.do(lambda: (os.chmod(point, 0o755), os.chmod(point / "closed", 0o600)))
        check(as_user(ALICE, lambda: (point / "mine").read_text()) == "written by a user", "with it others come in")
        check("mine" in as_user(0, lambda: os.listdir(point)), "and root")
        for claim, call in {
            "read a file of mode 0600": lambda: (point / "closed").read_text(),
            "write another's file": lambda: (point / "mine").write_text("x"),
            "make a file in another's directory": lambda: (point / "new").write_text("x"),
            "remove another's file": lambda: os.unlink(point / "mine"),
        }.items():
            ends_with(errno.EACCES, f"but may not {claim}", lambda c=call: as_user(ALICE, c))
        for claim, call in {
            "change its mode": lambda: os.chmod(point / "mine", 0o777),
            "take it over": lambda: os.chown(point / "mine", ALICE, ALICE),
        }.items():
            ends_with(errno.EPERM, f"nor {claim}", lambda c=call: as_user(ALICE, c))
        resident.do(lambda: os.mkdir(point / "shared"))
        resident.do(lambda: os.chmod(point / "shared", 0o1777))
        as_user(ALICE, lambda: (point / "shared" / "hers").write_text("x"))
        got = os.stat(point / "shared" / "hers").st_uid
        check(got == ALICE, "what they make belongs to them", str(got))
        give = lambda: resident.do(lambda: os.chown(point / "mine", ALICE, -1))  # noqa: E731
        ends_with(errno.EPERM, "who mounted is not root on it", give)
        resident.umount()


def persists(resident):
    """The user's volume is an ordinary one: killed and mounted again, it is as it was."""
    resident.mount("protection=local")
    pid = json.loads(resident.run("status", resident.point, "--json").stdout)["pid"]
    os.kill(pid, 9)
    wait_until(lambda: not alive(pid), 10, "the user's daemon is dead")
    # A call that comes while the daemon dies is ECONNABORTED.
    look = lambda: code_of(lambda: resident.do(lambda: os.listdir(resident.point)))  # noqa: E731
    wait_until(lambda: look() == errno.ENOTCONN, 20, "a dead mount answers ENOTCONN")
    resident.run("umount", "--force", resident.point, ok=None)
    check(mounted(resident.point) is None, "the user takes the dead mount away")
    resident.mount("protection=local")
    got = resident.do(lambda: sorted(os.listdir(resident.point)))
    check(got == ["closed", "mine", "shared"], "and mounts it again with all its files", str(got))
    resident.umount()


def main(directory):
    volume = Volume(directory)
    volume.init()
    each_option(volume, directory / "state")
    with fuse_device():
        resident = Resident(directory / "resident", NOBODY)
        alone(resident)
        together(resident)
        persists(resident)
