"""Images streamed from disk: the same training as with images on the devices, bit for bit."""

import jax
import numpy as np
import pytest
from absl import flags
from harness import make_config

from ferjax import config as configs
from ferjax.config import UserError
from ferjax.data import stream
from ferjax.engine import parallel
from ferjax.engine.experiment import Experiment

STEPS = 50


@pytest.fixture(autouse=True)
def _parsed():
    if not flags.FLAGS.is_parsed():  # Grain reads flags of its own; commands parse them
        flags.FLAGS.mark_as_parsed()


def make(pipeline, workdir, **data):
    c = configs.base()
    c.update(make_config(dtype="float32", epochs=40).to_dict())
    c.data.update(pipeline=pipeline, workers=0, labeled="4/class", **data)
    return Experiment(configs.finalize(c), workdir)


def losses(run, state, first, end, per_call=1):
    data, found = run.device_data(), []
    state = run.layout.replicate(state)
    for step in range(first, end, per_call):
        state, metrics, _ = run.call(state, step, step + per_call, data)
        found.extend(np.ravel(parallel.host(metrics["loss"][0])))
    return parallel.host(state), found


def test_fifty_steps_are_the_same_and_resume_anywhere(data_dir, tmp_path, caplog):
    with caplog.at_level("INFO", "ferjax"):
        resident, streamed = (make(p, tmp_path / p) for p in ("device", "stream"))
        assert not resident.streamed
        assert streamed.streamed
        assert streamed.subsets.digest == resident.subsets.digest
        state, expected = losses(resident, resident.init_state(), 0, STEPS)
        middle, before = losses(streamed, streamed.init_state(), 0, 20)
        streamed.close()
        assert "training waited for images" in caplog.text
        end, after = losses(streamed, middle, 20, STEPS)
        streamed.close()
    assert before + after == expected
    assert len(set(expected)) == STEPS
    jax.tree.map(np.testing.assert_array_equal, end, state)


def test_shares_of_processes_make_up_the_batch(data_dir):
    batch = np.arange(24).reshape(1, 8, 3)
    for kind in ("pmap", "shard_map"):
        layout = parallel.Layout(kind)
        whole, own = layout.shard(batch, axis=1), layout.shard_own(batch, axis=1)
        np.testing.assert_array_equal(whole, own)


def test_what_does_not_fit_is_streamed(data_dir, tmp_path, monkeypatch):
    def room(bytes_):
        monkeypatch.setattr(parallel.Layout, "room", lambda _: bytes_)
        return make("auto", tmp_path)

    size = np.prod(room(1e9).dataset.splits["train"].images.shape)
    assert not room(size).streamed
    run = room(size - 1)
    assert run.streamed
    assert isinstance(run.dataset.splits["train"].images, stream.Records)
    assert isinstance(run.dataset.splits["public_test"].images, np.ndarray)
    assert "images" not in run.device_data()
    with pytest.raises(UserError, match=r"clean=leaks .*data\.pipeline=device"):
        make("stream", tmp_path, clean="leaks")
    with pytest.raises(UserError, match=r"config\.data\.workers=-2"):
        make_config(data={"workers": -2})
    monkeypatch.undo()
    assert parallel.Layout().room() > 1e6
