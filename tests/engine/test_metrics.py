"""Rows and sums that survive a restart."""

import collections
import json
import os
import types
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ferjax.engine.metrics import (
    Accumulator,
    NotFiniteError,
    Packed,
    Recorder,
    Writer,
    count_parameters,
    read_rows,
)
from ferjax.engine.parallel import host


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


class FakeRun:
    steps, per_epoch = 5, 2
    config = types.SimpleNamespace(log_every=2)
    batches: typing.ClassVar = {"labeled": types.SimpleNamespace(size=8)}
    layout = types.SimpleNamespace(process=0)

    def __init__(self, workdir):
        self.workdir = workdir

    def rows(self, step):
        return {"labeled": [step, 100]}


def make_recorder(workdir):
    writer = Writer(workdir, 0, active=True)
    return Recorder(FakeRun(workdir), writer, {}, lambda: 3)


def metrics(*losses, norm=1.0):
    one = np.ones(len(losses))
    return {"loss": (np.array(losses), one), "grad_norm": (np.full(len(losses), norm), one)}


def test_recorder_writes_full_rows_and_the_last(tmp_path):
    recorder = make_recorder(tmp_path)
    recorder.add(0, metrics(1.0, 2.0, 3.0))
    recorder.read(1)
    assert read_rows(tmp_path / "metrics.jsonl") == []  # not read yet
    recorder.read(0)
    assert recorder.to_json()["loss"] == [3.0, 1.0]
    recorder.add(3, metrics(5.0, 7.0))
    recorder.read(0)
    found = read_rows(tmp_path / "metrics.jsonl")
    assert [(r["step"], r["loss"], r["epoch"]) for r in found] == [
        (2, 1.5, 1),
        (4, 4, 2),
        (5, 7, 2.5),
    ]


def test_images_per_second_leaves_pauses_out(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("ferjax.engine.metrics.time.monotonic", lambda: clock[0])
    recorder = make_recorder(tmp_path)
    clock[0] += 1  # one second a step
    recorder.add(0, metrics(1.0))
    recorder.read(0)
    with recorder.pause():
        clock[0] += 50
    clock[0] += 1
    recorder.add(1, metrics(1.0))
    recorder.read(0)
    assert read_rows(tmp_path / "metrics.jsonl")[0]["images_per_second"] == 8.0


def test_rows_of_one_call_share_its_speed(tmp_path, monkeypatch):
    """Three steps a call, a row every two: no row has a time of its own."""
    clock = [100.0]
    monkeypatch.setattr("ferjax.engine.metrics.time.monotonic", lambda: clock[0])
    recorder = make_recorder(tmp_path)
    for first in range(0, 12, 3):
        clock[0] += 3  # one second a step
        recorder.add(first, metrics(1.0, 1.0, 1.0))
        recorder.read(0)
    speeds = [row["images_per_second"] for row in read_rows(tmp_path / "metrics.jsonl")]
    assert speeds == [8.0] * len(speeds)
    assert len(speeds) > 4


@pytest.mark.parametrize(
    ("bad", "step"),
    [(metrics(1.0, float("nan")), 4), (metrics(1.0, 1.0, norm=float("inf")), 3)],
    ids=["loss", "gradient"],
)
def test_divergence_names_the_step_and_the_last_good_checkpoint(tmp_path, bad, step):
    recorder = make_recorder(tmp_path)
    recorder.add(3, bad)
    with pytest.raises(NotFiniteError, match=f"at step {step}; the last good checkpoint is step 3"):
        recorder.read(0)


def test_divergence_names_the_images(tmp_path):
    recorder = make_recorder(tmp_path)
    recorder.add(3, metrics(1.0, float("nan")))
    with pytest.raises(
        NotFiniteError, match=r"rows of the step's images are in .*not_finite\.json"
    ):
        recorder.read(0)
    note = json.loads((tmp_path / "not_finite.json").read_text())
    assert (note["step"], note["rows"]) == (4, {"labeled": [4, 100]})


def test_skipped_steps_are_counted_and_end_after_too_many_in_a_row(tmp_path):
    recorder = make_recorder(tmp_path)

    def steps(first, *skipped):
        values = metrics(*[0.0] * len(skipped))
        recorder.add(first, {**values, "skipped": (np.array(skipped), np.ones(len(skipped)))})
        recorder.read(0)

    steps(0, *[1.0] * 9, 0.0)
    steps(10, *[1.0] * 9)
    with pytest.raises(NotFiniteError, match="10th time at step 19"):
        steps(19, 1.0)


def test_a_diverged_state_is_not_saved(tmp_path):
    recorder = make_recorder(tmp_path)
    State = collections.namedtuple("State", "step params")
    recorder.check_state(State(np.asarray(4), {"w": np.ones(3)}))
    with pytest.raises(NotFiniteError, match=r"'w'.* is not finite at step 3"):
        recorder.check_state(State(np.asarray(4), {"w": np.array([1.0, np.inf])}))


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


def test_events_that_fail_stop_no_training(tmp_path, caplog):
    def refuse(*_):
        raise RuntimeError("File too large")

    writer = Writer(tmp_path, 0)
    writer._events = types.SimpleNamespace(write_scalars=refuse)
    writer.write({"kind": "train", "step": 10, "loss": 1.0})
    writer.write({"kind": "train", "step": 20, "loss": 1.0})
    writer.close()
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [10, 20]
    assert caplog.text.count("no more TensorBoard events: File too large") == 1


def test_count_parameters():
    assert count_parameters({"a": np.zeros((2, 3)), "b": {"c": np.zeros(4)}}) == 10


def test_rows_that_a_full_disk_refuses_are_written_later(tmp_path, monkeypatch):
    writer = Writer(tmp_path, 0)
    real = os.write

    def full(file, data):
        return real(file, data[:5])  # what a full disk takes of it

    writer.write({"kind": "train", "step": 1})
    monkeypatch.setattr(os, "write", full)
    writer.write({"kind": "train", "step": 2})
    writer.write({"kind": "train", "step": 3})
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1]
    with pytest.raises(OSError, match="No space left"):
        writer.flush()
    monkeypatch.undo()
    writer.write({"kind": "train", "step": 4})
    writer.close()
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_packed_metrics_are_one_array_and_come_out_as_they_went_in():
    given = {"loss": (jnp.array([1.5, 2]), jnp.ones(2)), "hit": (jnp.array([3, 4]), jnp.zeros(2))}
    packed = jax.jit(Packed.of)(given)
    assert len(jax.tree.leaves(packed)) == 1
    found = host(packed)
    assert sorted(found) == ["hit", "loss"]
    for name, pair in given.items():
        for there, here in zip(pair, found[name], strict=True):
            np.testing.assert_array_equal(here, there)
    assert len(found) == 2
