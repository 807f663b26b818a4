"""Illumination: what is done to the pixels, and that it is done in training and in prediction."""

import dataclasses
import shutil

import cv2
import numpy as np
import pytest

from ferjax import config as configs
from ferjax.data import illumination
from ferjax.engine.checkpoint import Checkpoints
from ferjax.engine.experiment import Experiment
from ferjax.engine.parallel import host
from ferjax.evaluate_sections import Contender
from ferjax.load import load

RNG = np.random.default_rng(0)
FACES = np.stack([cv2.resize(RNG.integers(40, 120, (6, 6), np.uint8), (48, 48)) for _ in range(4)])
FACES = FACES[..., None]


def flattened(image):
    """Histogram equalisation of one grey image by its textbook formula."""
    counts = np.bincount(image.ravel(), minlength=256)
    cumulative = counts.cumsum()
    first = counts[counts > 0][0]
    table = np.rint((cumulative - first) * 255 / (image.size - first)).clip(0, 255)
    return table[image]


def test_equalize_flattens_the_histogram():
    out = illumination.apply(FACES, "equalize")
    assert out.dtype == np.uint8
    for image, found in zip(FACES, out, strict=True):
        assert np.abs(flattened(image).astype(int) - found).max() <= 1
    assert FACES.max() < 120 < out.max()  # the given array is as it was


def test_clahe_evens_out_a_shadow():
    shaded = FACES.copy()
    shaded[:, :, :24] = shaded[:, :, :24] // 3
    out = illumination.apply(shaded, "clahe").astype(float)
    for before, after in zip(shaded.astype(float), out, strict=True):
        gap = [x[:, 24:].mean() / x[:, :24].mean() for x in (before, after)]
        assert gap[1] < 0.8 * gap[0]
        assert after[:, :24].std() > before[:, :24].std()


def test_colour_keeps_its_hue():
    image = np.zeros((1, 16, 16, 3), np.uint8)
    image[..., 0] = 40 + 5 * np.arange(16)
    out = illumination.apply(image, "equalize")
    assert out.shape == image.shape
    assert out[..., 0].max() > image[..., 0].max()
    assert (out[..., 0].astype(int) >= out[..., 2]).mean() > 0.9


@pytest.mark.parametrize("kind", ["none", "standardize"])
def test_what_changes_no_pixel_returns_the_same_array(kind):
    assert illumination.apply(FACES, kind) is FACES


def config(kind):
    c = configs.base()
    c.data.name = "synthetic_faces/tiny"
    c.data.illumination = kind
    c.data.clean = "leaks"
    c.batch_size = 8
    c.algorithm = {"name": "supervised"}
    c.model = {"name": "cnn", "layers": ("space_to_depth 8", "conv 4 3", "relu", "gap")}
    return configs.finalize(c)


def test_training_and_prediction_see_the_same_pixels(data_dir, tmp_path, monkeypatch):
    plain = Experiment(config("none"), tmp_path / "plain")
    raw = plain.dataset.splits
    compared = []

    def to_drop(mode, images, labels, tests):
        compared.append((images, *tests))
        return {}

    monkeypatch.setattr("ferjax.engine.training_data.duplicates.to_drop", to_drop)
    run = Experiment(config("equalize"), tmp_path / "run")
    for name in ("train", "public_test"):
        expected = illumination.apply(raw[name].images, "equalize")
        np.testing.assert_array_equal(run.dataset.splits[name].images, expected)
        assert not np.array_equal(expected, raw[name].images)
    # Copies are looked for among the original pixels.
    np.testing.assert_array_equal(compared[0][0], raw["train"].images)
    assert run.dataset.digest == plain.dataset.digest

    run.claim_workdir()
    run.lock.release()
    state = run.init_state()
    checkpoints = Checkpoints(run.workdir / "checkpoints", 1)
    checkpoints.save(state, {"row": {}, "best": None, "unscored": False}, 0.5)
    checkpoints.wait()
    checkpoints.close()
    faces = raw["public_test"].images[:12]
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    trained = run.predict(run.layout.replicate(variables), run.dataset.splits["public_test"].images)
    found = load(run.workdir, weights="raw").logits(faces)
    np.testing.assert_allclose(found, host(trained)[:12], atol=1e-5)

    # The same network told to leave the light as it is says something else of the same pixels.
    shutil.copytree(run.workdir, tmp_path / "other")
    data = {**run.config.data.to_dict(), "illumination": "none"}
    other = configs.finalize({**run.config.to_dict(), "data": data})
    configs.save(other, tmp_path / "other" / "config.json")
    unlit = load(tmp_path / "other", weights="raw").logits(faces)
    assert np.abs(unlit - found).max() > 1e-3
    corrected = illumination.apply(faces, "equalize")
    lit = load(tmp_path / "other", weights="raw").logits(corrected)
    np.testing.assert_allclose(lit, found, atol=1e-5)
    # Of ten crops, too, the whole image is corrected.
    crops = [
        Contender([path], [load(path, weights="raw")], "ten_crop").outputs(images)[0]
        for path, images in ((run.workdir, faces), (tmp_path / "other", corrected))
    ]
    np.testing.assert_allclose(*crops, atol=1e-5)
    assert dataclasses.is_dataclass(run.dataset)
