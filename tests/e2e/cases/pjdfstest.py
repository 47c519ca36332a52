"""pjdfstest, the POSIX test suite for file systems: all of it, as root and as a user without rights.

Invariant: no test fails, and what is skipped is on the list below with its reason and is tried here in another way.
"""

import errno
import os
import re
from pathlib import Path

from harness import Failed, Volume, check, empty_dir, mount_helper, run, say, tool

VERSION = "0.2.2"
# The suite's own features that are not those of Linux (flags and ACLs of the BSDs) stay off; it then does not list
# their tests. All others are on.
CONFIG = """
[features]
posix_fallocate = {{}}
rename_ctime = {{}}
utime_now = {{}}
utimensat = {{}}
stat_st_birthtime = {{}}
[settings]
naptime = 0.001
allow_remount = {remount}
[dummy_auth]
entries = [["nobody", "nogroup"], ["daemon", "daemon"]]
"""
# Skipped as root, with the reason. pathconf(2) is answered by the C library, from a list of file systems it knows by
# heart; FUSE is not on it. The limit itself is tried below.
SKIPPED = {"link::link_count_max": "the C library knows no LINK_MAX for FUSE"}
LINKS_MAX = 65_000
USER = 65534


def suite(directory, point, patterns=(), user=None, remount=False):
    """Runs the suite in `point`; gives its counts and the reasons for what it skipped."""
    config = directory / "pjdfstest.toml"
    config.write_text(CONFIG.format(remount=str(remount).lower()))
    command = [tool("pjdfstest", VERSION, "--debug"), "-c", config, "-p", point, "-s", "/dev/shm", "--", *patterns]
    if user is not None:
        command = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", *command]
    done = run(*command, ok=None, limit=400, cwd=point, env={"RUST_BACKTRACE": "0"})
    text = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)
    summary = re.search(r"Summary: (\d+) failed, (\d+) skipped, (\d+) passed, (\d+) expected .*, (\d+) total", text)
    if not summary:
        raise Failed(f"the suite did not come to its end: {(text + done.stderr)[-1000:]}")
    failed, skipped, passed, _, total = map(int, summary.groups())
    lines = re.findall(r"^(\S+) +skipped((?:\n\t.*)*)", text, re.MULTILINE)
    if failed or done.returncode != 0 or failed + skipped + passed != total or len(lines) != skipped:
        wrong = re.findall(r"^\S+ +FAILED(?:\n\t.*)*", text, re.MULTILINE)
        raise Failed(f"{summary.group(0)}\n" + "\n".join(wrong)[:4000])
    return passed, {name: " ".join(reason.split()) for name, reason in lines}


def links(point):
    """As many names as an inode can have, and not one more."""
    place = empty_dir(point / "links")
    (place / "0").touch()
    count = 1
    try:
        while count <= LINKS_MAX + 1:
            os.link(place / "0", place / str(count))
            count += 1
    except OSError as e:
        check(e.errno == errno.EMLINK, f"the name after {count} is refused with EMLINK")
    check(count == os.stat(place / "0").st_nlink == LINKS_MAX, f"an inode has up to {count} names")


def main(directory):
    volume = Volume(directory)
    volume.init()
    home = volume.mount("home", directory / "state", options=["protection=local", "allow_other", "suid", "dev"])

    # While the suite still has a file open for writing, nothing can be remounted ro, on no file system: these tests
    # get a run of their own.
    passed, skipped = suite(directory, home.point)
    erofs = {name for name, reason in skipped.items() if "allow_remount" in reason}
    check(all("::erofs_" in name for name in erofs) and erofs, f"{len(erofs)} tests want to remount")
    check(set(skipped) - erofs == set(SKIPPED), f"nothing else is skipped but {', '.join(SKIPPED)}", f"{skipped}")
    with mount_helper("mount.fuse.embassyfs"):
        remounted, left_out = suite(directory, home.point, ["erofs"], remount=True)
    check(remounted == len(erofs) and not left_out, "and all of them pass in a run of their own")
    say(f"as root: {passed + remounted} passed, 0 failed, {len(SKIPPED)} skipped")
    for name, reason in SKIPPED.items():
        say(f"skipped: {name} ({reason})")

    own = empty_dir(home.point / "user")
    os.chown(own, USER, USER)
    Path(directory).chmod(0o755)
    passed, skipped = suite(directory, own, user=USER)
    others = {n: why for n, why in skipped.items() if n not in SKIPPED and "root" not in why and "CAP_" not in why}
    check(not others, "as a user, only what needs root is skipped", f"{others}")
    say(f"as user {USER}: {passed} passed, 0 failed, {len(skipped)} skipped that need root")
    links(home.point)
    home.umount()
