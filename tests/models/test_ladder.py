"""The ladder's encoders against the plain network, its rungs, shapes and combinators."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from weights import random_variables

from ferjax.config import UserError
from ferjax.models import cnn, decoder, ladder, ops, resnet, wide_resnet

pytestmark = pytest.mark.usefixtures("quick_compilation")

LAYERS = ("conv 3 3 nobias", "bn", "relu", "maxpool 2", "conv 4 3 valid", "relu", "flatten")
LAYERS = (*LAYERS, "dense 5", "relu", "dropout 0.5")
RUNGS = ("input", "conv_0", "conv_4", "dense_7", "classifier")


def images(n=6, side=8):
    return np.random.default_rng(1).normal(0, 1, (n, side, side, 1)).astype(np.float32)


def keys(n=6, seed=0):
    return jax.random.split(jax.random.key(seed), n)


def shapes(model, **kwargs):
    """Shapes of the variables, and of what every method makes of two 48x48 images."""
    net = ladder.Ladder(model, **kwargs)
    x = jax.ShapeDtypeStruct((2, 48, 48, 1), jnp.float32)
    variables = jax.eval_shape(net.init, jax.random.key(0), x)

    def run(variables, x):
        def call(*args, method):
            return net.apply(variables, *args, method=method, mutable=["batch_stats"])[0]

        clean = call(x, True, method="clean")
        noisy = call(x, True, keys(2), method="noisy")
        costs = {k: v for k, (_, v) in call((noisy, clean), method="costs").items()}
        fmap = net.apply(variables, x, method="features")
        return clean, noisy, costs, fmap, net.apply(variables, fmap, method="head")

    return variables, jax.eval_shape(run, variables, x)


NETWORKS = {
    "small": (cnn.Model(), 8, (6, 6, 128)),
    "seed": (cnn.Model(preset="seed"), 8, (5, 5, 128)),
    "strided": (
        cnn.Model(layers=("conv 4 4 valid 3", "maxpool 3 2", "conv 2 3 2", "gap")),
        4,
        None,
    ),
    "wide_resnet": (wide_resnet.Model(depth=10, width=1), 6, (12, 12, 64)),
    "resnet": (resnet.Model(depth=18, width=4), 11, (2, 2, 32)),
    "bottleneck": (resnet.Model(depth=50, width=2, stem="cifar"), 19, (6, 6, 64)),
}


@pytest.mark.parametrize(
    ("name", "norms"),
    [
        ("small", "added"),
        ("seed", "added"),
        ("seed", "kept"),
        ("strided", "added"),
        ("wide_resnet", "added"),
        ("wide_resnet", "kept"),
        ("resnet", "added"),
        pytest.param("bottleneck", "added", marks=pytest.mark.slow),
    ],
)
def test_every_network_gets_a_rung_a_layer_and_keeps_its_tree(name, norms):
    model, rungs, last_map = NETWORKS[name]
    x = jax.ShapeDtypeStruct((2, 48, 48, 1), jnp.float32)
    plain = jax.eval_shape(model.init, jax.random.key(0), x)
    variables, (clean, noisy, costs, fmap, (logits, _)) = shapes(model, norms=norms)
    for collection, tree in plain.items():
        assert variables[collection]["backbone"] == tree
    added = set(variables["params"]) - {"backbone", "decoder"}
    assert added == set(variables.get("batch_stats", {})) - {"backbone"}
    assert ("added_classifier" in added) == (norms == "added")
    assert bool(added) == (norms == "added")
    assert len(clean.z) == len(costs) == rungs
    assert [z.shape for z in clean.z] == [z.shape for z in noisy.z]
    assert clean.z[0].shape == (2, 48, 48, 1)
    assert clean.z[-1].shape == clean.logits.shape == logits.shape == (2, 7)
    assert all(cost.shape == (2,) for cost in costs.values())
    assert last_map is None or fmap.shape == (2, *last_map)


def test_seed_gets_a_norm_for_each_layer_without_one():
    variables, _ = shapes(cnn.Model(preset="seed"))
    names = ("conv_4", "conv_8", "conv_11", "dense_16", "dense_19", "classifier")
    assert set(variables["params"]) == {"backbone", "decoder", *(f"added_{n}" for n in names)}


@pytest.mark.parametrize("norms", ladder.NORMS)
def test_clean_encoder(norms):
    """Kept: the plain network in training and evaluation. Added: every rung has mean 0, std 1."""
    model = cnn.Model(layers=LAYERS)
    net = ladder.Ladder(model, norms=norms)
    x = images()
    variables = random_variables(net, x[:1])
    inner = {name: tree["backbone"] for name, tree in variables.items()}

    @jax.jit
    def run(variables, inner, x):
        clean, moved = net.apply(variables, x, True, method="clean", mutable=["batch_stats"])
        # Dropout is not in the clean encoder, so neither here.
        bare = cnn.Model(layers=LAYERS[:-1])
        plain, plain_moved = bare.apply(inner, x, True, mutable=["batch_stats"])
        fmap = net.apply(variables, x, method="features")
        head = net.apply(variables, fmap, method="head")[0]
        return clean, moved, plain, plain_moved, net.apply(variables, x), head, bare.apply(inner, x)

    clean, moved, plain, plain_moved, evaluated, head, plain_evaluated = run(variables, inner, x)
    np.testing.assert_allclose(evaluated, head, rtol=1e-6)
    for a, b in zip(
        jax.tree.leaves(moved["batch_stats"]["backbone"]),
        jax.tree.leaves(plain_moved["batch_stats"]),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    for z in clean.z[1:]:
        axes = tuple(range(z.ndim - 1))
        np.testing.assert_allclose(z.mean(axes), 0, atol=1e-4)
        assert (np.asarray(z.std(axes)) <= 1).all()
    if norms == "kept":
        np.testing.assert_allclose(clean.logits, plain, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(evaluated, plain_evaluated, rtol=1e-4, atol=1e-5)
    else:
        norm = variables["params"]["added_classifier"]
        wanted = norm["scale"] * np.asarray(clean.z[-1]) + norm["bias"]
        np.testing.assert_allclose(clean.logits, wanted, rtol=1e-4, atol=1e-5)
        stats = {k: np.asarray(v) for k, v in moved["batch_stats"]["added_classifier"].items()}
        old = variables["batch_stats"]["added_classifier"]
        np.testing.assert_allclose(stats["mean"], 0.9 * old["mean"] + 0.1 * clean.mean[-1], 1e-4)


@pytest.mark.parametrize("norms", ladder.NORMS)
def test_bfloat16_does_not_round_logits(norms):
    net = ladder.Ladder(cnn.Model(layers=LAYERS, dtype="bfloat16"), norms=norms)
    variables = random_variables(net, images()[:1])

    @jax.jit
    def run(variables, x):
        clean, _ = net.apply(variables, x, True, method="clean", mutable=["batch_stats"])
        noisy = net.apply(variables, x, True, keys(), method="noisy")
        return net.apply(variables, x), clean.logits, noisy.logits

    for logits in run(variables, images()):
        assert logits.dtype == jnp.float32
        assert (logits != logits.astype(jnp.bfloat16).astype(jnp.float32)).any()


def test_noise_has_sigma_at_every_rung_and_comes_from_each_image_s_key():
    """With kernels of 0 but for the noise nothing reaches a rung."""
    net = ladder.Ladder(cnn.Model(layers=LAYERS[:-1]), sigma=0.5)
    x = images(n=200)
    variables = random_variables(net, x[:1])
    variables["params"]["backbone"] = jax.tree.map(
        lambda leaf: leaf if leaf.ndim == 1 else 0 * leaf, variables["params"]["backbone"]
    )
    noisy = jax.jit(
        lambda x, keys: (
            net.apply(variables, x, True, keys, method="noisy", mutable=["batch_stats"])[0].z
        )
    )
    z = noisy(x, keys(200))
    noises = [np.asarray(z[0] - x), *(np.asarray(value) for value in z[1:])]
    for noise in noises:
        error = 4 * 0.5 / noise.size**0.5
        np.testing.assert_allclose([noise.mean(), noise.std()], [0, 0.5], atol=error)
    flat = [noise.reshape(200, -1)[:, 0] for noise in noises]
    assert np.abs(np.corrcoef(flat) - np.eye(len(flat))).max() < 0.35
    order = np.random.default_rng(0).permutation(200)
    for a, b in zip(noises, noisy(x[order], keys(200)[order]), strict=True):
        got = np.asarray(b) - x[order] if a.shape == x.shape else b
        np.testing.assert_allclose(got, a[order], atol=1e-5)


def test_combinators():
    """Every denoising function, with parameters of its own for each channel."""
    rng = np.random.default_rng(0)
    z, u = rng.normal(0, 1, (2, 5, 2, 2, 3)).astype(np.float32)
    a = rng.normal(0, 1, (10, 3)).astype(np.float32)

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    m = a[0] * sigmoid(a[1] * u + a[2]) + a[3] * u + a[4]
    v = a[5] * sigmoid(a[6] * u + a[7]) + a[8] * u + a[9]
    wanted = {
        "vanilla": (z - m) * v + m,
        "gaussian": z * sigmoid(v) + (1 - sigmoid(v)) * m,
        "seed": z + 0.2 * u,
        "none": u,
    }
    assert set(wanted) == set(decoder.DENOISE)
    for kind, expected in wanted.items():
        part = decoder.Combinator(kind, 0.2)
        start = part.init(jax.random.key(0), z, u).get("params", {})
        if kind in ("vanilla", "gaussian"):
            first = np.zeros((10, 3))
            first[[1, 6]] = 1  # a2 and a7
            np.testing.assert_array_equal(start["a"], first)
            start = {"a": a}
        np.testing.assert_allclose(
            part.apply({"params": start}, z, u), expected, rtol=1e-5, atol=1e-5
        )


def test_cost_layers():
    weights = (5.0, 1.0, 0.5)
    wanted = {
        "all": dict(zip(RUNGS, (5.0, 1.0, 0.5, 0.5, 0.5), strict=True)),
        "top": {"classifier": 0.5},
        "conv_4": {"conv_4": 0.5},
        "0 3": {"input": 5.0, "dense_7": 0.5},
        "": {},
    }
    for text, expected in wanted.items():
        assert ladder.layer_weights(RUNGS, text, weights) == expected
    assert ladder.layer_weights(RUNGS, "all", (0.0, 1.0, 0.0)) == {"conv_0": 1.0}
    for text in ("conv_5", "5"):
        with pytest.raises(UserError, match=f"'{text}' is not all, top, a number from 0 to 4"):
            ladder.layer_weights(RUNGS, text, weights)


def test_decoder_ends_at_the_lowest_cost():
    """The Gamma-model has nothing but the top's combinator."""
    for cost_layers, lowest in (("top", 4), ("dense_7", 3), ("0 4", 0)):
        variables, (_, _, costs, _, _) = shapes(cnn.Model(layers=LAYERS), cost_layers=cost_layers)
        made = {name for name in variables["params"]["decoder"] if name.startswith("g_")}
        assert made == {f"g_{name}" for name in RUNGS[lowest:]}
        assert set(costs) == set(ladder.layer_weights(RUNGS, cost_layers, (1.0,)))
    variables, (_, _, costs, _, _) = shapes(cnn.Model(layers=LAYERS), cost_layers="")
    assert "decoder" not in variables["params"]
    assert not costs


def test_upward_shapes_are_those_of_the_layers():
    x = np.arange(2 * 6 * 6 * 2, dtype=np.float32).reshape(2, 6, 6, 2)
    down = decoder.depth_to_space(ops.space_to_depth(x, 3), 3)
    np.testing.assert_array_equal(down, x)
    np.testing.assert_array_equal(ops.avg_pool(decoder.repeat(x, 2), 2), x)
    np.testing.assert_array_equal(ops.max_pool(decoder.repeat(x, 2), 2), x)
    bigger = decoder.resize(x, 5, 8)
    np.testing.assert_array_equal(bigger[:, :, :6], x[:, :5])
    assert bigger.shape == (2, 5, 8, 2)
    assert not np.asarray(bigger[:, :, 6:]).any()


def test_other_networks_are_refused():
    class Other(cnn.nn.Module):
        dtype: type = jnp.float32
        bn_epsilon: float = 1e-3

    with pytest.raises(UserError, match="goes with the models cnn, resnet and wide_resnet"):
        jax.eval_shape(ladder.Ladder(Other()).init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
