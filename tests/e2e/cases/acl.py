"""Access control lists: the same commands on a disk that has them and on a mount give the same, to the letter.

Invariant: the script below prints everything it sees, and nothing that depends on where it runs.
"""

import difflib

from harness import Volume, check, empty_dir, run

SCRIPT = r"""
umask 022
show() { for f in "$@"; do stat -c '%n %a %u %g' "$f"; getfacl -cpn "$f" | grep -v '^$'; done; }
as() { id=$1 group=$2; shift 2; setpriv --reuid "$id" --regid "$group" "$@"; echo "=> $?"; }
touch f; setfacl -m u:11:rw,g:12:r f; show f
echo "# chmod and the mask"
chmod 600 f; show f; chmod 664 f; show f; setfacl -m m::r f; show f; setfacl -m o::7 f; show f
setfacl -x u:11 f; show f; setfacl -b f; show f
echo "# what a directory hands down"
mkdir p; setfacl -d -m u:11:rwx,g:12:rx,o::- p; show p
umask 077; touch p/a; mkdir p/b; touch p/b/c; mkdir p/b/d; mkfifo p/fifo; ln -s x p/link
show p/a p/b p/b/c p/b/d p/fifo; stat -c '%n %a' p/link
umask 022
python3 -c "
os.close(os.open('p/x', os.O_CREAT | os.O_WRONLY, 0o600))
os.mkdir('p/y', 0o750)
os.mknod('p/z', 0o666)
"
show p/x p/y p/z
cp -a p copied; show copied/b; setfacl -Rm u:7:rx copied; getfacl -Rn copied | sort
mv p/x moved; show moved; mv moved p/b/x; show p/b/x
setfacl -k p; show p; touch p/after; show p/after
mkdir -m 777 q; chown 0:77 q; chmod 2777 q; setfacl -d -m g::rwx,o::rx,u:5:rwx q
as 1 1 --clear-groups sh -c 'umask 077; touch q/n; mkdir q/m'; show q/n q/m
as 1 1 --clear-groups python3 -c "import os; os.close(os.open('q/sg', os.O_CREAT, 0o2775))"; show q/sg
echo "# errors"
python3 - <<'END'
import errno, os, struct
EMPTY = struct.pack("<I", 2)
def answer(call, *args, **more):
    try:
        print(call(*args, **more))
    except OSError as e:
        print(errno.errorcode[e.errno])
os.symlink("nowhere", "dangling")
answer(os.setxattr, "f", "system.posix_acl_default", EMPTY)
answer(os.setxattr, "f", "system.posix_acl_default", EMPTY + struct.pack("<HHIHHIHHI", 1, 7, 0, 4, 7, 0, 32, 7, 0))
answer(os.setxattr, "f", "system.posix_acl_access", b"xx")
answer(os.setxattr, "f", "system.posix_acl_access", EMPTY)
answer(os.setxattr, "f", "system.posix_acl_access", EMPTY + struct.pack("<HHI", 1, 7, 0))
answer(os.setxattr, "dangling", "system.posix_acl_access", EMPTY, follow_symlinks=False)
for name in ("system.posix_acl_access", "system.posix_acl_default", "system.other"):
    answer(os.getxattr, "f", name)
    answer(os.setxattr, "f", name, b"")
    answer(os.removexattr, "f", name)
    answer(os.removexattr, "p", name)
print(os.listxattr("f"), sorted(os.listxattr("p/b")))
END
echo "# who may what"
echo secret > e; chmod 600 e; setfacl -m u:11:r e
as 11 11 --clear-groups sh -c 'cat e; echo x >> e'; as 13 13 --clear-groups cat e
setfacl -m m::- e; as 11 11 --clear-groups cat e
setfacl -m m::rw,u:11:- e; as 11 11 --clear-groups cat e
setfacl -b e; setfacl -m g:77:rw e
as 11 11 --groups 77 sh -c 'cat e; echo y >> e; cat e'; as 11 11 --groups 78 cat e
mkdir -m 700 closed; echo in > closed/file; setfacl -m u:11:x closed; chmod 604 closed/file
as 11 11 --clear-groups sh -c 'cat closed/file; ls closed'
as 11 11 --clear-groups setfacl -m u:11:rwx e
echo "# the set-group-id bit"
for groups in "--clear-groups" "--groups 77"; do
    touch s; chown 1:77 s; chmod 2770 s; as 1 1 $groups setfacl -m u:5:rw s; show s; rm s
done
touch s; chown 1:77 s; chmod 2770 s; setfacl -m u:5:rw s; show s
"""


def play(place):
    """What the script prints in an empty directory."""
    place.mkdir(mode=0o755)
    done = run("bash", "-c", SCRIPT, cwd=place, ok=None, limit=120, env={"LC_ALL": "C"})
    return (done.stdout + done.stderr).splitlines()


def compare(want, got, claim):
    differences = [line for line in difflib.unified_diff(want, got, "disk", "mount", n=2, lineterm="")]
    check(want == got, claim, "\n".join(differences)[:4000])


def main(directory):
    reference = empty_dir(directory / "reference")
    probe = run("setfacl", "-m", "u:11:r", reference, ok=None)
    check(probe.returncode == 0, "the disk to compare with has access control lists", probe.stderr)
    want = play(reference / "acl")
    check(sum("user:11:" in line for line in want) > 10, f"the script prints {len(want)} lines on the disk")

    volume = Volume(directory)
    volume.init()
    home = volume.mount("home", directory / "state", options=["protection=local", "allow_other"])
    compare(want, play(home.point / "acl"), "and the same on a mount")
    listing = ["getfacl", "-Rnp", "acl"]
    before = sorted(run(*listing, cwd=home.point).stdout.splitlines())
    home.umount()
    home = volume.mount("home", home.state, options=["protection=local", "allow_other"])
    compare(before, sorted(run(*listing, cwd=home.point).stdout.splitlines()), "all lists are there after a remount")
    home.umount()
    embassy = volume.embassy(options=["allow_other"])
    compare(before, sorted(run(*listing, cwd=embassy.point).stdout.splitlines()), "and in the embassy")
    stranger = ["setpriv", "--reuid=13", "--regid=13", "--clear-groups", "cat", embassy.point / "acl" / "e"]
    check(run(*stranger, ok=False).returncode != 0, "where they count as well")
    embassy.umount()
