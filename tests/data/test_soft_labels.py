"""A network's probabilities as a file: written, read, and refused when they are something else."""

import dataclasses
import pickle

import numpy as np
import pytest
from etils import epath

from ferjax.config import UserError
from ferjax.data import soft_labels


def some():
    p = np.random.default_rng(0).dirichlet(np.ones(3), 4).astype(np.float32)
    rows = np.array([1, 3, 4, 9], np.int32)
    return soft_labels.SoftLabels(rows, p, ("a", "b", "c"), "digest", np.array([3], np.int32))


def test_what_is_written_is_read(tmp_path):
    path = epath.Path(tmp_path / "x.npz")
    soft_labels.save(some(), path)
    found = soft_labels.read(path)
    for field in dataclasses.fields(found):
        mine, other = getattr(found, field.name), getattr(some(), field.name)
        assert type(mine) is type(other)
        np.testing.assert_array_equal(mine, other)
    with np.load(path, allow_pickle=False) as arrays:  # as any NumPy program would
        assert arrays["probabilities"].dtype == np.float32


@pytest.mark.parametrize(
    "changes",
    [
        {"probabilities": np.full((4, 3), 0.5)},
        {"probabilities": np.full((4, 3), np.nan)},
        {"probabilities": np.tile([2.0, -1.0, 0.0], (4, 1))},
        {"probabilities": some().probabilities[:3]},
        {"class_names": ("a", "b")},
        {"rows": np.array([1, 1, 4, 9])},
        {"rows": np.ones((4, 1))},
    ],
)
def test_arrays_that_make_no_sense(tmp_path, changes):
    path = epath.Path(tmp_path / "x.npz")
    soft_labels.save(dataclasses.replace(some(), **changes), path)
    with pytest.raises(UserError, match=r"x\.npz: its"):
        soft_labels.read(path)


def test_files_of_another_kind(tmp_path):
    path = epath.Path(tmp_path / "x.npz")
    with pytest.raises(FileNotFoundError):
        soft_labels.read(path)
    bait = tmp_path / "bait"
    hostile = {name: np.array([Bait(str(bait))], object) for name in ("rows", "probabilities")}
    np.savez(tmp_path / "objects.npz", **hostile, class_names=1, digest=1, labeled_rows=1)
    np.savez(tmp_path / "other.npz", rows=np.arange(3))
    np.save(tmp_path / "array.npy", np.arange(3))
    contents = [(tmp_path / n).read_bytes() for n in ("objects.npz", "other.npz", "array.npy")]
    contents += [b"", b"PK\x03\x04 no", contents[1][:-30], pickle.dumps(Bait(str(bait)))]
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"is not what .* --keep_predictions"):
            soft_labels.read(path)
    assert not bait.exists()


class Bait:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")
