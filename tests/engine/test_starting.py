"""A run that starts from other runs' files, and goes on without them."""

import shutil

import harness
import jax
import numpy as np
import pytest
from etils import epath

from ferjax import config as configs
from ferjax.config import UserError
from ferjax.data import arrays, soft_labels
from ferjax.engine.checkpoint import Checkpoints, restore_latest
from ferjax.engine.experiment import Experiment


@pytest.fixture
def teacher(data_dir, tmp_path):
    """A workdir with predictions for the training images, and those."""
    data = arrays.load("synthetic_faces/tiny", splits=("train",))
    rows = data.splits["train"].rows
    p = np.random.default_rng(0).dirichlet(np.ones(7), len(rows)).astype(np.float32)
    none = np.zeros(0, np.int32)
    (tmp_path / "teacher" / "eval").mkdir(parents=True)
    path = epath.Path(tmp_path / "teacher" / "eval" / "train_predictions.npz")
    soft_labels.save(soft_labels.SoftLabels(rows, p, data.class_names, data.digest, none), path)
    return tmp_path / "teacher", p


def test_the_teacher_and_the_weights_are_needed_once(teacher, tmp_path, monkeypatch):
    workdir, p = teacher
    data = {**configs.base().data, "name": "synthetic_faces/tiny", "labeled": "4/class"}
    config = harness.make_config(
        dtype="float32",
        data=data,
        algorithm={"name": "self_training", "mu": 1, "predictions": str(workdir)},
        model={"name": "cnn", "layers": ("conv 4 3 4 nobias", "bn", "relu", "gap")},
        init_from="the weights of a run",
    )
    reads = []

    def start_from(state, config, class_names):
        reads.append(config.init_from)
        params = jax.tree.map(lambda x: x + 1, state.params)
        return state.replace(params=params)

    monkeypatch.setattr("ferjax.engine.experiment.start_from", start_from)
    run = Experiment(config, epath.Path(tmp_path / "student"))
    state = run.init_state()
    np.testing.assert_array_equal(state.extra["targets"], p)
    assert reads == ["the weights of a run"]
    run.claim_workdir()
    checkpoints = Checkpoints(run.workdir / "checkpoints", keep=1)
    checkpoints.save(state, {"row": {}}, None)
    checkpoints.close()
    run.lock.release()

    shutil.rmtree(workdir)
    again = run.init_state()
    assert len(reads) == 1
    # Nothing is computed that the checkpoint holds.
    assert again.extra["targets"] == jax.ShapeDtypeStruct(p.shape, np.float32)
    restored, _ = restore_latest(run.workdir, again)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True):
        np.testing.assert_array_equal(a, b)
    # A workdir without a checkpoint is a start, which needs the teacher.
    run.workdir = epath.Path(tmp_path / "another")
    with pytest.raises(UserError, match=f"--workdir={workdir} --split=train --keep_predictions"):
        run.init_state()
