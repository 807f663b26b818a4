"""Images as a bad camera or a hidden face gives them, for judging how robust a network is.

The operations are those of the training views at fixed strengths, made on uint8 images before the
network's view. What is random (where a square lies, which way an image turns, the noise) depends on
the image's position and the kind alone: the same for each level, each run and each number of
devices.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ferjax.augment import geometric, occlusion, photometric
from ferjax.config import UserError

# Kind -> its levels, the mildest first.
LEVELS = {
    "occlusion": (0.25, 0.5, 0.75),  # side of a middle-grey square, of the image's side
    "darkness": (0.5, 0.25, 0.1),  # brightness factor
    "low_contrast": (0.5, 0.25, 0.1),  # contrast factor, about the image's mean level
    "noise": (10.0, 25.0, 50.0),  # standard deviation of normal noise, in levels 0..255
    "rotation": (15.0, 30.0, 45.0),  # degrees, either way; corners are reflected
}
_CHUNK = 512  # images of one call: one shape is compiled, whatever their number
_GREY = 128


def corrupt(images: np.ndarray, kind: str, level: float) -> np.ndarray:
    """Corrupts each image.

    Args:
      images: uint8 [N, H, W, C] with C 1 or 3; for occlusion and rotation H = W.
      kind: a key of `LEVELS`.
      level: any value of the kind's unit, not only those of `LEVELS`.

    Returns:
      uint8 [N, H, W, C].

    Raises:
      UserError: no such kind, or images that are not square.
    """
    if kind not in LEVELS:
        raise UserError(f"there is no corruption {kind!r}: use {', '.join(LEVELS)}")
    n, height, width, _ = images.shape
    if height != width:
        raise UserError(f"corruptions take square images, these have {height} x {width} pixels")
    bits = np.random.Philox(key=list(LEVELS).index(kind))
    if kind == "noise":
        draw, out = np.random.Generator(bits).standard_normal, np.empty_like(images)
        for start in range(0, n, _CHUNK):
            part = images[start : start + _CHUNK]
            noisy = part + np.float32(level) * draw(part.shape, np.float32)
            out[start : start + _CHUNK] = np.rint(np.clip(noisy, 0, 255))
        return out
    # 24 of the 64 bits: what float32 holds exactly, below 1.
    raw = (bits.random_raw(3 * n) >> np.uint64(40)).astype(np.float32) / np.float32(2**24)
    return _in_chunks(_FUNCTIONS[kind], images, raw.reshape(n, 3), np.float32(level))


def _in_chunks(
    function: Callable[..., jax.Array], images: np.ndarray, numbers: np.ndarray, level: np.float32
) -> np.ndarray:
    size = min(_CHUNK, len(images))
    out = np.empty_like(images)
    for start in range(0, len(images), size):
        rows = np.minimum(np.arange(start, start + size), len(images) - 1)
        made = np.asarray(function(images[rows], numbers[rows], level))
        out[start : start + size] = made[: len(images) - start]
    return out


@jax.jit
def _occlusion(images: jax.Array, numbers: jax.Array, level: Any) -> jax.Array:
    covered = occlusion.cutout(numbers, images.shape[1], level, "fixed")
    return jnp.where(covered[..., None], jnp.uint8(_GREY), images)


@jax.jit
def _darkness(images: jax.Array, numbers: jax.Array, level: jax.Array) -> jax.Array:
    factor = jnp.full((len(images), 1, 1), level)
    return photometric.apply_tables(images, [lambda _: photometric.brightness(factor)], "gather")


@jax.jit
def _low_contrast(images: jax.Array, numbers: jax.Array, level: jax.Array) -> jax.Array:
    factor = jnp.full((len(images), 1, 1), level)

    def table(counts: jax.Array) -> jax.Array:
        return photometric.contrast(photometric.mean_luma(counts), factor)

    return photometric.apply_tables(images, [table], "gather")


@jax.jit
def _rotation(images: jax.Array, numbers: jax.Array, level: jax.Array) -> jax.Array:
    n = len(images)
    turned = geometric.warp(
        images,
        geometric.affine(n),
        geometric.rotation(jnp.where(numbers[:, 0] < 0.5, -level, level)),
        size=images.shape[1],
        fill="reflect",
        fill_value=0.0,
        form="gather",
    )
    return jnp.round(turned).astype(jnp.uint8)


_FUNCTIONS: dict[str, Any] = {
    "occlusion": _occlusion,
    "darkness": _darkness,
    "low_contrast": _low_contrast,
    "rotation": _rotation,
}
