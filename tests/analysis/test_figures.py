"""Figures: what they show, read back from the SVG and from Matplotlib's artists."""

import io
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from PIL import Image

from ferjax.analysis import figures, page, training_curves
from ferjax.analysis.reliability import reliability

NAMES = ("angry", "a & <b>")
TEXT = "{http://www.w3.org/2000/svg}text"


def texts(svg):
    return ["".join(e.itertext()) for e in ET.fromstring(svg).iter(TEXT)]


def test_every_colour_becomes_the_pages_and_no_id_is_shared():
    counts = [[3, 1], [0, 0]]
    points = np.random.default_rng(0).random((20, 2))
    labels = np.arange(20) % 2
    drawn = [
        figures.confusion(counts, NAMES, shares=False),
        figures.scatter(points, labels, NAMES),
        figures.histogram({"right": points[:, 0], "wrong": points[:, 1]}, x_label="x"),
        figures.reliability(reliability(points, labels)),
    ]
    svgs = [figures.svg(each, f'a "title" & {i}') for i, each in enumerate(drawn)]
    seen = set()
    for svg in svgs:
        root = ET.fromstring(svg)
        assert root.get("aria-label").startswith('a "title" & ')
        assert not re.search(r"#[0-9a-f]{6}\b|font-family|<style|<metadata", svg)
        assert set(re.findall(r"var\(--([\w-]+)\)", svg)) <= set(figures.LIGHT)
        ids = [e.get("id") for e in root.iter() if e.get("id")]
        assert not seen & set(ids)
        seen |= set(ids)
    assert set(figures.DARK) == set(figures.LIGHT)
    assert len(set(figures.LIGHT.values())) == len(figures.LIGHT)


@pytest.mark.parametrize("palette", [figures.LIGHT, figures.DARK])
def test_colours_are_legible(palette):
    """WCAG 2: contrast of text at least 4.5 on the page, also on the palest and darkest cell."""

    def light(value):
        rgb = np.array([int(value[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        return float(
            np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
            @ [0.2126, 0.7152, 0.0722]
        )

    background = "#ffffff" if palette is figures.LIGHT else "#14191e"
    for name in ("ink", "muted", "accent", "second", "third", "fourth"):
        pair = sorted((light(palette[name]), light(background)))
        assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 4.5, name
    pair = sorted((light(palette["accent"]), light(palette["on-accent"])))
    assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 4.5


def test_a_name_is_no_formula():
    names = (r"$\happy$", "a$b")
    counts = [[3, 1], [0, 2]]
    points = np.random.default_rng(0).random((20, 2))
    each = {"precision": 0.5, "recall": 0.5, "f1": 0.5}
    for drawn in (
        figures.confusion(counts, names, shares=False),
        figures.scatter(points, np.arange(20) % 2, names),
        figures.class_bars(dict.fromkeys(names, each)),
    ):
        assert set(names) <= set(texts(figures.svg(drawn, "a")))


def test_a_confusion_matrix_as_counts_and_shares():
    counts = [[30, 10], [0, 0]]
    plain = texts(figures.svg(figures.confusion(counts, NAMES, shares=False), "counts"))
    shares = texts(figures.svg(figures.confusion(counts, NAMES, shares=True), "shares"))
    assert [t for t in plain if t.isdigit()] == ["30", "10", "0", "0"]
    assert [t for t in shares if t.isdigit()] == ["75", "25", "0", "0"]
    assert plain.count("a & <b>") == 2


def test_text_is_legible_at_400_pixels():
    """The page shows a figure of 288 points at 368 pixels or more there."""
    per_class = {name: {"precision": 0.5, "recall": 0.25, "f1": 1 / 3} for name in NAMES}
    for each in (
        figures.class_bars(per_class),
        figures.confusion([[1, 0], [0, 1]], NAMES, shares=True),
    ):
        svg = figures.svg(each, "x")
        assert 'viewBox="0 0 288 ' in svg
        sizes = [float(s) for s in re.findall(r"font-size: ([\d.]+)px", svg)]
        assert min(sizes) * 368 / 288 >= 9.5
    assert {"50", "25", "33"} <= set(texts(figures.svg(figures.class_bars(per_class), "x")))


def test_gaps_and_png():
    line = figures.Series("a", [0, 1, 2], [0.5, None, 1.0])
    drawn = figures.curves([line], y_label="share", percent=True)
    (plotted,) = drawn.axes[0].lines
    np.testing.assert_array_equal(plotted.get_ydata(), [50, np.nan, 100])
    assert "nan" not in figures.svg(drawn, "x").lower()
    image = Image.open(io.BytesIO(figures.png(drawn)))
    assert image.size[0] == 800
    assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)


def test_training_curves_are_means_of_what_is_there():
    rows = [
        {"kind": "train", "epoch": i / 100, "loss": float(i), "mask_rate": None}
        for i in range(1, 451)
    ]
    rows.append({"kind": "eval", "epoch": 4.5, "ema_nll": 2.0})
    drawn = {name: figure for name, figure, _ in training_curves.draw(rows)}
    assert set(drawn) == {"loss"}
    train, public = drawn["loss"].axes[0].lines
    assert len(train.get_ydata()) == training_curves.POINTS
    np.testing.assert_allclose(train.get_ydata()[0], (1 + 2 + 3) / 3)
    np.testing.assert_allclose(public.get_ydata(), [2.0])
    assert training_curves.draw([]) == []


def test_mask_rates_are_shown_apart_where_pictures_without_label_are_used():
    def labels(**rates):
        rows = [{"kind": "train", "epoch": i, "mask_rate": 0.5, **rates} for i in range(3)]
        ((name, figure, _),) = training_curves.draw(rows)
        assert name == "pseudo_labels"
        return {line.get_label(): line.get_ydata()[0] for line in figure.axes[0].lines}

    assert len(labels(mask_rate_known=0.5, mask_rate_unknown=None)) == 1
    shown = labels(mask_rate_known=0.6, mask_rate_unknown=0.2)
    assert shown["above, own images"] == 60
    assert shown["above, pictures without label"] == 20


def test_pages_escape_what_they_are_given():
    made = page.page("<i>", [("a", "A & B", page.table(("<x>",), [("<y>",)]))], "")
    assert "<title>&lt;i&gt;</title>" in made
    assert "<td>&lt;y&gt;</td>" in made
    assert "<x>" not in made
