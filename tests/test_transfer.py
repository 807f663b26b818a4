"""One run's weights and predictions in another, with the commands that a user types."""

import json
import shutil

import numpy as np
import pytest
from test_distributed import finish, start
from test_end_to_end import SMALL, ferjax

from ferjax.data import arrays
from ferjax.load import load

pytestmark = pytest.mark.slow
WITHOUT_METHOD = [a for a in SMALL if "algorithm" not in a and "epochs" not in a]


def train(workdir, method, *args):
    command = [*WITHOUT_METHOD, f"--workdir={workdir}", f"--config.algorithm.name={method}"]
    return ferjax("main", *command, "--config.epochs=1", *args)


@pytest.fixture(scope="module")
def teacher(data_dir, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("transfer") / "teacher"
    done = train(workdir, "supervised")
    assert done.returncode == 0, done.stderr
    return workdir


def test_a_student_of_a_teacher(teacher, tmp_path):
    student, gone = tmp_path / "student", tmp_path / "teacher"
    shutil.copytree(teacher, gone)
    args = [f"--config.algorithm.predictions={gone}", f"--config.init_from={gone}"]
    args.append("--config.algorithm.threshold=0.0")  # instead of the config file's
    early = train(student, "self_training", *args)
    assert early.returncode == 2
    command = f"python -m ferjax.evaluate --workdir={gone} --split=train --keep_predictions"
    assert command in early.stderr
    done = ferjax(*command.split()[2].split(".")[1:], *command.split()[3:])
    assert done.returncode == 0, done.stderr

    split = arrays.load("synthetic_faces/tiny", splits=("train",)).splits["train"]
    with np.load(gone / "eval" / "train_predictions.npz", allow_pickle=False) as kept:
        assert np.array_equal(kept["rows"], split.rows)
        learnt = json.loads((gone / "split.json").read_text())["labeled_rows"]
        assert kept["labeled_rows"].tolist() == learnt
        p = load(gone).predict(split.images[..., 0].copy()).probabilities
        np.testing.assert_allclose(kept["probabilities"], p, atol=1e-5)

    first = train(student, "self_training", *args, "--config.stop_after_steps=3")
    assert first.returncode == 75, first.stderr
    assert "init_from: 7 of 7 tensors" in first.stdout
    assert "has learnt from" not in first.stdout
    shutil.rmtree(gone)
    second = train(student, "self_training", *args)
    assert second.returncode == 0, second.stderr
    assert "resumed at step 3" in second.stdout
    assert "init_from" not in second.stdout
    rows = [json.loads(x) for x in (student / "metrics.jsonl").read_text().splitlines()]
    assert all(
        r["loss_unlabeled"] > 0 and r["mask_rate"] == 1 for r in rows if r["kind"] == "train"
    )


def test_another_network_and_other_classes(teacher, tmp_path):
    args = [f"--config.init_from={teacher}", "--config.model.layers=('conv 8 5', 'relu', 'gap')"]
    done = train(tmp_path / "run", "supervised", *args)
    assert done.returncode == 2
    assert f"config.init_from={teacher}: its network has" in done.stderr
    assert not (tmp_path / "run" / "config.json").exists()


def test_an_autoencoder_first(tmp_path, data_dir):
    before = tmp_path / "autoencoder"
    done = train(before, "autoencoder", "--config.algorithm.mu=1")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(x) for x in (before / "metrics.jsonl").read_text().splitlines()]
    errors = [r["loss_unlabeled"] for r in rows if r["kind"] == "train"]
    assert errors[-1] < errors[0]
    done = train(
        tmp_path / "run", "fixmatch", "--config.algorithm.mu=1", f"--config.init_from={before}"
    )
    assert done.returncode == 0, done.stderr
    assert "init_from: 7 of 7 tensors" in done.stdout


def test_two_processes_read_weights_and_their_own_checkpoint(teacher, tmp_path):
    args = [*WITHOUT_METHOD, "--config.algorithm.name=supervised", "--config.epochs=1"]
    run = [*args, f"--workdir={tmp_path}/run", f"--config.init_from={teacher}"]
    for stop, line in ((2, "init_from: 7 of 7 tensors"), (3, "resumed at step 2")):
        found = finish(start(2, *run, f"--config.stop_after_steps={stop}"))
        assert [code for code, _, _ in found] == [75, 75], found
        assert line in found[0][1]
    other = [*args, f"--workdir={tmp_path}/other", f"--config.init_from={tmp_path}/nowhere"]
    found = finish(start(2, *other))
    assert [code for code, _, _ in found] == [2, 2], found
    assert all("no config.json is there" in stderr for _, _, stderr in found)
