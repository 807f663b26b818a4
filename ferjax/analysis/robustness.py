"""Accuracy on corrupted images beside that on clean ones, in NumPy alone."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ferjax.analysis import scores


def summarize_robustness(
    clean: np.ndarray, labels: np.ndarray, corrupted: Mapping[str, Mapping[float, np.ndarray]]
) -> dict[str, Any]:
    """Scores of the same images under each kind and level of corruption.

    Args:
      clean: logits [N, C] of the images as they are.
      labels: int [N].
      corrupted: kind -> level -> logits [N, C].

    Returns:
      clean_accuracy; kinds: kind -> a list, by level as given, of level, accuracy,
      accuracy_interval (95 %), same_prediction (share of images predicted as when clean);
      mean_accuracy over all kinds and levels; relative (mean_accuracy / clean_accuracy, None if
      that is 0).
    """
    before = np.argmax(clean, -1)
    own = float(np.mean(before == labels))
    kinds = {
        kind: [
            {
                "level": float(level),
                "accuracy": scores.accuracy(logits, labels),
                "accuracy_interval": list(
                    scores.wilson_interval(scores.accuracy(logits, labels), len(labels))
                ),
                "same_prediction": float(np.mean(np.argmax(logits, -1) == before)),
            }
            for level, logits in levels.items()
        ]
        for kind, levels in corrupted.items()
    }
    mean = float(np.mean([row["accuracy"] for rows in kinds.values() for row in rows]))
    return {
        "clean_accuracy": own,
        "mean_accuracy": mean,
        "relative": mean / own if own else None,
        "kinds": kinds,
    }


def table(found: dict[str, Any]) -> str:
    """What `summarize_robustness` found, for a terminal: accuracy (level), the mildest first."""
    lines = [f"corruptions: accuracy in % (level); clean {100 * found['clean_accuracy']:.2f} %"]
    for kind, rows in found["kinds"].items():
        cells = (f"{100 * row['accuracy']:.2f} ({row['level']:g})" for row in rows)
        lines.append(f"{kind:<14}" + "".join(f"{cell:>16}" for cell in cells))
    lines.append(f"mean {100 * found['mean_accuracy']:.2f} %")
    return "\n".join(lines)
