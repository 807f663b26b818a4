"""The report's figures, drawn with Matplotlib: as SVG that follows the page's colours, or as PNG.

Each function draws one `Figure` of 288 points (4 inches) in width, whose smallest text stays
legible where the page shows it at 340 pixels. `svg` turns the colours of `LIGHT` into CSS variables
of the same names, which the page defines for light and for dark; `png` keeps them.
"""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ferjax.analysis.reliability import Bin

# Each colour once: `svg` tells them apart by value. Lines differ in style as well as in colour.
LIGHT = {
    "ink": "#1f2932",
    "muted": "#55636f",
    "grid": "#d4dbe1",
    "accent": "#1f5fa6",
    "second": "#b8500f",
    "third": "#1f7f47",
    "fourth": "#7b46a0",
    "fifth": "#a3244b",
    "sixth": "#0f7f8a",
    "seventh": "#86690a",
    "on-accent": "#fffffe",
}
DARK = {
    "ink": "#e5eaef",
    "muted": "#a3afba",
    "grid": "#39444e",
    "accent": "#74aff0",
    "second": "#f19a5c",
    "third": "#70cd91",
    "fourth": "#c59ae9",
    "fifth": "#f0839f",
    "sixth": "#5cc8d1",
    "seventh": "#d6b64a",
    "on-accent": "#10161c",
}
WIDTH = 4.0  # inches
SHEET_COLUMNS = 6
_STYLES = (("accent", "-"), ("second", "--"), ("third", "-."), ("fourth", ":"))
_MARKERS = "os^DvPX*<>"
_NAMESPACES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
_FONT: Any = {
    "font.size": 9.5,
    "font.family": "DejaVu Sans",
    "svg.fonttype": "none",  # text stays text: the page's font, found by search and screen readers
    "axes.edgecolor": LIGHT["muted"],
    "axes.labelcolor": LIGHT["ink"],
    "text.color": LIGHT["ink"],
    "xtick.color": LIGHT["muted"],
    "ytick.color": LIGHT["muted"],
}


@dataclass(frozen=True)
class Series:
    """A line of `curves`.

    Attributes:
      name: in the legend.
      x: [N].
      y: [N]; None or NaN leaves a gap.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float | None]


def curves(
    series: Sequence[Series], *, y_label: str, x_label: str = "epoch", percent: bool = False
) -> Figure:
    """Lines over a common axis; points too where there are few."""
    figure, axes = _axes(2.7)
    for i, line in enumerate(series):
        colour, style = _STYLES[i % len(_STYLES)]
        y = np.array([np.nan if v is None else v for v in line.y], float) * (100 if percent else 1)
        axes.plot(
            *(line.x, y, style),
            label=line.name,
            color=LIGHT[colour],
            linewidth=1.6,
            marker="o" if len(y) <= 40 else None,
            markersize=2.5,
        )
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label + (", %" if percent else ""))
    if len(series) > 1:
        _legend(figure, axes)
    return figure


def confusion(counts: Sequence[Sequence[int]], names: Sequence[str], *, shares: bool) -> Figure:
    """A confusion matrix: rows are true classes, columns predicted ones.

    Args:
      counts: [true][predicted].
      names: of the classes.
      shares: writes percent of the true class instead of counts; the shade is that in both.
    """
    matrix = np.asarray(counts, float)
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    n = len(names)
    figure, axes = _axes(3.7)
    size = 8.5 if n <= 8 else 60 / n
    for row in range(n):
        for column in range(n):
            level = float(share[row, column])
            box = (column - 0.48, row - 0.48)
            axes.add_patch(Rectangle(box, 0.96, 0.96, color=LIGHT["accent"], alpha=level, lw=0))
            value = f"{100 * level:.0f}" if shares else f"{int(matrix[row, column])}"
            colour = LIGHT["on-accent" if level > 0.7 else "ink"]
            axes.text(column, row, value, ha="center", va="center", fontsize=size, color=colour)
    axes.set(xlim=(-0.5, n - 0.5), ylim=(n - 0.5, -0.5), aspect="equal")
    names = _plain(names)
    axes.set_xticks(range(n), names, rotation=45, ha="right", rotation_mode="anchor", fontsize=9)
    axes.set_yticks(range(n), names, fontsize=9)
    axes.set_xlabel("predicted" + (" (percent of the true class)" if shares else " (images)"))
    axes.set_ylabel("true")
    axes.grid(visible=False)
    axes.tick_params(length=0)
    return figure


def class_bars(per_class: Mapping[str, Mapping[str, float]]) -> Figure:
    """Precision, recall and F1 of each class as horizontal bars, in percent."""
    names = list(per_class)
    figure, axes = _axes(0.9 + 0.42 * len(names))
    kinds = (("precision", "accent", 0.35), ("recall", "second", 0.6), ("f1", "third", 1.0))
    for i, (kind, colour, alpha) in enumerate(kinds):
        values = [100 * per_class[name][kind] for name in names]
        places = np.arange(len(names)) + 0.27 * (i - 1)
        label = "F1" if kind == "f1" else kind
        axes.barh(places, values, 0.25, color=LIGHT[colour], alpha=alpha, label=label)
        for place, value in zip(places, values, strict=True):
            text = f"{value:.0f}"
            axes.text(value + 1, place, text, va="center", fontsize=7.5, color=LIGHT["ink"])
    axes.set_yticks(range(len(names)), _plain(names))
    axes.set(xlim=(0, 108), ylim=(len(names) - 0.4, -0.6), xlabel="percent")
    axes.grid(visible=False, axis="y")
    _legend(figure, axes)
    return figure


def reliability(bins: Sequence[Bin], scaled: Sequence[Bin] = ()) -> Figure:
    """Accuracy against confidence; the area of a point is its share of the images.

    Args:
      bins: of the confidences as they are.
      scaled: of the same images after temperature scaling.
    """
    figure, axes = _axes(3.4)
    axes.plot([0, 100], [0, 100], color=LIGHT["muted"], lw=1, ls=":", label="perfect")
    for name, points, (colour, style) in zip(
        ("as trained", "temperature-scaled"), (bins, scaled), _STYLES, strict=False
    ):
        if points:
            total = sum(b.images for b in points)
            x, y = ([100 * getattr(b, k) for b in points] for k in ("confidence", "accuracy"))
            axes.plot(x, y, style, color=LIGHT[colour], lw=1.4, label=name)
            areas = [6 + 250 * b.images / total for b in points]
            axes.scatter(x, y, areas, color=LIGHT[colour], alpha=0.5, lw=0)
    axes.set(xlim=(0, 100), ylim=(0, 100), aspect="equal")
    axes.set(xlabel="confidence, %", ylabel="accuracy, %")
    _legend(figure, axes)
    return figure


def histogram(groups: Mapping[str, np.ndarray], *, x_label: str, bins: int = 20) -> Figure:
    """Counts of values in [0, 1], one outline for each group."""
    figure, axes = _axes(2.7)
    for (name, values), (colour, style) in zip(groups.items(), _STYLES, strict=False):
        counts, edges = np.histogram(values, bins, (0, 1))
        axes.stairs(counts, 100 * edges, color=LIGHT[colour], ls=style, lw=1.6, label=name)
        axes.stairs(counts, 100 * edges, color=LIGHT[colour], fill=True, alpha=0.15)
    axes.set(xlim=(0, 100), xlabel=x_label, ylabel="images")
    axes.set_ylim(bottom=0)
    _legend(figure, axes)
    return figure


def scatter(points: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> Figure:
    """Points [N, 2], with a colour and a marker for each class."""
    figure, axes = _axes(3.6)
    colours = [name for name in LIGHT if name not in ("grid", "on-accent", "muted", "ink")]
    for i, name in enumerate(_plain(names)):
        mine = points[labels == i]
        axes.scatter(
            *(mine[:, 0], mine[:, 1], 9),
            marker=_MARKERS[i % len(_MARKERS)],
            color=LIGHT[colours[i % len(colours)]],
            alpha=0.6,
            lw=0,
            label=name,
        )
    axes.set(xlabel="first component", ylabel="second component")
    axes.tick_params(labelbottom=False, labelleft=False, length=0)
    _legend(figure, axes, columns=4)
    return figure


def faces(images: Sequence[np.ndarray], said: Sequence[tuple[str, str, bool]]) -> Figure:
    """A sheet of faces, for `png`, with what they are and are taken for under each.

    Args:
      images: [N] of uint8 [H, W, C], grey or RGB.
      said: of each the true class, the predicted one with its confidence, and whether it is right.
    """
    rows = -(-len(images) // SHEET_COLUMNS)
    with mpl.rc_context(_FONT):
        figure = Figure(figsize=(WIDTH, 0.85 * rows), layout="constrained")
        for place, (image, (true, found, right)) in enumerate(zip(images, said, strict=True)):
            axes = figure.add_subplot(rows, SHEET_COLUMNS, place + 1)
            axes.imshow(np.broadcast_to(image, (*image.shape[:2], 3)))
            axes.set_axis_off()
            colours = LIGHT["ink"], LIGHT["third" if right else "fifth"]
            for line, text, colour in zip((0.03, 0.2), _plain((true, found)), colours, strict=True):
                axes.text(
                    *(0.5, -line, text),
                    size=6,
                    color=colour,
                    ha="center",
                    va="top",
                    transform=axes.transAxes,
                )
    return figure


def svg(figure: Figure, title: str) -> str:
    """The figure as an `<svg>` element that scales with its place and takes the page's colours.

    Args:
      figure: drawn by a function of this module.
      title: what it shows, for screen readers.
    """
    buffer = io.StringIO()
    # The salt makes the identifiers of clip paths and markers differ between figures of one page.
    with mpl.rc_context({**_FONT, "svg.hashsalt": title}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)  # it would hold for the page
    text = re.sub(r' id="[A-Za-z.\d]+_[\d_]*"', "", text)  # those that nothing refers to
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    for name, value in LIGHT.items():
        text = text.replace(value, f"var(--{name})")
    box = re.search(r'viewBox="[^"]*"', text)
    label = _escape(title)
    head = f'<svg {_NAMESPACES} {box[0] if box else ""} role="img" aria-label="{label}">'
    return head + text[text.index(">") + 1 :].strip()


def png(figure: Figure) -> bytes:
    """The figure as a PNG in light colours on white, 200 pixels an inch."""
    buffer = io.BytesIO()
    with mpl.rc_context(_FONT):
        figure.savefig(buffer, format="png", dpi=200, facecolor="white")
    return buffer.getvalue()


def _axes(height: float) -> tuple[Figure, Axes]:
    with mpl.rc_context(_FONT):
        # Not pyplot: it would keep each figure, and look for a display.
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.add_subplot()
    axes.set_axisbelow(True)
    axes.grid(color=LIGHT["grid"], linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _legend(figure: Figure, axes: Axes, columns: int = 0) -> None:
    handles: Any
    handles, names = axes.get_legend_handles_labels()
    columns = columns or (len(names) if sum(map(len, names)) <= 36 else 2)
    with mpl.rc_context(_FONT):
        figure.legend(
            *(handles, names),
            loc="outside upper center",
            ncols=columns,
            frameon=False,
            fontsize=9,
            columnspacing=1.0,
            handletextpad=0.4,
        )


def _plain(names: Sequence[str]) -> list[str]:
    """Names in which Matplotlib sees no formula."""
    return [name.replace("$", r"\$") for name in names]


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
