"""The pictures for TensorBoard, as arrays and as events that are read back."""

import io

import numpy as np
import pytest
from PIL import Image

from ferjax.analysis import boards
from ferjax.engine.metrics import Writer

NAMES = ("calm", "loud", "odd")


def drawn(images):
    labels = np.arange(len(images)) % 3
    return boards.draw(5.0 * np.eye(3)[labels], images, labels, NAMES)


def test_faces_are_shown_enlarged_with_their_names():
    levels = np.arange(1, 5, dtype=np.uint8) * 40
    images = np.broadcast_to(levels[:, None, None, None], (4, 8, 8, 1))
    board = drawn(images)["faces"][0]
    assert board.dtype == np.uint8
    faces = [board[4:100, left + 4 : left + 100] for left in (0, 120, 240, 360)]
    assert all(face.min() == face.max() for face in faces)
    assert {int(face[0, 0, 0]) for face in faces} == set(levels.tolist())
    assert (board[112:142, :112] < 128).any(), "no text"
    colour = np.broadcast_to(np.array([200, 10, 10], np.uint8), (2, 8, 8, 3))
    assert (drawn(colour)["faces"][0, 50, 50] == (200, 10, 10)).all()


def test_events_hold_the_pictures_but_not_too_often(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    pytest.importorskip("tensorflow")
    pictures = drawn(np.zeros((4, 8, 8, 1), np.uint8))
    writer = Writer(tmp_path, 0)
    writer.write_images(10, lambda: pictures)
    writer.write_images(11, lambda: pytest.fail("drawn again at once"))
    writer.close()
    events = reader.EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    for name, picture in pictures.items():
        (event,) = events.Tensors(f"eval/{name}")
        assert event.step == 10
        encoded = event.tensor_proto.string_val[2]  # after the width and the height
        shown = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))
        np.testing.assert_array_equal(shown, picture[0])
