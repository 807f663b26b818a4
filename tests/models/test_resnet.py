"""ResNet's size, its agreement with a forward pass in torch, its synchronised statistics."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from weights import random_variables

from ferjax.config import UserError
from ferjax.models.resnet import DEPTHS, Block, Model

pytestmark = pytest.mark.usefixtures("quick_compilation")


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("depth", "channels", "parameters"),
    [
        (18, 3, 11_180_103),
        (18, 1, 11_173_831),
        (34, 3, 21_288_263),
        (34, 1, 21_281_991),
        (50, 3, 23_522_375),
        (50, 1, 23_516_103),
        (101, 3, 42_514_503),
        (101, 1, 42_508_231),
    ],
)
def test_parameter_counts(depth, channels, parameters):
    x = jax.ShapeDtypeStruct((1, 64, 64, channels), jnp.float32)
    variables = jax.eval_shape(Model(depth=depth).init, jax.random.key(0), x)
    assert count(variables["params"]) == parameters


def torch_forward(variables, x, depth, stem):
    """Logits in eval mode: an independent implementation on torch.nn.functional."""
    torch = pytest.importorskip("torch")
    f = torch.nn.functional
    params, stats = variables["params"], variables["batch_stats"]

    def tensor(array):
        return torch.from_numpy(np.array(array))

    def conv(x, weights, stride):
        kernel = tensor(weights["kernel"]).permute(3, 2, 0, 1)
        return f.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)

    def norm(x, weights, stats):
        mean, var = tensor(stats["mean"]), tensor(stats["var"])
        return f.batch_norm(x, mean, var, tensor(weights["scale"]), tensor(weights["bias"]))

    x = tensor(x).permute(0, 3, 1, 2)
    x = conv(x, params["stem_conv"], 2 if stem == "imagenet" else 1)
    x = f.relu(norm(x, params["stem_norm"], stats["stem_norm"]))
    if stem == "imagenet":
        x = f.max_pool2d(x, 3, 2, 1)
    counts, bottleneck = DEPTHS[depth]
    strided = {sum(counts[:stage]) for stage in (1, 2, 3)}
    for i in range(sum(counts)):
        p, s = params[f"blocks_{i}"], stats[f"blocks_{i}"]
        stride, y = 2 if i in strided else 1, x
        strides = (1, stride, 1) if bottleneck else (stride, 1)
        for j, step in enumerate(strides):
            y = norm(conv(y, p[f"convs_{j}"], step), p[f"norms_{j}"], s[f"norms_{j}"])
            y = f.relu(y) if j < len(strides) - 1 else y
        if "shortcut" in p:
            x = norm(conv(x, p["shortcut"], stride), p["shortcut_norm"], s["shortcut_norm"])
        x = f.relu(x + y)
    x = x.mean((2, 3))
    return (
        x @ tensor(params["classifier"]["kernel"]) + tensor(params["classifier"]["bias"])
    ).numpy()


@pytest.mark.parametrize(("depth", "stem"), [(18, "cifar"), (50, "imagenet")])
def test_logits_equal_a_torch_forward(depth, stem):
    side = 32 if stem == "imagenet" else 12
    x = np.random.default_rng(0).normal(size=(2, side, side, 1)).astype(np.float32)
    model = Model(depth=depth, stem=stem, width=16)
    variables = random_variables(model, x)
    expected = torch_forward(variables, x, depth, stem)
    logits = jax.jit(model.apply)(variables, x)
    assert logits.shape == (2, 7)
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


@pytest.fixture
def narrow(monkeypatch):
    """A ResNet of two small stages: what is tested needs no more, and compiling does."""
    monkeypatch.setitem(DEPTHS, 6, ((1, 1), False))
    return partial(Model, depth=6, width=8, stem="cifar")


def test_features_and_head_are_the_model(narrow):
    model = narrow()
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 16, 1)), jnp.float32)
    variables = random_variables(model, x)

    @jax.jit
    def parts(variables, x):
        fmap = model.apply(variables, x, method="features")
        return fmap, *model.apply(variables, fmap, method="head"), model.apply(variables, x)

    fmap, logits, vector, whole = parts(variables, x)
    assert fmap.shape == (2, 8, 8, 16)
    assert vector.shape == (2, 16)
    np.testing.assert_allclose(vector, fmap.mean((1, 2)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(logits, whole, rtol=1e-6)


def test_training_over_devices_equals_one_device(narrow):
    rng = np.random.default_rng(2)
    with jax.enable_x64(True):
        x = jnp.asarray(rng.normal(size=(8, 8, 8, 1)))
        single = narrow(dtype=jnp.float64)
        shapes = jax.eval_shape(single.init, jax.random.key(0), x)
        assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float64")}
        variables = random_variables(single, x, dtype=np.float64)

        def step(params, stats, x, model):
            def loss(params):
                both = {"params": params, "batch_stats": stats}
                logits, updated = model.apply(both, x, True, mutable=["batch_stats"])
                assert logits.dtype == jnp.float64
                return jnp.mean(jnp.sin(logits)), updated["batch_stats"]

            (value, updated), gradient = jax.value_and_grad(loss, has_aux=True)(params)
            return value, updated, gradient

        def over_devices(params, stats, x):
            model = narrow(axis_name="d", dtype=jnp.float64)
            value, updated, gradient = step(params, stats, x, model)
            return lax.pmean(value, "d"), updated, lax.pmean(gradient, "d")

        arguments = variables["params"], variables["batch_stats"]
        want = jax.jit(lambda *a: step(*a, single))(*arguments, x)
        mapped = jax.pmap(over_devices, "d", in_axes=(None, None, 0), out_axes=None)
        got = mapped(*arguments, x.reshape(4, 2, 8, 8, 1))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


def test_bfloat16_keeps_float32_parameters_statistics_and_logits(narrow):
    x = jnp.asarray(np.random.default_rng(3).normal(size=(4, 16, 16, 1)), jnp.float32)
    model = narrow(dtype=jnp.bfloat16)
    variables = random_variables(model, x)

    def apply(model):
        return jax.jit(lambda v, x: model.apply(v, x, True, mutable=["batch_stats"]))(variables, x)

    logits, updated = apply(model)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    for leaf in jax.tree.leaves((shapes, updated, logits)):
        assert leaf.dtype == jnp.float32
    assert (logits != logits.astype(jnp.bfloat16).astype(jnp.float32)).any()
    exact, _ = apply(narrow())
    np.testing.assert_allclose(logits, exact, atol=0.1 * float(np.abs(exact).max()))


def test_zero_init_starts_a_block_as_its_shortcut():
    x = jnp.asarray(np.random.default_rng(4).normal(size=(1, 4, 4, 2)), jnp.float32)
    block = Block(2, 1, False, project=False, norm={}, zero_init=True, dtype=jnp.float32)
    y, variables = block.init_with_output(jax.random.key(0), x, False)
    np.testing.assert_array_equal(y, np.maximum(x, 0))
    assert np.all(variables["params"]["norms_0"]["scale"] == 1)


@pytest.mark.parametrize("wrong", [{"depth": 19}, {"stem": "vgg"}, {"width": 0}])
def test_wrong_fields_are_user_errors(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        jax.eval_shape(Model(**wrong).init, jax.random.key(0), jnp.ones((1, 8, 8, 1)))
