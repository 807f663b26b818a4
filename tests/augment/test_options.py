"""Options of views that are off by default: crops of the data, own statistics, turns, erasing."""

import dataclasses

import jax
import numpy as np
import pytest

from ferjax.augment import policies, tta
from ferjax.augment.policies import NONE, WEAK, Policy
from ferjax.config import UserError

pytestmark = pytest.mark.usefixtures("quick_compilation")

RNG = np.random.default_rng(2)
IMAGES = RNG.integers(0, 256, (16, 24, 24, 1)).astype(np.uint8)
KEYS = jax.random.split(jax.random.key(5), 16)
LEVELS = {"size": None, "mean": (0.0,), "std": (1 / 255,), "channels": 1}


def view(policy, images=IMAGES, turns=None, **options):
    made = policies.make_view(policy, **{**LEVELS, **options})
    return np.asarray(jax.jit(made)(images, KEYS[: len(images)], turns))


def test_a_crop_is_the_middle_without_randomness():
    np.testing.assert_allclose(view(NONE, crop=20), IMAGES[:, 2:22, 2:22], atol=1e-3)
    np.testing.assert_allclose(view(NONE, crop=19), IMAGES[:, 2:21, 2:21], atol=1e-3)
    np.testing.assert_allclose(view(NONE, crop=24), IMAGES, atol=1e-3)
    assert view(NONE, crop=20, size=30).shape == (16, 30, 30, 1)


@pytest.mark.parametrize("form", ["gather", "matmul"])
@pytest.mark.parametrize(
    "policy",
    [
        Policy(flip=0.5),
        # As in configs/recipe73.py: it is cropped at random all the same.
        Policy(flip=0.5, resized_crop=(1.0, 1.0), resized_crop_aspect=(1.0, 1.0)),
    ],
    ids=["flip", "resized"],
)
def test_a_random_policy_crops_anywhere(policy, form):
    seen = set()
    for image, found in zip(IMAGES, view(policy, crop=20, form=form), strict=True):
        places = [
            (flip, top, left)
            for flip in (1, -1)
            for top in range(5)
            for left in range(5)
            if np.abs(image[:, ::flip][top : top + 20, left : left + 20] - found).max() < 0.02
        ]
        assert len(places) == 1
        seen |= set(places)
    assert len(seen) > 9


def test_a_policy_that_crops_itself_is_cropped_in_the_middle():
    whole = view(WEAK)
    np.testing.assert_allclose(view(WEAK, crop=20), whole[:, 2:22, 2:22], atol=0.02)


def test_ten_crops_move_each_crop_to_where_the_network_looks():
    ten = tta.variants(IMAGES, "ten_crop", 20)
    places = [(top, left) for top in (0, 4) for left in (0, 4)] + [(2, 2)]
    for version, mirrored, (top, left) in zip(ten[:5], ten[5:], places, strict=True):
        part = IMAGES[:, top : top + 20, left : left + 20]
        np.testing.assert_array_equal(version[:, 2:22, 2:22], part)
        np.testing.assert_array_equal(mirrored[:, 2:22, 2:22], part[:, :, ::-1])
    # 24 - 19 is odd: the network looks at columns 2 to 20.
    for version, mirrored in zip(*np.split(np.stack(tta.variants(IMAGES, "ten_crop", 19)), 2)):  # noqa: B905
        seen = version[:, 2:21, 2:21]
        np.testing.assert_array_equal(mirrored[:, 2:21, 2:21], seen[:, :, ::-1])


def test_standardized_views_have_their_own_mean_and_deviation():
    images = IMAGES.copy()
    images[3] = 7
    images[4] = images[4] // 8 + 100
    out = view(Policy(cutout=0.5), images, standardize=True)
    kept = [i for i in range(16) if i != 3]
    np.testing.assert_allclose(out[kept].mean((1, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(out[kept].std((1, 2, 3)), 1, atol=1e-5)
    blank = view(NONE, images, standardize=True)[3]
    assert np.array_equal(blank, np.zeros_like(blank))


def test_turns_decide_where_flips_alternate_and_nowhere_else():
    alternate = Policy(flip=0.5, flip_style="alternate")
    turns = np.arange(16, dtype=np.int32)
    out = view(alternate, turns=turns)
    np.testing.assert_allclose(out[1::2], IMAGES[1::2], atol=1e-3)
    np.testing.assert_allclose(out[0::2], IMAGES[0::2, :, ::-1], atol=1e-3)
    drawn = view(dataclasses.replace(alternate, flip_style="random"), turns=turns)
    assert not np.array_equal(drawn, out)
    np.testing.assert_array_equal(view(alternate), drawn)


def test_erasing_takes_its_ranges():
    white = np.full((16, 24, 24, 1), 255, np.uint8)
    erased = view(Policy(erase=1.0, erase_area=(0.25, 0.25), erase_aspect=(4.0, 4.0)), white) < 200
    assert (erased.any((2, 3)).sum(1) == 6).all()
    assert (erased.any((1, 3)).sum(1) == 24).all()


@pytest.mark.parametrize(
    "wrong",
    [
        {"erase_area": (0.5, 1.5)}, {"erase_aspect": (0.0, 1.0)}, {"flip_style": "never"},
        {"flip": 0.4, "flip_style": "alternate"},
    ],
)  # fmt: skip
def test_wrong_fields(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        Policy(**wrong)


def test_a_crop_larger_than_the_images():
    with pytest.raises(UserError, match=r"config\.data\.crop=30: the images have 24 x 24 pixels"):
        view(NONE, crop=30)
