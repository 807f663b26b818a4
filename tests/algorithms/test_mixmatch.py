"""MixMatch against NumPy on fixed logits, and MixUp's partners."""

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fakes import SIDE, C, FakeNet, cross_entropy, make_batch, softmax

from ferjax.algorithms import mixmatch
from ferjax.algorithms.base import Time, mixup
from ferjax.config import UserError


def test_loss():
    # A large alpha, so that every partner leaves a trace.
    method = mixmatch.Algorithm(mu=2, warmup=0.5, alpha=20.0)
    batch, a = make_batch(method)
    net = FakeNet()
    loss, _, _ = method.loss(net, batch, {}, Time(0, 0.1))
    n, m = fakes.N, 2 * fakes.N
    # Guesses without statistics, then one forward of everything mixed.
    assert net.calls == [
        ("__call__", m, False),
        ("__call__", m, False),
        ("__call__", n + 2 * m, True),
    ]
    q = (softmax(a["u:weak"]) + softmax(a["u:weak:2"])) / 2
    q = q**2 / (q**2).sum(1, keepdims=True)
    images = [batch.labeled.views["weak"], *batch.unlabeled.views.values()]
    images = np.concatenate([np.asarray(x, np.float64).reshape(len(x), -1) for x in images])
    targets = np.concatenate([a["x:target"], q, q])
    # Which image was mixed with which, and how much, is found in what the network saw.
    mixed = np.asarray(net.seen[2], np.float64).reshape(n + 2 * m, -1)
    partners, shares = zip(*(solve(images, i, x) for i, x in enumerate(mixed)), strict=True)
    assert sorted(partners) == list(range(n + 2 * m))
    shares = np.asarray(shares)[:, None]
    targets = shares * targets + (1 - shares) * targets[list(partners)]
    logits = mixed[:, :C]
    distance = ((softmax(logits[n:]) - targets[n:]) ** 2).mean()
    expected = cross_entropy(logits[:n], targets[:n]).mean() + 100 * 0.2 * distance
    np.testing.assert_allclose(loss, expected, rtol=1e-4)


def solve(images, i, mixed):
    """The partner j and share l in [.5, 1] for which mixed = l images[i] + (1 - l) images[j]."""
    if np.abs(mixed - images[i]).max() < 1e-5:
        return i, 1.0
    best = np.inf, i, 1.0
    for j, other in enumerate(images):
        if j == i:
            continue
        away = images[i] - other
        share = (mixed - other) @ away / (away @ away)
        error = np.abs(share * images[i] + (1 - share) * other - mixed).max()
        if error < best[0]:
            best = error, j, share
    assert best[0] < 1e-5
    assert 0.5 <= best[2] <= 1 + 1e-6
    return best[1:]


@pytest.mark.slow
def test_partners_do_not_depend_on_the_devices():
    """Two halves of a batch, each seeing all through gather, are mixed as the whole is."""
    method = mixmatch.Algorithm(mu=2)
    batch, _ = make_batch(method)
    parts = [batch.labeled, batch.unlabeled]
    images = [p.views["weak"] for p in parts]
    targets, keys = [p.target for p in parts], [p.key("mixup") for p in parts]
    whole = jax.jit(lambda x, y: mixup(batch, x, y, keys, 0.5))(images, targets)

    def device(images, targets, data):
        keys = [jax.random.wrap_key_data(k) for k in data]
        local = batch.replace(gather=lambda x: jax.lax.all_gather(x, "i", tiled=True))
        return mixup(local, images, targets, keys, 0.5)

    def halves(x):
        return x.reshape(2, -1, *x.shape[1:])

    data = [jax.random.key_data(k) for k in keys]
    both = jax.jit(jax.vmap(device, axis_name="i"))(*jax.tree.map(halves, (images, targets, data)))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(both), strict=True):
        np.testing.assert_allclose(b.reshape(a.shape), a, rtol=1e-6, atol=1e-6)


def test_mixed_targets_stay_distributions():
    method = mixmatch.Algorithm(mu=2)
    batch, _ = make_batch(method)
    part = batch.unlabeled
    _, (targets,) = mixup(batch, [part.views["weak"]], [part.target], [part.key("a")], 0.5)
    np.testing.assert_allclose(targets.sum(1), 1, rtol=1e-6)
    assert targets.dtype == jnp.float32


@pytest.mark.parametrize("alpha", [1.0, 1.0001])
def test_images_keep_at_least_half_of_themselves_evenly(alpha):
    """Beta(1, 1) is drawn in its own way: b is uniform, so max(b, 1 - b) is from .5 to 1."""
    batch, _ = make_batch(mixmatch.Algorithm(mu=2))
    keys = jax.random.split(jax.random.key(3), 600)
    images, targets = jnp.zeros((600, 1)), jnp.eye(600)
    _, (mixed,) = mixup(batch.replace(gather=lambda x: x), [images], [targets], [keys], alpha)
    shares = np.asarray(mixed).max(1)
    assert shares.min() >= 0.5
    counts, _ = np.histogram(shares[shares < 1], 5, (0.5, 1))
    assert counts.min() > 80  # of 120 each


def test_gradients_reach_both_views():
    method = mixmatch.Algorithm(mu=2)
    batch, _ = make_batch(method)
    got = fakes.gradients(method, batch, {}, Time(0, 0.5))
    assert all(np.abs(g).max() > 1e-3 for g in got.values())
    assert got["weak"].shape[1:] == (SIDE, SIDE, 1)


def test_bad_hyperparameters():
    with pytest.raises(UserError, match="above 0"):
        mixmatch.Algorithm(alpha=0.0)
