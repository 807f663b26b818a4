"""VAT against NumPy on fixed logits, and its direction against float64 finite differences."""

import fakes
import harness
import jax
import jax.numpy as jnp
import numpy as np
from fakes import FakeNet, log_softmax, make_batch, softmax, supervised

from ferjax.algorithms import vat
from ferjax.algorithms.base import Time
from ferjax.models.cnn import Model


def test_loss():
    """FakeNet's logits are pixels, so KL's Hessian is diag p - p p^T on those, 0 on the others."""
    method = vat.Algorithm(mu=2, epsilon=3.0)
    batch, a = make_batch(method)
    net = FakeNet()
    loss, _, _ = method.loss(net, batch, {}, Time(0, 0.1))
    noise = jax.vmap(lambda k: jax.random.normal(k, (fakes.SIDE, fakes.SIDE, 1)))(
        batch.unlabeled.key("vat")
    )
    d = np.asarray(noise, np.float64).reshape(2 * fakes.N, -1)[:, : fakes.C]
    p = softmax(a["u:weak"])
    r = p * d - p * (p * d).sum(1, keepdims=True)
    r *= 3.0 / np.linalg.norm(r, axis=1, keepdims=True)
    moved = log_softmax(a["u:weak"] + r)
    divergence = (p * (np.log(p) - moved)).sum(1).mean()
    spread = -(p * np.log(p)).sum(1).mean()
    assert divergence > 0.01
    expected = supervised(a) + 0.3 * 0.25 * divergence + 0.06 * spread
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    # One statistics update, by the labelled images.
    assert [call[2] for call in net.calls] == [True, False, False]
    away = np.asarray(net.seen[2] - batch.unlabeled.views["weak"]).reshape(2 * fakes.N, -1)
    np.testing.assert_allclose(np.linalg.norm(away, axis=1), 3.0, rtol=1e-5)


def test_divergence_and_entropy_reach_the_student():
    batch, _ = make_batch(vat.Algorithm(mu=2))
    for changes in ({"lambda_entropy": 0.0}, {"lambda_u": 0.0}):
        method = vat.Algorithm(mu=2, **changes)
        assert np.abs(fakes.gradients(method, batch, {}, Time(0, 0.5))["weak"]).max() > 1e-3


def test_float32_direction_is_that_of_float64_differences():
    """Through convolution and BatchNorm; the references' xi = 1e-6 in float32 has a cosine of .05
    with it (measured on the small CNN)."""
    rng = np.random.default_rng(0)
    images, d = rng.normal(0, 1, (2, 6, 8, 8, 1))
    layers = ("conv 4 3 nobias", "bn", "relu", "conv 4 3", "relu", "gap")

    initial = Model(layers=layers).init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    initial = jax.tree.map(lambda x: 3 * np.asarray(x), initial)  # so that the predictions differ

    def student(dtype):
        model = Model(layers=layers, dtype=dtype)
        variables = jax.tree.map(lambda x: jnp.asarray(x, dtype), initial)
        return lambda x: model.apply(variables, x, train=True, mutable=["batch_stats"])[0]

    with harness.float64():
        net = student(jnp.float64)
        log_p = jax.nn.log_softmax(net(images))

        def divergence(r):
            return jnp.sum(jnp.exp(log_p) * (log_p - jax.nn.log_softmax(net(images + r))))

        wanted = vat.unit(jax.jit(jax.grad(divergence))(1e-5 * vat.unit(jnp.asarray(d))))

    @jax.jit
    def ours(images, d):
        logits, pull = jax.vjp(student(jnp.float32), images)
        return vat.worst_direction(logits, pull, vat.unit(d))

    got = ours(images.astype(np.float32), d.astype(np.float32))
    cosine = np.sum(np.asarray(got) * np.asarray(wanted), axis=(1, 2, 3))
    np.testing.assert_allclose(cosine, 1, atol=1e-3)
