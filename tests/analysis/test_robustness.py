"""Scores under corruption, by hand."""

import numpy as np
import pytest

from ferjax.analysis import robustness


def test_accuracy_by_kind_and_level():
    labels = np.array([0, 1, 2, 0])
    clean, mild, strong = (np.eye(3)[k] for k in ([0, 1, 2, 1], [0, 1, 1, 0], [1, 1, 1, 1]))
    found = robustness.summarize_robustness(
        clean, labels, {"noise": {10.0: mild, 50.0: strong}, "darkness": {0.5: clean}}
    )
    assert found["clean_accuracy"] == 3 / 4
    noise, dark = found["kinds"]["noise"], found["kinds"]["darkness"]
    assert [(row["level"], row["accuracy"]) for row in noise] == [(10.0, 3 / 4), (50.0, 1 / 4)]
    assert [row["same_prediction"] for row in noise + dark] == [2 / 4, 2 / 4, 1.0]
    assert found["mean_accuracy"] == pytest.approx((3 / 4 + 1 / 4 + 3 / 4) / 3)
    assert found["relative"] == pytest.approx(found["mean_accuracy"] / (3 / 4))
    low, high = noise[0]["accuracy_interval"]
    assert low < 3 / 4 < high
    text = robustness.table(found)
    assert "75.00 (10)" in text
    assert max(map(len, text.splitlines())) <= 72
    wrong = robustness.summarize_robustness(-np.eye(3), np.arange(3), {"noise": {1.0: np.eye(3)}})
    assert wrong["relative"] is None
