"""The store and the state directory hold no plaintext: no name, no content, no key.

Invariant: the search is shown to find what it looks for before it is believed when it finds nothing.
"""

import base64
import os
import re
import secrets

import trees
from harness import Volume, check, empty_dir, run, say

# A word long enough that no random bytes hold it by chance.
WORD = f"plainword{secrets.token_hex(6)}"


def write_all_kinds(root):
    """The word in every place a file system keeps something of its user's."""
    top = root / f"dir-{WORD}"
    top.mkdir()
    line = f"content {WORD} of a register\n".encode()
    trees.write_file(top / f"small-{WORD}", line)
    trees.write_file(top / f"text-{WORD}", line * 30_000)
    trees.write_file(top / f"random-{WORD}", b"".join(line + trees.random_bytes(n, 5000) for n in range(300)))
    trees.write_file(top / f"{WORD}{'x' * (255 - len(WORD))}", b"")
    os.symlink(f"/target/{WORD}", top / "symlink")
    os.setxattr(top / f"small-{WORD}", f"user.{WORD}", line)
    os.link(top / f"small-{WORD}", top / f"link-{WORD}")
    os.rename(top / f"text-{WORD}", top / f"moved-{WORD}")
    os.unlink(top / f"random-{WORD}")
    trees.write_file(top / f"sync-{WORD}", line)
    for n in range(2000):
        trees.write_file(top / f"{n}-{WORD}", b"%d %s" % (n, line))


def secrets_in(keys):
    """The secret bytes in the key files: whatever the public auditor's file does not hold as well."""
    public = (keys / "auditor.key").read_bytes()
    found = set()
    for role in ("writer", "reader", "steward"):
        data = (keys / f"{role}.key").read_bytes()
        for token in re.findall(rb"[0-9a-fA-F]{32,}", data) + re.findall(rb"[A-Za-z0-9+/_=-]{40,}", data):
            if token.lower() not in public.lower():
                found.add(token)
        if not data.isascii():
            found |= {data[n : n + 32] for n in range(0, len(data) - 31) if data[n : n + 32] not in public}
    return found


def spellings(secret):
    """A secret as it may lie about: as in the file, raw, hexadecimal, base64."""
    out = {secret}
    try:
        raw = bytes.fromhex(secret.decode())
    except (ValueError, UnicodeDecodeError):
        return out
    out |= {raw, raw.hex().encode(), raw.hex().upper().encode(), base64.b64encode(raw).rstrip(b"=")}
    return out


def find(needles, *roots):
    """Files below `roots` whose name or bytes hold one of the needles."""
    hits = []
    for root in roots:
        for directory, names, files in os.walk(root):
            hits += [os.path.join(directory, n) for n in names + files if any(x in os.fsencode(n) for x in needles)]
            for name in files:
                path = os.path.join(directory, name)
                if os.path.isfile(path):
                    data = open(path, "rb").read()
                    hits += [path for x in needles if x in data]
    return hits


def main(directory):
    volume = Volume(directory)
    phrase = directory / "phrase"
    phrase.write_text(f"phrase {WORD}\n")
    volume.init("--passphrase-file", phrase, "--name", "land")
    state = directory / "state"
    home = volume.mount("home", state)
    write_all_kinds(home.point)
    home.sync()
    trees.write_file(home.point / f"unsynced-{WORD}", WORD.encode() * 100)
    fd = os.open(home.point / f"unsynced-{WORD}", os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    embassy = volume.embassy()
    run("grep", "-rqF", WORD, embassy.point, limit=60)
    log = home.status()
    words = [WORD.encode(), WORD.encode().hex().encode(), base64.b64encode(WORD.encode())[:-4]]
    for needle in secrets_in(volume.keys):
        words += spellings(needle)
    say(f"looking for {len(words)} needles")
    check(len(words) > 3, "the key files hold secrets to look for")
    probe = empty_dir(directory / "probe")
    for n, needle in enumerate(words):
        trees.write_file(probe / f"{n}", b"a" * 5000 + needle + b"b" * 5000)
    check(len(set(find(words, probe))) == len(words), "the search finds each of them where it is")
    places = {"store": volume.store_dir, "home state": state, "embassy state": embassy.state}
    for name, place in places.items():
        check(any(os.scandir(place)), f"{name}: there is something to search")
        hits = find(words, place)
        check(not hits, f"{name}: no name, no content, no key", str(hits[:5]))
    check(WORD not in str(log), "the status holds no name of a user's file", str(log))
    for key in volume.keys.iterdir():
        check(key.stat().st_mode & 0o777 == 0o600, f"{key.name} is for its owner only", oct(key.stat().st_mode))
    embassy.umount()
    home.umount()
    for name, place in places.items():
        check(not find(words, place), f"{name}: nor after a clean unmount")
