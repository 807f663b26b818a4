"""ReMixMatch against NumPy on fixed logits; its rotations and its second head."""

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fakes import C, FakeNet, cross_entropy, make_batch, softmax

from ferjax.algorithms import remixmatch
from ferjax.algorithms.base import Time
from ferjax.config import UserError
from ferjax.models.cnn import Model


def test_loss_and_averages_over_two_steps(monkeypatch):
    """MixUp is tested with MixMatch; here each image keeps all of itself."""
    seen = []

    def no_mixup(batch, images, targets, keys, alpha):
        seen.append(targets)
        assert alpha == 0.75
        return list(images), list(targets)

    monkeypatch.setattr(remixmatch, "mixup", no_mixup)
    method = remixmatch.Algorithm(mu=2, strong_views=2, decay=0.9, warmup=0.5)
    assert method.unlabeled_views == ("weak", "strong", "strong:2")
    extra = method.init_extra(C, 100)
    labeled = present = None
    for step in range(2):
        batch, a = make_batch(method, seed=step)
        net = FakeNet()
        loss, _, extra = method.loss(net, batch, extra, Time(step, 0.1))
        p, y = softmax(a["u:weak"]), a["x:target"]
        # Plain means, as long as they are over fewer than 10 steps.
        labeled = y.mean(0) if step == 0 else 0.5 * labeled + 0.5 * y.mean(0)
        present = p.mean(0) if step == 0 else 0.5 * present + 0.5 * p.mean(0)
        q = p * (labeled + 1e-6) / (present + 1e-6)
        q = q**2 / (q**2).sum(1, keepdims=True)
        np.testing.assert_allclose(seen[-1][1], q, rtol=1e-4, atol=1e-6)
        mixed = np.mean([cross_entropy(a[f"u:{v}"], q) for v in method.unlabeled_views])
        rotation, turns = rotation_logits(batch, net)
        expected = (
            cross_entropy(a["x:strong"], y).mean()
            + 0.2 * (1.5 * mixed + 0.5 * cross_entropy(a["u:strong"], q).mean())
            + 0.5 * cross_entropy(rotation, np.eye(4)[turns]).mean()
        )
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
        m = 2 * fakes.N
        assert net.calls == [
            ("__call__", m, False),
            ("__call__", fakes.N + 3 * m, True),
            ("__call__", m, False),
            ("rotation", m, False),
        ]
    np.testing.assert_allclose(extra["labeled"], labeled, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(extra["unlabeled"], present, rtol=1e-5)


def rotation_logits(batch, net):
    """The net's rotation logits, and the quarter turns that NumPy finds in what it saw."""
    strong, turned = (np.asarray(x) for x in (batch.unlabeled.views["strong"], net.seen[-1]))
    turns = [
        next(k for k in range(4) if np.array_equal(np.rot90(before, k), after))
        for before, after in zip(strong, turned, strict=True)
    ]
    assert len(set(turns)) > 1
    return turned.reshape(len(turned), -1)[:, -4:], turns


def test_gradients_reach_all_views(monkeypatch):
    monkeypatch.setattr(remixmatch, "mixup", lambda b, images, targets, *_: (images, targets))
    method = remixmatch.Algorithm(mu=2, strong_views=2)
    batch, _ = make_batch(method)
    got = fakes.gradients(method, batch, method.init_extra(C, 9), Time(0, 0.5))
    assert all(np.abs(g).max() > 1e-4 for g in got.values())


def test_the_wrapped_model_has_the_same_call():
    model = Model(layers=("conv 4 3 nobias", "bn", "relu", "gap"))
    wrapped = remixmatch.Algorithm().wrap(model)
    images = jnp.asarray(np.random.default_rng(0).normal(0, 1, (3, 6, 6, 1)), jnp.float32)
    variables = wrapped.init(jax.random.key(0), images)
    inner = {name: tree["backbone"] for name, tree in variables.items()}
    assert set(variables["params"]) == {"backbone", "rotation_head"}
    np.testing.assert_array_equal(wrapped.apply(variables, images), model.apply(inner, images))
    turned = wrapped.apply(variables, images, method="rotation")
    vector = model.apply(inner, model.apply(inner, images, method="features"), method="head")[1]
    head = variables["params"]["rotation_head"]
    np.testing.assert_allclose(turned, vector @ head["kernel"] + head["bias"], rtol=1e-5)


def test_bad_hyperparameters():
    with pytest.raises(UserError, match="strong_views=0: it must be 1 or more"):
        remixmatch.Algorithm(strong_views=0)
    with pytest.raises(UserError, match="above 0"):
        remixmatch.Algorithm(temperature=0.0)
