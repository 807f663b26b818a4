"""The audit as one HTML file: counts, distributions and pictures, without any outside request."""

import base64
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import cv2
import numpy as np

from ferjax.data.arrays import Dataset

_STYLE = """
:root{color-scheme:light dark;--ink:#1c2024;--soft:#5a6470;--back:#fff;--line:#d5dae0;--bar:#3b6fb6;
--bad:#b3261e}
@media (prefers-color-scheme:dark){:root{--ink:#e6e9ec;--soft:#a0a9b3;--back:#15181b;--line:#363d45;
--bar:#7fa9e0;--bad:#ff9b92}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:76rem;padding:1rem;background:var(--back);color:var(--ink);
font:16px/1.45 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.5rem;margin:.2rem 0}h2{font-size:1.15rem;margin:2rem 0 .4rem}
p{margin:.3rem 0;max-width:46rem}.soft{color:var(--soft)}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.9rem}
th,td{padding:.2rem .6rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child{text-align:left}
.charts,.groups{display:flex;flex-wrap:wrap;gap:.8rem}
.charts figure{flex:1 1 15rem;max-width:24rem}figure{margin:0;min-width:0}
svg{width:100%;height:auto;display:block}
.group{display:flex;flex-wrap:wrap;gap:.3rem;border:1px solid var(--line);border-radius:.3rem;
padding:.4rem;max-width:100%}
.group figure{width:5.2rem}
.group img{width:100%;image-rendering:pixelated;display:block}
figcaption{font-size:.75rem;line-height:1.25;color:var(--soft)}
.bad figcaption b{color:var(--bad)}
.note{flex-basis:100%;font-size:.75rem;color:var(--soft)}
"""


def sheet(report: dict[str, Any], data: Dataset, limit: int) -> str:
    """The page.

    Args:
        report: of `audit.audit`.
        data: the set that it is about.
        limit: groups of pictures shown of each kind.
    """
    pictures = _Pictures(data)
    groups = report["exact_groups"]
    conflicting = [g["rows"] for g in groups if len(set(g["labels"]) - {-1}) > 1]
    across = [g["rows"] for g in groups if len(set(g["splits"])) > 1]
    # The least alike first: they tell whether the threshold is right.
    near = [(row, other, r) for row, other, r in reversed(report["near_pairs"])]
    threshold = report["near"]["threshold"]
    parts = [
        f"<h1>Audit of {escape(report['dataset'])}</h1>",
        f"<p class=soft>content {escape(report['digest'][:12])}</p>",
        _counts(report),
        "<h2>Brightness and contrast</h2><p class=soft>Mean and standard deviation of an image's "
        "grey levels; share of images.</p>",
        _charts(report),
        _section(
            "Equal pixels, different labels",
            "Strict cleaning leaves these out of training.",
            [pictures.group(rows) for rows in conflicting[:limit]],
            len(conflicting),
        ),
        _section(
            "Equal pixels in two splits",
            "Cleaning by leaks leaves the training copies out.",
            [pictures.group(rows) for rows in across[:limit]],
            len(across),
        ),
        _section(
            "Nearly equal",
            f"Thumbnails correlate by {threshold:g} or more; the least alike first.",
            [pictures.group((a, b), f"r = {r:.4f}") for a, b, r in near[:limit]],
            len(near),
        ),
        _section(
            "Blank",
            "One single grey level.",
            [pictures.group([row]) for row in report["blank"][:limit]],
            len(report["blank"]),
        ),
        _section(
            "Padded",
            f"{report['padded']['least']} or more rows or columns of one single grey level.",
            [pictures.group([row]) for row in report["padded"]["rows"][:limit]],
            len(report["padded"]["rows"]),
        ),
    ]
    if "not_a_face" in report:
        rows = report["not_a_face"]
        shown = [pictures.group([row]) for row in rows[:limit]]
        parts.append(_section("Not a face", "By most of FER+'s votes.", shown, len(rows)))
    body = "\n".join(parts)
    return (
        '<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width='
        f'device-width,initial-scale=1"><title>Audit of {escape(report["dataset"])}</title>'
        f"<style>{_STYLE}</style><body>{body}</body></html>\n"
    )


class _Pictures:
    """Images of a data set by row."""

    def __init__(self, data: Dataset) -> None:
        self._data = data
        self._where = {
            row: (name, place)
            for name, split in data.splits.items()
            for place, row in enumerate(split.rows.tolist())
        }

    def group(self, rows: Iterable[int], note: str = "") -> str:
        rows = list(rows)
        labels = {self._label(row) for row in rows}
        extra = f"<div class=note>{escape(note)}</div>" if note else ""
        kind = "group bad" if len(labels - {"no label"}) > 1 else "group"
        return f'<div class="{kind}">{"".join(map(self._figure, rows))}{extra}</div>'

    def _label(self, row: int) -> str:
        name, place = self._where[row]
        label = self._data.splits[name].labels[place]
        return self._data.class_names[label] if label >= 0 else "no label"

    def _figure(self, row: int) -> str:
        name, place = self._where[row]
        pixels = self._data.splits[name].images[place]
        label = escape(self._label(row))
        return (
            f'<figure><img alt="{label}, row {row}" src="{_data_uri(pixels)}">'
            f"<figcaption><b>{label}</b><br>{escape(name)} {row}</figcaption></figure>"
        )


def _data_uri(pixels: np.ndarray) -> str:
    """A uint8 [H, W, C] image in RGB or grey as a PNG data URI."""
    ordered = pixels[..., ::-1] if pixels.shape[-1] == 3 else pixels
    encoded = cv2.imencode(".png", ordered)[1].tobytes()
    return "data:image/png;base64," + base64.b64encode(encoded).decode()


def _section(title: str, text: str, shown: list[str], count: int) -> str:
    number = f"{count:,}" if len(shown) == count else f"{len(shown):,} of {count:,} shown"
    return (
        f"<h2>{escape(title)}: {number}</h2><p class=soft>{escape(text)}</p>"
        f"<div class=groups>{''.join(shown)}</div>"
    )


def _counts(report: dict[str, Any]) -> str:
    classes = [[n, *s["classes"], s["images"]] for n, s in report["splits"].items()]
    classes += [
        [f"train, clean={mode}", *c["classes"], c["images"]]
        for mode, c in report.get("cleaning", {}).items()
        if mode != "none"
    ]
    names = list(report["splits"])
    exact = [[n, *e.values()] for n, e in report["exact"].items()]
    copies = [
        [n + note, *(row.get(other, "") for other in names)]
        for counts, note in ((report["copies"], ""), (report["near"]["copies"], " (nearly equal)"))
        for n, row in counts.items()
    ]
    return (
        "<h2>Classes</h2>"
        + _table(["images", *report["class_names"], "all"], classes)
        + "<h2>Equal pixels</h2>"
        + _table(["", "groups", "images", "one label", "conflicting", "(images)"], exact)
        + "<h2>Images with a copy in another split</h2>"
        + _table(["images of, copy in", *names], copies)
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def line(cells: Sequence[Any], tag: str) -> str:
        texts = (f"{c:,}" if isinstance(c, int) else escape(str(c)) for c in cells)
        return "<tr>" + "".join(f"<{tag}>{text}</{tag}>" for text in texts) + "</tr>"

    body = line(head, "th") + "".join(line(row, "td") for row in rows)
    # A wide table scrolls within itself, so that the page does not on a telephone.
    return f"<div class=wide><table>{body}</table></div>"


def _charts(report: dict[str, Any]) -> str:
    charts = []
    for what in ("brightness", "contrast"):
        for name, split in report["splits"].items():
            found = split[what]
            median = found["quantiles"]["50%"]
            charts.append(
                f"<figure>{_bars(found['histogram'])}<figcaption>{what}, {escape(name)}: 0 to "
                f"{found['histogram_end']}, median {median:.0f}</figcaption></figure>"
            )
    return f"<div class=charts>{''.join(charts)}</div>"


def _bars(counts: Sequence[int]) -> str:
    top = max([*counts, 1])
    bars = "".join(
        f'<rect x="{10 * k}" y="{100 - 100 * n / top:.1f}" width="9" height="{100 * n / top:.1f}"/>'
        for k, n in enumerate(counts)
    )
    width = 10 * len(counts)
    return (
        f'<svg viewBox="0 0 {width} 101" role=img aria-label="histogram"><g fill="var(--bar)">'
        f'{bars}</g><path d="M0 100.5H{width}" stroke="var(--line)"/></svg>'
    )
