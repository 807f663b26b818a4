"""Pseudo-Label against NumPy on fixed logits."""

import fakes
import numpy as np
import pytest
from fakes import cross_entropy, make_batch, one_hot, softmax, supervised

from ferjax.algorithms import pseudo_label
from ferjax.algorithms.base import Time


@pytest.mark.parametrize(("progress", "ramp"), [(0.0, 0.0), (0.1, 0.25), (0.4, 1.0), (0.9, 1.0)])
def test_loss_ramps_up_and_means_over_all_images(progress, ramp):
    method = pseudo_label.Algorithm(mu=3, threshold=0.7, lambda_u=2.0)
    batch, a = make_batch(method)
    loss, metrics, _ = fakes.loss(method, batch, {}, Time(0, progress))
    p = softmax(a["u:weak"])
    mask = p.max(1) >= 0.7
    assert 0 < mask.sum() < len(mask)
    own = one_hot(p.argmax(1))
    unlabeled = (mask * cross_entropy(a["u:weak"], own)).mean()
    np.testing.assert_allclose(loss, supervised(a) + 2.0 * ramp * unlabeled, rtol=1e-5)
    assert fakes.calls(method, batch, {}) == [("__call__", 6, True), ("__call__", 18, False)]
    np.testing.assert_allclose(fakes.means(metrics)["mask_rate"], mask.mean(), rtol=1e-6)


def test_the_target_is_fixed_and_the_same_view_learns():
    """The gradient of CE(p, argmax p) is p - one-hot for a confident image, 0 for another."""
    method = pseudo_label.Algorithm(mu=3, threshold=0.7, lambda_u=2.0, warmup=0.0)
    batch, a = make_batch(method)
    p = softmax(a["u:weak"])
    mask = p.max(1) >= 0.7
    expected = 2.0 * mask[:, None] * (p - one_hot(p.argmax(1))) / len(p)
    got = fakes.gradients(method, batch, {}, Time(0, 0.5))["weak"].reshape(len(p), -1)
    np.testing.assert_allclose(got[:, : fakes.C], expected, atol=1e-6)
    assert np.abs(expected).max() > 1e-3
