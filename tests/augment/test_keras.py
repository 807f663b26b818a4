"""Views in Keras' way against Keras' order of matrices in NumPy, and SciPy's sampling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from ferjax.augment import geometric, policies
from ferjax.augment.policies import KERAS20, KERAS40, KERAS90, Policy
from ferjax.config import UserError

pytestmark = pytest.mark.usefixtures("quick_compilation")

SIDE = 24
RNG = np.random.default_rng(1)
IMAGES = RNG.integers(0, 256, (6, SIDE, SIDE, 1)).astype(np.uint8)


def keras_matrix(theta, tx, ty, shear, zx, zy, side=SIDE):
    """Rows first: rotation, shift, shear, zoom about the centre; [3, 3], angles in radians.

    tx moves along rows and ty along columns, in pixels; zx and zy likewise.
    """
    rotate = [[np.cos(theta), -np.sin(theta), 0], [np.sin(theta), np.cos(theta), 0], [0, 0, 1]]
    shift = [[1, 0, tx], [0, 1, ty], [0, 0, 1]]
    slant = [[1, -np.sin(shear), 0], [0, np.cos(shear), 0], [0, 0, 1]]
    zoom = [[zx, 0, 0], [0, zy, 0], [0, 0, 1]]
    middle = (side - 1) / 2
    there = [[1, 0, middle], [0, 1, middle], [0, 0, 1]]
    back = [[1, 0, -middle], [0, 1, -middle], [0, 0, 1]]
    return np.linalg.multi_dot([there, rotate, shift, slant, zoom, back])


def column(*values):
    return jnp.asarray(values, jnp.float32)


@pytest.mark.parametrize("form", ["gather", "matmul"])
def test_the_map_and_its_samples_are_those_of_keras(form):
    theta, shear = np.array([20, -75, 0, 0, 0, 8.0]), np.array([5.7, -22.9, 0, 20, 0, 3])
    tx, ty = np.array([2.3, -6, 0, 0, 4.5, 0]), np.array([-1.7, 3.2, 5, 0, 0, 0])
    zx, zy = np.array([0.9, 1.4, 1, 1, 1, 0.6]), np.array([1.1, 0.7, 1, 1, 1.2, 1.3])
    ours = geometric.keras_affine(*(column(*v) for v in (theta, ty, tx, shear, zy, zx)))
    found = geometric.warp(
        jnp.asarray(IMAGES),
        geometric.affine(6),
        ours,
        size=SIDE,
        fill="nearest",
        fill_value=0.0,
        form=form,
    )
    for i, image in enumerate(IMAGES[..., 0].astype(float)):
        matrix = keras_matrix(
            np.radians(theta[i]), tx[i], ty[i], np.radians(shear[i]), zx[i], zy[i]
        )
        wanted = scipy.ndimage.affine_transform(
            image, matrix[:2, :2], matrix[:2, 2], order=1, mode="nearest"
        )
        np.testing.assert_allclose(found[i, ..., 0], wanted, atol=5e-3)


def test_the_slides_rows():
    for policy, degrees, share in ((KERAS20, 20, 0.1), (KERAS40, 40, 0.2), (KERAS90, 90, 0.4)):
        assert policy.rotation == degrees
        assert policy.shift == (share, share)
        assert policy.zoom == (1 - share, 1 + share)
        assert policy.flip == 0.5
        assert policy.fill == "nearest"
        assert policy.shear_degrees == pytest.approx(np.degrees(share))
    assert Policy(shear=0.4).shear_degrees == 0.4


def test_draws_cover_keras_ranges_with_a_zoom_for_each_axis():
    numbers = RNG.random((4096, 28)).astype(np.float32)
    zoomed = Policy(affine_style="keras", zoom=(0.6, 1.4))
    a, _, _, _, e, _ = policies._move(zoomed, numbers, None, SIDE, SIDE)
    for scale in (np.asarray(a), np.asarray(e)):
        assert 0.6 <= scale.min() < 0.61
        assert 1.39 < scale.max() <= 1.4 + 1e-6
    assert abs(np.corrcoef(a, e)[0, 1]) < 0.1
    moved = Policy(affine_style="keras", shift=(0.25, 0.5))
    _, _, c, _, _, f = policies._move(moved, numbers, None, SIDE, SIDE)
    for shift, reach in ((np.asarray(c), 6), (np.asarray(f), 12)):
        assert -reach <= shift.min() < -0.98 * reach
        assert 0.98 * reach < shift.max() <= reach
    assert np.abs(c - np.round(c)).max() > 0.4  # not whole pixels
    turned = Policy(affine_style="keras", shear=0.3, shear_unit="radians")
    d = np.asarray(policies._move(turned, numbers, None, SIDE, SIDE).d)
    assert 0.98 * np.sin(0.3) < np.abs(d).max() <= np.sin(0.3) + 1e-6


def test_a_view_agrees_in_both_forms():
    keys = jax.random.split(jax.random.key(0), 6)
    outs = []
    for form in ("gather", "matmul"):
        view = policies.make_view(
            KERAS90, size=None, mean=(0.0,), std=(1 / 255,), channels=1, form=form
        )
        outs.append(np.asarray(view(IMAGES, keys)))
    np.testing.assert_allclose(*outs, atol=1e-2)
    assert np.abs(outs[0] - IMAGES).max() > 50


@pytest.mark.parametrize(
    "wrong",
    [
        {"affine_style": "torch"},
        {"shear_unit": "turns"},
        {"shear": 1.6, "shear_unit": "radians"},
        {"affine_p": 0.5, "affine_style": "keras"},
    ],
)
def test_wrong_fields(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        Policy(**wrong)
