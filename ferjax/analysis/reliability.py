"""Confidence against accuracy in bins, in NumPy: the reliability diagram and calibration errors."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BINS = 15  # of the expected calibration error (Guo et al. 2017)


@dataclass(frozen=True)
class Bin:
    """The images of one range of confidence.

    Attributes:
      low, high: the range, in [0, 1]; of an equal-mass bin the least and the greatest confidence.
      images: how many.
      confidence: their mean confidence.
      accuracy: the share of them that is right.
    """

    low: float
    high: float
    images: int
    confidence: float
    accuracy: float


def reliability(
    probabilities: np.ndarray, labels: np.ndarray, *, bins: int = BINS, equal_mass: bool = False
) -> list[Bin]:
    """The bins of a reliability diagram, without the empty ones.

    Args:
      probabilities: [N, C]; the confidence is a row's largest.
      labels: [N].
      bins: how many: of equal width, (low, high], or of equal mass (sizes differ by at most one).
      equal_mass: bins over sorted confidences (Nguyen & O'Connor 2015), so that none is empty.
    """
    confidence = np.max(probabilities, -1)
    correct = np.argmax(probabilities, -1) == labels
    if equal_mass:
        order = np.argsort(confidence, kind="stable")
        groups = [rows for rows in np.array_split(order, bins) if len(rows)]
        ranges = [(float(confidence[g[0]]), float(confidence[g[-1]])) for g in groups]
    else:
        place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
        groups = [np.flatnonzero(place == b) for b in np.unique(place)]
        ranges = [(float(b / bins), float((b + 1) / bins)) for b in np.unique(place)]
    return [
        Bin(low, high, len(rows), float(confidence[rows].mean()), float(correct[rows].mean()))
        for (low, high), rows in zip(ranges, groups, strict=True)
    ]


def expected_calibration_error(bins: Sequence[Bin]) -> float:
    """Sum over bins of share |accuracy - confidence| (Guo et al. 2017, eq. 5)."""
    total = sum(b.images for b in bins)
    return sum(b.images / total * abs(b.accuracy - b.confidence) for b in bins)
