"""Tables and filters against Pillow's ImageOps and ImageEnhance."""

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from ferjax.augment import photometric

FORMS = ("gather", "matmul")


def _images():
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (48, 48)) for _ in range(3)]
    images += [rng.integers(90, 140, (48, 48)), rng.normal(128, 20, (48, 48))]
    images += [np.full((48, 48), v) for v in (0, 77, 255)]
    images += [np.where(rng.random((48, 48)) < p, 30, 201) for p in (0.5, 0.999)]
    return np.clip(np.stack(images), 0, 255).astype(np.uint8)


IMAGES = _images()
COUNTS = np.stack([np.bincount(i.ravel(), minlength=256) for i in IMAGES]).astype(np.float32)


def _through(table):
    """The images after tables [n or 1, 256]."""
    table = np.broadcast_to(np.asarray(table).reshape(-1, 256), (len(IMAGES), 256))
    assert np.array_equal(table, np.round(table))
    assert table.min() >= 0
    assert table.max() <= 255
    return np.stack([t[i] for t, i in zip(table, IMAGES, strict=True)])


def _pillow(operation, images=IMAGES):
    return np.stack([np.asarray(operation(Image.fromarray(i))) for i in images]).astype(int)


@pytest.mark.parametrize("form", FORMS)
def test_histogram_and_lookup(form):
    planes = IMAGES.reshape(len(IMAGES), -1)
    assert np.array_equal(photometric.histogram(planes, form), COUNTS)
    tables = np.random.default_rng(1).integers(0, 256, COUNTS.shape).astype(np.uint8)
    found = photometric.lookup(jnp.asarray(tables), planes, form)
    assert found.dtype == np.uint8
    assert np.array_equal(found, [t[p] for t, p in zip(tables, planes, strict=True)])
    pushed = photometric.push(jnp.asarray(COUNTS), jnp.asarray(tables), form)
    assert np.array_equal(pushed, photometric.histogram(found, form))


def test_autocontrast():
    ours = _through(photometric.autocontrast(COUNTS))
    # Pillow truncates a double that may stand just below a whole number.
    assert np.abs(ours - _pillow(ImageOps.autocontrast)).max() <= 1


def test_equalize():
    assert np.array_equal(_through(photometric.equalize(COUNTS)), _pillow(ImageOps.equalize))


@pytest.mark.parametrize("factor", [0.0, 0.05, 0.28, 0.5, 0.95, 1.0, 1.36, 1.9])
def test_enhancers(factor):
    column = jnp.full((len(IMAGES), 1, 1), factor, jnp.float32)
    mean = photometric.mean_luma(COUNTS[:, None])
    pairs = (
        (photometric.brightness(column), ImageEnhance.Brightness),
        (photometric.contrast(mean, column), ImageEnhance.Contrast),
    )
    for table, enhancer in pairs:
        theirs = _pillow(lambda i, e=enhancer: e(i).enhance(factor))
        assert np.abs(_through(table) - theirs).max() <= 1
        if factor == 1:
            assert np.array_equal(_through(table), IMAGES)


@pytest.mark.parametrize("bits", range(1, 9))
def test_posterize(bits):
    theirs = _pillow(lambda i: ImageOps.posterize(i, bits))
    assert np.array_equal(_through(photometric.posterize(jnp.array([bits]))), theirs)


@pytest.mark.parametrize("threshold", [0, 26, 128, 230.4, 256])
def test_solarize(threshold):
    theirs = _pillow(lambda i: ImageOps.solarize(i, threshold))
    assert np.array_equal(_through(photometric.solarize(jnp.array([threshold]))), theirs)


@pytest.mark.parametrize("factor", [0.0, 0.28, 0.95, 1.0, 1.72])
def test_sharpness(factor):
    rng = np.random.default_rng(2)
    for images in (IMAGES[..., None], rng.integers(0, 256, (2, 9, 13, 3)).astype(np.uint8)):
        ours = photometric.sharpen(images, jnp.full(len(images), factor, jnp.float32))
        drop = images[..., 0] if images.shape[-1] == 1 else images
        theirs = _pillow(lambda i: ImageEnhance.Sharpness(i).enhance(factor), drop)
        assert np.abs(np.asarray(ours).reshape(drop.shape) - theirs).max() <= 1


@pytest.mark.parametrize("factor", [0.1, 1.0, 1.72])
def test_colour_images(factor):
    images = np.random.default_rng(3).integers(0, 256, (2, 10, 12, 3)).astype(np.uint8)
    factors = jnp.full(2, factor, jnp.float32)
    theirs = _pillow(lambda i: ImageEnhance.Color(i).enhance(factor), images)
    assert np.abs(photometric.saturate(images, factors) - theirs).max() <= 1
    counts = photometric.histogram(np.moveaxis(images, -1, 1).reshape(2, 3, -1), "gather")
    table = photometric.contrast(photometric.mean_luma(counts), factors[:, None, None])
    ours = np.broadcast_to(table, counts.shape)
    ours = np.stack(
        [np.stack([ours[n, c][images[n, ..., c]] for c in range(3)], -1) for n in range(2)]
    )
    theirs = _pillow(lambda i: ImageEnhance.Contrast(i).enhance(factor), images)
    # The mean of rounded lumas may round to the next level.
    assert np.abs(ours - theirs).max() <= 2
