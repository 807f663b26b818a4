"""Entropy minimisation against NumPy on fixed logits."""

import fakes
import numpy as np
import pytest
from fakes import make_batch, softmax, supervised

from ferjax.algorithms import entropy_min
from ferjax.algorithms.base import Time


@pytest.mark.parametrize(("warmup", "ramp"), [(0.0, 1.0), (0.5, 0.4)])
def test_loss(warmup, ramp):
    method = entropy_min.Algorithm(mu=2, warmup=warmup)
    batch, a = make_batch(method)
    loss, _, _ = fakes.loss(method, batch, {}, Time(0, 0.2))
    p = softmax(a["u:weak"])
    spread = -(p * np.log(p)).sum(1)
    np.testing.assert_allclose(loss, supervised(a) + 0.06 * ramp * spread.mean(), rtol=1e-5)
    assert fakes.calls(method, batch, {}) == [("__call__", 6, True), ("__call__", 12, False)]


def test_gradient_flows_through_both_factors():
    """dH/dz_c = -p_c (log p_c + H)."""
    method = entropy_min.Algorithm(mu=2, lambda_u=1.0)
    batch, a = make_batch(method)
    p = softmax(a["u:weak"])
    spread = -(p * np.log(p)).sum(1, keepdims=True)
    got = fakes.gradients(method, batch, {}, Time(0, 0.2))["weak"].reshape(len(p), -1)
    expected = -p * (np.log(p) + spread) / len(p)
    np.testing.assert_allclose(got[:, : fakes.C], expected, atol=1e-6)
    assert np.abs(expected).max() > 1e-3
