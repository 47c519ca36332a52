"""What growth.py measured, as Markdown: one column a size, and what was wanted.

Invariant: it computes from the results alone, also from those of some sizes only.
"""

from parts import verdict

# What was asked for.
RATIO, MOUNT, RECOVERY, MEMORY = 0.7, 1, 5, 300


def peak(one):
    return max(one["grew"]["peak MiB"], one["used"]["peak MiB"])


def operation(name):
    def cell(one):
        figures = one["operations"].get(name)
        return f"{figures['rate']:,.0f} ({figures['ratio']:.2f})" if figures else ""

    return cell


def checkpoints(one):
    figures = one["checkpoints"]
    return f"{figures['number']}, {figures['seconds']:.1f} s, {figures['longest']:.2f} s"


COMMON = {
    "peak memory growing / at work: MiB": lambda one: f"{one['grew']['peak MiB']:.0f} / {one['used']['peak MiB']:.0f}",
    "sync after growing: s": lambda one: f"{one['sync']:.2f}",
    "checkpoints while growing: number, all, longest": checkpoints,
    "a checkpoint of scattered changes: s, MB": lambda one: (
        f"{one['checkpoint']:.2f}, {one['checkpoint bytes'] / 1e6:.1f}"
    ),
    "mount: s": lambda one: f"{one['mount']:.2f}",
    "memory after mount: MiB": lambda one: f"{one['MiB after mount']:.0f}",
    "mount after kill -9, longest: s": lambda one: f"{one['recovery']:.2f}",
    "read-only mount, empty state: s": lambda one: f"{one['read-only mount']:.2f}",
    "the same from S3: s, requests, MB, MiB": lambda one: (
        "{s3 mount:.2f}, {requests}, {MB:.1f}, {MiB:.0f}".format(**one["embassy"])
    ),
}
OF_FILES = {
    "growing (empty files): files/s": lambda one: f"{one['growing']:,.0f}",
    "create 100 bytes: files/s (ratio)": operation("create"),
    "lookup: a second (ratio)": operation("lookup"),
    "stat: a second (ratio)": operation("stat"),
    "lookup scattered over all: a second (ratio)": operation("lookup, scattered"),
    "bytes in the store for an empty file": lambda one: f"{one['bytes a file']:.0f}",
}
OF_WIDE = {
    "sequential write, first tenth / last tenth: MiB/s": lambda one: (
        f"{one['MiB/s'][0]:,.0f} / {one['MiB/s'][-1]:,.0f}"
    ),
    "random 4 KiB read, cold: a second (ratio to 1 GiB)": operation("random 4 KiB read"),
    "random 8 KiB write, fdatasync each 16: a second (ratio to 1 GiB)": operation("random 8 KiB write"),
    "first stat after a mount: s": lambda one: f"{one['first stat']:.3f}",
    "in the store: GiB": lambda one: f"{one['stored GiB']:.1f}",
}


def columns(titles, ones, rows):
    lines = ["| | " + " | ".join(titles) + " |", "|---|" + "---:|" * len(titles)]
    return lines + [f"| {name} | " + " | ".join(cell(one) for one in ones) + " |" for name, cell in rows.items()]


def wanted(title, one, operations):
    """Each demand and whether it is met."""
    lines = [f"- {title}, {name}, of the small one's rate: {verdict(one['operations'][name]['ratio'], RATIO)}"
             for name in operations]  # fmt: skip
    for what, value, most in (
        ("mount, s", one["mount"], MOUNT),
        ("read-only mount with an empty state directory, s", one["read-only mount"], MOUNT),
        ("mount after kill -9, s", one["recovery"], RECOVERY),
        ("peak memory, MiB", peak(one), MEMORY),
    ):
        lines.append(f"- {title}, {what}: {verdict(value, most, at_least=False)}")
    return lines


def table(results):
    machine, sizes = results["machine"], results["sizes"]
    lines = [f"{machine['cpu']}, {machine['cores']} cores, Linux {machine['kernel']}; "
             f"ratios are to a volume of {sizes[0]['files']:,} files beside it, in turns", ""]  # fmt: skip
    lines += columns([f"{one['files']:,} files" for one in sizes], sizes, {**OF_FILES, **COMMON})
    largest = sizes[-1]
    lines += ["", *wanted(f"{largest['files']:,} files", largest, ("create", "lookup", "stat"))]
    if wide := results["wide"]:
        lines += ["", *columns([f"{wide['GiB']} GiB in one file"], [wide], {**OF_WIDE, **COMMON})]
        lines += ["", *wanted(f"{wide['GiB']} GiB", wide, ())]
    return "\n".join(lines)
