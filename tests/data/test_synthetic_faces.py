"""The drawn faces: the same everywhere, every class present, not solved by a linear rule."""

import io

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from ferjax.config import UserError
from ferjax.data import arrays
from ferjax.data.synthetic_faces import SHARES, Builder, draw_face, make_face


def test_a_face_depends_on_its_row_alone():
    first = [make_face(row) for row in range(20)]
    np.random.seed(1)  # noqa: NPY002 (a global generator must not matter)
    for row in reversed(range(20)):
        again = make_face(row)
        assert (again.row, again.label, again.encoded) == (
            row,
            first[row].label,
            first[row].encoded,
        )
    assert len({face.encoded for face in first}) == 20


def test_the_file_holds_the_pixels():
    face = make_face(3)
    assert face.pixels.shape == (48, 48)
    assert face.pixels.dtype == np.uint8
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(face.encoded))), face.pixels)


def test_the_label_changes_the_drawing():
    # One random stream, seven labels: what differs is the expression.
    faces = [draw_face(label, np.random.default_rng(8)).astype(int) for label in range(7)]
    for one in range(7):
        for other in range(one):
            assert np.abs(faces[one] - faces[other]).max() > 40


@pytest.fixture(scope="module")
def standard(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("standard"))
    return arrays.load(
        "synthetic_faces", data_dir=path, splits=("train", "public_test", "private_test")
    )


def test_sizes_rows_and_classes(standard):
    assert {name: len(split) for name, split in standard.splits.items()} == {
        "train": 2800,
        "public_test": 700,
        "private_test": 700,
    }
    rows = np.concatenate([split.rows for split in standard.splits.values()])
    np.testing.assert_array_equal(rows, np.arange(4200))
    for split in standard.splits.values():
        shares = np.bincount(split.labels, minlength=7) / len(split)
        np.testing.assert_allclose(shares, SHARES, atol=0.04)
    images = np.concatenate([split.images for split in standard.splits.values()])
    assert len(np.unique(images.reshape(4200, -1), axis=0)) == 4200


def test_a_linear_classifier_does_not_solve_it(standard):
    """Ridge regression on all of train, its strength chosen in its favour: below 70 %."""
    train, test = standard.splits["train"], standard.splits["public_test"]
    x, z = (split.images.reshape(len(split), -1).astype(np.float32) for split in (train, test))
    center, scale = x.mean(0), x.std(0)
    x, z = (x - center) / scale, (z - center) / scale
    targets = np.eye(7, dtype=np.float32)[train.labels]
    gram, moment = x.T @ x, x.T @ targets
    scores = []
    for strength in (100, 1000, 10000, 100000):
        weights = np.linalg.solve(gram + strength * np.eye(len(gram), dtype=np.float32), moment)
        predicted = (z @ weights + targets.mean(0)).argmax(1)
        scores.append((predicted == test.labels).mean())
    assert 0.4 < max(scores) < 0.7  # far above chance: the rule is there to be learnt


def test_tfds_opens_it(prepared_tiny):
    builder = tfds.builder("synthetic_faces/tiny", data_dir=prepared_tiny)
    assert builder.info.splits["train"].num_examples == 280
    first = builder.as_data_source("private_test")[0]
    face = make_face(350)
    assert (int(first["row"]), int(first["label"])) == (350, face.label)
    np.testing.assert_array_equal(first["image"][..., 0], face.pixels)


def test_it_takes_no_source(tmp_path):
    with pytest.raises(UserError, match="reads no source"):
        Builder(source="faces.zip", data_dir=tmp_path)
