"""Credentials that expire and are renewed in their file: a running mount takes the new ones up by itself."""

import contextlib
import os

from cases.store_refusals import drains, fsync_of, protection, says
from harness import FULL, Volume, check, program, run, s3_environment, timed, wait_until
from stub_s3 import StubS3

SECRET = "this-must-not-be-told"


def put(path, key, mode=0o600, text=None):
    """Replaces the file in one step, as an agent that renews credentials does."""
    fresh = path.with_suffix(".new")
    fresh.write_text(text or f"AWS_ACCESS_KEY_ID={key}\nAWS_SECRET_ACCESS_KEY={SECRET}\n")
    fresh.chmod(mode)
    fresh.rename(path)


def main(directory):
    with contextlib.closing(StubS3()) as stub:
        stub.keys = {"first"}
        file = directory / "credentials"
        put(file, "first", mode=0o644)
        environment = {name: value for name, value in s3_environment(stub.port).items() if "KEY" not in name}
        volume = Volume(directory, "s3://land/registers", environment)
        option = ["--store-option", f"credentials={file}"]
        refused = volume.init(*option, ok=False)
        check("chmod 600" in refused.stderr, "a file that others may read is refused", refused.stderr)
        file.chmod(0o600)
        volume.init(*option)
        # From a config file, with a relative path: both ways there are.
        config = directory / "land.toml"
        config.write_text('[store-option]\ncredentials = "credentials"\n')
        home = volume.mount("home", directory / "state", "--config", config, options=["sync_timeout=1s"])
        check(fsync_of(home.point / "before", b"x" * 1000) == "ok", "the credentials in the file are good")

        stub.keys = {"second"}
        check(fsync_of(home.point / "expired", b"y" * 1000) == "ok", "they expire: fsync falls back")
        says(home, "available: FELL BACK", "InvalidAccessKeyId")
        check((home.point / "before").read_bytes() == b"x" * 1000, "what is here can be read")
        put(file, "", text="AWS_ACCESS_KEY_ID=sec")
        log = home.state / "embassyfs.log"
        wait_until(lambda: "AWS_SECRET_ACCESS_KEY is missing" in log.read_text(), 35, "a bad file is told in the log")
        check(protection(home).startswith("available: FELL BACK"), "half a file changes nothing")
        put(file, "second")
        drains(home, "with the new ones in the file it drains, without a restart")
        check("new credentials are in force" in log.read_text(), "the log says that they were taken up")
        check(os.path.isdir(f"/proc/{home.pid}") and home.status()["pid"] == home.pid, "it is the same daemon")
        said = log.read_text() + protection(home) + str(home.status()) + run("ps", "-ef").stdout
        check(SECRET not in said, "log, status, control files and process list do not tell the secret")
        home.umount()

        # Home starts with credentials that have expired, from what it holds.
        stub.keys = {"third"}
        home = volume.mount("home", home.state, *option, options=["sync_timeout=1s"])
        check((home.point / "before").read_bytes() == b"x" * 1000, "home starts while the credentials are refused")
        check(fsync_of(home.point / "after", b"z" * 1000) == "ok", "and takes writes")
        if FULL:
            done, took = timed(lambda: run(program(), "umount", "--timeout", "1s", home.point, limit=40, ok=None))
            kept = f"kept in {home.state}; the next mount with this state directory ships it"
            check(done.returncode == 5 and kept in done.stderr, f"umount ends in {took:.1f} s, says what stays", done.stderr)
        else:
            home.kill()
        put(file, "third")
        home = volume.mount("home", home.state, *option)
        drains(home, "and the next mount ships it")
        home.umount()
