"""benchmarks/augment.py on small batches, and its peers' operations against Pillow and ours."""

import importlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest
from PIL import Image

from ferjax.augment import policies
from ferjax.augment.randaugment import OPS

ROOT = Path(__file__).parents[2]
DATA = {"image_size": 0, "channels": 1, "mean": (0.5,), "std": (0.25,)}
CONFIG = """
from ferjax.config import base

def get_config():
    c = base()
    c.batch_size = 4
    c.algorithm = {"name": "supervised"}
    c.model = {"name": "cnn", "layers": ("space_to_depth 4", "conv 8 3", "gap")}
    del c.views["strong"]
    return c
"""


@pytest.fixture
def torch() -> ModuleType:
    return pytest.importorskip("torch")


@pytest.fixture
def peer_views(torch: ModuleType) -> ModuleType:
    return importlib.import_module("peer_views")


@pytest.mark.slow
@pytest.mark.parametrize("torch_is_there", [True, False])
def test_a_run(tmp_path: Path, torch_is_there: bool):
    if torch_is_there:
        pytest.importorskip("torch")
    config = tmp_path / "tiny.py"
    config.write_text(CONFIG)
    program = (
        "import importlib.util as u, runpy, sys; find = u.find_spec\n"
        f"hidden = {[] if torch_is_there else ['torch']}\n"
        "u.find_spec = lambda name, *a: None if name in hidden else find(name, *a)\n"
        "import augment\n"
        # The poster's views cost seconds of compilation.
        "every = augment.cases\n"
        "augment.cases = lambda c: {k: v for k, v in every(c).items() if k == 'weak'}\n"
        f"augment.main(['--config={config}', '--rounds=2', '--batch=8', '--images=24', "
        "'--side=16', '--table'])"
    )
    file = tmp_path / "run.py"
    indented = "\n".join(f"    {line}" for line in program.splitlines())
    file.write_text(f"if __name__ == '__main__':\n{indented}\n")
    path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    done = subprocess.run(
        [sys.executable, str(file)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "XLA_FLAGS": ""},
    )
    assert done.returncode == 0, done.stderr
    *table, last = done.stdout.strip().splitlines()
    assert any(line.startswith("views_per_second.weak.ours") for line in table)
    record = json.loads(last)
    rates, ratios = record["views_per_second"]["weak"], record["ratio"]["weak"]
    peers = {"pillow", "pillow_pool", "tensors"} if torch_is_there else set()
    assert record["missing"] == ([] if torch_is_there else ["torch"])
    assert set(ratios) == peers
    assert set(rates) == {"ours", *peers}
    for spread in (*rates.values(), *ratios.values()):
        assert 0 < spread["low"] <= spread["median"] <= spread["high"]
    share = record["training_step"]
    assert share["step_ms"]["median"] > 0
    # Two rounds, and extremes of the same rounds: the share cannot lie outside theirs.
    full, plain = share["step_ms"], share["step_without_views_ms"]
    assert 1 - plain["high"] / full["low"] <= share["share"]["low"] + 1e-9
    assert share["share"]["high"] <= 1 - plain["low"] / full["high"] + 1e-9


def faces(count: int = 6, side: int = 24) -> np.ndarray:
    """Smooth images, so that a small shift of a sample changes little."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (count, 4, 4), dtype=np.uint8)
    bilinear = Image.Resampling.BILINEAR
    return np.stack([np.asarray(Image.fromarray(x).resize((side, side), bilinear)) for x in coarse])


@pytest.mark.parametrize("op", [op for op in OPS if op not in ("identity", "colour")])
@pytest.mark.parametrize("style", ["original", "uniform"])
def test_tensor_operations_are_pillows(torch, peer_views, op: str, style: str):
    images = faces()
    random.seed(1)
    levels = [float(peer_views.magnitude(op, style, 24, peer_views.draw())) for _ in images]
    want = np.stack(
        [
            np.asarray(peer_views.apply(Image.fromarray(x), op, level, 128))
            for x, level in zip(images, levels, strict=True)
        ]
    ).astype(np.float32)
    x = torch.from_numpy(images)[:, None].float()
    got = peer_views.apply_batch(x, op, torch.tensor(levels), 128.0).round().clamp(0, 255)[:, 0]
    error = np.abs(got.numpy() - want)
    if op.startswith("shear"):
        # About the corner there, about the centre here: only how far pixels move is the same.
        assert want.shape == got.shape
        assert not np.array_equal(got, x[:, 0])
    elif op in ("rotate", "translate_x", "translate_y"):
        # Pillow fills where a sample's four neighbours are not all inside, or nearest the border.
        assert np.quantile(error[:, 3:-3, 3:-3], 0.8) <= 2
    else:
        assert error.max() <= 1


@pytest.mark.parametrize("view", ["PillowView", "TensorView"])
@pytest.mark.parametrize("channels", [1, 3])
def test_without_operations_views_are_normalised_images(
    torch, peer_views, view: str, channels: int
):
    images = faces()
    made = getattr(peer_views, view)(vars(policies.NONE), {**DATA, "channels": channels})
    if view == "PillowView":
        got = torch.stack([made(x) for x in images])
    else:
        got = made(torch.from_numpy(images)[:, None])
    want = (images[:, None] / 255 - 0.5) / 0.25
    assert got.shape == (len(images), channels, 24, 24)
    np.testing.assert_allclose(got, np.broadcast_to(want, got.shape), atol=1e-5)


def test_all_three_strong_views_have_the_same_statistics(torch, peer_views):
    """Ours, Pillow's and the tensors' are draws of one distribution: compare means over many."""
    images = np.repeat(faces(2, 16), 400, axis=0)
    random.seed(0)
    torch.manual_seed(0)
    policy = policies.STRONG
    pillow = peer_views.PillowView(vars(policy), DATA)
    theirs = [
        torch.stack([pillow(x) for x in images]).numpy(),
        peer_views.TensorView(vars(policy), DATA)(torch.from_numpy(images)[:, None]).numpy(),
    ]
    view = policies.make_view(policy, size=None, mean=(0.5,), std=(0.25,), channels=1)
    ours = jax.jit(view)(images[..., None], jax.random.split(jax.random.key(0), len(images)))
    ours = np.asarray(ours).transpose(0, 3, 1, 2)
    for other in theirs:
        assert other.shape == ours.shape
        for start in (0, 400):
            a, b = ours[start : start + 400], other[start : start + 400]
            # Pixel means differ by their standard errors and by how borders are filled.
            assert np.abs(a.mean(0) - b.mean(0)).mean() < 0.12
            assert a.std() == pytest.approx(b.std(), rel=0.1)


@pytest.mark.parametrize(
    ("policy", "data"),
    [
        (policies.SEED_CROP, {**DATA, "image_size": 32, "channels": 3}),
        (policies.WEAK, {**DATA, "image_size": 32}),
        (policies.STRONG_USB, DATA),
    ],
)
def test_other_policies_give_views_of_the_size(
    torch, peer_views, policy: policies.Policy, data: dict
):
    images = faces()
    side, channels = data["image_size"] or 24, data["channels"]
    one = peer_views.PillowView(vars(policy), data)(images[0])
    many = peer_views.TensorView(vars(policy), data)(torch.from_numpy(images)[:, None])
    assert one.shape == (channels, side, side)
    assert many.shape == (len(images), channels, side, side)
    for view in (one, many):
        assert view.dtype == torch.float32
        assert -2.001 <= float(view.min()) < float(view.max()) <= 2.001


def test_what_the_peer_lacks_is_a_user_error(peer_views):
    with pytest.raises(peer_views.UserError, match="no rotation"):
        peer_views.PillowView({**vars(policies.WEAK), "rotation": 10.0}, DATA)
