"""Scores against hand-worked and SciPy values."""

import numpy as np
import pytest
from scipy import special, stats

from ferjax.analysis import scores

CLASSES = ("a", "b", "c")


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    labels = rng.choice(3, 500, p=[0.7, 0.2, 0.1])
    logits = rng.normal(size=(500, 3)) * 2 + 2 * np.eye(3)[labels]
    return logits, labels


def test_hand_worked_confusion():
    labels = np.array([0, 0, 0, 1, 1, 2])
    logits = np.log(np.eye(3)[[0, 0, 1, 1, 0, 1]] * 0.8 + 0.1)
    s = scores.summarize(logits, labels, CLASSES)
    assert s["confusion"] == [[2, 1, 0], [1, 1, 0], [0, 1, 0]]
    assert s["accuracy"] == pytest.approx(3 / 6)
    assert s["balanced_accuracy"] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert s["per_class"]["a"] == pytest.approx(
        {"precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "images": 3}
    )
    assert s["per_class"]["c"]["precision"] == 0
    assert s["macro_f1"] == pytest.approx((2 / 3 + 2 / 5 + 0) / 3)
    assert s["nll"] == pytest.approx(-(3 * np.log(0.9 / 1.1) + 3 * np.log(0.1 / 1.1)) / 6)


def test_interval_is_wilsons(case):
    logits, labels = case
    s = scores.summarize(logits, labels, CLASSES)
    expected = stats.binomtest(round(s["accuracy"] * 500), 500).proportion_ci(method="wilson")
    assert s["accuracy_interval"] == pytest.approx([expected.low, expected.high], abs=1e-6)


def test_nll_against_scipy(case):
    logits, labels = case
    expected = -special.log_softmax(logits, axis=1)[np.arange(500), labels].mean()
    assert scores.summarize(logits, labels, CLASSES)["nll"] == pytest.approx(expected)
    assert scores.brief(logits, labels)["nll"] == pytest.approx(expected)


def test_calibration_error_by_a_plain_loop(case):
    logits, labels = case
    p = special.softmax(logits, axis=1)
    total = 0.0
    for b in range(15):
        inside = [i for i in range(500) if b / 15 < p[i].max() <= (b + 1) / 15]
        if inside:
            hit = np.mean([p[i].argmax() == labels[i] for i in inside])
            total += len(inside) / 500 * abs(hit - np.mean([p[i].max() for i in inside]))
    assert scores.summarize(logits, labels, CLASSES)["ece"] == pytest.approx(total)


def test_a_class_that_never_occurs_is_not_averaged():
    labels = np.array([0, 1])
    s = scores.summarize(np.eye(3)[[0, 1]] * 5, labels, CLASSES)
    assert s["balanced_accuracy"] == s["macro_f1"] == s["accuracy"] == 1


def test_extreme_logits_stay_finite():
    s = scores.summarize(np.array([[1e4, -1e4, 0.0]]), np.array([1]), CLASSES)
    assert np.isfinite(s["nll"])
    assert s["nll"] > 600


def test_table_fits_72_columns(case):
    logits, labels = case
    text = scores.table(scores.summarize(logits, labels, [f"a long name {i}" for i in range(3)]))
    assert max(map(len, text.splitlines())) <= 72
    assert f"{100 * scores.accuracy(logits, labels):.2f} %" in text
