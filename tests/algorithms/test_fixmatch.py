"""Loss values against NumPy written from the papers' formulas, on fixed logits."""

import dataclasses

import harness
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ferjax.algorithms import fixmatch, supervised
from ferjax.algorithms.base import Batch, Part, Time
from ferjax.config import UserError

N, MU, C = 5, 3, 7


class LinearNet:
    """A net whose logits are the first C pixels of an image: its loss can be worked out by hand."""

    def __init__(self):
        self.calls = []

    def __call__(self, images, *, keys=None, update=True, method="__call__"):
        self.calls.append((len(images), len(keys), update))
        return images.reshape(len(images), -1)[:, :C]


def make_part(rng, n, views):
    logits = {name: rng.normal(0, 3, (n, C)) for name in views}
    images = {name: jnp.asarray(x).reshape(n, 1, C, 1) for name, x in logits.items()}
    target = np.eye(C)[rng.integers(0, C, n)]
    keys = jax.random.split(jax.random.key(0), n)
    part = Part(images, jnp.asarray(target), jnp.ones(n), jnp.arange(n), keys)
    return part, logits, target


@pytest.fixture
def batch():
    rng = np.random.default_rng(3)
    labeled, logits, target = make_part(rng, N, ("weak",))
    unlabeled, u_logits, u_target = make_part(rng, N * MU, ("weak", "strong"))
    arrays = {"x": logits["weak"], "y": target, "truth": u_target}
    return Batch(labeled, unlabeled, lambda x: x), {**arrays, **u_logits}


def log_softmax(x):
    x = x - x.max(1, keepdims=True)
    return x - np.log(np.exp(x).sum(1, keepdims=True))


def expected_fixmatch(a, tau, weight, temperature):
    supervised_loss = -(a["y"] * log_softmax(a["x"])).sum(1).mean()
    q = np.exp(log_softmax(a["weak"]))
    mask = q.max(1) >= tau
    if temperature:
        sharp = q ** (1 / temperature)
        target = sharp / sharp.sum(1, keepdims=True)
    else:
        target = np.eye(C)[q.argmax(1)]
    each = -(target * log_softmax(a["strong"])).sum(1)
    return supervised_loss + weight * (mask * each).sum() / len(mask), mask, q


@pytest.mark.parametrize("forward", ["joint", "split", "apart"])
@pytest.mark.parametrize(
    ("tau", "weight", "temperature"), [(0.7, 1, 0), (0.9, 2.5, 0), (0.5, 1, 0.4)]
)
def test_fixmatch_loss(batch, forward, tau, weight, temperature):
    batch, a = batch
    method = fixmatch.Algorithm(
        mu=MU, threshold=tau, lambda_u=weight, temperature=temperature, forward=forward
    )
    loss, metrics, extra = method.loss(LinearNet(), batch, {}, Time(0, 0.3))
    expected, mask, q = expected_fixmatch(a, tau, weight, temperature)
    assert 0 < mask.sum() < len(mask)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert extra == {}
    means = {k: float(s) / float(w) for k, (s, w) in metrics.items() if float(w)}
    np.testing.assert_allclose(means["mask_rate"], mask.mean(), rtol=1e-6)
    hit = q.argmax(1) == a["truth"].argmax(1)
    np.testing.assert_allclose(means["pseudo_label_accuracy"], hit[mask].mean(), rtol=1e-6)
    np.testing.assert_allclose(means["unlabeled_accuracy"], hit.mean(), rtol=1e-6)


def test_fixmatch_warmup_scales_the_unlabelled_loss(batch):
    batch, a = batch
    method = fixmatch.Algorithm(mu=MU, threshold=0.5, warmup=0.4)
    for progress, share in ((0.0, 0.0), (0.1, 0.25), (0.4, 1.0), (0.9, 1.0)):
        loss, _, _ = method.loss(LinearNet(), batch, {}, Time(0, jnp.asarray(progress)))
        np.testing.assert_allclose(loss, expected_fixmatch(a, 0.5, share, 0)[0], rtol=1e-5)


def test_pseudo_labels_carry_no_gradient_and_strong_views_do(batch):
    batch, _ = batch
    method = fixmatch.Algorithm(mu=MU, threshold=0.5)

    def loss(views):
        part = dataclasses.replace(batch.unlabeled, views=views)
        return method.loss(LinearNet(), batch.replace(unlabeled=part), {}, Time(0, 0.0))[0]

    grads = jax.grad(loss)(dict(batch.unlabeled.views))
    assert float(jnp.abs(grads["weak"]).max()) == 0
    assert float(jnp.abs(grads["strong"]).max()) > 1e-3


def test_hidden_labels_do_not_reach_the_loss(batch):
    batch, _ = batch
    method = fixmatch.Algorithm(mu=MU, threshold=0.5)
    lied_to = batch.replace(
        unlabeled=batch.unlabeled.replace(target=jnp.roll(batch.unlabeled.target, 1, 1))
    )
    losses = [method.loss(LinearNet(), b, {}, Time(0, 0.0))[0] for b in (batch, lied_to)]
    assert float(losses[0]) == float(losses[1])


def test_joint_equals_split_without_batch_statistics():
    """With BatchNorm in evaluation mode each image stands alone, so both forms must agree, in
    the loss and in the gradient."""
    with harness.float64():
        config = harness.make_config(model={"name": "cnn", "layers": harness.LAYERS[:-1]})
        small = harness.Small(config)
        state, data = small.init(), harness.make_data()
        keys = jax.random.split(jax.random.key(1), 24)
        images = jnp.asarray(data["images"][:24])
        views = {"weak": images / 255, "strong": 1 - images / 300}
        target = jnp.asarray(data["targets"][:24])
        part = Part(views, target, jnp.ones(24), jnp.arange(24), keys)
        labeled = jax.tree.map(lambda x: x[:8], part)
        batch = Batch(labeled, part, lambda x: x)

        model = small.model.clone(axis_name=None)

        def loss(params, forward):
            variables = {"params": params, "batch_stats": state.batch_stats}

            def net(images, **kwargs):
                return model.apply(variables, images)

            method = fixmatch.Algorithm(mu=3, threshold=0.15, forward=forward)
            return method.loss(net, batch, {}, Time(0, 0.0))[0]

        forms = ("joint", "split", "apart")
        gradient = jax.jit(jax.value_and_grad(loss), static_argnums=1)
        results = [gradient(state.params, f) for f in forms]
    for other in results[1:]:
        np.testing.assert_allclose(other[0], results[0][0], rtol=1e-12)
        for a, b in zip(*(jax.tree.leaves(r[1]) for r in (results[0], other)), strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-9, atol=1e-13)


def test_which_views_are_normalised_together(batch):
    batch, _ = batch
    m = N * MU
    for forward, rows in (("joint", [N + 2 * m]), ("split", [m, N + m]), ("apart", [m, m, N])):
        net = LinearNet()
        fixmatch.Algorithm(mu=MU, forward=forward).loss(net, batch, {}, Time(0, 0.0))
        assert [call[0] for call in net.calls] == rows
        # Strong views alone must not enter the running statistics.
        assert [call[2] for call in net.calls] == (
            [True, False, True] if rows[2:] else [True] * len(rows)
        )
        assert all(call[0] == call[1] for call in net.calls)  # a key for each row


def test_supervised_loss(batch):
    batch, a = batch
    for smoothing in (0.0, 0.1):
        method = supervised.Algorithm(label_smoothing=smoothing)
        loss, metrics, _ = method.loss(LinearNet(), batch, {}, Time(0, 0.0))
        target = a["y"] * (1 - smoothing) + smoothing / C
        expected = -(target * log_softmax(a["x"])).sum(1).mean()
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
        total, weight = metrics["train_accuracy"]
        hit = a["x"].argmax(1) == a["y"].argmax(1)
        np.testing.assert_allclose(total / weight, hit.mean(), rtol=1e-6)


def test_bad_hyperparameters():
    with pytest.raises(UserError, match="forward=both: use joint, split or apart"):
        fixmatch.Algorithm(forward="both")
    with pytest.raises(UserError, match="mu=0"):
        fixmatch.Algorithm(mu=0)
