"""A sweep's plot: accuracy on public_test against a label share, or a place for each row."""

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ferjax.analysis import figures
from ferjax.analysis.tables import Line

_COLOURS = ("accent", "second", "third", "fourth")
_MARKERS = "os^D"
_COLUMNS = 3  # of panels


def draw(lines: Sequence[Line], *, x_label: str = "") -> Figure:
    """The mean over seeds of the best EMA accuracy on public_test, in percent, as a figure.

    A bar spans one standard deviation to each side; hollow points are published figures. What was
    not run has no point.

    Args:
      lines: of the sweep's table. If each has an `x`, those of a series are joined, against x; more
        than four series have a panel each, with the first one in grey. Else each line has a row of
        the figure.
      x_label: of the axis, where lines have an `x`.
    """
    if not lines or any(line.x is None for line in lines):
        return _places(lines)
    if len({line.series for line in lines}) > len(_COLOURS):
        return _panels(lines, x_label)
    return _curves(lines, x_label)


def _curves(lines: Sequence[Line], x_label: str) -> Figure:
    figure, axes = figures._axes(2.9)
    ticks = _ticks(lines)
    for i, (name, mine) in enumerate(_by_series(lines).items()):
        colour, marker = figures.LIGHT[_COLOURS[i]], _MARKERS[i]
        _points(axes, mine, ticks, colour=colour, marker=marker, label=name)
        _published(axes, mine, ticks, colour=colour, marker=marker, label=f"{name}, published")
    _label(axes, ticks)
    axes.set(xlabel=x_label, ylabel="public_test, %")
    if axes.get_legend_handles_labels()[0]:
        figures._legend(figure, axes, columns=2)
    return figure


def _panels(lines: Sequence[Line], x_label: str) -> Figure:
    series, ticks = _by_series(lines), _ticks(lines)
    (first, reference), *others = series.items()
    height = -(-len(others) // _COLUMNS)
    with mpl.rc_context(figures._FONT):
        figure = Figure(figsize=(6.0, 0.7 + 1.45 * height), layout="constrained")
        grid = figure.subplots(height, _COLUMNS, sharex=True, sharey=True, squeeze=False)
    accent, second, muted = (figures.LIGHT[c] for c in ("accent", "second", "muted"))
    for axes, (name, mine) in zip(grid.flat, others, strict=False):
        axes.set_axisbelow(True)
        axes.grid(color=figures.LIGHT["grid"], linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        lone = "_" if len(ticks) == 1 else ""  # a line of one point is not seen
        _points(axes, reference, ticks, colour=muted, marker=lone, label=first)
        _published(axes, mine, ticks, colour=second, marker="D", label="published")
        _points(axes, mine, ticks, colour=accent, marker="o", label="this method")
        _label(axes, ticks)
        axes.set_title(name, fontsize=9.5, color=figures.LIGHT["ink"])
    for axes in grid.flat[len(others) :]:
        axes.set_visible(False)
    # Also above an empty place.
    for axes in grid.flat[max(0, len(others) - _COLUMNS) : len(others)]:
        axes.tick_params(labelbottom=True)
    figure.supxlabel(x_label, fontsize=9.5)
    figure.supylabel("public_test, %", fontsize=9.5)
    found = dict(
        pair[::-1]
        for axes in grid.flat[: len(others)]
        for pair in zip(*axes.get_legend_handles_labels(), strict=True)
    )
    if found:
        with mpl.rc_context(figures._FONT):
            figure.legend(
                *(found.values(), found.keys()),
                loc="outside upper center",
                ncols=len(found),
                frameon=False,
                fontsize=9,
            )
    return figure


def _by_series(lines: Sequence[Line]) -> dict[str, list[Line]]:
    names = dict.fromkeys(line.series for line in lines)
    return {
        name: sorted((x for x in lines if x.series == name), key=lambda x: x.x or 0.0)
        for name in names
    }


def _ticks(lines: Sequence[Line]) -> list[float]:
    """The places on the axis: shares of labels are nearer to equal steps than to a scale."""
    return sorted({line.x for line in lines if line.x is not None})


def _label(axes: Axes, ticks: Sequence[float]) -> None:
    axes.set_xticks(range(len(ticks)), [f"{tick:g}" for tick in ticks])
    axes.set_xlim(-0.4, len(ticks) - 0.6)


def _points(
    axes: Axes,
    lines: Sequence[Line],
    ticks: Sequence[float],
    *,
    colour: str,
    marker: str,
    label: str,
) -> None:
    measured = [line for line in lines if line.values("best")]
    if not measured:
        return
    mean, deviation = _spread([line.values("best") for line in measured])
    axes.errorbar(
        *([ticks.index(line.x or 0.0) for line in measured], mean),
        yerr=deviation if marker else None,
        fmt="-",
        marker=marker,
        markersize=4,
        linewidth=1.4,
        capsize=2,
        color=colour,
        label=label,
    )


def _published(
    axes: Axes,
    lines: Sequence[Line],
    ticks: Sequence[float],
    *,
    colour: str,
    marker: str,
    label: str,
) -> None:
    known = [(ticks.index(line.x or 0.0), line.published) for line in lines if line.published]
    if known:
        axes.plot(
            *zip(*known, strict=True),
            ":",
            marker=marker,
            markersize=5,
            linewidth=0.9,
            fillstyle="none",
            color=colour,
            label=label,
        )


def _places(lines: Sequence[Line]) -> Figure:
    figure, axes = figures._axes(1.1 + 0.24 * len(lines))
    measured = [(i, line.values("best")) for i, line in enumerate(lines)]
    measured = [(i, values) for i, values in measured if values]
    if measured:
        mean, deviation = _spread([values for _, values in measured])
        axes.errorbar(
            *(mean, [i for i, _ in measured]),
            xerr=deviation,
            fmt="o",
            markersize=4.5,
            capsize=2,
            color=figures.LIGHT["accent"],
            label="ours",
        )
    published = [(i, line.published) for i, line in enumerate(lines) if line.published is not None]
    if published:
        axes.plot(
            *([y for _, y in published], [i for i, _ in published]),
            "D",
            markersize=5,
            fillstyle="none",
            color=figures.LIGHT["second"],
            label="published",
        )
    axes.set_yticks(range(len(lines)), [line.name for line in lines], fontsize=8.5)
    axes.set(ylim=(len(lines) - 0.5, -0.5), xlabel="public_test, %")
    if measured or published:
        figures._legend(figure, axes, columns=2)
    return figure


def _spread(values: Sequence[Sequence[float]]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and sample standard deviation of each; 0 of a single value."""
    mean = np.array([np.mean(v) for v in values])
    return mean, np.array([np.std(v, ddof=1) if len(v) > 1 else 0.0 for v in values])
