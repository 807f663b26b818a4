"""Streamed images against the arrays that the resident path reads."""

import builtins
import os
import pickle
import signal
import subprocess
import sys

import numpy as np
import pytest
from absl import flags

from ferjax.config import UserError
from ferjax.data import arrays, batches, illumination, stream


@pytest.fixture(scope="module")
def resident(data_dir):
    return arrays.load("synthetic_faces/tiny").splits["train"]


@pytest.fixture(scope="module")
def records(resident):
    if not flags.FLAGS.is_parsed():  # Grain reads flags of its own; commands parse them
        flags.FLAGS.mark_as_parsed()
    made = arrays.builder("synthetic_faces/tiny")
    paths = [str(path) for path in made.info.splits["train"].filepaths]
    return stream.Records(paths, made.info.features["image"].shape)


def test_records_are_the_resident_arrays(resident, records):
    assert records.shape == resident.images.shape
    np.testing.assert_array_equal(records.labels, resident.labels)
    np.testing.assert_array_equal(records.rows, resident.rows)
    some = np.array([5, 0, 5, len(resident) - 1])
    np.testing.assert_array_equal(records[some], resident.images[some])
    np.testing.assert_array_equal(
        pickle.loads(pickle.dumps(records)).treated("equalize")[some],
        illumination.apply(resident.images[some], "equalize"),
    )


def test_joined_sources_follow_each_other(resident, records):
    other = 255 - resident.images[:3]
    joined = stream.Joined([records, other, records])
    whole = np.concatenate([resident.images, other, resident.images])
    assert joined.shape == whole.shape
    some = np.random.default_rng(0).permutation(len(whole))[:40]
    np.testing.assert_array_equal(joined[some], whole[some])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_gives_each_step_its_images(resident, records, workers):
    members = {"labeled": np.arange(10), "unlabeled": np.arange(10, len(resident))}
    sizes = {"labeled": 4, "unlabeled": 8}
    parts = {n: batches.Batches(members[n], sizes[n], 3, n) for n in members}
    shares = [
        stream.Stream(parts, records, share=k, shares=2, first=7, end=20, workers=workers)
        for k in range(2)
    ]
    for first, count in ((7, 1), (8, 4), (12, 8)):
        taken = [share.take(count) for share in shares]
        for name, part in parts.items():
            found = np.concatenate([each[name] for each in taken], axis=1)
            expected = np.stack([resident.images[part(s)] for s in range(first, first + count)])
            np.testing.assert_array_equal(found, expected)
    for share in shares:
        with pytest.raises(StopIteration):
            share.take(1)
        share.close()
    # Fewer steps than workers.
    short = stream.Stream(parts, records, first=19, end=20, workers=workers)
    np.testing.assert_array_equal(
        short.take(1)["labeled"][0], resident.images[parts["labeled"](19)]
    )
    short.close()


def test_without_grain_one_line_says_what_to_install(records, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "grain":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install '\.\[stream\]'"):
        stream.Stream({}, records, first=0, end=1, workers=0)


ABORTED = """
import os, sys
import numpy as np
from absl import flags
from ferjax.data import arrays, batches, stream

if __name__ == "__main__":
    flags.FLAGS.mark_as_parsed()
    made = arrays.builder("synthetic_faces/tiny")
    paths = [str(path) for path in made.info.splits["train"].filepaths]
    records = stream.Records(paths, made.info.features["image"].shape)
    part = {"labeled": batches.Batches(np.arange(8), 4, 0, "labeled")}
    stream.Stream(part, records, first=0, end=1000, workers=1).take(1)
    os.abort()
"""


def test_workers_end_with_a_trainer_that_dies(resident, tmp_path):
    script = tmp_path / "aborted.py"
    script.write_text(ABORTED)
    # The pipe closes when the last process that holds it has ended.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, timeout=240
    )
    assert done.returncode == -signal.SIGABRT, done.stderr


def test_a_damaged_record_is_named(records, monkeypatch):
    monkeypatch.setattr(stream.cv2, "imdecode", lambda *_: None)
    with pytest.raises(UserError, match="synthetic_faces"):
        records[:2]


def test_the_share_of_the_time_that_was_waited(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(stream.time, "monotonic", lambda: clock[0])
    part = {"labeled": batches.Batches(np.arange(8), 4, 0, "labeled")}
    images = np.zeros((8, 2, 2, 1), np.uint8)
    share = stream.Stream(part, images, first=0, end=6, workers=0)
    load = share._iterator

    def slow():
        clock[0] += 3  # of the reader
        return next(load)

    share._iterator = iter(slow, None)
    share.take(1)  # is there already
    clock[0] += 7  # of training
    share.take(1)
    assert share.waiting == 0.3
    share.close()
