"""Rectangles that cover a part of a view: cutout and random erasing."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ferjax.augment.randaugment import index

STYLES = ("fixed", "uniform")


def _box(
    size: int, top: jax.Array, left: jax.Array, bottom: jax.Array, right: jax.Array
) -> jax.Array:
    """Edges [N] in whole pixels, the last ones excluded -> bool [N, size, size]."""
    place = jnp.arange(size)
    rows = (place >= top[:, None]) & (place < bottom[:, None])
    columns = (place >= left[:, None]) & (place < right[:, None])
    return rows[:, :, None] & columns[:, None, :]


def cutout(numbers: jax.Array, size: int, fraction: float, style: str) -> jax.Array:
    """A square centred on any pixel and cut at the border (DeVries & Taylor 2017).

    Args:
      numbers: uniform in [0, 1), [N, 3].
      size: side of the view in pixels.
      fraction: side of the square as a share of the view's.
      style: "fixed", or "uniform": the share is drawn from U(0, fraction).

    Returns:
      Which pixels are covered, bool [N, size, size].
    """
    y, x = index(numbers[:, 0], size), index(numbers[:, 1], size)
    share = numbers[:, 2] if style == "uniform" else jnp.ones_like(numbers[:, 2])
    half = jnp.round(size * fraction * share / 2.0).astype(jnp.int32)
    return _box(size, y - half, x - half, y + half, x + half)


def erasing(
    numbers: jax.Array,
    size: int,
    probability: float,
    areas: Sequence[float],
    aspects: Sequence[float],
) -> jax.Array:
    """A rectangle inside the view (Zhong et al. 2017).

    Args:
      numbers: uniform in [0, 1), [N, 5].
      size: side of the view in pixels.
      probability: that there is one.
      areas: (low, high) of its share of the view's area, drawn uniformly.
      aspects: (low, high) of its width / height, drawn uniformly in the logarithm.

    Returns:
      Which pixels are covered, bool [N, size, size].
    """
    on, area, aspect, y, x = numbers.T
    area = size**2 * (areas[0] + (areas[1] - areas[0]) * area)
    aspect = jnp.exp(np.log(aspects[0]) + np.log(aspects[1] / aspects[0]) * aspect)
    height = jnp.minimum(jnp.round(jnp.sqrt(area / aspect)), size)
    width = jnp.minimum(jnp.round(jnp.sqrt(area * aspect)), size)
    height = jnp.where(on < probability, height, 0.0)
    top, left = jnp.floor(y * (size - height + 1)), jnp.floor(x * (size - width + 1))
    return _box(size, top, left, top + height, left + width)
