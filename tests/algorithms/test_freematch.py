"""FreeMatch against NumPy on fixed logits: thresholds, fairness, averages."""

import fakes
import jax.numpy as jnp
import numpy as np
from fakes import cross_entropy, make_batch, one_hot, softmax, supervised

from ferjax.algorithms import freematch
from ferjax.algorithms.base import Time


def ratio(p, histogram):
    out = np.array([x / h if h > 0 else 0 for x, h in zip(p, histogram, strict=True)])
    return out / out.sum()


def test_loss_and_averages_over_some_steps():
    method = freematch.Algorithm(mu=3, decay=0.9, lambda_f=0.5, lambda_u=2.0)
    extra = method.init_extra(fakes.C, 100)
    tau, mean, histogram = 1 / fakes.C, np.full(fakes.C, 1 / 7), np.full(fakes.C, 1 / 7)
    for seed in range(3):
        batch, a = make_batch(method, seed=seed, scale=1.5)
        loss, metrics, extra = fakes.loss(method, batch, extra, Time(0, 0.0))
        q, p = softmax(a["u:weak"]), softmax(a["u:strong"])
        guess = q.argmax(1)
        tau = 0.9 * tau + 0.1 * q.max(1).mean()
        mean = 0.9 * mean + 0.1 * q.mean(0)
        histogram = 0.9 * histogram + 0.1 * one_hot(guess).mean(0)
        mask = q.max(1) >= (tau * mean / mean.max())[guess]
        unlabeled = (mask * cross_entropy(a["u:strong"], one_hot(guess))).mean()
        h = one_hot(p.argmax(1))[mask].mean(0)
        fair = (ratio(mean, histogram) * np.log(ratio(p[mask].mean(0), h) + 1e-12)).sum()
        np.testing.assert_allclose(
            loss, supervised(a) + 2 * unlabeled + 0.5 * fair, rtol=1e-5, atol=1e-5
        )
        assert abs(fair) > 0.1
    for name, value in {"confidence": tau, "mean": mean, "histogram": histogram}.items():
        np.testing.assert_allclose(extra[name], value, rtol=1e-5)
        assert extra[name].dtype == jnp.float32
    assert 0 < fakes.means(metrics)["mask_rate"] <= 1


def test_fairness_has_a_gradient_and_no_nan_without_confident_images():
    method = freematch.Algorithm(mu=3, lambda_u=0.0, lambda_f=1.0)
    batch, _ = make_batch(method)
    extra = method.init_extra(fakes.C, 100)
    got = fakes.gradients(method, batch, extra, Time(0, 0.0))
    assert np.abs(got["strong"]).max() > 1e-4
    assert np.abs(got["weak"]).max() == 0
    nobody = {**extra, "confidence": jnp.asarray(50.0)}  # a threshold that nobody reaches
    got = fakes.gradients(method, batch, nobody, Time(0, 0.0))
    assert np.abs(got["strong"]).max() == 0  # and not NaN
    loss, metrics, _ = fakes.loss(method, batch, nobody, Time(0, 0.0))
    assert np.isfinite(float(loss))
    assert fakes.means(metrics)["loss_fairness"] == 0
