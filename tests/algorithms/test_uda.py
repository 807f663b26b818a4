"""UDA against NumPy on fixed logits: its temperature and its annealing act."""

import fakes
import numpy as np
import pytest
from fakes import cross_entropy, log_softmax, make_batch, softmax, supervised

from ferjax.algorithms import uda
from ferjax.algorithms.base import Time
from ferjax.config import UserError


def divergence(a, tau, temperature):
    q = softmax(a["u:weak"])
    mask = q.max(1) > tau
    assert 0 < mask.sum() < len(mask)
    target = q ** (1 / temperature)
    target /= target.sum(1, keepdims=True)
    kl = (target * (np.log(target) - log_softmax(a["u:strong"]))).sum(1)
    return (mask * kl).mean()


@pytest.mark.parametrize("forward", ["joint", "split", "apart"])
@pytest.mark.parametrize("temperature", [0.4, 1.0])
def test_loss_is_the_divergence_from_the_sharpened_target(forward, temperature):
    method = uda.Algorithm(mu=3, temperature=temperature, lambda_u=2.0, forward=forward)
    batch, a = make_batch(method)
    loss, _, _ = fakes.loss(method, batch, {}, Time(0, 0.0))
    expected = supervised(a) + 2 * divergence(a, 0.8, temperature)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_the_temperature_acts_on_the_gradient():
    """d KL / d strong logits = mask (p_s - sharpened target) / m."""
    method = uda.Algorithm(mu=3, temperature=0.4)
    batch, a = make_batch(method)
    q = softmax(a["u:weak"])
    sharp = q**2.5 / (q**2.5).sum(1, keepdims=True)
    expected = (q.max(1) > 0.8)[:, None] * (softmax(a["u:strong"]) - sharp) / len(q)
    got = fakes.gradients(method, batch, {}, Time(0, 0.0))
    strong = got["strong"].reshape(len(q), -1)[:, : fakes.C]
    np.testing.assert_allclose(strong, expected, atol=1e-6)
    assert np.abs(sharp - q).max() > 0.05
    assert np.abs(got["weak"]).max() == 0


@pytest.mark.parametrize(
    ("tsa", "alpha"),
    [("linear", 0.3), ("log", 1 - np.exp(-1.5)), ("exp", np.exp(5 * (0.3 - 1)))],
)
def test_annealing_leaves_out_what_is_known_too_well(tsa, alpha):
    method = uda.Algorithm(mu=3, tsa=tsa, lambda_u=0.0)
    batch, a = make_batch(method, seed=14)
    loss, metrics, _ = fakes.loss(method, batch, {}, Time(0, 0.3))
    eta = alpha * (1 - 1 / fakes.C) + 1 / fakes.C
    kept = (softmax(a["x:weak"]) * a["x:target"]).sum(1) <= eta
    assert 0 < kept.sum() < len(kept)
    expected = cross_entropy(a["x:weak"], a["x:target"])[kept].mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    seen = fakes.means(metrics)
    np.testing.assert_allclose(seen["loss_labeled"], expected, rtol=1e-5)
    np.testing.assert_allclose(seen["released_rate"], kept.mean(), rtol=1e-6)


def test_no_released_label_gives_no_loss_and_no_nan():
    method = uda.Algorithm(mu=3, tsa="linear", lambda_u=0.0)
    batch, _ = make_batch(method)
    sure = batch.labeled.target * 30
    images = np.zeros((fakes.N, fakes.SIDE**2), np.float32)
    images[:, : fakes.C] = sure
    views = {"weak": images.reshape(fakes.N, fakes.SIDE, fakes.SIDE, 1)}
    batch = batch.replace(labeled=batch.labeled.replace(views=views))
    assert float(fakes.loss(method, batch, {}, Time(0, 0.1))[0]) == 0


def test_bad_hyperparameters():
    with pytest.raises(UserError, match="tsa=cosine: use none"):
        uda.Algorithm(tsa="cosine")
    with pytest.raises(UserError, match=r"temperature=0.*above 0"):
        uda.Algorithm(temperature=0.0)
