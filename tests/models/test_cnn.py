"""The seed's table layer by layer, the small network, and what a wrong description gets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from weights import random_variables

from ferjax.config import UserError
from ferjax.models import cnn

pytestmark = pytest.mark.usefixtures("quick_compilation")

IMAGE = jax.ShapeDtypeStruct((2, 48, 48, 1), jnp.float32)

# The seed's "CNN model summary": output shape of one image and parameters, statistics included.
TABLE = [
    ("conv 32 3 valid", (46, 46, 32), 320),
    ("bn", (46, 46, 32), 128),
    ("prelu", (46, 46, 32), 67712),
    ("pad 2", (50, 50, 32), 0),
    ("conv 64 3 valid", (48, 48, 64), 18496),
    ("prelu", (48, 48, 64), 147456),
    ("maxpool 5", (9, 9, 64), 0),
    ("pad 2", (13, 13, 64), 0),
    ("conv 128 3 valid", (11, 11, 128), 73856),
    ("prelu", (11, 11, 128), 15488),
    ("pad 2", (15, 15, 128), 0),
    ("conv 128 3 valid", (13, 13, 128), 147584),
    ("prelu", (13, 13, 128), 21632),
    ("pad 2", (17, 17, 128), 0),
    ("avgpool 3", (5, 5, 128), 0),
    ("flatten", (3200,), 0),
    ("dense 1024", (1024,), 3277824),
    ("prelu", (1024,), 1024),
    ("dropout 0.25", (1024,), 0),
    ("dense 1024", (1024,), 1049600),
    ("prelu", (1024,), 1024),
    ("dropout 0.25", (1024,), 0),
]


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def abstract(model, image=IMAGE):
    return jax.eval_shape(model.init, jax.random.key(0), image)


def test_seed_is_the_table_layer_by_layer():
    model = cnn.Model(preset="seed")
    variables = abstract(model)
    assert tuple(row[0] for row in TABLE) == cnn.SEED
    shapes = []

    def spied(module, x):
        step = module._apply

        def spy(i, x, train, keys):
            y = step(i, x, train, keys)
            shapes.append(y.shape[1:])
            return y

        object.__setattr__(module, "_apply", spy)
        return module(x)

    logits = jax.eval_shape(lambda v, x: model.apply(v, x, method=spied), variables, IMAGE)
    assert logits.shape == (2, 7)
    assert shapes == [row[1] for row in TABLE]
    for i, (text, _, parameters) in enumerate(TABLE):
        name = f"{text.split()[0]}_{i}"
        own = [collection.get(name, {}) for collection in variables.values()]
        assert count(own) == parameters, text
    assert count(variables["params"]["classifier"]) == 7175
    assert count(variables) == 4_829_319
    assert count(variables["params"]) == 4_829_255
    assert count(variables["batch_stats"]) == 64


def test_seed_splits_into_features_and_head():
    model = cnn.Model(preset="seed")
    variables = abstract(model)
    fmap = jax.eval_shape(lambda v, x: model.apply(v, x, method="features"), variables, IMAGE)
    assert fmap.shape == (2, 5, 5, 128)
    logits, vector = jax.eval_shape(lambda v, x: model.apply(v, x, method="head"), variables, fmap)
    assert (logits.shape, vector.shape) == ((2, 7), (2, 1024))


def test_small_has_the_size_that_its_configs_quote():
    variables = abstract(cnn.Model())
    assert count(variables["params"]) == 288_647
    assert count(variables["batch_stats"]) == 2 * 2 * (32 + 64 + 128)
    three = jax.ShapeDtypeStruct((1, 48, 48, 3), jnp.float32)
    assert count(abstract(cnn.Model(), three)["params"]) == 288_647 + 9 * 8 * 32


def test_medium_is_small_of_twice_the_width():
    variables = abstract(cnn.Model(preset="medium"))
    assert count(variables["params"]) == 1_148_679
    assert count(variables["batch_stats"]) == 2 * 2 * (64 + 128 + 256)
    assert [entry for entry, _, _ in cnn.parse(cnn.MEDIUM)][:-1] == [
        entry for entry, _, _ in cnn.parse(cnn.SMALL)
    ]


ALL_WORDS = (
    "space_to_depth 2",
    "conv 4 3",
    "bn",
    "leaky_relu 0.1",
    "pad 1",
    "maxpool 3 2",
    "conv 5 3 2 same nobias",
    "prelu",
    "avgpool 2 1",
    "flatten",
    "dense 6",
    "relu",
    "gaussian_dropout 0.5",
    "dropout 0.5",
)


def test_every_word_in_one_network_with_its_gradient_and_row_keys():
    model = cnn.Model(layers=ALL_WORDS, num_classes=3)
    assert {text.split()[0] for text in ALL_WORDS} == set(cnn.GRAMMAR) - {"gap"}
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 24, 24, 1)), jnp.float32)
    keys = jax.random.split(jax.random.key(1), 4)
    variables = random_variables(model, x)
    assert "bias" in variables["params"]["conv_1"]
    assert "bias" not in variables["params"]["conv_6"]

    # Statistics of the batch would tie the rows together: only the head's noise is looked at.
    fmap = jnp.asarray(np.random.default_rng(1).normal(size=(4, 2, 2, 5)), jnp.float32)

    @jax.jit
    def head(fmap, keys):
        return model.apply(variables, fmap, True, keys, method="head")[0]

    whole = head(fmap, keys)
    parts = [head(fmap[i : i + 2], keys[i : i + 2]) for i in (0, 2)]
    assert whole.shape == (4, 3)
    np.testing.assert_allclose(whole, np.concatenate(parts), rtol=1e-5, atol=1e-6)
    assert not np.allclose(whole, head(fmap, jax.random.split(jax.random.key(2), 4)))

    def loss(params):
        both = {**variables, "params": params}
        logits, _ = model.apply(both, x, True, keys, mutable=["batch_stats"])
        return jnp.sum(jnp.sin(logits))

    gradient = jax.jit(jax.grad(loss))(variables["params"])
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradient["conv_1"]["kernel"]))
    with pytest.raises(ValueError, match="key per row"):
        model.apply(variables, x, True, mutable=["batch_stats"])


def test_bfloat16_keeps_float32_parameters_statistics_and_logits():
    layers = ("conv 8 3", "bn", "relu", "maxpool 2", "conv 8 3 nobias", "bn", "relu", "gap")
    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 12, 12, 1)), jnp.float32)
    low, full = cnn.Model(layers=layers, dtype="bfloat16"), cnn.Model(layers=layers)
    variables = random_variables(low, x)

    def apply(model):
        return jax.jit(lambda v, x: model.apply(v, x, True, mutable=["batch_stats"]))(variables, x)

    logits, updated = apply(low)
    for leaf in jax.tree.leaves((abstract(low), updated, logits)):
        assert leaf.dtype == jnp.float32
    # Not rounded on the way: a tie of two classes would go to the first.
    assert (logits != logits.astype(jnp.bfloat16).astype(jnp.float32)).any()
    exact, _ = apply(full)
    np.testing.assert_allclose(logits, exact, atol=0.05)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (("conv 8 3", "bnn", "gap"), r"layers\[1\] 'bnn': unknown word 'bnn'; known: conv, bn,"),
        (("conv 8", "gap"), r"\[0\] 'conv 8': conv takes 2 to 3 numbers, not 1"),
        (("conv 8 3 full", "gap"), r"'full' is not a number or one of nobias, same, valid"),
        (("conv 8 0", "gap"), r"out of range"),
        (("conv 8 2.5", "gap"), r"'2.5' is not a number"),
        (("bn 3", "gap"), r"bn takes 0 numbers"),
        (("gap", "dropout 1.0"), r"'dropout 1.0'.*out of range"),
        (("conv 8 3",), r"0 entries are gap or flatten, exactly one"),
        (("gap", "maxpool 2"), r"\[1\] 'maxpool 2': maxpool belongs before gap"),
        (("dense 5", "flatten"), r"\[0\] 'dense 5': dense belongs after flatten"),
        (("maxpool 99", "gap"), r"\[0\] 'maxpool 99': does not fit a map of 48x48 pixels"),
        (("space_to_depth 5", "gap"), r"does not fit"),
        (("", "gap"), r"unknown word ''"),
    ],
)
def test_wrong_descriptions_are_user_errors(layers, message):
    with pytest.raises(UserError, match=message):
        abstract(cnn.Model(layers=layers))


def test_unknown_preset_is_a_user_error():
    with pytest.raises(UserError, match="choose one of seed, small, medium"):
        abstract(cnn.Model(preset="large"))
