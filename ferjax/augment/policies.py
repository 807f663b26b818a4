"""Policies: which random operations make a view, and the view function of a training step.

A view is made inside the jitted step from uint8 images, in this fixed order:

1. All drawn per-pixel operations, in drawn order, as one 256-entry table (`photometric.py`).
2. Colour (a no-op on grey images), then sharpness, a 3x3 filter.
3. All geometric operations as one affine map, sampled bilinearly once (`geometric.py`): flip, then
   crop or random resized crop, then the policy's shift, rotation, shear and zoom, then the drawn
   ones in drawn order, then the part that `config.data.crop` shows, and the resize to the result's
   side (bilinear, without antialiasing).
4. Random erasing, then cutout: rectangles of middle grey, level 127.5.
5. Normalisation: (level / 255 - mean) / std; or by the view's own mean and deviation.

Pillow pipelines, the reference codes' too, apply what RandAugment drew in drawn order, round to
levels after each operation, and sample anew for each. Here order is kept within the table and
within the map only; sharpness drawn more than once is one filter with the factors' product; the
places that a constant fill covers are those outside the window under the whole map.

RandAugment's pool; each slot draws one of these 14 with equal probability, and applies it with
`op_p`. "original": level l is drawn from 1..9, signs are random. "uniform": u is drawn from [0, 1).

| operation | "original" (FixMatch) | "uniform" (USB) |
|---|---|---|
| identity, autocontrast, equalize | | |
| brightness, contrast, colour, sharpness: factor | .1 + .18 l: .28..1.72 | .05 + .9 u |
| posterize: bits kept | 8 - floor(.4 l): 8..5 | 4 + floor(4 u): 4..7 |
| solarize: threshold | 256 - floor(25.6 l): 231..26 | 256 u |
| rotate: degrees | +- 3 l: 3..27 | -30 + 60 u |
| shear_x, shear_y: tangent | +- .03 l | -.3 + .6 u |
| translate_x, translate_y: of the side, to whole pixels | +- .03 l | -.3 + .6 u |

Shears are about the image's centre (the references': about its corner). For posterize the FixMatch
paper gives 4..8 bits, followed here; its code keeps 4 - floor(.4 l).

The policy's own operations stand in `policy.py`.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ferjax.augment import geometric, occlusion, photometric, randaugment
from ferjax.augment.geometric import Affine, affine
from ferjax.augment.policy import Policy
from ferjax.augment.randaugment import Drawn, index
from ferjax.config import UserError

GREY = 127.5  # level of cutout and erasing: the middle, 0 in the reference's [-1, 1]

# Where each operation's random numbers stand in an image's vector, so that switching one operation
# on or off leaves what the others draw as it was.
_FLIP, _CROP, _SHIFT, _ROTATION, _SHEAR, _ZOOM = 0, 1, 3, 6, 8, 10
_RESIZED, _BRIGHTNESS, _CONTRAST, _CUTOUT, _ERASE, _RANDAUGMENT = 12, 16, 18, 20, 23, 28

NONE = Policy()
WEAK = Policy(flip=0.5, crop=0.125, fill="reflect")
STRONG = Policy(flip=0.5, crop=0.125, fill="constant", ops=2, op_p=0.5, cutout=0.5)
STRONG_USB = dataclasses.replace(
    STRONG, fill_value=0.0, ops=3, op_p=1.0, magnitude="uniform", cutout_style="uniform"
)
SEED_CROP = Policy(flip=0.5, resized_crop=(0.08, 1.0))


def _keras(rotation: float, others: float) -> Policy:
    """A row of the slides' table: shifts, shear and zoom share a number (see `policy.py`)."""
    return Policy(
        flip=0.5,
        affine_style="keras",
        rotation=rotation,
        shift=(others, others),
        shear=others,
        shear_unit="radians",
        zoom=(1 - others, 1 + others),
    )


KERAS20, KERAS40, KERAS90 = _keras(20, 0.1), _keras(40, 0.2), _keras(90, 0.4)


def apply_photometric(
    policy: Policy, images: jax.Array, numbers: jax.Array, ops: Drawn | None, form: str
) -> jax.Array:
    """Steps 1 and 2: uint8 [N, H, W, C] -> uint8 of the same shape."""
    steps: list[Callable[[jax.Array], jax.Array]] = []

    def jitter(strength: float, start: int) -> jax.Array:
        on = numbers[:, start] < policy.jitter_p
        amount = strength * (2.0 * numbers[:, start + 1] - 1.0)
        return (1.0 + jnp.where(on, amount, 0.0))[:, None, None]

    if policy.brightness:
        brighter = jitter(policy.brightness, _BRIGHTNESS)
        steps.append(lambda counts: photometric.brightness(brighter))
    if policy.contrast:
        factor = jitter(policy.contrast, _CONTRAST)
        steps.append(lambda counts: photometric.contrast(photometric.mean_luma(counts), factor))
    if ops is not None:
        draws = functools.partial(randaugment.table, drawn=ops)
        steps += [functools.partial(draws, slot=k) for k in range(policy.ops)]
    if steps:
        images = photometric.apply_tables(images, steps, form)
    if ops is None:
        return images
    if images.shape[-1] == 3:
        images = photometric.saturate(images, randaugment.enhancement(ops, "colour"))
    sharper = photometric.sharpen(images, randaugment.enhancement(ops, "sharpness"))
    return sharper.astype(jnp.uint8)


def _window(policy: Policy, numbers: jax.Array, h: int, w: int) -> Affine:
    """Flip and crop: the map from the window to the source."""
    n = numbers.shape[0]
    sign = jnp.where(numbers[:, _FLIP] < policy.flip, -1.0, 1.0)
    crop = affine(n)
    if policy.crop:
        pad_y, pad_x = round(policy.crop * h), round(policy.crop * w)
        crop = affine(
            n,
            shift_x=(index(numbers[:, _CROP + 1], 2 * pad_x + 1) - pad_x).astype(jnp.float32),
            shift_y=(index(numbers[:, _CROP], 2 * pad_y + 1) - pad_y).astype(jnp.float32),
        )
    elif policy.resized_crop:
        draws = numbers[:, _RESIZED : _RESIZED + 4]
        crop = geometric.resized_crop(draws, h, w, policy.resized_crop, policy.resized_crop_aspect)
    return affine(n, scale_x=sign) @ crop


def _move(policy: Policy, numbers: jax.Array, ops: Drawn | None, h: int, w: int) -> Affine:
    """The policy's own moves, then the drawn ones: the map from the result to the window."""
    own = _keras_moves if policy.affine_style == "keras" else _plain_moves
    move = own(policy, numbers, h, w)
    if ops is not None:
        for slot in range(policy.ops):
            move @= randaugment.move(ops, slot, h, w)
    return move


def _keras_moves(policy: Policy, numbers: jax.Array, h: int, w: int) -> Affine:
    rotation, shear, right, down = (
        reach * (2.0 * numbers[:, start + 1] - 1.0)
        for reach, start in (
            (policy.rotation, _ROTATION),
            (policy.shear_degrees, _SHEAR),
            (policy.shift[0] * w, _SHIFT),
            (policy.shift[1] * h, _SHIFT + 1),
        )
    )
    low, high = policy.zoom
    # Keras moves every image, so that both numbers of the zoom are free for its two axes.
    zoom = low + (high - low) * numbers[:, _ZOOM : _ZOOM + 2]
    return geometric.keras_affine(rotation, right, down, shear, zoom[:, 0], zoom[:, 1])


def _plain_moves(policy: Policy, numbers: jax.Array, h: int, w: int) -> Affine:
    n = numbers.shape[0]
    move = affine(n)

    def on(start: int) -> jax.Array:
        return numbers[:, start] < policy.affine_p

    if any(policy.shift):
        unit = jnp.where(on(_SHIFT)[:, None], 2.0 * numbers[:, _SHIFT + 1 : _SHIFT + 3] - 1.0, 0.0)
        move @= affine(
            n,
            shift_x=jnp.round(unit[:, 0] * (policy.shift[0] * w)),
            shift_y=jnp.round(unit[:, 1] * (policy.shift[1] * h)),
        )
    if policy.rotation:
        degrees = policy.rotation * (2.0 * numbers[:, _ROTATION + 1] - 1.0)
        move @= geometric.rotation(jnp.where(on(_ROTATION), degrees, 0.0))
    if policy.shear:
        radians = np.pi / 180.0 * policy.shear_degrees * (2.0 * numbers[:, _SHEAR + 1] - 1.0)
        move @= affine(n, shear_x=jnp.where(on(_SHEAR), jnp.tan(radians), 0.0))
    if policy.zoom != (1.0, 1.0):
        low, high = policy.zoom
        zoom = low + (high - low) * numbers[:, _ZOOM + 1]
        step = jnp.where(on(_ZOOM), 1.0 / zoom, 1.0)
        move @= affine(n, scale_x=step, scale_y=step)
    return move


def _part(policy: Policy, numbers: jax.Array, h: int, w: int, crop: int) -> Affine:
    """The map from a square of `crop` pixels, anywhere in the image, to the image.

    It is in the middle where the policy's own crop moves the image already.
    """
    free = (h - crop, w - crop)
    top, left = (index(numbers[:, _CROP + i], room + 1) for i, room in enumerate(free))
    if policy.crop:
        top, left = (jnp.full_like(top, room // 2) for room in free)
    return affine(
        numbers.shape[0],
        scale_x=crop / w,
        scale_y=crop / h,
        shift_x=left - (w - crop) / 2,
        shift_y=top - (h - crop) / 2,
    )


def _covered(policy: Policy, numbers: jax.Array, size: int) -> jax.Array | None:
    """Which pixels cutout and erasing cover: bool [N, size, size], or None if neither is on."""
    covered: jax.Array | None = None
    if policy.cutout:
        draws = numbers[:, _CUTOUT : _CUTOUT + 3]
        covered = occlusion.cutout(draws, size, policy.cutout, policy.cutout_style)
    if policy.erase:
        draws = numbers[:, _ERASE : _ERASE + 5]
        erased = occlusion.erasing(
            draws, size, policy.erase, policy.erase_area, policy.erase_aspect
        )
        covered = erased if covered is None else covered | erased
    return covered


def _render(
    images: jax.Array,
    numbers: jax.Array,
    *,
    policy: Policy,
    size: int | None,
    mean: np.ndarray,
    std: np.ndarray,
    channels: int,
    crop: int,
    standardize: bool,
    form: str,
) -> jax.Array:
    _, h, w, _ = images.shape
    ops = None
    if policy.ops:
        ops = randaugment.draw(numbers[:, _RANDAUGMENT:], policy.op_p, policy.magnitude)
    images = apply_photometric(policy, images, numbers, ops, form)
    side = size or crop or h
    same = side == h == w and not crop
    if same and policy.still:
        pixels = images.astype(jnp.float32)
    else:
        sample = geometric.warp
        if policy.aligned:
            sample = functools.partial(geometric.warp_aligned, whole=policy.whole and same)
        window, move = _window(policy, numbers, h, w), _move(policy, numbers, ops, h, w)
        if crop:
            move @= _part(policy, numbers, h, w, crop)
        pixels = sample(
            images,
            window,
            move,
            size=side,
            fill=policy.fill,
            fill_value=255.0 * policy.fill_value,
            form=form,
        )
    covered = _covered(policy, numbers, side)
    if covered is not None:
        pixels = jnp.where(covered[..., None], GREY, pixels)
    if standardize:
        pixels -= jnp.mean(pixels, (1, 2, 3), keepdims=True)
        deviation = jnp.sqrt(jnp.mean(pixels**2, (1, 2, 3), keepdims=True))
        pixels /= jnp.maximum(deviation, 1.0)
    else:
        scale = (1.0 / (255.0 * std)).astype(np.float32)
        pixels = pixels * scale - (mean / std).astype(np.float32)
    return jnp.broadcast_to(pixels, (*pixels.shape[:3], channels))


def make_view(
    policy: Policy,
    *,
    size: int | None,
    mean: Sequence[float],
    std: Sequence[float],
    channels: int,
    crop: int = 0,
    standardize: bool = False,
    form: str = "auto",
) -> Callable[..., jax.Array]:
    """A function that makes one view of a batch, to be called inside a jitted step.

    Args:
      policy: the random operations; `NONE` gives the view for evaluation.
      size: side of the result in pixels; None keeps that of the (then square) images or the crop.
      mean: of the levels / 255; one number, or one a channel of the result.
      std: their standard deviation, likewise.
      channels: of the result; grey images are repeated, others must have as many.
      crop: side in pixels of the part of an image that a view shows, 0 for all of it: anywhere if
        the policy is random and does not crop by itself, else the middle one.
      standardize: subtract each view's own mean level and divide by its own standard deviation (of
        1 level at least), instead of `mean` and `std`.
      form: "gather", "matmul", or "auto": matmul where the step is lowered for TPU, else gather.

    Returns:
      `view(images, keys, turns=None)`: uint8 [N, H, W, C] with C 1 or 3 and typed random keys [N]
      -> float32 [N, size, size, channels], normalised. An image's view depends on that image and
      its key alone. A policy without random operations reads no keys: any value will do. Where
      flips alternate, images with an even number in `turns`, int32 [N], are flipped (None: as
      drawn).
    """
    means, stds = np.asarray(mean, np.float64), np.asarray(std, np.float64)
    for name, values in (("mean", means), ("std", stds)):
        if values.shape not in ((1,), (channels,)):
            raise UserError(f"view: {name} has {values.size} numbers: give 1 or {channels}")
    if not np.all(stds > 0):
        raise UserError(f"view: std={stds.tolist()}: must be above 0")
    if form not in ("auto", "gather", "matmul"):
        raise UserError(f"view: form={form!r}: must be auto, gather or matmul")
    render = functools.partial(
        _render,
        policy=policy,
        size=size,
        mean=means,
        std=stds,
        channels=channels,
        standardize=standardize,
    )
    count = _RANDAUGMENT + randaugment.NUMBERS * policy.ops

    def view(images: jax.Array, keys: jax.Array, turns: jax.Array | None = None) -> jax.Array:
        n, h, w, c = images.shape
        if c not in (1, 3) or (c == 3 and channels != 3):
            raise UserError(f"view: images with {c} channels do not make {channels}: give 1 or 3")
        if size is None and h != w and not crop:
            raise UserError(f"view: images of {h} x {w} pixels need a size: give one")
        if crop > min(h, w):
            raise UserError(f"config.data.crop={crop}: the images have {h} x {w} pixels")
        free = crop if crop != h or crop != w else 0
        if free and not policy.random:
            top, left = (h - crop) // 2, (w - crop) // 2
            images, free = images[:, top : top + crop, left : left + crop], 0
        if policy.random:
            draw = functools.partial(jax.random.uniform, shape=(count,), dtype=jnp.float32)
            numbers = jax.vmap(draw)(keys)
        else:
            numbers = jnp.zeros((n, count), jnp.float32)
        if turns is not None and policy.flip_style == "alternate":
            flip = (turns % 2).astype(jnp.float32)[:, None]
            numbers = jnp.where(np.arange(count) == _FLIP, flip, numbers)
        if form != "auto":
            return render(images, numbers, crop=free, form=form)
        return jax.lax.platform_dependent(
            images,
            numbers,
            tpu=functools.partial(render, crop=free, form="matmul"),
            default=functools.partial(render, crop=free, form="gather"),
        )

    return view
