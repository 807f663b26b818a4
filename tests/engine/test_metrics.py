"""Rows and sums that survive a restart."""

import json

import numpy as np
import pytest

from ferjax.engine.metrics import Accumulator, Writer, count_parameters, read_rows


def test_weighted_means_over_steps():
    row = Accumulator()
    row.add({"hit": (2.0, 4.0), "empty": (0.0, 0.0)})
    row.add({"hit": (3.0, 1.0), "empty": (0.0, 0.0)})
    assert row.take() == {"hit": 1.0, "empty": None}
    assert row.take() == {}


def test_sums_pass_through_json_exactly():
    rng = np.random.default_rng(0)
    whole, first = Accumulator(), Accumulator()
    for i in range(10):
        step = {"loss": (np.float32(rng.normal()), np.float32(1))}
        whole.add(step)
        if i == 4:
            first = Accumulator(json.loads(json.dumps(whole.to_json())))
        if i > 4:
            first.add(step)
    assert first.take() == whole.take()


def write(workdir, *steps, after=0):
    writer = Writer(workdir, after, active=True)
    for step in steps:
        writer.write({"kind": "train", "step": step, "loss": 0.5})
    writer.close()


def test_rows_after_the_restored_step_are_dropped(tmp_path):
    write(tmp_path, 10, 20, 30)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 4')  # a write cut off by a kill
    write(tmp_path, 30, after=20)
    assert [r["step"] for r in read_rows(tmp_path / "metrics.jsonl")] == [10, 20, 30]
    write(tmp_path, after=0)
    assert read_rows(tmp_path / "metrics.jsonl") == []


def test_not_a_number_stays_json(tmp_path):
    writer = Writer(tmp_path, 0, active=True)
    writer.write({"kind": "train", "step": 1, "loss": float("nan"), "x": float("inf")})
    writer.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "kind": "train",
        "step": 1,
        "loss": None,
        "x": None,
    }


def test_other_processes_write_nothing(tmp_path):
    Writer(tmp_path, 0, active=False).write({"kind": "train", "step": 1})
    assert not list(tmp_path.iterdir())


def test_tensorboard_events_are_read_back(tmp_path):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    pytest.importorskip("tensorflow")
    write(tmp_path, 10, 20)
    events = event_accumulator.EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    tensors = events.Tensors("train/loss")
    assert [e.step for e in tensors] == [10, 20]


def test_count_parameters():
    assert count_parameters({"a": np.zeros((2, 3)), "b": {"c": np.zeros(4)}}) == 10
