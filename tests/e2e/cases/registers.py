"""The checks of the seven registers: a check that can't fail proves nothing.

Each register's clerks work for a moment on a plain directory. Its check must pass there, and must tell each of the
damages below, done to a copy: by its own rules, or in that less is found than the clerks were promised.

Invariant: runs on the plain disk, without the program; every damage is done alone, to a fresh copy; a damage is told
only when the check says what it is told by here: another error, an accident, is not enough.
"""

import contextlib
import os
import re
import shutil
import sqlite3

from harness import Failed, check, empty_dir, run, say, side_by_side, wait_until
from registers.databases import Businesses, Land, Taxes
from registers.files import CENSUS_BLOCK, Census, Identity, Legislation, Pensions
from registers.register import digest

SIZE = {"columns": 3, "column_mib": 2}
# So many cases at least are entered before the damages are done.
ENOUGH = {Taxes: 40, Land: 40, Businesses: 40, Identity: 80, Pensions: 40, Legislation: 24, Census: 3}
# Told by the comparison with what was promised: the check itself cannot know.
LOST = "^lost [1-9]"
# What is damaged where it is not said otherwise: neither the first nor the newest.
ONE = 7


def flip(path, at=None):
    """One bit turns, as on a bad disk: size and times stay."""
    times = os.stat(path)
    with open(path, "r+b") as out:
        at = times.st_size // 2 if at is None else at
        out.seek(at)
        byte = out.read(1)[0]
        out.seek(at)
        out.write(bytes([byte ^ 1]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def cut(path, n):
    os.truncate(path, os.path.getsize(path) - n)


def append(path, data):
    with open(path, "ab") as out:
        out.write(data)


def file_of(change, number=ONE):
    """A change of the file of one document, for the registers that have a place for each."""
    return lambda register, point: change(register.place(point, number))


# Taxes and land: statements. {last}: the last case that was promised.

BALANCE = "update account a set balance = coalesce((select sum(amount) from entry e where e.account = a.id), 0)"


def query(register, point, text):
    """Does something to a register's database; gives the answer. All of its server has ended then."""
    register.close()
    register.serve(point / "data")
    register.server.start()
    said = register.server.sql(text.format(last=register.acknowledged))
    register.server.stop()
    register.close()
    return said


def sql(text):
    return lambda register, point: query(register, point, text)


def page_of(relation, page=0):
    """A bit turns in a page of a table or an index."""

    def damage(register, point):
        path = query(register, point, f"select pg_relation_filepath('{relation}')")
        flip(point / "data" / path, page * 8192 + 8000)

    return damage


def lose_deed(register, point):
    query(register, point, "delete from deed where number >= {last}")
    for n in (register.acknowledged, register.acknowledged + 1):
        register.place(point, n).unlink(missing_ok=True)


def forge_deed(register, point):
    register.place(point, ONE).write_bytes(b"")
    query(register, point, f"update deed set sha256 = '{digest(b'')}' where number = {ONE}")


TAXES = (
    ("an entry's amount changed", sql("update entry set amount = amount + 1 where number = 7 and amount > 0"),
     "add up"),
    ("an entry moved", sql("update entry set account = account + 1 where number = 7 and amount > 0"), "balance of"),
    ("a balance changed", sql("update account set balance = balance + 1 where id = 9"), "balance of"),
    ("a case removed, accounts balanced", sql(f"delete from entry where number = 7; {BALANCE}"), "in the middle"),
    ("a case altered, accounts balanced", sql(f"update entry set amount = amount * 2 where number = 7; {BALANCE}"),
     "what their cases"),
    ("a case entered twice, accounts balanced",
     sql(f"insert into entry select * from entry where number = 7; {BALANCE}"), "what their cases"),
    ("an account without entries removed",
     sql("delete from account where id = (select max(id) from account where id not in (select account from entry))"),
     "not all there"),
    ("a bit of the table turned", page_of("entry"), "page verification failed"),
    ("a bit of an index turned", page_of("account_pkey", 2), "checksum verification failed"),
    ("the last case removed, accounts balanced", sql(f"delete from entry where number >= {{last}}; {BALANCE}"), LOST),
)  # fmt: skip

LAND = (
    ("a deed changed by a bit", file_of(flip), "document 7"),
    ("a deed cut by a byte", file_of(lambda path: cut(path, 1)), "document 7"),
    ("a deed missing", file_of(os.unlink), "document 7"),
    ("a row's hash changed", sql(f"update deed set sha256 = '{digest(b'')}' where number = 7"), "row 7"),
    ("row and deed altered alike", forge_deed, "row 7"),
    ("a row removed", sql("delete from deed where number = 7"), "in the middle"),
    ("the last rows removed", sql("delete from deed where number > {last} - 3"), "without a row"),
    ("a deed that nobody filed", file_of(lambda path: path.write_bytes(b"deed"), 100_007), "without a row"),
    ("the last row and its deed removed", lose_deed, LOST),
)


# Businesses.


def lite(text):
    def damage(register, point):
        with contextlib.closing(sqlite3.connect(point / "register.db", isolation_level=None)) as base:
            base.execute(text.format(last=register.acknowledged))

    return damage


def zero_page(path):
    """The page that holds the middle of the table, as a disk that has lost it gives it back."""
    with open(path, "r+b") as out:
        out.seek(4096)
        out.write(bytes(4096))


def forge_document(register, point):
    register.place(point, ONE).write_bytes(b"")
    lite(f"update company set sha256 = '{digest(b'')}' where number = {ONE}")(register, point)


def lose_company(register, point):
    lite("delete from company where number = {last}")(register, point)
    register.place(point, register.acknowledged).unlink()


BUSINESSES = (
    ("a document changed by a bit", file_of(flip), "document 7"),
    ("a document missing", file_of(os.unlink), "document 7"),
    ("a row's hash changed", lite(f"update company set sha256 = '{digest(b'')}' where number = 7"), "row 7"),
    ("row and document altered alike", forge_document, "row 7"),
    ("a row removed", lite("delete from company where number = 7"), "in the middle"),
    ("the last rows removed", lite("delete from company where number > {last} - 3"), "without a row"),
    ("a page of the database zeroed", lambda _, point: zero_page(point / "register.db"), "be read|integrity"),
    ("the database missing", lambda _, point: os.unlink(point / "register.db"), "is missing"),
    ("the last row removed", lite("delete from company where number = {last}"), LOST),
    ("the last row and its document removed", lose_company, LOST),
)


# Identity: of a document in the middle its own check knows; the newest can have been under way.


def newest(change, back=0):
    return lambda register, point: change(register.place(point, register.acknowledged - back))


def move(path):
    (path.parents[2] / "elsewhere").mkdir()
    path.rename(path.parents[2] / "elsewhere" / path.name)


IDENTITY = (
    ("a wrong mode", file_of(lambda path: os.chmod(path, 0o644)), "document 7 "),
    ("a set-id bit", file_of(lambda path: os.chmod(path, 0o4640)), "document 7 "),
    ("a wrong owner", file_of(lambda path: os.chown(path, 0, -1)), "document 7 "),
    ("a wrong group", file_of(lambda path: os.chown(path, -1, 0)), "document 7 "),
    ("a document changed by a bit", file_of(flip), "document 7 "),
    ("a document empty", file_of(lambda path: os.truncate(path, 0)), "document 7 "),
    ("a document missing", file_of(os.unlink), "document 7 "),
    ("a document in another place", file_of(move), "not in its place"),
    ("a file that is no document", lambda _, point: (point / "core").touch(), "is no document"),
    ("the last document but one missing", newest(os.unlink, 1), "is not right"),
    ("the last document with a wrong mode", newest(lambda path: os.chmod(path, 0o644)), LOST),
    ("the last document changed by a bit", newest(flip), LOST),
    ("the last document missing", newest(os.unlink), LOST),
)


# Pensions.


def lines(change):
    """A change of the lines of one of the files."""

    def damage(_, point):
        path = point / "payments-2.txt"
        path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))

    return damage


def lose_payment(change):
    """A change of the file that has the last payment."""
    return lambda register, point: change(point / f"payments-{register.acknowledged % register.files}.txt")


PENSIONS = (
    ("a line dropped from the middle", lines(lambda all: all[:3] + all[4:]), "in the middle"),
    ("the first line dropped", lines(lambda all: all[1:]), "in the middle"),
    ("a line cut in the middle", lines(lambda all: [*all[:3], all[3][:20] + b"\n", *all[4:]]), "line 4 .* not right"),
    ("a line cut at its beginning", lines(lambda all: [*all[:3], all[3][20:], *all[4:]]), "line 4 .* not right"),
    ("the last line cut", lines(lambda all: [*all[:-1], all[-1][:-5]]), "line .* not right"),
    ("a line changed by a bit", lines(lambda all: [*all[:3], all[3].replace(b" EE", b" DE"), *all[4:]]),
     "line 4 .* not right"),
    ("two lines in each other's place", lines(lambda all: [*all[:3], all[4], all[3], *all[5:]]), "out of order"),
    ("a line twice", lines(lambda all: [*all[:4], *all[3:]]), "out of order"),
    ("zeros behind the last line", lines(lambda all: [*all, bytes(46)]), "line .* not right"),
    ("a file missing", lambda _, point: os.unlink(point / "payments-2.txt"), "in the middle"),
    ("a file too many", lambda _, point: (point / "payments-9.txt").touch(), "no clerk made"),
    ("the last payment missing", lose_payment(lambda path: cut(path, len(path.read_bytes().splitlines(True)[-1]))),
     LOST),
)  # fmt: skip


# Legislation.


def git(*words):
    """A git command in the repository. {last}: the last act that was promised."""
    return lambda register, point: register.git(point, *(word.format(last=register.acknowledged) for word in words))


def loose(change, what):
    """A change of the file of a loose object."""

    def damage(register, point):
        name = register.git(point, "rev-parse", what).stdout.strip()
        change(point / "acts" / ".git" / "objects" / name[:2] / name[2:])

    return damage


def forge_tag(change):
    """The tag of the tenth act anew, with other bytes."""

    def damage(register, point):
        forged = register.directory / "forged"
        forged.write_text(change(register.git(point, "cat-file", "tag", "collection-10").stdout))
        name = register.git(point, "hash-object", "-t", "tag", "-w", forged).stdout.strip()
        register.git(point, "update-ref", "refs/tags/collection-10", name)

    return damage


def break_signature(text):
    head, signature = text.split("-----BEGIN SSH SIGNATURE-----\n")
    rows = signature.split("\n")
    # The signature itself stands at the end.
    rows[-4] = rows[-4][:20] + ("A" if rows[-4][20] != "A" else "B") + rows[-4][21:]
    return f"{head}-----BEGIN SSH SIGNATURE-----\n" + "\n".join(rows)


def sign_as_another(register, point):
    key = empty_dir(register.directory / "other") / "key"
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "gazette@example.org", "-f", key)
    register.git(point, "-c", f"user.signingkey={key}.pub", "tag", "-f", "-s", "-m", "collection 10",
                 "collection-10", "collection-10^{}")  # fmt: skip


def act(change, number=ONE):
    return lambda register, point: change(point / "acts" / register.file(number))


def hole(register, point):
    """The last act but one is left out."""
    last = register.acknowledged
    new = register.git(point, "commit-tree", "main^{tree}", "-p", "main~2", "-m", f"act {last}").stdout.strip()
    register.git(point, "update-ref", "refs/heads/main", new)


def amend(register, point):
    append(point / "acts" / register.file(register.acknowledged), b"and the contrary")
    register.git(point, "commit", "-q", "-a", "--amend", "--no-edit")


def lose_act(register, point):
    register.git(point, "update-ref", "refs/heads/main", "main~1")
    register.git(point, "tag", "-d", f"collection-{register.acknowledged}", ok=None)


TAG = "refs/tags/collection-"
LEGISLATION = (
    ("an object changed by a bit", loose(flip, "main:act-7.txt"), "fsck"),
    ("an object missing", loose(os.unlink, "main:act-7.txt"), "fsck"),
    ("a commit missing", loose(os.unlink, "main~9"), "fsck"),
    ("a tag's object missing", loose(os.unlink, "collection-10"), "fsck|bad ref"),
    ("a tag's signature broken", forge_tag(break_signature), "tag -v"),
    ("a signed text changed", forge_tag(lambda text: text.replace("\ncollection 10", "\ncollection 11")), "tag -v"),
    ("a tag without a signature", forge_tag(lambda text: text.split("-----BEGIN")[0]), "tag -v"),
    ("a tag signed with another key", sign_as_another, "tag -v"),
    ("a tag in another's place", git("update-ref", f"{TAG}10", f"{TAG}20"), "tags are not"),
    ("a tag signed for another act", git("tag", "-f", "-s", "-m", "x", "collection-10", "main~1"), "tags are not"),
    ("a tag removed", git("tag", "-d", "collection-10"), "tags are not"),
    ("a tag too many", git("tag", "collection-11", "main~1"), "tags are not"),
    ("an act's file changed by a bit", act(flip), "act-7.txt is not"),
    ("an act's file missing", act(os.unlink), "act-7.txt is not"),
    ("a file that is no act", act(lambda path: path.write_text("none"), 190), "act-190.txt is not"),
    ("an act left out of the history", hole, "has holes"),
    ("the newest act rewritten", amend, "in the newest commit"),
    ("the newest acts taken back", git("update-ref", "refs/heads/main", "main~3"), "act-.* is not"),
    ("the last act taken back", lose_act, LOST),
)


# Census.


def column(change, number=2):
    return lambda _, point: change(point / f"column-{number:04}.bin")


def zero_block(path):
    with open(path, "r+b") as out:
        out.seek(CENSUS_BLOCK)
        out.write(bytes(4096))


CENSUS = (
    ("a byte changed", column(flip), "block 1 of column-0002.bin"),
    ("the last byte changed", column(lambda path: flip(path, os.path.getsize(path) - 1), 3), "block 1 of column-0003"),
    ("zeros in the middle", column(zero_block), "block 1 of column-0002.bin"),
    ("a column cut", column(lambda path: cut(path, 1)), "is short"),
    ("a column missing", column(os.unlink), "column 2 is missing"),
    ("two columns exchanged", column(lambda path: exchange(path, path.with_name("column-0001.bin"))), "block 0 of"),
    ("a block too many", lambda register, point: append(point / "column-0003.bin", register.block(3, 2)), "is long"),
    ("a file that is no column", lambda _, point: (point / "column-0002.bin.new").touch(), "no clerk made"),
    ("the last column cut", column(lambda path: cut(path, 1), 3), LOST),
    ("the last column missing", column(os.unlink, 3), LOST),
)


def exchange(one, other):
    between = one.with_name("between")
    one.rename(between)
    other.rename(one)
    between.rename(other)


DAMAGES = {
    Taxes: TAXES, Land: LAND, Businesses: BUSINESSES, Identity: IDENTITY, Pensions: PENSIONS,
    Legislation: LEGISLATION, Census: CENSUS,
}  # fmt: skip


def main(directory):
    side_by_side({kind.name: lambda kind=kind: examine(directory / kind.name, kind) for kind in DAMAGES})


def examine(directory, kind):
    """One register: at work, whole, then damaged in each way; all is tried before any of it fails the case."""
    register, point = kind(directory, SIZE), empty_dir(directory / "whole")
    with contextlib.closing(register):
        at_work(register, point, ENOUGH[kind])
        promised = register.acknowledged
        found, what = register.check(point)
        check(found >= promised, f"{what}; {promised} promised")
        passed_over = []
        for damage, change, word in DAMAGES[kind]:
            copy = directory / "damaged"
            run("cp", "-a", point, copy)
            change(register, copy)
            told = verdict(register, copy, promised)
            if re.search(word, told):
                say(f"ok  {damage}: {told if len(told) < 100 else f'...{told[-96:]}'}")
            else:
                passed_over.append(f"{damage}: {told[-300:]}")
            register.close()
            shutil.rmtree(copy)
        check(not passed_over, f"all {len(DAMAGES[kind])} damages are told", "\n      ".join(["", *passed_over]))


def at_work(register, point, enough):
    """The clerks work until they were promised so many cases, and are ended hard where they have a server."""
    register.prepare(point)
    register.start(point)
    wait_until(lambda: register.acknowledged >= enough or not register.thread.is_alive(), 60, f"{enough} cases")
    register.kill()
    register.end()
    check(register.acknowledged >= enough, f"at work, {register.acknowledged} cases promised")


def verdict(register, point, promised):
    """What the check says of a damaged register, or what the comparison says behind it."""
    try:
        found, what = register.check(point)
    except Failed as failure:
        return " ".join(str(failure).split())
    except Exception as accident:
        return f"not told, {accident!r}"
    lost = register.lost(promised, found)
    return f"lost {lost} of {promised}" if lost else f"not told, {what}"
