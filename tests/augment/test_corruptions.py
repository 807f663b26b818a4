"""Corruptions against Pillow and NumPy: what each does, and that it never changes."""

import itertools

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from ferjax.augment import corruptions
from ferjax.config import UserError


def images(n=6, side=16, channels=1, seed=0):
    """Levels 30..225, none of them the square's."""
    levels = np.random.default_rng(seed).integers(30, 226, (n, side, side, channels))
    return np.where(levels == 128, 129, levels).astype(np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_darkness_and_contrast_against_pillow(channels):
    faces = images(channels=channels)
    enhancers = (("darkness", ImageEnhance.Brightness), ("low_contrast", ImageEnhance.Contrast))
    for kind, enhancer in enhancers:
        made = corruptions.corrupt(faces, kind, 0.25)
        for face, result in zip(faces, made, strict=True):
            picture = Image.fromarray(face[..., 0] if channels == 1 else face)
            wanted = np.asarray(enhancer(picture).enhance(0.25)).reshape(face.shape)
            np.testing.assert_array_equal(result, wanted)


def test_a_grey_square_covers_the_same_place_at_every_level():
    faces = images(n=40, side=24)
    covered = []
    for level in corruptions.LEVELS["occlusion"]:
        made = corruptions.corrupt(faces, "occlusion", level)
        changed = made != faces
        assert (made[changed] == 128).all()
        sides = []
        for one in changed[..., 0]:
            rows, columns = (np.flatnonzero(one.any(axis)) for axis in (1, 0))
            assert one.sum() == len(rows) * len(columns)  # a rectangle, cut at the border
            sides.append(max(np.ptp(rows), np.ptp(columns)) + 1)
        assert max(sides) == round(24 * level)
        covered.append(changed)
    for small, large in itertools.pairwise(covered):
        assert (small <= large).all()
        assert small.sum() < large.sum()


def test_noise_has_the_deviation_that_is_asked_for():
    grey = np.full((20, 32, 32, 1), 128, np.uint8)
    mild, strong = (corruptions.corrupt(grey, "noise", level).astype(float) for level in (5, 20))
    assert (mild - 128).std() == pytest.approx(5, rel=0.05)
    assert (strong - 128).std() == pytest.approx(20, rel=0.05)
    assert abs(mild.mean() - 128) < 0.2
    assert np.corrcoef(mild.ravel(), strong.ravel())[0, 1] > 0.99  # the same noise, stronger
    white = corruptions.corrupt(np.full_like(grey, 255), "noise", 20)
    assert white.max() == 255  # clipped, not wrapped
    assert white.min() > 128


def test_rotation_against_pillow_either_way():
    ramp = np.add.outer(np.arange(32) * 3, np.arange(32) * 4).astype(np.uint8)
    faces = np.broadcast_to(ramp[None, ..., None], (12, 32, 32, 1))
    made = corruptions.corrupt(faces, "rotation", 30.0)
    turned = {
        sign: np.asarray(Image.fromarray(ramp).rotate(sign * 30, Image.Resampling.BILINEAR))
        for sign in (1, -1)
    }
    inner = slice(8, 24)  # away from the corners, which Pillow leaves black
    signs = []
    for result in made[..., 0].astype(int):
        errors = {s: np.abs(result - turned[s].astype(int))[inner, inner].max() for s in turned}
        signs.append(min(errors, key=errors.get))
        assert min(errors.values()) <= 1
    assert set(signs) == {1, -1}


@pytest.mark.parametrize("kind", corruptions.LEVELS)
def test_an_images_corruption_depends_on_its_place_alone(kind, monkeypatch):
    monkeypatch.setattr(corruptions, "_CHUNK", 6)  # the last chunk is filled up
    faces = images(n=8)
    level = corruptions.LEVELS[kind][1]
    whole = corruptions.corrupt(faces, kind, level)
    assert whole.dtype == np.uint8
    assert (whole != faces).reshape(8, -1).any(1).all()
    np.testing.assert_array_equal(corruptions.corrupt(faces, kind, level), whole)
    np.testing.assert_array_equal(corruptions.corrupt(faces[:6], kind, level), whole[:6])


def test_what_cannot_be_corrupted():
    with pytest.raises(UserError, match="use occlusion, darkness"):
        corruptions.corrupt(images(), "fog", 1.0)
    with pytest.raises(UserError, match="square"):
        corruptions.corrupt(images()[:, :8], "noise", 1.0)
