"""Scores of a classifier from its logits, in NumPy, and their table for a terminal."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ferjax.analysis.reliability import expected_calibration_error, reliability
from ferjax.config import UserError


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities float64 [N, C] of logits [N, C]."""
    shifted = np.asarray(logits, np.float64) - np.max(logits, axis=-1, keepdims=True)
    exp = np.exp(shifted)
    return exp / exp.sum(-1, keepdims=True)


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Share of images whose largest logit is their label's."""
    return float(np.mean(np.argmax(logits, -1) == labels))


def nll(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean of -log p(label), in nats."""
    likelihood = np.take_along_axis(probabilities, np.asarray(labels)[:, None], 1)
    return float(-np.log(np.maximum(likelihood, 1e-300)).mean())


def brief(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy and negative log-likelihood (nats): what is followed during training."""
    return {"accuracy": accuracy(logits, labels), "nll": nll(softmax(logits), labels)}


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share of n trials (Wilson 1927)."""
    z = 1.959964
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return float(centre - half), float(centre + half)


def restrict(logits: np.ndarray, have: Sequence[str], want: Sequence[str]) -> np.ndarray:
    """The logits of some classes; their softmax is the probabilities given that it is one of them.

    Args:
      logits: [N, C], or log-probabilities.
      have: the C classes' names.
      want: the names of the D classes that are wanted, in the order of the result.

    Returns:
      [N, D].

    Raises:
      UserError: a class that is wanted is not there.
    """
    if tuple(have) == tuple(want):
        return logits
    if missing := [name for name in want if name not in have]:
        raise UserError(
            f"the run tells apart {', '.join(have)}, and not {', '.join(missing)}: score it on "
            "its own classes"
        )
    return logits[:, [list(have).index(name) for name in want]]


def rates(predicted: np.ndarray, labels: np.ndarray, count: int) -> dict[str, Any]:
    """What predictions without probabilities are scored by.

    Args:
      predicted: int [N]; labels: int [N]; both in [0, count).

    Returns:
      images, accuracy, accuracy_interval, balanced_accuracy, macro_f1 and confusion, as
      `summarize` gives them.
    """
    labels = np.asarray(labels)
    confusion = np.bincount(labels * count + predicted, minlength=count**2).reshape(count, count)
    hits, true, found = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    f1 = 2 * hits / np.maximum(true + found, 1)
    share = float(hits.sum() / len(labels))
    return {
        "images": len(labels),
        "accuracy": share,
        "accuracy_interval": list(wilson_interval(share, len(labels))),
        "balanced_accuracy": float((hits / np.maximum(true, 1))[true > 0].mean()),
        "macro_f1": float(f1[true + found > 0].mean()),
        "confusion": confusion.tolist(),
    }


def summarize(logits: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    """All scores of one split.

    Args:
      logits: float [N, C]; labels: int [N]; classes: C names.

    Returns:
      accuracy, accuracy_interval (95 %), balanced_accuracy (mean recall of the classes that
      occur), macro_f1 (mean over all classes that occur or are predicted), nll (nats), ece,
      images, per_class {name: precision, recall, f1, images}, confusion [true][predicted].
    """
    probabilities = softmax(logits)
    counted = rates(probabilities.argmax(-1), labels, len(classes))
    confusion = np.array(counted.pop("confusion"))
    hits, true, found = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    precision, recall = hits / np.maximum(found, 1), hits / np.maximum(true, 1)
    f1 = 2 * hits / np.maximum(true + found, 1)
    return {
        **counted,
        "nll": nll(probabilities, labels),
        "ece": expected_calibration_error(reliability(probabilities, labels)),
        "per_class": {
            name: {
                "precision": float(precision[i]),
                "recall": float(recall[i]),
                "f1": float(f1[i]),
                "images": int(true[i]),
            }
            for i, name in enumerate(classes)
        },
        "confusion": confusion.tolist(),
    }


def table(scores: dict[str, Any]) -> str:
    """A summary as text of at most 72 columns."""
    low, high = (100 * x for x in scores["accuracy_interval"])
    lines = [
        f"accuracy           {100 * scores['accuracy']:6.2f} %   (95 %: {low:.2f} to {high:.2f})",
        f"balanced accuracy  {100 * scores['balanced_accuracy']:6.2f} %",
        f"macro-F1           {100 * scores['macro_f1']:6.2f} %",
        f"NLL {scores['nll']:.3f} nats, ECE {scores['ece']:.3f}, {scores['images']:,} images",
        "",
        f"{'class':<12}{'precision':>10}{'recall':>10}{'F1':>10}{'images':>10}",
    ]
    for name, row in scores["per_class"].items():
        values = "".join(f"{100 * row[k]:>10.1f}" for k in ("precision", "recall", "f1"))
        lines.append(f"{name[:12]:<12}{values}{row['images']:>10,}")
    names = list(scores["per_class"])
    lines += ["", "confusion (rows: true, columns: predicted)"]
    lines.append(" " * 9 + "".join(f"{name[:8]:>9}" for name in names))
    for name, counts in zip(names, scores["confusion"], strict=True):
        lines.append(f"{name[:8]:<9}" + "".join(f"{c:>9,}" for c in counts))
    return "\n".join(lines)
