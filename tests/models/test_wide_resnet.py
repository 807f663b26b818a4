"""Wide ResNet: its size, its shapes, its agreement with a forward pass written in torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from weights import random_variables

from ferjax.config import UserError
from ferjax.models.wide_resnet import Model

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.parametrize(("channels", "parameters"), [(3, 1_467_223), (1, 1_466_935)])
def test_parameter_counts(channels, parameters):
    x = jax.ShapeDtypeStruct((1, 48, 48, channels), jnp.float32)
    variables = jax.eval_shape(Model().init, jax.random.key(0), x)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == parameters


def test_shapes_at_48_pixels():
    x = jax.ShapeDtypeStruct((2, 48, 48, 1), jnp.float32)
    model = Model()
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    fmap = jax.eval_shape(lambda v, x: model.apply(v, x, method="features"), variables, x)
    assert fmap.shape == (2, 12, 12, 128)
    logits, vector = jax.eval_shape(lambda v, x: model.apply(v, x, method="head"), variables, fmap)
    assert (logits.shape, vector.shape) == ((2, 7), (2, 128))


def torch_forward(variables, x):
    """Logits in eval mode of WRN-10-1: three blocks, of widths 16, 32 and 64."""
    torch = pytest.importorskip("torch")
    f = torch.nn.functional
    params, stats = variables["params"], variables["batch_stats"]

    def tensor(array):
        return torch.from_numpy(np.array(array))

    def conv(x, weights, stride=1):
        kernel = tensor(weights["kernel"]).permute(3, 2, 0, 1)
        # TensorFlow's "same" on an even side: with stride 2 only the far side is padded.
        total = max(kernel.shape[-1] - stride, 0)
        low, high = total // 2, total - total // 2
        return f.conv2d(f.pad(x, (low, high, low, high)), kernel, stride=stride)

    def activated(x, weights, stats):
        mean, var = tensor(stats["mean"]), tensor(stats["var"])
        scale, bias = tensor(weights["scale"]), tensor(weights["bias"])
        return f.leaky_relu(f.batch_norm(x, mean, var, scale, bias, eps=1e-3), 0.1)

    x = conv(tensor(x).permute(0, 3, 1, 2), params["stem"])
    for i, stride in enumerate((1, 2, 2)):
        p, s = params[f"blocks_{i}"], stats[f"blocks_{i}"]
        y = activated(x, p["norm1"], s["norm1"])
        if i == 0:
            x = y
        y = conv(activated(conv(y, p["conv1"], stride), p["norm2"], s["norm2"]), p["conv2"])
        x = y + (conv(x, p["shortcut"], stride) if "shortcut" in p else x)
    x = activated(x, params["last_norm"], stats["last_norm"]).mean((2, 3))
    return (
        x @ tensor(params["classifier"]["kernel"]) + tensor(params["classifier"]["bias"])
    ).numpy()


def test_logits_equal_a_torch_forward():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 16, 16, 1)).astype(np.float32)
    model = Model(depth=10, width=1)
    variables = random_variables(model, x)
    logits = jax.jit(model.apply)(variables, x)
    np.testing.assert_allclose(logits, torch_forward(variables, x), rtol=1e-4, atol=1e-4)


def test_dropout_needs_keys_and_depends_on_rows_alone():
    model = Model(depth=10, width=1, dropout=0.5)
    variables = random_variables(model, jnp.ones((1, 8, 8, 1)))
    fmap = jnp.asarray(np.random.default_rng(1).normal(size=(4, 2, 2, 64)), jnp.float32)
    keys = jax.random.split(jax.random.key(1), 4)
    whole, _ = model.apply(variables, fmap, True, keys, method="head")
    half, _ = model.apply(variables, fmap[2:], True, keys[2:], method="head")
    np.testing.assert_allclose(whole[2:], half, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="key per row"):
        model.apply(variables, fmap, True, None, method="head")


def test_remat_keeps_names_values_and_gradients():
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 1)).astype(np.float32)
    results = []
    for remat in (False, True):
        model = Model(depth=10, width=1, remat=remat)
        variables = random_variables(model, x)

        def loss(params, model=model, rest=variables["batch_stats"]):
            out, changed = model.apply(
                {"params": params, "batch_stats": rest}, x, train=True, mutable=["batch_stats"]
            )
            return (out**2).sum(), changed

        program = jax.value_and_grad(loss, has_aux=True)
        results.append(jax.jit(program)(variables["params"]))
        assert ("remat" in str(jax.make_jaxpr(program)(variables["params"]))) == remat
    plain, again = results
    assert jax.tree.structure(plain) == jax.tree.structure(again)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(b, a, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"depth": 27}, "6 n"),
        ({"width": 0}, r"config.model.width=0: it must be in \[1, inf\)"),
        ({"dropout": 1.0}, r"config.model.dropout=1.0: it must be in \[0, 1\)"),
        ({"bn_momentum": 1.5}, "bn_momentum=1.5"),
        ({"bn_epsilon": -1.0}, "bn_epsilon=-1.0"),
    ],
)
def test_impossible_fields_are_user_errors(wrong, message):
    with pytest.raises(UserError, match=message):
        jax.eval_shape(Model(**wrong).init, jax.random.key(0), jnp.ones((1, 8, 8, 1)))
