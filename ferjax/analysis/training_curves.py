"""The rows of a metrics.jsonl as figures against the epoch."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ferjax.analysis import figures
from ferjax.analysis.figures import Series

POINTS = 150  # of a training curve; more are averaged


def draw(rows: Sequence[dict[str, Any]]) -> list[tuple[str, Figure, str]]:
    """Name, figure and caption of each curve that the rows have values for.

    Args:
      rows: of kind "train" and "eval", as `ferjax.engine.metrics` writes them.
    """
    ema, raw = "public_test, EMA", "public_test, raw"
    public = [
        (_evaluated(rows, ema, f"ema_{kind}"), _evaluated(rows, raw, f"raw_{kind}"))
        for kind in ("accuracy", "nll")
    ]
    accuracy = [_trained(rows, "train", "train_accuracy"), *public[0]]
    losses = [_trained(rows, "train", "loss"), *public[1]]
    # The parts of the loss would hide public_test's curves: they have a figure of their own.
    parts = [
        _trained(rows, "labelled part", "loss_labeled"),
        _trained(rows, "unlabelled part", "loss_unlabeled"),
    ]
    pseudo = [
        _trained(rows, "above the threshold", "mask_rate"),
        *_by_source(rows),
        _trained(rows, "pseudo-labels right", "pseudo_label_accuracy"),
    ]
    rate = [_trained(rows, "", "learning_rate")]
    speed = [_trained(rows, "", "images_per_second")]
    drawings = [
        ("accuracy", accuracy, "accuracy", True, "Accuracy in training and on public_test."),
        ("loss", losses, "loss", False, "Training loss; NLL (nats) on public_test."),
        ("loss_parts", parts, "loss", False, "The training loss's parts, before their weights."),
        ("pseudo_labels", pseudo, "share", True, "Mask rate and pseudo-label accuracy."),
        ("learning_rate", rate, "learning rate", False, "Learning rate."),
        ("speed", speed, "images/s", False, "Images a second in training, of all kinds."),
    ]
    return [
        (name, figures.curves([x for x in lines if x], y_label=label, percent=percent), caption)
        for name, lines, label, percent, caption in drawings
        if any(lines)
    ]


def _by_source(rows: Sequence[dict[str, Any]]) -> list[Series | None]:
    """The mask rates of images whose hidden label is known, and of other pictures, if there are."""
    if not any(row.get("mask_rate_unknown") is not None for row in rows):
        return []
    return [
        _trained(rows, "above, own images", "mask_rate_known"),
        _trained(rows, "above, pictures without label", "mask_rate_unknown"),
    ]


def _trained(rows: Sequence[dict[str, Any]], name: str, key: str) -> Series | None:
    """A training curve, averaged to at most POINTS points."""
    rows = [row for row in rows if row.get("kind") == "train" and row.get(key) is not None]
    if not rows:
        return None
    groups = np.array_split(np.arange(len(rows)), min(POINTS, len(rows)))
    x, y = ([float(np.mean([rows[i][k] for i in g])) for g in groups] for k in ("epoch", key))
    return Series(name, x, y)


def _evaluated(rows: Sequence[dict[str, Any]], name: str, key: str) -> Series | None:
    rows = [row for row in rows if row.get("kind") == "eval" and row.get(key) is not None]
    x, y = ([row[k] for row in rows] for k in ("epoch", key))
    return Series(name, x, y) if rows else None
