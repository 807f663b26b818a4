"""Views: what is drawn, in what order it is applied, and that an image depends on its key alone."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict, FrozenConfigDict
from PIL import Image, ImageEnhance, ImageOps

from ferjax.augment import policies, randaugment
from ferjax.augment.policies import NONE, SEED_CROP, STRONG, STRONG_USB, WEAK, Policy
from ferjax.config import UserError

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (8, 24, 24, 1)).astype(np.uint8)
KEYS = jax.random.split(jax.random.key(3), 8)
EVERYTHING = Policy(
    flip=0.5, crop=0.1, shift=(0.2, 0.1), rotation=20, shear=10, zoom=(0.8, 1.2), affine_p=0.5,
    brightness=0.4, contrast=0.4, jitter_p=0.5, ops=2, fill="reflect", cutout=0.4, erase=0.5,
)  # fmt: skip


def _view(policy, size=None, form="auto", channels=1, mean=(0.0,), std=(1 / 255,)):
    made = policies.make_view(policy, size=size, mean=mean, std=std, channels=channels, form=form)
    return jax.jit(made)


def _numbers(policy, n=4096):
    keys = jax.random.split(jax.random.key(0), n)
    return jax.vmap(lambda k: jax.random.uniform(k, (28 + 4 * policy.ops,)))(keys)


def test_evaluation_view_is_the_image_normalised():
    view = _view(NONE, channels=3, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    out = view(IMAGES, KEYS)
    assert out.shape == (8, 24, 24, 3)
    assert out.dtype == jnp.float32
    wanted = (IMAGES / 255.0 - [0.5, 0.4, 0.3]) / [0.2, 0.3, 0.4]
    np.testing.assert_allclose(out, wanted, atol=2e-6)


def test_evaluation_view_resizes():
    out = _view(NONE, size=40)(IMAGES, KEYS)
    picture = Image.fromarray(IMAGES[0, ..., 0]).convert("F")
    wanted = picture.resize((40, 40), Image.Resampling.BILINEAR)
    np.testing.assert_allclose(out[0, ..., 0], np.asarray(wanted), atol=1e-2)


def test_weak_is_flip_and_reflected_crop():
    out = np.asarray(_view(WEAK)(IMAGES, KEYS))[..., 0]
    seen = set()
    for image, found in zip(IMAGES[..., 0], out, strict=True):
        matches = []
        for flipped in (False, True):
            wide = np.pad(image[:, ::-1] if flipped else image, 3, mode="reflect")
            for top in range(7):
                for left in range(7):
                    if np.abs(wide[top : top + 24, left : left + 24] - found).max() < 1e-3:
                        matches.append((flipped, top, left))
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) > 5


@pytest.mark.parametrize(
    ("policy", "size"),
    [(WEAK, None), (STRONG_USB, 32), (SEED_CROP, 40), (EVERYTHING, None)],
)
def test_forms_agree_and_neighbours_do_not_matter(policy, size):
    gather = _view(policy, size, "gather")
    out = np.asarray(gather(IMAGES, KEYS))
    np.testing.assert_allclose(_view(policy, size, "matmul")(IMAGES, KEYS), out, atol=1e-2)
    assert out.min() > -1e-3
    assert out.max() < 255 + 1e-3
    order = [3, 5, 5, 0, 7, 7, 1, 2]
    assert np.array_equal(gather(IMAGES[order], KEYS[np.array(order)]), out[order])
    if policy is EVERYTHING:
        assert np.array_equal(gather(IMAGES[5:6], KEYS[5:6]), out[5:6])


@pytest.mark.slow
def test_views_are_those_of_one_device_on_two():
    devices = jax.devices()
    if len(devices) < 2:
        pytest.skip("needs two devices")
    mesh = jax.sharding.Mesh(np.array(devices[:2]), ("data",))
    spec = jax.sharding.PartitionSpec("data")
    made = policies.make_view(STRONG, size=None, mean=(0.5,), std=(0.25,), channels=1)
    shards = jax.shard_map(made, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    assert np.array_equal(jax.jit(shards)(IMAGES, KEYS), jax.jit(made)(IMAGES, KEYS))


def test_form_is_chosen_where_the_step_is_lowered():
    traced = _view(STRONG).trace(jax.ShapeDtypeStruct(IMAGES.shape, jnp.uint8), KEYS)
    tpu = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "stablehlo.gather" not in tpu
    assert "stablehlo.scatter" not in tpu
    gpu = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "stablehlo.gather" in gpu
    # Only the choice of the platform, known when compiled: a condition on data would make the host
    # wait for the GPU.
    cases = re.findall(r'%(\w+) = "stablehlo.case"\(%(\w+)', gpu)
    known = {result for result, _ in cases}
    assert all(on.startswith("c") or on in known for _, on in cases)
    assert "stablehlo.gather" in traced.lower(lowering_platforms=("cpu",)).as_text()


def test_colour_images():
    images = RNG.integers(0, 256, (4, 16, 16, 3)).astype(np.uint8)
    policy = dataclasses.replace(STRONG_USB, ops=1)
    outs = [_view(policy, form=f, channels=3)(images, KEYS[:4]) for f in ("gather", "matmul")]
    np.testing.assert_allclose(*outs, atol=1e-2)
    np.testing.assert_allclose(_view(NONE, channels=3)(images, KEYS), images, atol=1e-3)


@functools.partial(jax.jit, static_argnames="form")
def _three_operations(images, ops, form):
    return policies.apply_photometric(Policy(ops=3), images, jnp.zeros((1, 28)), ops, form)


def _drawn(*drawn):
    """Drawn of one image from (operation, argument) pairs."""
    op = jnp.array([[randaugment.OPS.index(name) for name, _ in drawn]])
    value = jnp.array([[argument for _, argument in drawn]], jnp.float32)
    return randaugment.Drawn(op, value, value.astype(jnp.int32), value, value, value)


PILLOW = {
    "autocontrast": lambda i, _: ImageOps.autocontrast(i),
    "equalize": lambda i, _: ImageOps.equalize(i),
    "brightness": lambda i, v: ImageEnhance.Brightness(i).enhance(v),
    "contrast": lambda i, v: ImageEnhance.Contrast(i).enhance(v),
    "posterize": lambda i, v: ImageOps.posterize(i, int(v)),
    "solarize": ImageOps.solarize,
    "sharpness": lambda i, v: ImageEnhance.Sharpness(i).enhance(v),
    "colour": lambda i, _: i,
}


@pytest.mark.parametrize(
    "drawn",
    [
        (("solarize", 100), ("autocontrast", 0), ("contrast", 0.5)),
        (("contrast", 1.5), ("posterize", 5), ("equalize", 0)),
        (("brightness", 0.4), ("equalize", 0), ("sharpness", 1.7)),
        (("equalize", 0), ("solarize", 180), ("brightness", 1.3)),
        (("colour", 0.2), ("posterize", 4), ("autocontrast", 0)),
    ],
)
def test_composed_operations_equal_pillow_in_turn(drawn):
    y, x = np.mgrid[:24, :24]
    image = np.clip(60 + 4 * x + 2 * y + RNG.normal(0, 6, (24, 24)), 0, 255).astype(np.uint8)
    picture = Image.fromarray(image)
    for name, value in drawn:
        picture = PILLOW[name](picture, value)
    pixels = jnp.asarray(image[None, ..., None])
    ours = [_three_operations(pixels, _drawn(*drawn), form) for form in ("gather", "matmul")]
    assert np.array_equal(*ours)
    assert np.abs(np.asarray(ours[0], int)[0, ..., 0] - np.asarray(picture, int)).max() <= 2


def test_jitter_probability_and_range():
    images = np.full((512, 8, 8, 1), 100, np.uint8)
    keys = jax.random.split(jax.random.key(1), 512)
    policy = Policy(brightness=0.5, jitter_p=0.25)
    level = np.asarray(_view(policy)(images, keys))[:, 0, 0, 0]
    changed = level != level[level == np.median(level)][0]
    assert 0.15 < changed.mean() < 0.35
    assert 50 <= level.min() < 60 < 140 < level.max() <= 150.001


def test_fixed_cutout_is_grey_before_normalisation():
    images = np.full((2048, 24, 24, 1), 255, np.uint8)
    keys = jax.random.split(jax.random.key(2), 2048)
    out = np.asarray(_view(Policy(cutout=0.5), mean=(0.3,), std=(0.2,))(images, keys))[..., 0]
    covered = np.isclose(out, (0.5 - 0.3) / 0.2, atol=1e-5)
    assert np.allclose(out[~covered], (1 - 0.3) / 0.2, atol=1e-5)
    area = covered.sum((1, 2))
    assert area.max() == 144
    # Centre on pixel 0..23, side 12, cut at the border: 10.5 pixels each way on average.
    assert abs(area.mean() - 10.5**2) < 3
    assert np.all(covered.any(2).sum(1) * covered.any(1).sum(1) == area)


def test_uniform_cutout_and_erasing():
    images = np.zeros((1024, 24, 24, 1), np.uint8)
    keys = jax.random.split(jax.random.key(2), 1024)
    area = (np.asarray(_view(Policy(cutout=0.5, cutout_style="uniform"))(images, keys)) > 1).sum(
        (1, 2, 3)
    )
    assert area.min() == 0
    assert 120 < area.max() <= 144
    area = (np.asarray(_view(Policy(erase=0.5))(images, keys)) > 1).sum((1, 2, 3))
    assert 0.4 < np.mean(area == 0) < 0.6
    assert area[area > 0].min() >= 0.01 * 576
    assert area.max() <= 0.36 * 576


def test_resized_crop_shows_a_part_of_the_image():
    y, x = np.mgrid[:24, :24].astype(np.uint8) * 10
    out = [
        np.asarray(_view(SEED_CROP, 32)(np.stack([v[..., None]] * 8), KEYS))[..., 0] for v in (x, y)
    ]
    steps_x, steps_y = np.diff(out[0], axis=2) / 10, np.diff(out[1], axis=1) / 10
    assert np.allclose(np.diff(out[0], axis=1), 0, atol=1e-3)
    share_x, share_y = (np.abs(s).max((1, 2)) * 32 / 24 for s in (steps_x, steps_y))
    assert np.all(share_x <= 1.001)
    assert np.all(share_y <= 1.001)
    assert np.all(share_x * share_y >= 0.079)
    assert len(set(np.sign(steps_x[:, 16, 16]))) == 2  # some are flipped


def test_own_moves_draw_what_they_say():
    policy = Policy(shift=(0.25, 0.0), affine_p=0.5)
    numbers = _numbers(policy)
    shift = np.asarray(policies._move(policy, numbers, None, 24, 24).c)
    assert set(np.unique(shift)) == set(range(-6, 7))
    assert 0.48 < np.mean(shift == 0) < 0.6
    policy = Policy(rotation=10.0, zoom=(0.5, 2.0), shear=20.0)
    for name, low, high in (("rotation", 0, 10), ("zoom", 0.5, 2), ("shear", 0, 20)):
        only = dataclasses.replace(NONE, **{name: getattr(policy, name)})
        a, b, *_ = (np.asarray(v) for v in policies._move(only, numbers, None, 24, 24))
        value = {
            "rotation": np.degrees(np.arctan2(-b, a)),
            "zoom": 1 / a,
            "shear": np.degrees(np.arctan(b)),
        }[name]
        assert low <= np.abs(value).min() + 1e-4
        assert high * 0.98 < np.abs(value).max() <= high * 1.0001


def test_policy_survives_a_config():
    for policy in (WEAK, STRONG, STRONG_USB, SEED_CROP, EVERYTHING):
        config = FrozenConfigDict(ConfigDict(dataclasses.asdict(policy)))
        assert Policy(**config) == policy
        listed = {k: list(v) if isinstance(v, tuple) else v for k, v in config.items()}
        assert Policy(**listed) == policy


@pytest.mark.parametrize(
    "wrong",
    [
        {"flip": 1.5}, {"fill": "wrap"}, {"zoom": (1.2, 0.8)}, {"shift": (0.1,)}, {"shear": 90},
        {"magnitude": "strong"}, {"resized_crop": (0.5,)}, {"crop": 0.1, "resized_crop": (0.5, 1)},
    ],
)  # fmt: skip
def test_wrong_policies_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        Policy(**wrong)


def test_wrong_views_are_refused():
    good = {"size": None, "mean": (0.5,), "std": (0.2,), "channels": 3}
    for wrong in ({"mean": (0.5, 0.5)}, {"std": (0.0,)}, {"form": "fast"}):
        with pytest.raises(UserError):
            policies.make_view(WEAK, **(good | wrong))
    with pytest.raises(UserError, match="size"):
        policies.make_view(WEAK, **good)(IMAGES[:, :20], KEYS)
