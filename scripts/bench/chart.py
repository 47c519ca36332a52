"""Draws rates as horizontal bars on a logarithmic axis, each relative to one system's: an SVG, with nothing but text.

Invariant: every system has one colour whatever else is drawn, and a bar that is missing was not measured.
"""

import math
from html import escape

COLOURS = {
    "embassyfs": "#0b6e4f",
    "ext4": "#9aa0a6",
    "null": "#c9b458",
    "gocryptfs": "#4c78a8",
    "juicefs": "#e45756",
    "rclone": "#b279a2",
}
LEFT, WIDTH, BAR, GAP, TOP = 270, 640, 8, 10, 54


def span(values):
    """The powers of ten around all values."""
    logs = [math.log10(v) for v in values] or [0.0]
    return min(math.floor(min(logs)), -1), max(math.ceil(max(logs)), 1)


def text(x, y, words, anchor="start", size=12):
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(words)}</text>'


def box(x, y, width, height, colour):
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}"/>'


def relative(rows, medians, base):
    """Row title -> [(system, rate by the base's rate)], ours first."""
    names = sorted((n for n in medians if n != base), key=lambda n: n != "embassyfs")
    out = {}
    for key, title in rows:
        ours = medians[base][key].get("rate")
        rates = [(n, medians[n][key].get("rate")) for n in names]
        out[title] = [(n, rate / ours) for n, rate in rates if rate and ours]
    return {title: bars for title, bars in out.items() if bars}


def legend(names):
    """Names beside their colours, in one line."""
    out = []
    for i, name in enumerate(names):
        x = LEFT + i * 105
        out += [box(x, 12, 10, 10, COLOURS.get(name, "#000")), text(x + 15, 21, name)]
    return out


def draw(rows, medians, base):
    """The chart of all rows that the base has."""
    bars = relative(rows, medians, base)
    low, high = span([value for group in bars.values() for _, value in group])
    place = lambda value: LEFT + WIDTH * (math.log10(value) - low) / (high - low)  # noqa: E731
    height = TOP + sum(len(group) * BAR + GAP for group in bars.values()) + 10
    names = list(dict.fromkeys(name for group in bars.values() for name, _ in group))
    out = legend(names)
    for power in range(low, high + 1):
        x = place(10**power)
        colour = "#333" if power == 0 else "#ddd"
        out.append(f'<line x1="{x:.1f}" y1="{TOP - 8}" x2="{x:.1f}" y2="{height - 8}" stroke="{colour}"/>')
        out.append(text(x, TOP - 12, base if power == 0 else f"{10**power:g}\u00d7", "middle", 11))
    y = TOP
    for title, group in bars.items():
        out.append(text(LEFT - 8, y + len(group) * BAR / 2 + 4, title, "end"))
        for name, value in group:
            begin, end = sorted((place(1), place(value)))
            out.append(box(begin, y, max(end - begin, 1), BAR - 1, COLOURS.get(name, "#000")))
            if name == "embassyfs":
                out.append(text(end + 4, y + BAR - 1, f"{value:.2f}", size=9))
            y += BAR
        y += GAP
    size = f'width="{LEFT + WIDTH + 50}" height="{height}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" fill="#222">'
    return "\n".join([head, box(0, 0, LEFT + WIDTH + 50, height, "#fff"), *out, "</svg>"]) + "\n"
