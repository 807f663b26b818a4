"""The figure of benchmarks/scaling.py: a column for each axis, work above, time below."""

import itertools
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator, ScalarFormatter

LABELS = {
    "batch": "labelled images a step",
    "image": "side of a view, pixels",
    "network": "ResNet depth",
    "mu": "unlabelled images\nfor each labelled one",
    "devices": "devices",
    "steps": "steps a call (K)",
}
BLUE, ORANGE = "#1f5f99", "#b85c00"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Writes the figure; points that were not run have no time."""
    columns = {axis: list(g) for axis, g in itertools.groupby(rows, key=lambda r: r["axis"])}
    figure, grid = plt.subplots(
        2, len(columns), figsize=(3.2 * len(columns) + 0.6, 6.0), squeeze=False, sharex="col"
    )
    for (axis, column), (above, below) in zip(columns.items(), grid.T, strict=True):
        values = [row["value"] for row in column]
        above.plot(values, [row["gflop"] for row in column], "o-", color=BLUE)
        above.set_ylabel("GFLOP a step and device")
        if axis == "devices" and not any(row["ms"] for row in column):
            _sent(below, column)
        else:
            _time(below, column)
        below.set_xlabel(LABELS[axis])
        for panel in (above, below):
            _scale(panel, values)
        above.set_title(_title(column), fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _time(panel: Axes, rows: list[dict[str, Any]]) -> None:
    panel.set_ylabel("ms a step")
    timed = [row for row in rows if row["ms"]]
    if not timed:
        panel.set_yticks([])
        panel.text(0.5, 0.5, "not measured", ha="center", va="center", transform=panel.transAxes)
        return
    times = [row["ms"] for row in timed]
    errors = [[t["median"] - t["low"] for t in times], [t["high"] - t["median"] for t in times]]
    middle = [t["median"] for t in times]
    panel.errorbar([r["value"] for r in timed], middle, errors, fmt="o-", color=ORANGE, capsize=3)
    panel.set_yscale("log")


def _sent(panel: Axes, rows: list[dict[str, Any]]) -> None:
    sent = [sum(c["sent_bytes"] for c in (r["collectives"] or {}).values()) / 1e6 for r in rows]
    panel.plot([row["value"] for row in rows], sent, "s-", color=ORANGE)
    panel.set_ylabel("MB sent by each device a step")
    panel.set_ylim(0, 1.15 * max(sent) or 1)


def _scale(panel: Axes, values: list[int]) -> None:
    """Logarithmic, with the measured values and no others named below."""
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_locator(FixedLocator(values))
    panel.xaxis.set_major_formatter(ScalarFormatter())
    panel.xaxis.set_minor_locator(NullLocator())
    if panel.get_ylabel().startswith("GFLOP"):
        panel.set_yscale("log")
    if panel.get_yscale() == "log":
        panel.yaxis.set_major_formatter(ScalarFormatter())
        panel.yaxis.set_minor_formatter(NullFormatter())
        low, high = panel.get_ylim()
        ticks = [m * 10.0**e for e in range(-9, 12) for m in (1, 2, 5)]
        inside = [t for t in ticks if low <= t <= high]
        if len(inside) < 2:  # a flat line: room for two names
            panel.set_ylim(low / 2, high * 2)
            inside = [t for t in ticks if low / 2 <= t <= high * 2]
        every = -(-len(inside) // 8)
        panel.yaxis.set_major_locator(FixedLocator(inside[::every]))
        panel.yaxis.get_major_formatter().set_scientific(False)
    panel.grid(alpha=0.3)


def _title(rows: list[dict[str, Any]]) -> str:
    """What stays the same along the axis."""
    first, axis = rows[0], rows[0]["axis"]
    parts = [] if axis == "network" else [first["network"]]
    parts += [] if axis == "image" else [f"{first['image']} px"]
    if axis == "mu":
        parts.append(f"{first['labeled']} labelled")
    elif axis == "batch":
        parts.append(f"mu {first['unlabeled'] // first['labeled']}")
    else:
        parts.append(f"{first['labeled']} + {first['unlabeled']} images")
    return ", ".join(parts)
