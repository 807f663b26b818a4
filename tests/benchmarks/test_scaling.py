"""benchmarks/scaling.py on a tiny network: the rows against what must hold, and the command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import common
import jax
import matplotlib.image
import numpy as np
import pytest
import scaling

from ferjax.config import UserError

CONFIG = """
from ferjax.config import base

def get_config(variant=""):
    c = base()
    c.batch_size = 16
    c.algorithm = {"name": variant or "supervised"}
    layers = ("space_to_depth 4", "conv 16 3 nobias", "bn", "relu", "gap")
    c.model = {"name": "cnn", "layers": layers}
    return c
"""
WEIGHTS, STATISTICS = 16 * 16 * 9 + 2 * 16 + 16 * 7 + 7, 2 * 16


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.py"
    file.write_text(CONFIG)
    return file


@pytest.fixture
def config(path: Path):
    return common.read_config(str(path))


def measure(axis, config, **options):
    wanted = scaling.points(axis, config, True, "cpu")
    return scaling.measure(wanted, **{"limit": 1e9, "rounds": 2, "quick": True, **options})


def test_devices_share_the_work_and_reduce_gradients_and_statistics(config):
    rows = measure("devices", config)
    assert [row["value"] for row in rows] == [1, 2, 4]
    assert [row["parameters"] for row in rows] == [WEIGHTS] * 3
    assert rows[0]["collectives"] == {}
    for row in rows[1:]:
        found = row["collectives"]
        assert set(found) == {"all-reduce"}
        # Gradients, BatchNorm's moments forward and backward, and a few sums of metrics.
        least = 4 * (WEIGHTS + 2 * STATISTICS)
        assert least <= found["all-reduce"]["bytes"] <= least + 64
        n = row["devices"]
        sent = 2 * found["all-reduce"]["bytes"] * (n - 1) / n
        assert found["all-reduce"]["sent_bytes"] == pytest.approx(sent)
        # All but the update of the weights is shared.
        update = 30 * WEIGHTS / 1e9
        assert rows[0]["gflop"] / n <= row["gflop"] <= rows[0]["gflop"] / n + update
        assert row["ms"] is None
        assert "virtual" in row["note"]


def test_work_of_a_batch_is_that_of_its_convolutions(config):
    rows = measure("batch", config, limit=0)
    # Forward and weight gradient of a 3x3 convolution on 12 x 12 pixels, its zero border not
    # multiplied; all else is small beside them.
    inside = (3 * 12 - 2) ** 2
    for row, batch in zip(rows, (16, 48), strict=True):
        assert row["labeled"] == batch
        assert row["unlabeled"] == 0
        least = 2 * 2 * batch * inside * 16 * 16 / 1e9
        assert least <= row["gflop"] <= 1.5 * least
        # Beyond the limit nothing is compiled or run, and the row says so.
        assert [row[k] for k in ("ms", "compile_s", "program_mb", "collectives")] == [None] * 4
        assert "lowered only" in row["note"]


def test_filled_state_has_the_shapes_of_a_real_one(config):
    step = scaling.Step(config, images=64)
    ours, real = step.init_state(), common.Setup(config, images=64).init_state()
    shapes = [jax.tree.map(lambda x: (np.shape(x), np.asarray(x).dtype), s) for s in (ours, real)]
    assert shapes[0] == shapes[1]


def test_points_change_one_thing(path):
    config = common.read_config(f"{path}:fixmatch")
    for axis, values in {
        "image": {48: 48, 96: 96, 224: 224},
        "mu": {n: n for n in (1, 2, 3, 5, 7, 11, 15)},
        "network": {18: 18, 34: 34, 50: 50},
    }.items():
        found = {}
        for point in scaling.points(axis, config, False, "gpu"):
            c = point.config
            found[point.value] = {
                "image": c.data.image_size,
                "mu": c.algorithm.mu,
                "network": c.model.get("depth"),
            }[axis]
            assert c.batch_size == 16
        assert found == values
    steps = scaling.points("steps", config, False, "gpu")
    assert [p.config.steps_per_call for p in steps] == [1, 2, 4, 8, 16, 32, 64]
    assert {p.config.model.layers for p in steps} == {config.model.layers}
    assert all(p.note == scaling.LOOP_NOTE for p in scaling.points("steps", config, True, "cpu"))


def test_refusals(path, config):
    with pytest.raises(UserError, match=r"supervised has no unlabelled images"):
        scaling.points("mu", config, False, "cpu")
    with pytest.raises(UserError, match=r"--axes=depth: choose from batch,image,"):
        scaling.main([f"--config={path}", "--axes=depth"])


@pytest.mark.slow
def test_command_prints_rows_table_and_figure(path, tmp_path):
    """With one CPU device, so that the axis `devices` needs a process of its own."""
    root, picture = Path(scaling.__file__).parent, tmp_path / "figure.png"
    arguments = ["--quick", "--rounds=2", "--axes=devices,steps", "--table", f"--plot={picture}"]
    done = subprocess.run(
        [sys.executable, str(root / "scaling.py"), f"--config={path}", *arguments],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(root.parent), *sys.path])),
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]
    *lines, last = done.stdout.splitlines()
    record = json.loads(last)
    rows = record["rows"]
    assert record["machine"]["devices"] == 1
    assert [(row["axis"], row["value"]) for row in rows] == [
        *(("devices", n) for n in (1, 2, 4)),
        *(("steps", n) for n in (1, 4, 16)),
    ]
    timed = rows[3:]
    assert all(row["ms"]["low"] <= row["ms"]["median"] <= row["ms"]["high"] for row in timed)
    # The images of a step over its time; the work of a step does not depend on K.
    for row in timed:
        rate = 1e3 * (row["labeled"] + row["unlabeled"]) / row["ms"]["median"]
        assert row["images_per_second"] == pytest.approx(rate)
        assert row["gflop"] == timed[0]["gflop"]
    body = [line.split() for line in lines if line]
    assert [cells[:2] for cells in body[1:]] == [[row["axis"], str(row["value"])] for row in rows]
    pixels = matplotlib.image.imread(picture)
    assert pixels.shape[0] > 500
    assert 0 < (pixels[..., :3].min(-1) < 0.5).mean() < 0.5
