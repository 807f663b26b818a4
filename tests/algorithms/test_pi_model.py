"""The Pi-Model against NumPy on fixed logits."""

import fakes
import numpy as np
import pytest
from fakes import make_batch, softmax, supervised

from ferjax.algorithms import pi_model
from ferjax.algorithms.base import Time
from ferjax.config import UserError


@pytest.mark.parametrize(("ramp", "weight"), [("linear", 0.25), ("sigmoid", np.exp(-5 * 0.75**2))])
def test_loss(ramp, weight):
    method = pi_model.Algorithm(mu=2, ramp=ramp)
    batch, a = make_batch(method)
    loss, _, _ = fakes.loss(method, batch, {}, Time(0, 0.1))
    distance = ((softmax(a["u:weak"]) - softmax(a["u:weak:2"])) ** 2).mean(1).mean()
    assert distance > 0.01
    np.testing.assert_allclose(loss, supervised(a) + 10 * weight * distance, rtol=1e-5)
    assert [call[2] for call in fakes.calls(method, batch, {})] == [True, False, False]


def test_one_branch_learns():
    method = pi_model.Algorithm(mu=2)
    batch, _ = make_batch(method)
    got = fakes.gradients(method, batch, {}, Time(0, 0.5))
    assert np.abs(got["weak"]).max() > 1e-3
    assert np.abs(got["weak:2"]).max() == 0


def test_unknown_ramp():
    with pytest.raises(UserError, match="ramp=step: use linear or sigmoid"):
        pi_model.Algorithm(ramp="step")
