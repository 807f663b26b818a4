"""SoftMatch against NumPy on fixed logits: the weights, and their averages."""

import fakes
import numpy as np
import pytest
from fakes import cross_entropy, make_batch, one_hot, softmax, supervised

from ferjax.algorithms import softmatch
from ferjax.algorithms.base import Time
from ferjax.config import UserError


@pytest.mark.parametrize("alignment", ["uniform", "labeled", "none"])
def test_loss_and_averages_over_some_steps(alignment):
    method = softmatch.Algorithm(mu=3, decay=0.6, lambda_u=2.0, alignment=alignment)
    extra = method.init_extra(fakes.C, 100)
    m, v, labeled, present = 1 / fakes.C, 1.0, None, None
    for step in range(3):
        batch, a = make_batch(method, seed=step)
        loss, _, extra = fakes.loss(method, batch, extra, Time(step, 0.0))
        q = softmax(a["u:weak"])
        targets = a["x:target"].mean(0)
        keep = (0, 0.5, 0.6)[step]  # plain means at first
        labeled = targets if step == 0 else keep * labeled + (1 - keep) * targets
        present = q.mean(0) if step == 0 else keep * present + (1 - keep) * q.mean(0)
        aligned = q
        if alignment != "none":
            wanted = labeled if alignment == "labeled" else np.full(fakes.C, 1 / fakes.C)
            aligned = q * (wanted + 1e-6) / (present + 1e-6)
            aligned /= aligned.sum(1, keepdims=True)
        c = aligned.max(1)
        m, v = 0.6 * m + 0.4 * c.mean(), 0.6 * v + 0.4 * c.var(ddof=1)
        weight = np.where(c < m, np.exp(-((c - m) ** 2) / (2 * v / 4)), 1)
        # The target is the class before alignment.
        unlabeled = weight * cross_entropy(a["u:strong"], one_hot(q.argmax(1)))
        np.testing.assert_allclose(loss, supervised(a) + 2 * unlabeled.mean(), rtol=1e-5)
    for name, value in {"mean": m, "variance": v, "labeled": labeled, "unlabeled": present}.items():
        np.testing.assert_allclose(extra[name], value, rtol=1e-5, atol=1e-7)
    assert weight.min() < 0.99  # some count less


def test_only_strong_views_learn():
    method = softmatch.Algorithm(mu=3)
    batch, _ = make_batch(method)
    got = fakes.gradients(method, batch, method.init_extra(fakes.C, 100), Time(0, 0.0))
    assert np.abs(got["strong"]).max() > 1e-3
    assert np.abs(got["weak"]).max() == 0


def test_bad_hyperparameters():
    with pytest.raises(UserError, match="alignment=prior: use uniform"):
        softmatch.Algorithm(alignment="prior")
