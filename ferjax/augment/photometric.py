"""Photometric operations on grey levels: 256-entry lookup tables, and the filters after them.

A per-pixel operation on 8-bit images is a table of 256 levels, and operations in a row compose
into one table, so that an image is read once however many operations were drawn. Operations that
depend on the image (autocontrast, equalize, contrast) need only its histogram, and that of a
changed image is the first one pushed through the table so far.

Every operation follows Pillow's arithmetic (`PIL.ImageOps`, `PIL.ImageEnhance`) to within one
level. Levels are whole numbers 0..255 held in float32; histograms are float32 counts. Both are
exact below 2^24 pixels.

`histogram` and `lookup` have two forms with equal results: "gather" (indexing, for CPU and GPU) and
"matmul" (products with one-hot matrices of the two halves of a level, for TPU, where an index costs
as much as many multiplications).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_EXACT = jax.lax.Precision.HIGHEST
_HALF = 16  # a level is 16 * high + low
# ITU-R 601-2 luma as Pillow computes it, in 1/65536.
_LUMA = np.array([19595, 38470, 7471])


def stage(function: Callable[..., Any], pixels: jax.Array, *args: Any) -> Any:
    """`function(pixels, *args)`, computed to its end before anything reads it.

    XLA:CPU else fuses cheap arithmetic into the indexing that follows, and so repeats it for each
    pixel that is read, without vector instructions: views then take 3 to 5 times as long. It leaves
    the branches of a condition that it cannot foresee alone. Elsewhere this is a plain call.

    Args:
      function: of arrays (or trees of them) alone.
      pixels: levels, or other numbers that are never below 0.
      args: the other arguments.
    """

    def alone(pixels: jax.Array, *args: Any) -> Any:
        shapes = jax.eval_shape(function, pixels, *args)

        def never(*_: Any) -> Any:
            return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

        sure = pixels.reshape(-1)[0].astype(jnp.float32) > -1.0
        return jax.lax.cond(sure, function, never, pixels, *args)

    return jax.lax.platform_dependent(pixels, *args, cpu=alone, default=function)


def _one_hot_halves(values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Levels [..., P] -> float32 one-hot matrices [..., P, 16] of the high and the low half."""
    values = values.astype(jnp.int32)[..., None]
    half = np.arange(_HALF)
    return (
        (values // _HALF == half).astype(jnp.float32),
        (values % _HALF == half).astype(jnp.float32),
    )


def histogram(values: jax.Array, form: str, weights: jax.Array | None = None) -> jax.Array:
    """Counts levels.

    Args:
      values: levels [..., P], any dtype that holds 0..255.
      form: "gather" or "matmul".
      weights: float32 [..., P], whole numbers: what each value counts; one each if None.

    Returns:
      float32 [..., 256].
    """
    if form == "matmul":
        high, low = _one_hot_halves(values)
        if weights is not None:
            high = high * weights[..., None]
        counts = jnp.einsum("...ph,...pl->...hl", high, low, precision=_EXACT)
        return counts.reshape(*values.shape[:-1], _HALF * _HALF)
    # One flat scatter: on XLA:CPU twice as fast as one per image.
    rows = int(np.prod(values.shape[:-1]))
    index = (
        values.reshape(rows, -1).astype(jnp.int32) + 256 * np.arange(rows, dtype=np.int32)[:, None]
    )
    # Of whole numbers: XLA's deterministic GPU operations add others one after another.
    added = 1 if weights is None else weights.reshape(rows, -1).astype(jnp.int32)
    counts = jnp.zeros(rows * 256, jnp.int32).at[index].add(added, mode="promise_in_bounds")
    return counts.astype(jnp.float32).reshape(*values.shape[:-1], 256)


def lookup(table: jax.Array, values: jax.Array, form: str) -> jax.Array:
    """Replaces each level by its entry in a table.

    Args:
      table: [..., 256], entries 0..255.
      values: levels [..., P].
      form: "gather" or "matmul".

    Returns:
      [..., P] of the table's dtype.
    """
    if form == "matmul":
        high, low = _one_hot_halves(values)
        halves = table.astype(jnp.float32).reshape(*table.shape[:-1], _HALF, _HALF)
        rows = jnp.einsum("...ph,...hl->...pl", high, halves, precision=_EXACT)
        return jnp.sum(rows * low, axis=-1).astype(table.dtype)
    return jnp.take_along_axis(table, values.astype(jnp.int32), axis=-1, mode="promise_in_bounds")


def push(counts: jax.Array, table: jax.Array, form: str) -> jax.Array:
    """The histogram after a table: counts [..., 256] and table [..., 256] -> float32 [..., 256]."""
    return histogram(table, form, weights=counts)


def levels() -> np.ndarray:
    """The identity table, float32 [256]."""
    return np.arange(256, dtype=np.float32)


def blend(base: jax.Array | float, values: jax.Array, factor: jax.Array) -> jax.Array:
    """Pillow's `Image.blend` on 8-bit levels: base + factor (values - base), clipped, truncated."""
    return jnp.floor(jnp.clip(base + factor * (values - base), 0.0, 255.0))


def autocontrast(counts: jax.Array) -> jax.Array:
    """Stretches the levels that occur to 0..255: counts [..., 256] -> table [..., 256].

    An image of one level stays as it is.
    """
    level = levels()
    low = jnp.min(jnp.where(counts > 0, level, 255.0), axis=-1, keepdims=True)
    high = jnp.max(jnp.where(counts > 0, level, 0.0), axis=-1, keepdims=True)
    # The half keeps whole quotients whole where division is approximate.
    stretched = jnp.floor((255.0 * (level - low) + 0.5) / jnp.maximum(high - low, 1.0))
    return jnp.where(high > low, jnp.clip(stretched, 0.0, 255.0), level)


def equalize(counts: jax.Array) -> jax.Array:
    """Flattens the histogram: counts [..., 256] -> table [..., 256], as `ImageOps.equalize`.

    With step = (pixels - pixels of the highest level that occurs) // 255, level v becomes
    (step // 2 + pixels below v) // step. With step = 0 the image stays as it is.
    """
    level = levels()
    high = jnp.max(jnp.where(counts > 0, level, 0.0), axis=-1, keepdims=True)
    rest = jnp.sum(jnp.where(level < high, counts, 0.0), axis=-1, keepdims=True)
    step = jnp.floor((rest + 0.5) / 255.0)
    lower = (jnp.arange(256)[:, None] < jnp.arange(256)).astype(jnp.float32)
    below = jnp.matmul(counts, lower, precision=_EXACT)
    flat = jnp.floor((jnp.floor(step / 2.0) + below + 0.5) / jnp.maximum(step, 1.0))
    return jnp.where(step > 0, jnp.clip(flat, 0.0, 255.0), level)


def mean_luma(counts: jax.Array) -> jax.Array:
    """The rounded mean that contrast turns about: counts [N, C, 256] (C = 1 or 3) -> [N, 1, 1]."""
    means = jnp.sum(counts * levels(), axis=-1) / jnp.sum(counts, axis=-1)
    if counts.shape[1] == 3:
        mean = jnp.sum(means * (_LUMA / 65536.0).astype(np.float32), axis=-1)
    else:
        mean = means[:, 0]
    return jnp.floor(mean + 0.5)[:, None, None]


def contrast(mean: jax.Array, factor: jax.Array) -> jax.Array:
    """Moves levels from or to the mean: mean and factor, broadcast with [..., 256] -> table."""
    return blend(mean, jnp.asarray(levels()), factor)


def brightness(factor: jax.Array) -> jax.Array:
    """Multiplies levels: factor [..., 1] -> table [..., 256]."""
    return blend(0.0, jnp.asarray(levels()), factor)


def posterize(bits: jax.Array) -> jax.Array:
    """Keeps the highest bits of a level: whole bits 1..8 [..., 1] -> table [..., 256]."""
    dropped = jnp.left_shift(1, 8 - bits.astype(jnp.int32)) - 1
    return jnp.bitwise_and(np.arange(256, dtype=np.int32), ~dropped).astype(jnp.float32)


def solarize(threshold: jax.Array) -> jax.Array:
    """Inverts levels from the threshold on: threshold 0..256 [..., 1] -> table [..., 256]."""
    level = levels()
    return jnp.where(level < threshold, level, 255.0 - level)


def apply_tables(
    images: jax.Array, steps: Sequence[Callable[[jax.Array], jax.Array]], form: str
) -> jax.Array:
    """Applies per-pixel operations one after the other, as one lookup.

    Args:
      images: uint8 [N, H, W, C].
      steps: each gives its table, [N, C, 256] or broadcast to it, from the histogram [N, C, 256] of
        the images that the steps before it made.
      form: "gather" or "matmul".

    Returns:
      uint8 [N, H, W, C].
    """
    n, h, w, c = images.shape
    planes = jnp.moveaxis(images, -1, 1).reshape(n, c, h * w)
    counts = histogram(planes, form)
    look = functools.partial(lookup, form=form)

    def whole(counts: jax.Array, step: Callable[[jax.Array], jax.Array]) -> jax.Array:
        return jnp.broadcast_to(step(counts), counts.shape)

    table = stage(functools.partial(whole, step=steps[0]), counts)
    for step in steps[1:]:
        after = stage(functools.partial(whole, step=step), push(counts, table, form))
        table = stage(look, after, table)
    planes = stage(look, table.astype(jnp.uint8), planes)
    return jnp.moveaxis(planes.reshape(n, c, h, w), 1, -1)


def saturate(images: jax.Array, factor: jax.Array) -> jax.Array:
    """Blends colours with their luma: levels [N, H, W, 3], factor [N] -> float32 [N, H, W, 3]."""
    weighted = jnp.sum(images.astype(jnp.int32) * _LUMA, axis=-1, keepdims=True)
    luma = ((weighted + 0x8000) >> 16).astype(jnp.float32)
    return blend(luma, images.astype(jnp.float32), factor[:, None, None, None])


def sharpen(images: jax.Array, factor: jax.Array) -> jax.Array:
    """Blends with the smoothed image, as `ImageEnhance.Sharpness`.

    The smoothed image is the 3x3 mean with weight 5 in the middle (of 13), rounded; the outermost
    pixels stay as they are. Factor 0 gives it, 1 the image itself, above 1 a sharper one.

    Args:
      images: levels [N, H, W, C].
      factor: float32 [N].

    Returns:
      float32 levels [N, H, W, C].
    """
    n, h, w, c = images.shape
    # Flat rows with a margin: a neighbour is then one slice, which XLA:CPU vectorises. Pixels that
    # wrap around a row's end belong to the border, which stays as it is.
    row, count = w * c, h * w * c
    span = count + 2 * c

    def flat(images: jax.Array) -> jax.Array:
        margin = (row + c, row + c)
        return jnp.pad(images.reshape(n, count).astype(jnp.float32), ((0, 0), margin))

    pixels = stage(flat, images)
    three = pixels[:, :span] + pixels[:, row : row + span] + pixels[:, 2 * row :]
    box = three[:, :count] + three[:, c : c + count] + three[:, 2 * c :]
    middle = pixels[:, row + c : row + c + count]
    smooth = jnp.floor((box + 4.0 * middle + 6.5) / 13.0)
    border = np.ones((h, w, c), bool)
    border[1:-1, 1:-1] = False
    mixed = blend(smooth, middle, factor[:, None])
    return jnp.where(border.reshape(-1), middle, mixed).reshape(images.shape)
