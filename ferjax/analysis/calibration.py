"""Whether a confidence can be trusted, and whether two runs differ: in NumPy alone.

Probabilities are float [N, C] with rows that add up to 1, labels int [N] in [0, C).
"""

from typing import Any

import numpy as np

from ferjax.analysis.reliability import expected_calibration_error, reliability
from ferjax.analysis.scores import nll, softmax

TEMPERATURES = (0.01, 100.0)  # the range that a fit searches
RESAMPLES = 10_000  # of a bootstrap


def brier(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean over images of the sum over classes of (p - one-hot)^2, in [0, 2] (Brier 1950)."""
    errors = np.array(probabilities, np.float64)
    errors[np.arange(len(errors)), labels] -= 1
    return float(np.square(errors).sum(-1).mean())


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The T > 0 that minimises the NLL of softmax(logits / T) (Guo et al. 2017, section 4.2).

    In b = 1 / T the NLL is convex with the slope mean(E_p[z] - z_label), which is 0 at the minimum:
    found by bisection. Labels that are all right (or all worst) have no minimum: the end of
    `TEMPERATURES` is returned.

    Args:
      logits: [N, C]; log-probabilities will do.
      labels: [N].
    """
    z = np.asarray(logits, np.float64)
    own = np.take_along_axis(z, np.asarray(labels)[:, None], 1)[:, 0]

    def slope(b: float) -> float:
        return float(np.mean(np.sum(softmax(b * z) * z, -1) - own))

    low, high = -np.log(TEMPERATURES[1]), -np.log(TEMPERATURES[0])  # of log b
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if slope(np.exp(middle)) > 0 else (middle, high)
    return float(np.exp(-(low + high) / 2))


def cross_fitted(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Probabilities [N, C], each half scaled by the temperature that the other half chose.

    The effect of scaling on the split that it is fitted on is judged by these: one temperature for
    all of it would be judged by images that chose it.
    """
    out = np.empty(np.shape(logits), np.float64)
    for half in (0, 1):
        temperature = fit_temperature(logits[1 - half :: 2], labels[1 - half :: 2])
        out[half::2] = softmax(np.asarray(logits[half::2], np.float64) / temperature)
    return out


def summarize_calibration(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """nll (nats), brier, ece (15 bins of equal width), ece_equal_mass (15 of equal mass)."""
    return {
        "nll": nll(probabilities, labels),
        "brier": brier(probabilities, labels),
        "ece": expected_calibration_error(reliability(probabilities, labels)),
        "ece_equal_mass": expected_calibration_error(
            reliability(probabilities, labels, equal_mass=True)
        ),
    }


def mcnemar(only_first: int, only_second: int) -> float:
    """The two-sided exact p of McNemar's test (McNemar 1947, with the binomial distribution).

    Args:
      only_first: images that only the first run has right.
      only_second: images that only the second run has right.

    Returns:
      The probability of a split at least as uneven if both were equally likely; 1 without images.
    """
    n, fewer = only_first + only_second, min(only_first, only_second)
    term = tail = 1  # binomial coefficients, exact
    for k in range(1, fewer + 1):
        term = term * (n - k + 1) // k
        tail += term
    return min(1.0, 2 * tail / 2**n)


def compare(
    first: np.ndarray, second: np.ndarray, labels: np.ndarray, *, seed: int = 0
) -> dict[str, Any]:
    """Compares two runs on the same images.

    Args:
      first: [N, C] logits or probabilities of one run.
      second: of the other.
      labels: [N].
      seed: of the bootstrap.

    Returns:
      difference (accuracy of the first less that of the second), difference_interval (95 %,
      percentiles of 10,000 paired resamples of the images), only_first and only_second (images
      that one alone has right), mcnemar_p, same_prediction (share).
    """
    a, b = np.argmax(first, -1), np.argmax(second, -1)
    right_a, right_b = a == labels, b == labels
    n = len(a)
    only_first, only_second = int(np.sum(right_a & ~right_b)), int(np.sum(right_b & ~right_a))
    # What a resample of the images says of the difference are the counts of these three kinds.
    shares = np.array([only_first, only_second, n - only_first - only_second]) / n
    drawn = np.random.default_rng(seed).multinomial(n, shares, RESAMPLES)
    low, high = np.percentile((drawn[:, 0] - drawn[:, 1]) / n, [2.5, 97.5])
    return {
        "difference": (only_first - only_second) / n,
        "difference_interval": [float(low), float(high)],
        "only_first": only_first,
        "only_second": only_second,
        "mcnemar_p": mcnemar(only_first, only_second),
        "same_prediction": float(np.mean(a == b)),
    }
