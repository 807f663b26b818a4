"""Weights from torch: the same logits, and one line for each thing that can be wrong with them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ferjax.config import UserError
from ferjax.models import imported
from ferjax.models.resnet import DEPTHS, Model

torch = pytest.importorskip("torch")
from torch_resnet import random_resnet  # noqa: E402

SHALLOW = {10: ((1, 2, 1, 1), False), 14: ((1, 2, 1, 1), True)}


@pytest.fixture(autouse=True)
def shallow(monkeypatch, quick_compilation):
    """Networks that compile fast."""
    for depth, plan in SHALLOW.items():
        monkeypatch.setitem(DEPTHS, depth, plan)


@functools.cache
def shapes(model, side=32, channels=1):
    """{path without its collection: shape}."""
    x = jax.ShapeDtypeStruct((1, side, side, channels), jnp.float32)
    tree = jax.eval_shape(model.init, jax.random.key(0), x)
    flat = {c: jax.tree_util.tree_leaves_with_path(tree[c]) for c in ("params", "batch_stats")}
    return {tuple(k.key for k in p): (c, a.shape) for c, rows in flat.items() for p, a in rows}


def variables(found, wanted):
    tree = {"params": {}, "batch_stats": {}}
    for path, array in found.items():
        node = tree[wanted[path][0]]
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = array
    return tree


def converted(net, depth, channels, **fields):
    model = Model(depth=depth, **fields)
    wanted = shapes(model, channels=channels)
    tensors = {name: value.numpy() for name, value in net.state_dict().items()}
    found = imported.convert(tensors, {p: shape for p, (_, shape) in wanted.items()}, depth)
    return model, wanted, found


@pytest.mark.parametrize(("depth", "channels"), [(10, 1), (14, 3)])
def test_the_logits_are_torchs(depth, channels):
    """A grey image gives a three-channel network in torch what the one channel gives ours."""
    net = random_resnet(*DEPTHS[depth], width=8, classes=7)
    model, wanted, found = converted(net, depth, channels, width=8)
    assert found.keys() == wanted.keys()
    grey = np.random.default_rng(0).normal(size=(2, 1, 32, 32)).astype(np.float32)
    x = np.random.default_rng(1).normal(size=(2, 3, 32, 32)).astype(np.float32)
    x = np.repeat(grey, 3, 1) if channels == 1 else x
    with torch.no_grad():
        expected = net(torch.from_numpy(x)).numpy()
    x = x.transpose(0, 2, 3, 1)[..., :channels]
    logits = jax.jit(model.apply)(variables(found, wanted), x)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_every_tensor_of_a_deep_one_has_its_place():
    depth = 50
    net = random_resnet(*DEPTHS[depth], width=1, classes=7)
    _, wanted, found = converted(net, depth, 1, width=1)
    assert {path: array.shape for path, array in found.items()} == {
        path: shape for path, (_, shape) in wanted.items()
    }
    total = sum(t.numel() for n, t in net.state_dict().items() if "num_batches" not in n)
    assert sum(array.size for array in found.values()) == total - 2 * 49  # the stem's channels


def test_a_classifier_of_other_classes_is_left_out():
    net = random_resnet(*DEPTHS[10], width=1, classes=10)
    _, wanted, found = converted(net, 10, 1, width=1)
    assert wanted.keys() - found.keys() == {("classifier", "kernel"), ("classifier", "bias")}


def change(name, value):
    return lambda tensors: {**tensors, name: value}


def without(name):
    return lambda tensors: {n: t for n, t in tensors.items() if n != name}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without("layer1.0.conv1.weight"), "it lacks layer1.0.conv1.weight"),
        (without("layer4.0.bn2.running_var"), "it lacks layer4.0.bn2.running_var"),
        (change("layer1.2.conv1.weight", np.zeros(3, np.float32)), "holds layer1.2.conv1.weight"),
        (
            change("layer2.0.conv1.weight", np.zeros((2, 1, 1, 1), np.float32)),
            r"layer2.0.conv1.weight is \[2, 1, 1, 1\], the network needs \[2, 1, 3, 3\]",
        ),
        (change("conv1.weight", np.zeros((1, 2, 7, 7), np.float32)), r"conv1.weight is \[1, 2, 7"),
        (change("conv1.weight", np.zeros((1, 7), np.float32)), r"needs \[1, 1, 7, 7\]"),
        (change("bn1.weight", np.float32(0)), "bn1.weight is"),
        (change("bn1.weight", np.zeros(1, np.int64)), "bn1.weight is of type int64"),
        (change("bn1.bias", np.array([np.nan], np.float32)), "bn1.bias holds NaN"),
        (change("bn1.running_var", np.array([-1], np.float32)), "bn1.running_var holds"),
    ],
)
def test_what_does_not_fit_is_named(spoil, message):
    net = random_resnet(*DEPTHS[10], width=1, classes=7)
    tensors = spoil({name: value.numpy() for name, value in net.state_dict().items()})
    wanted = {path: shape for path, (_, shape) in shapes(Model(depth=10, width=1)).items()}
    with pytest.raises(UserError, match=message) as error:
        imported.convert(tensors, wanted, 10)
    assert "\n" not in str(error.value)
