"""benchmarks/startup.py on a tiny run: what its figures claim to be is what happened."""

import datetime
import subprocess
import sys
from pathlib import Path

import common
import pytest
import startup

from ferjax.config import UserError
from ferjax.data import arrays

CONFIG = """
from ferjax.config import base

def get_config(variant=""):
    c = base()
    c.data.name = "synthetic_faces/tiny"
    c.batch_size = 8
    c.epochs = 50
    c.algorithm = {"name": "supervised"}
    c.model = {"name": "cnn", "layers": ("space_to_depth 4", "conv 8 3 nobias", "bn", "gap")}
    return c
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.py"
    file.write_text(CONFIG)
    return file


def programs(cache: Path) -> set[str]:
    return {file.name for file in cache.rglob("*-cache")}


@pytest.mark.slow
def test_starts_are_cold_then_warm_then_resumed(data_dir, path, tmp_path, monkeypatch):
    arrays.load("synthetic_faces/tiny")
    cached, lines = [], []
    real = startup.start

    def start(arguments, workdir, env):
        times = real(arguments, workdir, env)
        cached.append(programs(Path(env["XDG_CACHE_HOME"])))
        lines.append((workdir / "logs" / "process_0.log").read_text())
        return times

    monkeypatch.setattr(startup, "start", start)
    found = startup.starts([f"--config={path}"], data_dir, tmp_path, rounds=1)
    assert cached[0]
    assert cached[0] == cached[1] == cached[2]  # nothing was compiled after the cold start
    assert "resumed at step" not in lines[0] + lines[1]
    assert "resumed at step" in lines[2]
    for kind in ("cold", "warm", "restart"):
        median = {key: value["median"] for key, value in found[kind].items()}
        assert median["first_step"] == pytest.approx(median["ready"] + median["first_call"])
        assert min(median.values()) > 0
    ratio = found["restart"]["first_step"]["median"] / found["cold"]["first_step"]["median"]
    assert found["restart_ratio"]["median"] == pytest.approx(ratio)


def test_checkpoint_saves_and_restores_the_state(path, tmp_path):
    config = common.read_config(str(path))
    found = startup.checkpoint(config, tmp_path, rounds=2)
    weights = 16 * 8 * 9 + 2 * 8 + 8 * 7 + 7
    # Weights, momentum and averages; statistics and averages; the step, the seed and the
    # schedule's count.
    assert 3 * weights + 2 * 16 < found["numbers"] <= 3 * weights + 2 * 16 + 4
    kept = sorted(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == [2, 3]  # the first save is not counted
    assert found["mb"] > 0.5 * 4 * 2 * weights / 1e6  # noise can't be packed much
    assert all(found[f"{name}_seconds"]["low"] > 0 for name in ("blocked", "on_disk", "restore"))


def test_prepare_finds_the_second_time_what_the_first_has_made(path, tmp_path):
    config = common.read_config(str(path))
    found = startup.prepare(config, tmp_path / "data", tmp_path)
    assert set(found) == {"prepare_seconds", "prepared_before_seconds"}
    assert arrays.builder("synthetic_faces/tiny", data_dir=str(tmp_path / "data")).is_prepared()


def test_first_moment_reads_the_log():
    lines = [
        "2026-03-01 10:00:00,123 WARNING jax: devices: not ours",
        "2026-03-01 10:00:01,250 INFO ferjax: devices: 1 in 1 process(es), driven by pmap",
        "2026-03-01 10:00:02,250 INFO ferjax: devices: later",
    ]
    moment = datetime.datetime(2026, 3, 1, 10, 0, 1, 250_000)
    assert startup.first_moment(lines, "devices: ") == pytest.approx(moment.timestamp())
    with pytest.raises(RuntimeError, match=r"no log line 'training: '"):
        startup.first_moment(lines, "training: ")


@pytest.mark.parametrize(
    ("status", "error", "message"),
    [(2, UserError, r"^config\.x is wrong$"), (1, RuntimeError, r"ended with 1:\n.*is wrong")],
)
def test_a_command_that_fails_is_reported(tmp_path, status, error, message):
    program = f"import sys; print('ferjax: config.x is wrong', file=sys.stderr); sys.exit({status})"
    errors = tmp_path / "stderr"
    with errors.open("w") as file:
        process = subprocess.Popen([sys.executable, "-c", program], stderr=file)
    with pytest.raises(error, match=message):
        startup.finish(process, errors)
