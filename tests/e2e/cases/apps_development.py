"""What developers keep on a file system: a git repository, and a Rust project that is built there.

Invariant: both tools decide by the times, sizes and inode numbers that the file system shows whether there is work to
do; "nothing to do" is demanded after each mount.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

from harness import FULL, Failed, Volume, check, empty_dir, run, say, timed
from real_input import GIT_ENV, git

OBJECTS, CHANGED = (30_000, 3_000) if FULL else (3_000, 300)
COMMITS = 60 if FULL else 20


def write_history(stream, files):
    """A history for `git fast-import`: the first commit has all files, each later one changes some of them."""
    per_commit = files // COMMITS
    for commit in range(COMMITS):
        message = b"commit %d" % commit
        stream.write(b"commit refs/heads/main\ncommitter R <r@example.org> %d +0000\n" % (1_700_000_000 + commit))
        stream.write(b"data %d\n%s\n" % (len(message), message))
        chosen = range(files) if commit == 0 else range(commit * per_commit, (commit + 1) * per_commit)
        for n in chosen:
            text = b"".join(b"file %d, line %d, commit %d\n" % (n, line, commit) for line in range(n % 60))
            stream.write(b"M 100644 inline d%02d/e%d/f%05d.txt\ndata %d\n%s\n" % (n % 37, n % 5, n, len(text), text))


def objects_of(repository):
    """How many objects a repository holds, packed or not."""
    counts = dict(line.split(": ") for line in git(repository, "count-objects", "-v").splitlines())
    return int(counts["count"]) + int(counts["in-pack"])


def make_origin(directory):
    """A bare repository on the plain disk."""
    origin, stream = directory / "origin.git", directory / "history"
    with open(stream, "wb") as out:
        write_history(out, OBJECTS // 2)
    run("git", "init", "-q", "--bare", "-b", "main", origin, env=GIT_ENV)
    with open(stream, "rb") as history:
        run("git", "-C", origin, "fast-import", "--quiet", stdin=history, env=GIT_ENV, limit=300)
    check(objects_of(origin) >= OBJECTS, f"the origin has {objects_of(origin)} objects")
    return origin


def work_on(clone):
    """Changed, new, moved and deleted files; a branch and a merge; then everything is packed."""
    for n in range(0, CHANGED * 2, 2):
        with open(clone / f"d{n % 37:02}/e{n % 5}/f{n:05}.txt", "a") as out:
            out.write("changed\n")
    git(clone, "commit", "-q", "-a", "-m", "changed")
    git(clone, "checkout", "-q", "-b", "side", "HEAD~3")
    for n in range(CHANGED):
        (clone / "new" / str(n % 10)).mkdir(parents=True, exist_ok=True)
        (clone / "new" / str(n % 10) / f"{n}").write_text(f"new {n}\n")
    git(clone, "add", "new")
    git(clone, "commit", "-q", "-m", "new")
    git(clone, "checkout", "-q", "main")
    git(clone, "merge", "-q", "--no-edit", "side")
    git(clone, "mv", "d00", "moved")
    git(clone, "rm", "-q", "-r", "d01")
    git(clone, "commit", "-q", "-m", "moved and deleted")
    git(clone, "gc", "-q", "--prune=now", limit=600)


def check_clone(clone, head, when):
    """Whole, clean, and so that git does not even have to read the files."""
    git(clone, "fsck", "--full", "--strict", "--no-progress", limit=600)
    check(git(clone, "rev-parse", "HEAD") == head, f"{when}: fsck is clean, HEAD is as it was")
    # diff-files looks at times, sizes and inode numbers and lists what it would have to read again.
    stale = git(clone, "diff-files")
    check(stale == "", f"{when}: the index holds for every file", stale[:500])
    status = git(clone, "--no-optional-locks", "status", "--porcelain", "--ignored")
    check(status == "", f"{when}: git status is clean", status[:500])


def git_case(directory):
    """Cloned onto a mount, worked on, packed, cloned back."""
    origin = make_origin(directory)
    volume = Volume(directory)
    volume.init()
    home = volume.mount("home", directory / "state")
    clone = home.point / "clone"
    # file:// makes git send and index a pack as over a network, instead of copying files.
    _, took = timed(lambda: run("git", "clone", "-q", f"file://{origin}", clone, limit=600, env=GIT_ENV))
    _, worked = timed(lambda: work_on(clone))
    say(f"cloned in {took:.1f} s, worked on and packed in {worked:.1f} s")
    head = git(clone, "rev-parse", "HEAD")
    check_clone(clone, head, "after gc")
    back = directory / "back"
    run("git", "clone", "-q", f"file://{clone}", back, limit=600, env=GIT_ENV)
    trees = [git(repository, "ls-tree", "-r", "-t", "HEAD") for repository in (clone, back)]
    check(trees[0] == trees[1] and trees[0].count("\n") > CHANGED, "cloned back: HEAD's trees are the same")
    check_clone(back, head, "cloned back")
    check(objects_of(clone) >= OBJECTS, f"the clone has {objects_of(clone)} objects")
    home.umount()
    home = volume.mount("home", home.state)
    check_clone(clone, head, "after another mount")
    git(clone, "push", "-q", "origin", "main:pushed")
    check(git(origin, "rev-parse", "pushed") == head, "pushed from there")
    home.umount()
    embassy = volume.embassy("embassy")
    check_clone(embassy.point / "clone", head, "embassy")
    embassy.umount()


# A workspace: a library of several modules whose build script makes another, and a program.
MODULES = 12
FILES = {
    "Cargo.toml": '[workspace]\nmembers = ["library", "program"]\nresolver = "2"\n',
    "library/Cargo.toml": '[package]\nname = "library"\nversion = "0.1.0"\nedition = "2021"\nbuild = "build.rs"\n',
    "library/build.rs": """use std::{env, fs, path::Path};
fn main() {
    println!("cargo:rerun-if-changed=number.txt");
    let number = fs::read_to_string("number.txt").unwrap();
    let out = Path::new(&env::var("OUT_DIR").unwrap()).join("made.rs");
    fs::write(out, format!("pub const MADE: u64 = {};", number.trim())).unwrap();
}
""",
    "library/number.txt": "1000\n",
    "program/Cargo.toml": '[package]\nname = "program"\nversion = "0.1.0"\nedition = "2021"\n'
    '[dependencies]\nlibrary = { path = "../library" }\n',
    "program/src/main.rs": 'fn main() {\n    println!("{}", library::sum());\n}\n',
}


def write_workspace(root):
    for name, text in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    modules = "".join(f"mod m{n};\n" for n in range(MODULES))
    total = " + ".join(f"m{n}::value()" for n in range(MODULES))
    (root / "library/src").mkdir()
    (root / "library/src/lib.rs").write_text(
        f'{modules}mod made {{ include!(concat!(env!("OUT_DIR"), "/made.rs")); }}\n'
        f"pub fn sum() -> u64 {{ made::MADE + {total} }}\n"
    )
    for n in range(MODULES):
        write_module(root, n, n)


def write_module(root, n, value):
    text = f"pub fn value() -> u64 {{ [{value}, 0].iter().max().copied().unwrap() }}\n"
    (root / f"library/src/m{n}.rs").write_text(text)


class Project:
    """A workspace and its target directory, both on the mount."""

    def __init__(self, root):
        self.root = root
        cargo = shutil.which("cargo") or Path.home() / ".cargo/bin/cargo"
        self.command = [cargo, "build", "--offline", "-v"]
        # Nothing of a build around this one: its flags, its target directory, its wrapper.
        self.clean = {k: v for k, v in os.environ.items() if not k.startswith(("CARGO_BUILD", "RUSTFLAGS", "RUSTC_W"))}

    def build(self):
        """The packages that were compiled and those that were found fresh."""
        env = {**self.clean, "CARGO_TARGET_DIR": str(self.root / "target")}
        done = subprocess.run(
            self.command, cwd=self.root, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=240
        )
        if done.returncode != 0:
            raise Failed(f"cargo build ended with {done.returncode}: {done.stderr[-2000:]}")
        # A package whose inputs are older than what was made of them is "Dirty" first, then compiled.
        found = {word: set(re.findall(rf"^ *{word} (\w+) v", done.stderr, re.M)) for word in ("Compiling", "Fresh")}
        return found["Compiling"], found["Fresh"]

    def expect(self, value, when):
        program = self.root / "target/debug/program"
        got = run(program).stdout.strip()
        check(got == str(value), f"{when}: the program runs from the mount and says {value}", got)

    def nothing_to_do(self, when):
        compiled, fresh = self.build()
        check(not compiled and fresh == {"library", "program"}, f"{when}: cargo has nothing to do", str(compiled))


def rust_build(directory):
    """Built, built again, changed, built again; and nothing to do after another mount."""
    volume = Volume(directory)
    volume.init()
    home = volume.mount("home", directory / "state")
    root = empty_dir(home.point / "workspace")
    write_workspace(root)
    project, value = Project(root), 1000 + sum(range(MODULES))
    (compiled, _), took = timed(project.build)
    check(compiled == {"library", "program"}, f"cargo built the workspace in {took:.1f} s", str(compiled))
    project.expect(value, "built")
    project.nothing_to_do("the second build")
    write_module(root, 3, 503)
    compiled, _ = project.build()
    check(compiled == {"library", "program"}, "a changed module is compiled, and what depends on it", str(compiled))
    project.expect(value + 500, "built incrementally")
    home.umount()
    home = volume.mount("home", home.state)
    project.nothing_to_do("after another mount")
    (root / "library/number.txt").write_text("2000\n")
    project.build()
    project.expect(value + 1500, "the build script ran again")
    (root / "program/src/main.rs").write_text(FILES["program/src/main.rs"].replace("sum()", "sum() + 1"))
    compiled, fresh = project.build()
    check(compiled == {"program"} and fresh == {"library"}, "only the changed package is compiled", str(compiled))
    project.nothing_to_do("then")
    home.umount()
    embassy = volume.embassy("embassy")
    Project(embassy.point / "workspace").expect(value + 1501, "embassy")
    embassy.umount()
