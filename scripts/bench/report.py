"""What the bench found: tables in Markdown, with the targets and whether they are met; every number in JSON; a chart.

Invariant: a target stands here once, and a table says of each whether it is met; what was not measured is an empty
cell, never a 0.
"""

import json
import statistics
from dataclasses import dataclass

import chart
from harness import MIB

OURS = "embassyfs"
# Row -> peer -> our rate must be at least this many times the peer's.
TARGETS = {
    "create": {"gocryptfs": 5, "juicefs": 15, "null": 0.5},
    "untar": {"gocryptfs": 5, "juicefs": 15, "null": 0.5},
    "remove": {"gocryptfs": 5, "juicefs": 15, "null": 0.5},
    "create-fsync-8": {"gocryptfs": 1.5, "ext4": 0.5},
    "append": {"ext4": 1},
    "sqlite": {"gocryptfs": 1.5},
    "write": {"gocryptfs": 2, "juicefs": 4},
    "read-cold": {"gocryptfs": 1.5},
    "read-warm": {"ext4": 0.8},
    "random-read": {"gocryptfs": 1.2},
    "random-write": {"gocryptfs": 1, "juicefs": 20},
    "walk-cold": {"gocryptfs": 1.2},
    "walk-warm": {"null": 0.8},
    "pgbench": {"gocryptfs": 1.5},
}
# Row -> bytes to the store for each byte written, at the most.
BYTES_PER_BYTE = {"write": 1.05, "random-write": 2}
# Row -> requests to the store for 1,000 small files, at the most.
REQUESTS = {"create": 5}
# MiB resident in any row, and seconds of a mount, at the most.
MEMORY, MOUNT = 300, 1


@dataclass
class Result:
    """All that a run has measured. `rounds`: system -> for each round: row -> figures."""

    machine: dict
    rows: list
    rounds: dict
    failures: dict
    mounts: dict
    read_only: dict
    many: int
    notes: dict

    def medians(self):
        """System -> row -> figure -> median of the rounds; of memory the most."""
        out = {}
        for name, rounds in self.rounds.items():
            for row in self.rows:
                seen = [r[row.key] for r in rounds if row.key in r]
                keys = seen[0] if seen else ()
                middle = {k: (max if k == "peak" else statistics.median)(s[k] for s in seen if k in s) for k in keys}
                out.setdefault(name, {})[row.key] = middle
        return out


def lines(head, body):
    """A table: the first column left, the others right."""
    return ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)] + [
        "| " + " | ".join(cells) + " |" for cells in body
    ]


def verdict(holds):
    return "met" if holds else "**MISSED**"


def ratio(medians, row, peer):
    """Our rate by the peer's; None where one is missing."""
    ours, theirs = (medians.get(name, {}).get(row, {}).get("rate") for name in (OURS, peer))
    return ours / theirs if ours and theirs else None


def verdicts(medians):
    """Every target that was measured: (row, words, value, holds)."""
    out = []
    for row, peers in TARGETS.items():
        for peer, least in peers.items():
            if (value := ratio(medians, row, peer)) is not None:
                out.append((row, f"at least {least} of {peer}", value, value >= least))
    ours = medians.get(OURS, {})
    for row, most in BYTES_PER_BYTE.items():
        if (figures := ours.get(row)) and "sent bytes" in figures:
            value = figures["sent bytes"] / figures["payload"]
            out.append((row, f"at most {most} bytes to the store per byte", value, value <= most))
    for row, most in REQUESTS.items():
        if (figures := ours.get(row)) and "sent requests" in figures:
            value = 1000 * figures["sent requests"] / figures["count"]
            out.append((row, f"at most {most} requests to the store per 1,000 files", value, value <= most))
    for row, figures in ours.items():
        if figures.get("peak", 0) > MEMORY:
            out.append((row, f"at most {MEMORY} MiB resident", figures["peak"], False))
    return out


def speeds(result, medians):
    """The rates, and ours as ratios to each of the others."""
    names = list(medians)
    peers = [n for n in names if n != OURS] if OURS in names else []
    body = []
    for row in result.rows:
        rates = [medians[n][row.key].get("rate") for n in names]
        cells = [f"{rate:,.0f}" if rate else "" for rate in rates]
        ratios = [ratio(medians, row.key, peer) for peer in peers]
        body.append([row.name, row.unit, *cells, *(f"{r:.2f}" if r else "" for r in ratios)])
    if result.mounts:
        cells = [f"{result.mounts[n]:.3f}" if n in result.mounts else "" for n in names]
        body.append(["mount", "s", *cells, *("" for _ in peers)])
    for when, took in result.read_only.items():
        cells = [f"{took:.3f}" if n == OURS else "" for n in names]
        what = f"read-only mount of {result.many:,} files, empty state, {when}"
        body.append([what, "s", *cells, *("" for _ in peers)])
    return lines(["", "unit", *names, *(f"{OURS} / {peer}" for peer in peers)], body)


def targets(result, medians):
    """What is wanted, and whether it holds."""
    titles = {row.key: row.name for row in result.rows}
    body = [[titles[row], words, f"{value:.2f}", verdict(holds)] for row, words, value, holds in verdicts(medians)]
    peak = max((f.get("peak", 0) for f in medians.get(OURS, {}).values()), default=0)
    if 0 < peak <= MEMORY:
        body.append(["every row", f"at most {MEMORY} MiB resident", f"{peak:.0f}", verdict(True)])
    for when, took in result.read_only.items():
        body.append([f"read-only mount, {when}", f"at most {MOUNT} s", f"{took:.2f}", verdict(took <= MOUNT)])
    return lines(["", "wanted", "found", ""], body)


def costs(result, medians, title, show):
    """One figure of the daemons, for all rows and systems that have it."""
    names = [n for n in medians if any(show(medians[n][row.key]) for row in result.rows)]
    body = [[row.name, *(show(medians[n][row.key]) for n in names)] for row in result.rows]
    return ["", f"### {title}", "", *lines(["", *names], body)] if names else []


def figure(key, text):
    """How a figure is shown, where there is one."""
    return lambda figures: text(figures[key]) if key in figures else ""


def per_operation(figures):
    """Microseconds of processor time for each operation that the rate counts."""
    return f"{1e6 * figures['cpu'] / figures['count']:,.1f}" if "cpu" in figures else ""


def to_store(figures):
    """Bytes and requests, and bytes for each byte that was written where that is known."""
    if "sent bytes" not in figures:
        return ""
    text = f"{figures['sent bytes'] / MIB:,.1f} in {figures['sent requests']:,.0f}"
    return f"{text} ({figures['sent bytes'] / figures['payload']:.2f})" if figures.get("payload") else text


def markdown(result):
    """All tables."""
    medians, facts = result.medians(), result.machine
    out = [f"{facts['cpu']}, {facts['cores']} cores, Linux {facts['kernel']}; medians of {facts['rounds']} rounds"]
    out += ["", "**Tiny sizes: this shows that the bench works, not how fast anything is.**"] if facts["quick"] else []
    out += ["", *speeds(result, medians), "", "### Targets", "", *targets(result, medians)]
    out += costs(result, medians, "Processor time of the daemon, seconds", figure("cpu", lambda v: f"{v:.2f}"))
    out += costs(result, medians, "The same for each operation, microseconds", per_operation)
    out += costs(result, medians, "Peak resident memory of the daemon, MiB", figure("peak", lambda v: f"{v:,.0f}"))
    written = figure("disk bytes", lambda v: f"{v / MIB:,.1f}")
    out += costs(result, medians, "Written to the disk by the daemon, MiB", written)
    out += costs(result, medians, "Sent to the store: MiB in requests (bytes per byte written)", to_store)
    notes = [f"- {name} {note}." for name, note in result.notes.items()]
    failed = [(name, row, why) for name, rows in result.failures.items() for row, why in rows.items()]
    notes += [f"- {name}, {row}: no result: {why}" for name, row, why in failed]
    out += ["", *notes] if notes else []
    return "\n".join(out) + "\n"


def write(result, place, stem):
    """The three files; gives the text."""
    medians, text = result.medians(), markdown(result)
    (place / f"{stem}.md").write_text(text)
    everything = {
        "machine": result.machine,
        "rows": {row.key: {"name": row.name, "unit": row.unit} for row in result.rows},
        "medians": medians,
        "rounds": result.rounds,
        "mounts": result.mounts,
        "read-only mount": result.read_only,
        "targets": [dict(zip(("row", "wanted", "found", "met"), v)) for v in verdicts(medians)],
        "failures": result.failures,
    }
    (place / f"{stem}.json").write_text(json.dumps(everything, indent=1) + "\n")
    if "gocryptfs" in medians:
        drawn = chart.draw([(row.key, row.name) for row in result.rows], medians, "gocryptfs")
        (place / f"{stem}.svg").write_text(drawn)
    return text
