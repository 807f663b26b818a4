"""Calibration and comparison against SciPy and against sums written out."""

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats

from ferjax.analysis import calibration, reliability, scores


def case(n=400, classes=5, scale=3.0, seed=0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, classes))
    labels = np.array([rng.choice(classes, p=p) for p in scipy.special.softmax(logits, -1)])
    return scale * logits, labels


@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_the_temperature_minimises_the_nll(scale):
    logits, labels = case(scale=scale)

    def loss(log_t):
        z = scipy.special.log_softmax(logits / np.exp(log_t), -1)
        return -z[np.arange(len(labels)), labels].mean()

    best = scipy.optimize.minimize_scalar(loss, bounds=(-3, 3), method="bounded").x
    found = calibration.fit_temperature(logits, labels)
    assert np.log(found) == pytest.approx(best, abs=1e-4)
    # Labels were drawn with temperature 1: what the scale did is undone.
    assert found == pytest.approx(scale, rel=0.2)


def test_a_temperature_without_minimum_is_the_end_of_the_range():
    logits = np.array([[2.0, 0.0], [0.0, 1.0]])
    low, high = calibration.TEMPERATURES
    assert calibration.fit_temperature(logits, np.array([0, 1])) == pytest.approx(low)
    assert calibration.fit_temperature(logits, np.array([1, 0])) == pytest.approx(high)


def test_cross_fitting_scales_each_half_by_the_other():
    logits, labels = case()
    changed = labels.copy()
    changed[::2] = (changed[::2] + 1) % 5
    before, after = (calibration.cross_fitted(logits, x) for x in (labels, changed))
    np.testing.assert_array_equal(before[::2], after[::2])  # their own labels play no part
    assert np.abs(before[1::2] - after[1::2]).max() > 0.05
    t = calibration.fit_temperature(logits[1::2], labels[1::2])
    np.testing.assert_allclose(before[::2], scipy.special.softmax(logits[::2] / t, -1))


def test_bins_of_equal_width_by_hand():
    confidence = np.array([0.6, 0.8, 0.80001, 1.0, 0.55])
    p = np.stack([confidence, 1 - confidence], 1)
    labels = np.array([0, 1, 0, 0, 1])
    bins = reliability.reliability(p, labels, bins=5)
    assert [(b.low, b.high, b.images) for b in bins] == [
        (pytest.approx(0.4), pytest.approx(0.6), 2),
        (pytest.approx(0.6), pytest.approx(0.8), 1),
        (pytest.approx(0.8), pytest.approx(1.0), 2),
    ]
    assert [b.accuracy for b in bins] == [0.5, 0.0, 1.0]
    by_hand = 2 / 5 * abs(0.5 - 0.575) + 1 / 5 * 0.8 + 2 / 5 * abs(1 - 0.900005)
    assert reliability.expected_calibration_error(bins) == pytest.approx(by_hand)


def test_bins_of_equal_mass():
    logits, labels = case(n=47)
    p = scores.softmax(logits)
    bins = reliability.reliability(p, labels, bins=10, equal_mass=True)
    assert sorted({b.images for b in bins}) == [4, 5]
    order = np.argsort(p.max(-1), kind="stable")
    hits = (p.argmax(-1) == labels)[order]
    ece, start = 0.0, 0
    for b in bins:
        part = slice(start, start + b.images)
        ece += abs(hits[part].sum() - p.max(-1)[order][part].sum()) / 47
        start += b.images
    assert reliability.expected_calibration_error(bins) == pytest.approx(ece)
    few = reliability.reliability(p[:3], labels[:3], bins=10, equal_mass=True)
    assert [b.images for b in few] == [1, 1, 1]


def test_brier_and_nll():
    p = np.array([[0.7, 0.2, 0.1], [0.0, 0.0, 1.0]])
    by_hand = ((0.3**2 + 0.2**2 + 0.1**2) + (1 + 0 + 1)) / 2
    assert calibration.brier(p, np.array([0, 0])) == pytest.approx(by_hand)
    logits, labels = case()
    log_p = scipy.special.log_softmax(logits, -1)[np.arange(len(labels)), labels]
    assert calibration.nll(scores.softmax(logits), labels) == pytest.approx(-log_p.mean())
    assert p[0, 0] == 0.7, "the caller's array was changed"


@pytest.mark.parametrize(("b", "c"), [(0, 0), (0, 1), (5, 5), (3, 12), (240, 190), (1700, 1801)])
def test_mcnemar_is_the_binomial_test(b, c):
    wanted = scipy.stats.binomtest(b, b + c, 0.5).pvalue if b + c else 1.0
    assert calibration.mcnemar(b, c) == pytest.approx(wanted, rel=1e-9)
    assert calibration.mcnemar(c, b) == calibration.mcnemar(b, c)


def test_comparison_of_two_runs():
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 3, 500)
    first, second = (np.eye(3)[np.where(rng.random(500) < s, labels, 0)] for s in (0.8, 0.6))
    found = calibration.compare(first, second, labels)
    right = [x.argmax(-1) == labels for x in (first, second)]
    assert found["difference"] == pytest.approx(right[0].mean() - right[1].mean())
    assert found["only_first"] == int((right[0] & ~right[1]).sum())
    assert found["same_prediction"] == np.mean(first.argmax(-1) == second.argmax(-1))
    reference = scipy.stats.bootstrap(
        (right[0].astype(float), right[1].astype(float)),
        lambda x, y, axis: np.mean(x, axis) - np.mean(y, axis),
        paired=True,
        method="percentile",
        n_resamples=10_000,
        rng=np.random.default_rng(2),
    ).confidence_interval
    assert found["difference_interval"] == pytest.approx(tuple(reference), abs=0.005)
    same = calibration.compare(first, first, labels)
    assert (same["difference"], same["mcnemar_p"], same["same_prediction"]) == (0, 1, 1)
    assert same["difference_interval"] == [0, 0]


def test_summary_names():
    logits, labels = case()
    p = scores.softmax(logits)
    found = calibration.summarize_calibration(p, labels)
    assert set(found) == {"nll", "brier", "ece", "ece_equal_mass"}
    assert found["nll"] == pytest.approx(scores.brief(logits, labels)["nll"])
