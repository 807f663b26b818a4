"""Geometric operations: affine maps that compose, and one bilinear sampling.

Coordinates are in pixels of the source image, measured from its centre: x to the right in
[-W/2, W/2], y downwards in [-H/2, H/2]; the middle of pixel (row i, column j) is at
(j + .5 - W/2, i + .5 - H/2). A map takes a place in the result to the place in the source where its
value is read, so the operation applied to the image last is the innermost map.

Sampling goes through a window: `inner` maps the result to the window and `outer` the window to the
source. The window is the image after flip and crop. Fill "reflect" and "nearest" continue the
source past its borders (reflect without repeating the border pixel); "constant" reads crops as
"reflect", but gives a fixed level wherever the map leaves the window, as Pillow does when it
rotates an image that was cropped before.

`warp` has two forms with equal results: "gather" reads the four neighbours of each place; "matmul"
multiplies with matrices of hat functions max(0, 1 - |place - pixel|), for TPU.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ferjax.augment.photometric import stage

FILLS = ("reflect", "nearest", "constant")
_EXACT = jax.lax.Precision.HIGHEST


class Affine(NamedTuple):
    """The map (x, y) -> (a x + b y + c, d x + e y + f), one an image: six float32 [N]."""

    a: jax.Array
    b: jax.Array
    c: jax.Array
    d: jax.Array
    e: jax.Array
    f: jax.Array

    def __matmul__(self, inner: "Affine") -> "Affine":
        """The map that applies `inner` first. Element-wise: a product could lose bits on a TPU."""
        a, b, c, d, e, f = self
        return Affine(
            a * inner.a + b * inner.d,
            a * inner.b + b * inner.e,
            a * inner.c + b * inner.f + c,
            d * inner.a + e * inner.d,
            d * inner.b + e * inner.e,
            d * inner.c + e * inner.f + f,
        )

    def __call__(self, x: ArrayLike, y: ArrayLike) -> tuple[jax.Array, jax.Array]:
        """Places x, y [N or 1, ...] -> their images under the map."""
        x, y = jnp.asarray(x), jnp.asarray(y)
        a, b, c, d, e, f = (v.reshape(v.shape + (1,) * (x.ndim - 1)) for v in self)
        return a * x + b * y + c, d * x + e * y + f


def affine(
    n: int,
    *,
    scale_x: jax.Array | float = 1.0,
    scale_y: jax.Array | float = 1.0,
    shear_x: jax.Array | float = 0.0,
    shear_y: jax.Array | float = 0.0,
    shift_x: jax.Array | float = 0.0,
    shift_y: jax.Array | float = 0.0,
) -> Affine:
    """x -> scale_x x + shear_x y + shift_x, y -> shear_y x + scale_y y + shift_y, for n images."""
    entries = (scale_x, shear_x, shift_x, shear_y, scale_y, shift_y)
    return Affine(*(jnp.broadcast_to(jnp.asarray(v, jnp.float32), (n,)) for v in entries))


def rotation(degrees: jax.Array) -> Affine:
    """Turns the image counter-clockwise about its centre, as Pillow's `rotate`: degrees [N]."""
    radians = degrees * np.float32(np.pi / 180.0)
    cos, sin, zero = jnp.cos(radians), jnp.sin(radians), jnp.zeros_like(radians)
    return Affine(cos, -sin, zero, sin, cos, zero)


def keras_affine(
    degrees: jax.Array,
    shift_x: jax.Array,
    shift_y: jax.Array,
    shear: jax.Array,
    zoom_x: jax.Array,
    zoom_y: jax.Array,
) -> Affine:
    """What Keras' `apply_affine_transform` does: the product R T S Z, from result to source.

    Keras counts rows first, so its positive angles turn as our negative ones, and its shear, with
    the matrix (1, -sin s; 0, cos s), moves rows by their columns and narrows the columns.

    Args:
      degrees, shear: [N], both in degrees.
      shift_x, shift_y: [N], pixels along the width and the height.
      zoom_x, zoom_y: [N], step in the source for one in the result: above 1 shows more.
    """
    n = degrees.shape[0]
    radians = shear * np.float32(np.pi / 180.0)
    move = rotation(-degrees) @ affine(n, shift_x=shift_x, shift_y=shift_y)
    move @= affine(n, scale_x=jnp.cos(radians), shear_y=-jnp.sin(radians))
    return move @ affine(n, scale_x=zoom_x, scale_y=zoom_y)


def resized_crop(
    numbers: jax.Array, h: int, w: int, scale: Sequence[float], aspect: Sequence[float]
) -> Affine:
    """A random part of the image, stretched over the whole window.

    Args:
      numbers: uniform in [0, 1), [N, 4].
      h: height of the images in pixels.
      w: their width.
      scale: (low, high) of the part's share of the area, drawn uniformly.
      aspect: (low, high) of its width / height, drawn uniformly in the logarithm. A part that is
        wider or higher than the image is cut to it.
    """
    area = h * w * (scale[0] + (scale[1] - scale[0]) * numbers[:, 0])
    ratio = jnp.exp(np.log(aspect[0]) + np.log(aspect[1] / aspect[0]) * numbers[:, 1])
    share_x = jnp.minimum(jnp.sqrt(area * ratio) / w, 1.0)
    share_y = jnp.minimum(jnp.sqrt(area / ratio) / h, 1.0)
    return affine(
        numbers.shape[0],
        scale_x=share_x,
        scale_y=share_y,
        shift_x=w * (1.0 - share_x) * (numbers[:, 2] - 0.5),
        shift_y=h * (1.0 - share_y) * (numbers[:, 3] - 0.5),
    )


def _fold(place: jax.Array, side: int, fill: str) -> jax.Array:
    """Brings index coordinates (0: middle of the first pixel) into [0, side - 1] by the fill."""
    last = side - 1
    if fill == "nearest" or last == 0:
        return jnp.clip(place, 0.0, last)
    period = 2.0 * last
    place = place - period * jnp.floor(place / period)
    return jnp.clip(last - jnp.abs(place - last), 0.0, last)


def _hat(place: jax.Array, side: int) -> jax.Array:
    """Places [N, P] in [0, side - 1] -> interpolation weights [N, P, side]."""
    return jnp.maximum(0.0, 1.0 - jnp.abs(place[..., None] - np.arange(side, dtype=np.float32)))


def _corner(place: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Places -> the whole index at or before each, int32, and the weight of the next one."""
    low = jnp.floor(place)
    return low.astype(jnp.int32), place - low


def _neighbours(images: jax.Array) -> jax.Array:
    """uint8 [N, H, W, C] -> uint32 [N, H W, C]: a pixel, the right, the lower, the lower right one.

    One read then fetches what bilinear interpolation needs: a read costs more than unpacking.
    Beyond the last column and row stands anything: it is read with weight 0.
    """
    n, h, w, c = images.shape
    pixels = jnp.pad(images.reshape(n, h * w, c), ((0, 0), (0, w + 1), (0, 0))).astype(jnp.uint32)
    pair = pixels[:, :-1] | (pixels[:, 1:] << 8)
    return pair[:, : h * w] | (pair[:, w:] << 16)


def _byte(words: jax.Array, number: int) -> jax.Array:
    return ((words >> (8 * number)) & 0xFF).astype(jnp.int32).astype(jnp.float32)


def _grid(size: int, side: int) -> np.ndarray:
    """Middles of `size` result pixels over a side of `side` source pixels, from the centre."""
    return ((np.arange(size) + 0.5) * (side / size) - side / 2.0).astype(np.float32)


def warp(
    images: jax.Array,
    outer: Affine,
    inner: Affine,
    *,
    size: int,
    fill: str,
    fill_value: float,
    form: str,
) -> jax.Array:
    """Samples images bilinearly through any affine map.

    Args:
      images: uint8 [N, H, W, C].
      outer: maps the window to the source.
      inner: maps the result to the window.
      size: side of the result in pixels; the whole source covers it under identity maps.
      fill: "reflect", "nearest" or "constant".
      fill_value: level 0..255 of the constant fill.
      form: "gather" or "matmul".

    Returns:
      float32 levels [N, size, size, C], not rounded.
    """
    n, h, w, c = images.shape
    grid_y, grid_x = np.meshgrid(_grid(size, h), _grid(size, w), indexing="ij")
    window = inner(grid_x.reshape(1, -1), grid_y.reshape(1, -1))

    def places(outer: Affine, inner: Affine) -> tuple[jax.Array, jax.Array]:
        x, y = outer(*inner(grid_x.reshape(1, -1), grid_y.reshape(1, -1)))
        return _fold(x + (w / 2.0 - 0.5), w, fill), _fold(y + (h / 2.0 - 0.5), h, fill)

    def reads(images: jax.Array, outer: Affine, inner: Affine) -> tuple[jax.Array, ...]:
        (x0, right), (y0, down) = (_corner(v) for v in places(outer, inner))
        return _neighbours(images), y0 * w + x0, right[..., None], down[..., None]

    if form == "matmul":
        x, y = places(outer, inner)
        pixels = images.astype(jnp.float32)
        columns = jnp.einsum("npw,nhwc->nphc", _hat(x, w), pixels, precision=_EXACT)
        out = jnp.sum(_hat(y, h)[..., None] * columns, axis=2)
    else:
        words, index, right, down = stage(reads, images, outer, inner)
        words = _take(words, index, 1)
        upper = _byte(words, 0) + right * (_byte(words, 1) - _byte(words, 0))
        lower = _byte(words, 2) + right * (_byte(words, 3) - _byte(words, 2))
        out = upper + down * (lower - upper)
    if fill == "constant":
        inside = _inside(window[0], w) & _inside(window[1], h)
        out = jnp.where(inside[..., None], out, fill_value)
    return out.reshape(n, size, size, c)


def _inside(place: jax.Array, side: int) -> jax.Array:
    return (place >= -side / 2.0) & (place < side / 2.0)


def warp_aligned(
    images: jax.Array,
    outer: Affine,
    inner: Affine,
    *,
    size: int,
    fill: str,
    fill_value: float,
    whole: bool,
    form: str,
) -> jax.Array:
    """`warp` for maps without rotation and shear, where rows and columns are sampled one by one.

    Args:
      whole: every place that is read is the middle of a pixel (flips and shifts by whole pixels to
        the same size), so that nothing is interpolated and the result is exact.

    The others, and what is returned: see `warp`.
    """
    n, h, w, c = images.shape
    window = inner(_grid(size, w)[None, :], _grid(size, h)[None, :])
    x, y = outer(*window)
    x = _fold(x + (w / 2.0 - 0.5), w, fill)
    y = _fold(y + (h / 2.0 - 0.5), h, fill)
    if form == "matmul":
        # One bfloat16 pass is exact for levels and for weights 0 and 1.
        precision = None if whole else _EXACT
        rows = jnp.einsum(
            "nyh,nhwc->nywc", _hat(y, h), images.astype(jnp.float32), precision=precision
        )
        out = jnp.einsum("nxw,nywc->nyxc", _hat(x, w), rows, precision=precision)
    elif whole:
        index = y.astype(jnp.int32)[:, :, None] * w + x.astype(jnp.int32)[:, None, :]
        index = stage(jnp.ravel, index).reshape(n, size * size)
        out = _take(images.reshape(n, h * w, c), index, 1)
        out = out.reshape(n, size, size, c).astype(jnp.float32)
    else:
        out = _interpolate(_interpolate(images.astype(jnp.float32), x, 2), y, 1)
    if fill == "constant":
        inside = _inside(window[0], w)[:, None, :] & _inside(window[1], h)[:, :, None]
        out = jnp.where(inside[..., None], out, fill_value)
    return out


def _along(vector: jax.Array, axis: int, ndim: int) -> jax.Array:
    """[N, P] -> the same numbers along the given axis of an array of ndim dimensions."""
    return vector.reshape(
        [-1 if k == 0 else vector.shape[1] if k == axis else 1 for k in range(ndim)]
    )


def _take(values: jax.Array, index: jax.Array, axis: int) -> jax.Array:
    """Picks by each image's own index [N, P] along an axis of [N, ...]."""
    index = _along(index, axis, values.ndim)
    return jnp.take_along_axis(values, index, axis=axis, mode="promise_in_bounds")


def _interpolate(images: jax.Array, place: jax.Array, axis: int) -> jax.Array:
    """Bilinear along one axis: float32 levels [N, H, W, C], places [N, P] within the axis."""
    low, weight = _corner(place)
    high = jnp.minimum(low + 1, images.shape[axis] - 1)
    weight = _along(weight, axis, images.ndim)

    def mix(images: jax.Array, low: jax.Array, high: jax.Array, weight: jax.Array) -> jax.Array:
        first = _take(images, low, axis)
        return first + weight * (_take(images, high, axis) - first)

    return stage(mix, images, low, high, weight)
