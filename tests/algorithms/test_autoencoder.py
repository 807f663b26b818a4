"""The autoencoder against NumPy; that its probe leaves the features alone; that it learns."""

import functools

import harness
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fakes import C, FakeNet, cross_entropy, make_batch

from ferjax.algorithms import autoencoder
from ferjax.algorithms.base import Time
from ferjax.config import UserError
from ferjax.engine.parallel import Layout
from ferjax.models.cnn import Model

LAYERS = ("conv 4 3 2 nobias", "bn", "relu", "gap")


class Reconstructing(FakeNet):
    """Half of the image, and its first pixels as logits."""

    def __call__(self, images, *, method="__call__", **kwargs):
        assert method == "reconstruct"
        logits = super().__call__(images, **kwargs)
        return 0.5 * images, logits


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_loss(noise):
    method = autoencoder.Algorithm(mu=2, noise=noise)
    batch, a = make_batch(method)

    def evaluate(batch):
        net = Reconstructing()
        return *method.loss(net, batch, {}, Time(0, 0.0))[:2], net.seen[0]

    loss, metrics, seen = jax.jit(evaluate)(batch)
    clean = np.concatenate([p.views["weak"] for p in (batch.labeled, batch.unlabeled)])
    seen = np.asarray(seen)
    added = seen - clean
    if noise:
        assert added.std() == pytest.approx(noise, rel=0.15)
        own = added[len(a["x:target"]) :]
        assert len(np.unique(own.round(5))) > 0.9 * own.size  # its own for each pixel
    else:
        assert not added.any()
    squares = ((0.5 * seen - clean) ** 2).mean((1, 2, 3))
    logits = seen.reshape(len(seen), -1)[: len(a["x:target"]), :C]
    probe = cross_entropy(logits, a["x:target"]).mean()
    np.testing.assert_allclose(loss, squares.mean() + probe, rtol=1e-5)
    total, weight = metrics["loss_unlabeled"]
    np.testing.assert_allclose(total / weight, squares.mean(), rtol=1e-5)


@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        (("conv 4 3 8", "gap"), (20, 18, 3)),
        (("conv 4 3 4", "gap"), (48, 48, 1)),
        (("conv 4 3", "gap"), (7, 7, 1)),
    ],
)
def test_the_decoder_gives_images_of_any_size(layers, shape):
    wrapped = autoencoder.Algorithm(width=5).wrap(Model(layers=layers))
    x = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
    variables = jax.eval_shape(wrapped.init, jax.random.key(0), x)
    apply = functools.partial(wrapped.apply, method="reconstruct")
    made, logits = jax.eval_shape(apply, variables, x)
    assert made.shape == x.shape
    assert logits.shape == (2, 7)


def test_the_call_is_the_models_and_the_probe_learns_alone():
    model = Model(layers=LAYERS)
    wrapped = autoencoder.Algorithm(width=5).wrap(model)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 16, 16, 1)), jnp.float32)
    variables = jax.tree.map(
        lambda leaf: rng.uniform(-1, 2, leaf.shape).astype(np.float32) ** 2,
        jax.eval_shape(wrapped.init, jax.random.key(0), x),
    )
    assert set(variables["params"]) == {"backbone", "decoder"}
    inner = {name: tree["backbone"] for name, tree in variables.items()}

    @jax.jit
    def everything(params):
        both = {**variables, "params": params}
        logits = wrapped.apply(both, x, method="reconstruct")[1]
        return logits.sum(), (logits, wrapped.apply(both, x), model.apply(inner, x))

    found, gradient = jax.jit(jax.value_and_grad(everything, has_aux=True))(variables["params"])
    logits, called, plain = found[1]
    np.testing.assert_allclose(called, plain, rtol=1e-6)
    np.testing.assert_allclose(logits, plain, rtol=1e-6)
    assert np.any(gradient["backbone"].pop("classifier")["kernel"])
    assert not any(map(np.any, jax.tree.leaves(gradient)))


@pytest.fixture(scope="module")
def four():
    """Six steps on four devices: the run, its first state, its last, and the metrics."""
    with harness.float64():
        config = harness.make_config(
            algorithm={"name": "autoencoder", "mu": 2, "noise": 0.1, "width": 4},
            model={"name": "cnn", "layers": LAYERS},
            views={"weak": {"policy": "none", "flip": 0.5}},
        )
        run = harness.Small(config)
        return run, run.init(), *run.run(Layout("pmap", jax.devices()[:4]), steps=6)


def test_it_learns(four):
    """The images are noise: what can be learnt is their mean, below the start's error."""
    _, start, end, metrics = four
    pairs = zip(jax.tree.leaves(start.params), jax.tree.leaves(end.params), strict=True)
    assert min(np.abs(a - b).max() for a, b in pairs) > 1e-6
    errors, images = metrics["loss_unlabeled"]
    assert (images == 24).all()
    assert errors[-1] < errors[0]


@pytest.mark.slow
def test_one_device_does_the_same_as_four(four):
    with harness.float64():
        one, _ = four[0].run(Layout("pmap", jax.devices()[:1]), steps=6)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(four[2]), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-8, atol=1e-11)


def test_bad_hyperparameters():
    with pytest.raises(UserError, match="width=0"):
        autoencoder.Algorithm(width=0)
    with pytest.raises(UserError, match="noise=-1"):
        autoencoder.Algorithm(noise=-1.0)
