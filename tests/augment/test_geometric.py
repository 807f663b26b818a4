"""Warps against NumPy's padding and slicing, a NumPy bilinear warp, and Pillow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ferjax.augment import geometric
from ferjax.augment.geometric import affine, rotation

STATIC = ("size", "fill", "fill_value", "whole", "form")
warp = jax.jit(geometric.warp, static_argnames=STATIC[:3] + STATIC[4:])
warp_aligned = jax.jit(geometric.warp_aligned, static_argnames=STATIC)
FORMS = ("gather", "matmul")
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (3, 20, 24, 1)).astype(np.uint8)


def _column(*values):
    return jnp.asarray(values, jnp.float32)


def _numpy_warp(image, matrix, size, fill):
    """[H, W], inverse 2x3 matrix in centred pixels -> [size, size], pixel by pixel."""
    h, w = image.shape
    rows, columns = np.meshgrid(np.arange(size), np.arange(size), indexing="ij")
    x = (columns + 0.5) * w / size - w / 2
    y = (rows + 0.5) * h / size - h / 2
    at_x = matrix[0, 0] * x + matrix[0, 1] * y + matrix[0, 2] + w / 2 - 0.5
    at_y = matrix[1, 0] * x + matrix[1, 1] * y + matrix[1, 2] + h / 2 - 0.5
    margin = 3 * max(h, w)
    mode = {"nearest": "edge", "reflect": "reflect", "constant": "reflect"}[fill]
    wide = np.pad(image.astype(float), margin, mode=mode)
    x0, y0 = np.floor(at_x).astype(int), np.floor(at_y).astype(int)
    right, down = at_x - x0, at_y - y0

    def at(i, j):
        return wide[i + margin, j + margin]

    upper = at(y0, x0) * (1 - right) + at(y0, x0 + 1) * right
    lower = at(y0 + 1, x0) * (1 - right) + at(y0 + 1, x0 + 1) * right
    out = upper * (1 - down) + lower * down
    if fill == "constant":
        inside = (np.abs(at_x + 0.5 - w / 2) < w / 2) & (np.abs(at_y + 0.5 - h / 2) < h / 2)
        out = np.where(inside, out, 60.0)
    return out


def _matrices(move):
    return np.stack([np.asarray(v) for v in move], -1).reshape(-1, 2, 3).astype(float)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("fill", geometric.FILLS)
def test_warp_equals_a_numpy_warp(form, fill):
    move = rotation(_column(17, -30, 90.5)) @ affine(3, shear_x=_column(0.2, -0.3, 0))
    move @= affine(3, scale_x=1.3, scale_y=0.8, shift_x=_column(4, -2.5, 9), shear_y=-0.1)
    for size in (20, 33):
        ours = warp(
            jnp.asarray(IMAGES), affine(3), move, size=size, fill=fill, fill_value=60.0, form=form
        )
        assert ours.shape == (3, size, size, 1)
        for image, matrix, found in zip(IMAGES, _matrices(move), ours, strict=True):
            wanted = _numpy_warp(image[..., 0], matrix, size, fill)
            # float32 places are off by 1e-6 pixels, times up to 255 levels a pixel.
            np.testing.assert_allclose(found[..., 0], wanted, atol=5e-3)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("fill", geometric.FILLS)
def test_aligned_warp_equals_the_general_one(form, fill):
    outer = affine(3, scale_x=_column(-1, 1, -0.4), scale_y=0.6, shift_x=_column(3, -4, 2.2))
    inner = affine(3, scale_x=1.4, scale_y=1.1, shift_y=_column(0, 2, -3.7))
    args = {"size": 30, "fill": fill, "fill_value": 60.0}
    ours = warp_aligned(jnp.asarray(IMAGES), outer, inner, whole=False, form=form, **args)
    wanted = warp(jnp.asarray(IMAGES), outer, inner, form="gather", **args)
    np.testing.assert_allclose(ours, wanted, atol=5e-3)


@pytest.mark.parametrize("form", FORMS)
def test_flip_and_crop_are_exact(form):
    images = np.stack([RNG.integers(0, 256, (24, 24, 1)) for _ in range(3)]).astype(np.uint8)
    right, down = (6, -3, 0), (-6, 5, 2)
    outer = affine(3, scale_x=_column(-1, 1, -1))
    outer @= affine(3, shift_x=_column(*right), shift_y=_column(*down))
    args = {"size": 24, "fill": "reflect", "fill_value": 0.0, "form": form}
    whole = warp_aligned(jnp.asarray(images), outer, affine(3), whole=True, **args)
    general = warp(jnp.asarray(images), outer, affine(3), **args)
    for n, flipped in enumerate((True, False, True)):
        image = images[n, :, ::-1, 0] if flipped else images[n, ..., 0]
        wide = np.pad(image, 6, mode="reflect")
        wanted = wide[6 + down[n] :, 6 + right[n] :][:24, :24]
        assert np.array_equal(whole[n, ..., 0], wanted)
        assert np.array_equal(general[n, ..., 0], wanted)


def _smooth(side):
    y, x = np.mgrid[:side, :side] / side
    return np.round(127 + 60 * np.sin(5 * x + 1) + 60 * np.cos(4 * y * x + 2)).astype(np.uint8)


@pytest.mark.parametrize(
    "move",
    [
        {"shear_x": 0.3},
        {"shear_y": -0.2},
        {"shift_x": 7.0, "shift_y": -3.0},
        {"scale_x": 0.8, "scale_y": 0.8},
        {"scale_x": 1.25, "scale_y": 1.25, "shear_x": 0.1, "shift_x": 1.5},
    ],
)
def test_warp_against_pillow_transform(move):
    side = 48
    image = _smooth(side)
    matrix = _matrices(affine(1, **move))[0]
    # Pillow's coordinates start at the corner.
    moved = matrix[:, 2] + side / 2 - matrix[:, :2] @ np.full(2, side / 2)
    data = [*matrix[0, :2], moved[0], *matrix[1, :2], moved[1]]
    picture = Image.fromarray(image)
    method = (Image.Transform.AFFINE, data, Image.Resampling.BILINEAR)
    theirs = np.asarray(picture.transform((side, side), *method)).astype(float)
    kept = np.pad(np.full((side - 2, side - 2), 255, np.uint8), 1)
    away = np.asarray(Image.fromarray(kept).transform((side, side), *method)) == 255
    filled = np.asarray(Image.new("L", (side, side), 255).transform((side, side), *method)) == 0
    ours = warp(
        jnp.asarray(image[None, ..., None]),
        affine(1),
        affine(1, **move),
        size=side,
        fill="constant",
        fill_value=0.0,
        form="gather",
    )[0, ..., 0]
    assert away.mean() > 0.5
    assert np.abs(ours - theirs)[away].max() <= 1.01  # Pillow truncates
    assert np.mean((np.asarray(ours) == 0) == filled) > 0.99


@pytest.mark.parametrize("degrees", [-30, 12.5, 90])
def test_rotation_against_pillow_rotate(degrees):
    image = _smooth(48)
    theirs = Image.fromarray(image).rotate(degrees, Image.Resampling.BILINEAR)
    ours = warp(
        jnp.asarray(image[None, ..., None]),
        affine(1),
        rotation(_column(degrees)),
        size=48,
        fill="constant",
        fill_value=0.0,
        form="gather",
    )[0, 12:36, 12:36, 0]
    assert np.abs(ours - np.asarray(theirs).astype(float)[12:36, 12:36]).max() <= 1.01


@pytest.mark.parametrize("form", FORMS)
def test_resize_against_pillow(form):
    image = RNG.integers(0, 256, (12, 12)).astype(np.uint8)
    theirs = Image.fromarray(image).convert("F").resize((30, 30), Image.Resampling.BILINEAR)
    args = {"size": 30, "fill": "nearest", "fill_value": 0.0, "form": form}
    pixels = jnp.asarray(image[None, ..., None])
    for ours in (
        warp(pixels, affine(1), affine(1), **args),
        warp_aligned(pixels, affine(1), affine(1), whole=False, **args),
    ):
        np.testing.assert_allclose(ours[0, ..., 0], np.asarray(theirs), atol=1e-2)


def test_maps_compose_in_order():
    first = affine(1, shift_x=3.0, scale_y=2.0)
    second = rotation(_column(40)) @ affine(1, shear_x=0.3)
    x, y = jnp.array([[1.0, -2.0]]), jnp.array([[0.5, 4.0]])
    np.testing.assert_allclose((first @ second)(x, y), first(*second(x, y)), rtol=1e-6)


def test_colour_channels_are_warped_alike():
    images = RNG.integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)
    move = rotation(_column(20, -8))
    for form in FORMS:
        args = {"size": 16, "fill": "reflect", "fill_value": 0.0, "form": form}
        together = warp(jnp.asarray(images), affine(2), move, **args)
        for c in range(3):
            alone = warp(jnp.asarray(images[..., c : c + 1]), affine(2), move, **args)
            np.testing.assert_allclose(together[..., c], alone[..., 0], atol=1e-4)
