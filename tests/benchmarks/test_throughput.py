"""benchmarks/throughput.py on a tiny network, and its PyTorch peer against the engine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import common
import jax
import numpy as np
import pytest
import throughput

from ferjax import config as configs
from ferjax.engine.state import build as build_ours
from ferjax.models.resnet import DEPTHS

ROOT = Path(__file__).parents[2]
CONFIG = """
from ferjax.config import base

def get_config(variant=""):
    c = base()
    c.batch_size = 4
    c.algorithm = {"name": variant or "fixmatch"}
    if not variant:
        c.algorithm.mu = 2
        c.algorithm.temperature = 0.5
    layers = ("space_to_depth 4", "conv 8 3 nobias", "bn", "relu", "flatten", "dropout 0.5")
    c.model = {"name": "cnn", "layers": layers}
    c.views.strong = {"policy": "weak", "cutout": 0.5}
    return c
"""
SPREAD = {"median", "low", "high"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.py"
    file.write_text(CONFIG)
    return file


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""},
    )


@pytest.mark.slow
def test_a_run_beside_the_peer(path: Path):
    pytest.importorskip("torch")
    flags = ["--peer=pytorch", "--steps=3", "--rounds=2", "--images=48", "--side=16", "--table"]
    done = python(
        str(ROOT / "benchmarks/throughput.py"), f"--config={path}", *flags, cwd=path.parent
    )
    assert done.returncode == 0, done.stderr
    *table, last = done.stdout.strip().splitlines()
    assert any(line.startswith("ratio.joint / loader") for line in table)
    record = json.loads(last)
    assert record["benchmark"] == "throughput"
    assert record["steps_per_round"] == 3
    loss = record["loss"]
    assert loss["equal"]
    assert loss["ours"] == pytest.approx(loss["peer"], rel=1e-4)
    # ln 7 for each part of an untrained network's loss: the unlabelled part was compared too.
    assert loss["ours"] > 2
    assert set(record["ours"]) == {"joint", "split"}
    for form, figures in record["ours"].items():
        step = figures["ms_per_step"]
        assert set(step) == SPREAD
        assert 0 < step["low"] <= step["median"] <= step["high"]
        # Extremes are of the same round.
        assert figures["unlabeled_images_per_second"]["high"] == pytest.approx(8e3 / step["low"])
        assert figures["labeled_images_per_second"]["low"] == pytest.approx(4e3 / step["high"])
        assert figures["compile_seconds"] > 0
        assert figures["mfu"]["median"] > 0
        assert set(record["ratio"][f"{form} / step"]) == SPREAD
    assert record["grad_norm"]["equal"]
    assert record["grad_norm"]["ours"] > 0
    memory = [figures["memory"] for figures in record["ours"].values()]
    assert memory[0]["bytes"] > 0
    assert memory[0]["program_bytes"] > 0
    assert memory[1] is None  # a peak only grows
    joint, split = (record["ours"][form]["flops_per_step"] for form in ("joint", "split"))
    assert split < joint  # its weak views have no gradient
    peer = record["peer"]
    assert peer["chosen"] in peer["candidates_ms"]
    assert peer["loader"]["ms_per_step"]["low"] > 0
    assert set(record["ratio"]) == {
        f"{form} / {kind}" for form in ("joint", "split") for kind in ("step", "loader")
    }


@pytest.mark.slow
def test_a_run_alone_counts_the_flops_of_one_step(path: Path, capsys: pytest.CaptureFixture):
    """Two convolutions' FLOPs by hand; two steps a call do not change the count."""

    def measured(*flags: str) -> dict:
        changes = [*flags, "--rounds=1", "--steps=2", "--images=48", "--side=16"]
        changes += ["--config.model.layers=('conv 48 3', 'conv 48 3', 'gap')"]
        changes += ["--config.parallel=shard_map"]
        assert throughput.main([f"--config={path}:supervised", *changes]) == 0
        return json.loads(capsys.readouterr().out)

    # Of 9 taps at each of 16 x 16 pixels, (3 * 16 - 2)^2 lie inside the map. The second layer takes
    # as much for each of its two gradients; the first has one.
    first, second = (2 * 4 * 46**2 * channels * 48 for channels in (1, 48))
    one, two = measured(), measured("--config.steps_per_call=2")
    assert two["ours"]["own"]["steps_per_call"] == 2
    flops = one["ours"]["own"]["flops_per_step"]
    assert two["ours"]["own"]["flops_per_step"] == flops
    assert 2 * first + 3 * second < flops < 1.25 * (2 * first + 3 * second)
    assert "peer" not in one
    assert "unlabeled_images_per_second" not in one["ours"]["own"]


def test_no_torch_is_a_line_and_status_2(path: Path):
    program = (
        "import importlib.util as u, runpy, sys; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'torch' else find(name, *a)\n"
        f"sys.argv = ['throughput.py', '--config={path}', '--peer=pytorch']\n"
        f"sys.path.insert(0, {str(ROOT / 'benchmarks')!r})\n"
        f"runpy.run_path({str(ROOT / 'benchmarks/throughput.py')!r}, run_name='__main__')"
    )
    done = python("-c", program, cwd=path.parent)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        'ferjax: --peer=pytorch needs PyTorch: pip install ".[bench]"'
    )
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.batch_sizes=3", "batch_size"),
        ("--config.modell.depth=3", "modell is not a section"),
        ("--config.batch_size=", "expected int"),
    ],
)
def test_wrong_keys_are_user_errors(path: Path, flag: str, message: str):
    with pytest.raises(common.UserError, match=message):
        throughput.main([f"--config={path}", flag])


def test_flops_are_counted_where_the_client_counts_none(path, monkeypatch):
    """As of a GPU or TPU, whose programs JAX analyses only once they are compiled."""
    config = configs.finalize({**configs.from_file(str(path), "supervised").to_dict(), "name": "x"})
    setup = common.Setup(config, images=24, side=16)
    own = setup.flops()
    monkeypatch.setattr("jax._src.interpreters.pxla.xb.using_pjrt_c_api", lambda _: True)
    assert setup.lower().cost_analysis() is None
    assert setup.flops() == own > 0


def test_losses_that_differ_are_not_equal():
    assert throughput.compared(2.0, 2.0001, 1e-4)["equal"]
    assert not throughput.compared(2.0, 2.001, 1e-4)["equal"]


MODELS = {
    "wide_resnet": {"name": "wide_resnet", "depth": 10, "width": 1},
    "resnet": {"name": "resnet", "depth": 6, "width": 8, "stem": "imagenet"},
    "bottleneck": {"name": "resnet", "depth": 8, "width": 8, "stem": "cifar"},
    "small": {"name": "cnn", "preset": "small"},
    # What the seed's CNN has and the small one does not: slopes, padding, valid, flatten, dense.
    "slopes": {
        "name": "cnn",
        "layers": (
            *("space_to_depth 2", "conv 6 3 valid", "prelu", "pad 2", "conv 4 2 2", "avgpool 2"),
            *("leaky_relu 0.2", "flatten", "dense 5", "prelu"),
        ),
    },
}


@pytest.mark.parametrize("name", list(MODELS))
def test_networks_compute_the_same_logits_in_train_mode(
    path: Path, name: str, monkeypatch: pytest.MonkeyPatch
):
    torch = pytest.importorskip("torch")
    from peer_networks import build, load

    # ResNets of two stages: what is tested needs no more, and compiling does.
    monkeypatch.setitem(DEPTHS, 6, ((1, 1), False))
    monkeypatch.setitem(DEPTHS, 8, ((1, 1), True))

    config = common.changed(common.read_config(str(path)), model=MODELS[name], data__channels=3)
    _, ours = build_ours(config, 7)
    ours = ours.clone(axis_name=None)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, 24, 24, 3)).astype(np.float32)
    shapes = jax.eval_shape(ours.init, jax.random.key(0), x)
    variables = jax.tree.map(
        lambda leaf: rng.normal(0.1, np.prod(leaf.shape[:-1]) ** -0.5, leaf.shape), shapes
    )
    variables = jax.tree.map(lambda leaf: leaf.astype(np.float32), variables)
    want, _ = jax.jit(lambda v, x: ours.apply(v, x, True, mutable=["batch_stats"]))(variables, x)
    theirs = build(config.to_dict(), side=24, classes=7, exact=True)
    load(theirs, variables["params"])
    with torch.no_grad():
        got = theirs.train()(torch.from_numpy(x).permute(0, 3, 1, 2)).numpy()
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3 * float(np.abs(want).max()))


@pytest.mark.parametrize("algorithm", ["fixmatch", "supervised"])
def test_steps_train_the_same_weights(path: Path, algorithm: str):
    """Loss, gradient, weight decay on kernels, momentum and EMA: two steps on the same views."""
    torch = pytest.importorskip("torch")
    from peer_networks import build, load
    from pytorch_peer import Trainer

    fields = {"name": "supervised", "label_smoothing": 0.1}
    if algorithm == "fixmatch":
        fields = {"name": "fixmatch", "mu": 2, "threshold": 0.0, "forward": "joint"}
    layers = ("space_to_depth 4", "conv 8 3", "bn", "prelu", "gap", "dense 6", "relu")
    config = common.changed(
        common.read_config(str(path)),
        algorithm=fields,
        model={"name": "cnn", "layers": layers},
        optimizer__schedule="constant",
        optimizer__weight_decay=0.1,
        optimizer__learning_rate=0.1,
        parallel="shard_map",
    )
    devices = jax.devices()[:1]
    setup = common.Setup(config, images=48, side=16, plain_views=True, devices=devices)
    start, data = setup.init_state(), setup.host_data()
    network = build(config.to_dict(), side=16, classes=7, exact=True)
    load(network, start.params)
    trainer = Trainer(config.to_dict(), network)
    for step in range(2):
        index = setup.index(step, step + 1)
        pixels = torch.from_numpy(data["images"]).permute(0, 3, 1, 2).float() / 255
        pixels = (pixels - config.data.mean[0]) / config.data.std[0]
        rows = torch.from_numpy(index["labeled"][0]).long()
        target = torch.from_numpy(data["targets"]).argmax(-1)[rows]
        batch = {"labeled": pixels[rows], "target": target}
        if algorithm == "fixmatch":
            batch["weak"] = batch["strong"] = pixels[torch.from_numpy(index["unlabeled"][0]).long()]
        loss = float(trainer.step(batch))
        setup.run(1)
        assert loss == pytest.approx(float(setup.metrics["loss"][0][0]), rel=1e-4)
    state, _, _ = setup.arguments(1)
    for trained, ours in ((trainer.network, state.params), (trainer.ema, state.ema["params"])):
        # Our weights in the peer's form, to be compared with what the peer trained.
        expected = build(config.to_dict(), side=16, classes=7, exact=True)
        load(expected, jax.device_get(ours))
        for (name, got), want in zip(
            trained.named_parameters(), expected.parameters(), strict=True
        ):
            np.testing.assert_allclose(
                got.detach(), want.detach(), rtol=1e-3, atol=1e-5, err_msg=name
            )
    assert not np.allclose(network.conv_1.weight.detach(), trainer.ema.conv_1.weight)
