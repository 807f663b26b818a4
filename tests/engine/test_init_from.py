"""Starting weights from another run, from an exported file and from torch's files."""

import json
import logging
import pickle
import shutil

import harness
import jax
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict

from ferjax import config as configs
from ferjax.config import UserError
from ferjax.data import splits
from ferjax.engine.checkpoint import Checkpoints
from ferjax.engine.init_from import start_from
from ferjax.engine.state import TrainState, build
from ferjax.models.imported import torch_name
from ferjax.models.resnet import DEPTHS

CLASSES = tuple("abcdefg")
LAYERS = ("conv 4 3 4 nobias", "bn", "relu", "gap")
CNN = {"name": "cnn", "layers": LAYERS}


def network(seed=0, method="supervised", model=CNN, classes=CLASSES, init_from="", channels=1):
    """A config, and a state of random arrays of its shapes; nothing is compiled."""
    config = harness.make_config(
        dtype="float32",
        algorithm={"name": method},
        model=dict(model),
        init_from=str(init_from),
    )
    _, module = build(config, len(classes))
    x = jax.ShapeDtypeStruct((1, 16, 16, channels), np.float32)
    rng = np.random.default_rng(seed)
    draw = lambda leaf: rng.uniform(0.1, 1, leaf.shape).astype(np.float32)  # noqa: E731
    shapes = {"batch_stats": {}, **jax.eval_shape(module.init, jax.random.key(0), x)}
    student, ema = (jax.tree.map(draw, shapes) for _ in range(2))
    zero = np.zeros((), np.int32)
    state = TrainState(zero, zero, student["params"], student["batch_stats"], (), ema, {})
    return config, state


def save(workdir, config, state, accuracies, classes=CLASSES):
    """Checkpoints of a run at steps 1, 2, ..., with the accuracy of each."""
    workdir.mkdir()
    configs.save(config, workdir / "config.json")
    everything = np.arange(3, dtype=np.int32)
    subsets = splits.Subsets(everything, everything, "x")
    splits.save(subsets, workdir / "split.json", everything, everything, "d", class_names=classes)
    checkpoints = Checkpoints(workdir / "checkpoints", keep=5)
    for step, accuracy in enumerate(accuracies, 1):
        ema = jax.tree.map(lambda x, step=step: x + step, state.ema)
        checkpoints.save(state.replace(step=np.int32(step), ema=ema), {}, accuracy)
    checkpoints.wait()
    checkpoints.close()
    return workdir


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose best checkpoint is its first, and its state before the steps."""
    config, state = network(seed=1)
    return save(tmp_path_factory.mktemp("runs") / "plain", config, state, [0.5, 0.3]), state


def flat(tree):
    return flatten_dict(tree)


def same(a, b):
    a, b = flat(a), flat(b)
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def test_the_ema_of_the_best_checkpoint(run, caplog):
    workdir, source = run
    config, fresh = network(init_from=workdir)
    with caplog.at_level(logging.INFO, "ferjax"):
        started = start_from(fresh, config, CLASSES)
    wanted = jax.tree.map(lambda x: x + 1, source.ema)
    assert same(started.params, wanted["params"])
    assert same(started.batch_stats, wanted["batch_stats"])
    assert same(started.ema, wanted)
    mine, averaged = (jax.tree.leaves(x) for x in (started.params, started.ema["params"]))
    assert not any(np.shares_memory(a, b) for a, b in zip(mine, averaged, strict=True))
    assert f"init_from: 7 of 7 tensors from {workdir}, step 1, fresh: none" in caplog.text
    assert jax.tree.structure(started) == jax.tree.structure(fresh)


@pytest.mark.parametrize("classes", ["gfedcba", "abc"])
def test_a_classifier_of_other_classes_starts_afresh(run, caplog, classes):
    workdir, source = run
    config, fresh = network(init_from=workdir, classes=tuple(classes))
    with caplog.at_level(logging.INFO, "ferjax"):
        started = start_from(fresh, config, tuple(classes))
    assert same(started.params["classifier"], fresh.params["classifier"])
    first = started.params["conv_0"]["kernel"]
    assert np.array_equal(first, source.ema["params"]["conv_0"]["kernel"] + 1)
    assert "5 of 7 tensors" in caplog.text
    assert "fresh: classifier" in caplog.text


def test_methods_with_parts_of_their_own(run, tmp_path, caplog):
    """From a plain network to a wrapped one, between two wrapped ones, and back."""
    workdir, source = run
    config, fresh = network(init_from=workdir, method="autoencoder")
    with caplog.at_level(logging.INFO, "ferjax"):
        started = start_from(fresh, config, CLASSES)
    plain = jax.tree.map(lambda x: x + 1, source.ema["params"])
    assert same(started.params["backbone"], plain)
    assert same(started.params["decoder"], fresh.params["decoder"])
    assert "fresh: decoder" in caplog.text

    wrapped = save(tmp_path / "wrapped", config, started, [None])  # not scored: the latest
    config, fresh = network(init_from=wrapped, method="autoencoder")
    again = start_from(fresh, config, CLASSES)
    assert same(again.params, jax.tree.map(lambda x: x + 1, started.ema["params"]))
    config, fresh = network(init_from=wrapped, method="remixmatch")
    other = start_from(fresh, config, CLASSES)
    assert same(other.params["backbone"], again.params["backbone"])
    assert same(other.params["rotation_head"], fresh.params["rotation_head"])
    config, fresh = network(init_from=wrapped)
    back = start_from(fresh, config, CLASSES)
    assert same(back.params, again.params["backbone"])


def test_a_file_that_ferjax_exported(run, tmp_path):
    _, source = run
    arrays = {"/".join(path): x for path, x in flat(source.ema).items()}
    path = tmp_path / "exported.safetensors"
    for classes, taken in ((CLASSES, True), (CLASSES[::-1], False)):
        metadata = {"ferjax": json.dumps({"classes": classes})}
        safetensors.numpy.save_file(arrays, path, metadata)
        config, fresh = network(init_from=path)
        started = start_from(fresh, config, CLASSES)
        assert same(started.params["conv_0"], source.ema["params"]["conv_0"])
        assert same(started.params["classifier"], source.ema["params"]["classifier"]) == taken


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"name": "cnn", "layers": ("conv 5 3 4 nobias", "bn", "relu", "gap")}}, "bn_1/"),
        ({"model": {"name": "cnn", "layers": LAYERS[:1] + LAYERS[2:]}}, "bn_1/"),
        ({"model": {"name": "cnn", "layers": ("conv 4 3 4", *LAYERS[1:])}}, "conv_0/bias"),
        ({"channels": 3}, r"conv_0/kernel \[3, 3, 1, 4\], this run's \[3, 3, 3, 4\]"),
    ],
)
def test_another_network_is_refused(run, changes, message):
    config, fresh = network(init_from=run[0], **changes)
    with pytest.raises(UserError, match=message) as error:
        start_from(fresh, config, CLASSES)
    assert str(error.value).startswith(f"config.init_from={run[0]}: ")


def test_what_is_no_source(run, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(run[0], damaged)
    for state in damaged.glob("checkpoints/*/state"):
        shutil.rmtree(state)
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "x.pth").write_bytes(pickle.dumps({}))
    files = {
        "pickle.safetensors": pickle.dumps({"conv1.weight": [0.0]}),
        "zip.safetensors": b"PK\x03\x04" + bytes(100),
        "nothing.safetensors": b"",
        "huge.safetensors": b"\xff" * 64,
        "cut.safetensors": safetensors.numpy.save({"conv1.weight": np.ones(99)})[:-9],
        "list.safetensors": (2).to_bytes(8, "little") + b"[]",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    for where, message in (
        (damaged, "checkpoints"),
        (empty, "no config.json is there"),
        (tmp_path / "x.pth", "a .pth, which is a pickle"),
        (tmp_path / "nowhere.safetensors", "No such file"),
        *((tmp_path / name, "not a whole safetensors file") for name in files),
    ):
        config, fresh = network(init_from=where)
        with pytest.raises(UserError, match=message) as error:
            start_from(fresh, config, CLASSES)
        assert "\n" not in str(error.value)
    odd = tmp_path / "odd.safetensors"
    kernel = np.full((3, 3, 1, 4), np.nan, np.float32)
    for tensors, described in (
        ({"a": kernel}, "{"),
        ({"a": kernel}, "[]"),
        ({"a": kernel}, '{"classes": 3}'),
        ({"params": kernel, "params/a": kernel}, '{"classes": ["a"]}'),
        ({"params/conv_0/kernel": kernel}, '{"classes": ["a"]}'),
        ({"params/conv_0/kernel": np.zeros(kernel.shape, np.int8)}, '{"classes": ["a"]}'),
    ):
        safetensors.numpy.save_file(tensors, odd, {"ferjax": described})
        config, fresh = network(init_from=odd)
        with pytest.raises(UserError, match=r"as ferjax\.export|its network has|finite floats"):
            start_from(fresh, config, CLASSES)
    good = tmp_path / "good.safetensors"
    safetensors.numpy.save_file({"conv1.weight": np.ones(3, np.float32)}, good)
    config, fresh = network(init_from=good)
    with pytest.raises(UserError, match=r"config.model.name=resnet, not cnn"):
        start_from(fresh, config, CLASSES)


def test_torchs_file(tmp_path, caplog, monkeypatch):
    monkeypatch.setitem(DEPTHS, 10, ((1, 1, 1, 1), False))
    resnet = {"name": "resnet", "depth": 10, "width": 2}
    path = tmp_path / "resnet10.safetensors"
    config, fresh = network(model=resnet, init_from=path)
    # Made by the table's own inverse; test_imported.py has networks of torch.
    tensors = {"bn1.num_batches_tracked": np.zeros((), np.int64)}
    for tree in (fresh.params, fresh.batch_stats):
        for place, array in flat(tree).items():
            order = {4: (3, 2, 0, 1), 2: (1, 0)}.get(array.ndim, range(array.ndim))
            tensors[torch_name(place, 10)] = np.ascontiguousarray(array.transpose(order)) + 1
    tensors["fc.weight"] = np.zeros((1000, 16), np.float32)
    safetensors.numpy.save_file(tensors, path)
    with caplog.at_level(logging.INFO, "ferjax"):
        started = start_from(fresh, config, CLASSES)
    assert "init_from: 60 of 62 tensors" in caplog.text
    assert "fresh: classifier" in caplog.text
    for name in ("params", "batch_stats"):
        before, after = flat(getattr(fresh, name)), flat(getattr(started, name))
        for place, array in before.items():
            np.testing.assert_array_equal(after[place], array + (place[0] != "classifier"))


def test_a_run_keeps_what_it_started_from():
    """A saved config without the key is one that started from random weights."""
    (old, _), (new, _) = network(), network(init_from="runs/x")
    assert configs.differences(old, new) == ["init_from: '' -> 'runs/x'"]
    earlier = old.to_dict()
    del earlier["init_from"]
    assert configs.finalize(earlier) == old
