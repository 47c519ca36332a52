"""What link.py measured, as Markdown: a table of speeds, one of costs, and what was wanted.

Invariant: it computes from the medians alone; what was not measured is an empty cell.
"""

import statistics

from parts import verdict

# What was asked for.
OF_LIMIT, OF_JUICEFS, OF_LINK = 0.85, 15, 0.8
REQUESTS, SEQUENTIAL, RANDOM = 5, 1.05, 2


def median(rounds):
    """Of each number of each row."""
    return {
        name: {key: statistics.median(one[name][key] for one in rounds) for key in row}
        for name, row in rounds[0].items()
    }


def whole(row):
    """Until the embassy has it."""
    return row["seconds"] + row["settling"]


def lines_of_speed(round_trip):
    """Title -> what is said of a system's rows."""

    def fsync(threads):
        def cell(rows):
            row = rows[f"fsync {threads}"]
            rate = row["files"] / row["seconds"]
            return f"{rate:,.0f} ({rate * round_trip / threads:.2f})"

        return cell

    speed = {f"create+fsync, {n} threads: files/s (of {n / round_trip:.0f})": fsync(n) for n in (1, 8, 32)}
    speed["create 4 KiB: files/s"] = lambda rows: f"{rows['create']['files'] / rows['create']['seconds']:,.0f}"
    speed["the same, until all is in the store"] = lambda rows: (
        f"{rows['create']['files'] / whole(rows['create']):,.0f}"
    )
    speed["untar: s"] = lambda rows: f"{rows['untar']['seconds']:.2f}"
    speed["untar, then sync: s"] = lambda rows: f"{whole(rows['untar']):.2f}"
    speed["sequential write+fsync: MB/s"] = lambda rows: (
        f"{rows['write']['payload'] / rows['write']['seconds'] / 1e6:.1f}"
    )
    speed["the same, then sync"] = lambda rows: f"{rows['write']['payload'] / whole(rows['write']) / 1e6:.1f}"
    speed["random 8 KiB, fdatasync each 16: writes/s"] = lambda rows: (
        f"{rows['overwrite']['writes'] / rows['overwrite']['seconds']:,.0f}"
    )
    speed["mount at the embassy: s (requests)"] = lambda rows: (
        f"{rows['cold']['mount']:.2f} ({rows['cold']['mount requests']:.0f})"
    )
    speed["reading the tree there, cold: s"] = lambda rows: f"{rows['cold']['seconds']:.2f}"
    speed["requests for 1,000 small files"] = lambda rows: f"{requests(rows):.1f}"
    speed["bytes to the store for a byte, sequential"] = lambda rows: f"{sent(rows['write']):.3f}"
    speed["the same, random 8 KiB"] = lambda rows: f"{sent(rows['overwrite']):.2f}"
    speed["unmount: s, MB sent"] = lambda rows: f"{rows['umount']['seconds']:.2f}, {rows['umount']['up'] / 1e6:.1f}"
    return speed


def requests(rows):
    return 1000 * rows["create"]["requests"] / rows["create"]["files"]


def sent(row):
    return row["up"] / row["payload"]


def costs(medians):
    """What each row used."""
    lines = ["| row | system | s | processor s | peak MiB | requests | MB up | MB down |", "|---|---|" + "---:|" * 6]
    rows = list(next(iter(medians.values())))
    for row in rows:
        for name, all_rows in medians.items():
            one = all_rows[row]
            if "peak MiB" in one:
                used = f"{one['processor seconds']:.1f} | {one['peak MiB']:.0f} | {one['requests']:.0f}"
                took = one["seconds"] + one.get("settling", 0)
                lines.append(
                    f"| {row} | {name} | {took:.2f} | {used} | {one['up'] / 1e6:.1f} | {one['down'] / 1e6:.1f} |"
                )
    return lines


def wanted(medians, round_trip, rate):
    """Each demand and whether it is met."""
    lines, ours = [], medians.get("embassyfs available")
    if not ours:
        return lines
    for threads in (1, 8, 32):
        row = ours[f"fsync {threads}"]
        of_limit = row["files"] / row["seconds"] * round_trip / threads
        lines.append(f"- create+fsync at `available`, {threads} threads, of threads ÷ round trip: "
                     f"{verdict(of_limit, OF_LIMIT)}")  # fmt: skip
    untar = ours["untar"]
    for peer in ("juicefs", "juicefs --writeback"):
        if peer in medians:
            times = whole(medians[peer]["untar"]) / whole(untar)
            lines.append(f"- untar, then sync, against {peer}: {verdict(times, OF_JUICEFS)}")
    of_link = untar["up"] / rate / whole(untar)
    lines.append(f"- untar, then sync, of the link for its {untar['up'] / 1e6:.1f} MB: {verdict(of_link, OF_LINK)} "
                 f"(they need {untar['up'] / rate:.2f} s; `tar` alone took {untar['seconds']:.2f} s)")  # fmt: skip
    lines.append(f"- requests for 1,000 small files: {verdict(requests(ours), REQUESTS, at_least=False)}")
    for row, most in (("write", SEQUENTIAL), ("overwrite", RANDOM)):
        lines.append(f"- bytes to the store for a byte, {row}: {verdict(sent(ours[row]), most, at_least=False)}")
    peak = max(row.get("peak MiB", 0) for row in ours.values())
    lines.append(f"- peak memory, MiB: {verdict(peak, 300, at_least=False)}")
    return lines


def table(medians, round_trip, rate, facts):
    names = list(medians)
    lines = [
        f"{facts['cpu']}, {facts['cores']} cores, Linux {facts['kernel']}; {round_trip * 1000:.0f} ms, "
        f"{rate * 8 / 1e9:.0f} Gbit/s; plain puts get {facts['plain puts'] / 1e6:.1f} MB/s of {rate / 1e6:.0f}; "
        f"the server itself takes {facts['put alone'] * 1000:.1f} ms for a put of 4 KiB",
        "",
        "| | " + " | ".join(names) + " |",
        "|---|" + "---:|" * len(names),
    ]
    for title, cell in lines_of_speed(round_trip).items():
        lines.append(f"| {title} | " + " | ".join(cell(medians[name]) for name in names) + " |")
    return "\n".join([*lines, "", *wanted(medians, round_trip, rate), "", *costs(medians)])
