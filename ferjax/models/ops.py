"""Convolution, pooling and space-to-depth as pure functions; NHWC maps, HWIO kernels.

What runs depends on the shapes and on the platform that is compiled for, never on the backend that
happens to be present; every form computes the same function (BUILD_NOTES.md has the figures). On
a CPU the plain weight gradient of a 3x3 convolution is the slowest part of a small network:
XLA 0.10 hands it to YNNPACK, which takes an output of 3x3 pixels and a kernel as large as the map
at 10-20 GFLOP/s, where Eigen's kernel reaches 60-150.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Pads = tuple[tuple[int, int], tuple[int, int]]
# Roles in the weight gradient: channels of x are the batch, the batch is summed over.
_GRADIENT_DIMS = lax.ConvDimensionNumbers((3, 0, 1, 2), (3, 0, 1, 2), (2, 3, 0, 1))


def conv2d(x: jax.Array, kernel: jax.Array, stride: int, pads: Pads) -> jax.Array:
    """Cross-correlate x [N, H, W, C] with kernel [h, w, C, F] -> [N, H', W', F].

    Reverse-mode derivatives of any order, and vmap. With stride 1 and a kernel larger than one
    pixel in float32 or float64 the derivative is our own, for which JAX refuses forward mode.
    """
    own = stride == 1 and kernel.shape[0] > 1 and x.dtype in (jnp.float32, jnp.float64)
    return _conv_unit(x, kernel, pads) if own else _conv(x, kernel, stride, pads)


def _conv(x: jax.Array, kernel: jax.Array, stride: int, pads: Pads) -> jax.Array:
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), pads, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv_unit(x: jax.Array, kernel: jax.Array, pads: Pads) -> jax.Array:
    """Convolution of stride 1."""
    plain = partial(_conv, stride=1, pads=pads)
    if x.shape[-1] > 1:
        return plain(x, kernel)
    return lax.platform_dependent(x, kernel, cpu=partial(_conv_one, pads=pads), default=plain)


def _conv_unit_forward(
    x: jax.Array, kernel: jax.Array, pads: Pads
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _conv_unit(x, kernel, pads), (x, kernel)


def _conv_unit_backward(
    pads: Pads, saved: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    plain = partial(_conv, stride=1, pads=pads)

    def plain_gradient(x: jax.Array, g: jax.Array) -> jax.Array:
        return jax.linear_transpose(lambda k: plain(x, k), kernel)(g)[0]

    (dx,) = jax.linear_transpose(lambda x: plain(x, kernel), x)(g)
    on_cpu = _gradient_one if x.shape[-1] == 1 else _gradient_eigen
    dw = lax.platform_dependent(
        x, g, cpu=partial(on_cpu, size=kernel.shape[:2], pads=pads), default=plain_gradient
    )
    return dx, dw


_conv_unit.defvjp(_conv_unit_forward, _conv_unit_backward)


def _gradient_eigen(x: jax.Array, g: jax.Array, size: Sequence[int], pads: Pads) -> jax.Array:
    """Weight gradient [h, w, C, F] of x [N, H, W, C] for g [N, H', W', F], in Eigen's kernel.

    YNNPACK declines a kernel that is taller than the map, so g gets rows of zeros until it is.
    The columns' padding is written out because XLA would swap the operands, and then decline
    Eigen too, if the kernel had more pixels than the map.
    """
    rows, columns = pads
    extra = max(1, x.shape[1] + 1 - g.shape[1])
    g = jnp.pad(g, ((0, 0), (0, extra), (0, 0), (0, 0)))
    x = jnp.pad(x, ((0, 0), (0, 0), columns, (0, 0)))
    window = ((rows[0], rows[1] + extra), (0, 0))
    return lax.conv_general_dilated(x, g, (1, 1), window, dimension_numbers=_GRADIENT_DIMS)


def _shifts(x: jax.Array, size: Sequence[int], pads: Pads) -> list[jax.Array]:
    """Maps of one channel that a kernel's taps see, row by row: h * w arrays [N, H', W', 1]."""
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    height, width = x.shape[1] - size[0] + 1, x.shape[2] - size[1] + 1
    return [x[:, i : i + height, j : j + width] for i in range(size[0]) for j in range(size[1])]


def _conv_one(x: jax.Array, kernel: jax.Array, pads: Pads) -> jax.Array:
    """Convolution of one channel as a sum of scaled shifts, which XLA fuses into one loop."""
    taps = kernel.reshape(-1, kernel.shape[-1])
    shifted = _shifts(x, kernel.shape[:2], pads)
    total = shifted[0] * taps[0]
    for shift, tap in zip(shifted[1:], taps[1:], strict=True):
        total += shift * tap
    return total


def _gradient_one(x: jax.Array, g: jax.Array, size: Sequence[int], pads: Pads) -> jax.Array:
    """Weight gradient [h, w, 1, F] for one channel as one matrix product."""
    columns = jnp.concatenate(_shifts(x, size, pads), -1)
    dw = lax.dot_general(columns, g, (((0, 1, 2), (0, 1, 2)), ((), ())))
    return dw.reshape(*size, 1, g.shape[-1])


def explicit_pads(padding: str | int, size: Sequence[int], kernel: int, stride: int) -> Pads:
    """Padding as pairs: "valid", "same" (as TensorFlow: the odd pixel last) or a number."""
    if isinstance(padding, int):
        return ((padding, padding), (padding, padding))
    pairs = lax.padtype_to_pads(size, (kernel, kernel), (stride, stride), padding.upper())
    (top, bottom), (left, right) = pairs
    return ((int(top), int(bottom)), (int(left), int(right)))


def _tiles(x: jax.Array, window: int) -> jax.Array:
    """[N, H, W, C] -> [N, H // w, w, W // w, w, C]; pixels of partial windows are dropped."""
    n, h, w, c = x.shape
    h, w = h // window, w // window
    return x[:, : h * window, : w * window].reshape(n, h, window, w, window, c)


@jax.custom_jvp
def _largest(tiles: jax.Array) -> jax.Array:
    """Maximum over the axes 2 and 4; equal largest values share the gradient, as in `jnp.max`.

    A compiler that computes `tiles` anew for the gradient may round it in another way and find no
    value equal to the maximum. `jnp.max` would then divide by 0; here such a tile passes nothing.
    """
    return tiles.max((2, 4))


@_largest.defjvp
def _largest_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (tiles,), (tangent,) = primals, tangents
    result = _largest(tiles)
    chosen = (tiles == result[:, :, None, :, None]).astype(tiles.dtype)
    count = jnp.maximum(chosen.sum((2, 4)), 1)
    return result, (tangent * chosen).sum((2, 4)) / count


def max_pool(x: jax.Array, window: int, stride: int | None = None, padding: int = 0) -> jax.Array:
    """Largest value of each window of x [N, H, W, C].

    No partial windows; stride defaults to window. Equal largest values share the gradient where
    windows do not overlap; where they do, the first one gets it.
    """
    stride = stride or window
    if stride == window and not padding:
        return _largest(_tiles(x, window))
    pads = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    return lax.reduce_window(
        x, -jnp.inf, lax.max, (1, window, window, 1), (1, stride, stride, 1), pads
    )


def avg_pool(x: jax.Array, window: int, stride: int | None = None) -> jax.Array:
    """Mean of each window of x [N, H, W, C]; no partial windows; stride defaults to window."""
    stride = stride or window
    if stride == window:
        return _tiles(x, window).mean((2, 4))
    shape, strides = (1, window, window, 1), (1, stride, stride, 1)
    return lax.reduce_window(x, 0.0, lax.add, shape, strides, "VALID") / (window * window)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def to_rows(x: jax.Array, count: int) -> jax.Array:
    """Makes x [...] each of `count` rows: [count, ...].

    The gradient is the sum over the rows. On a CPU XLA takes it along each column of memory, up to
    20 times slower than adding one half of the rows to the other until one is left.
    """
    return jnp.broadcast_to(x, (count, *x.shape))


def _to_rows_forward(x: jax.Array, count: int) -> tuple[jax.Array, None]:
    return to_rows(x, count), None


def _to_rows_backward(count: int, saved: None, g: jax.Array) -> tuple[jax.Array]:
    def plain(g: jax.Array) -> jax.Array:
        return g.sum(0)

    def by_halves(g: jax.Array) -> jax.Array:
        while len(g) > 1:
            half = len(g) // 2
            rest = [g[2 * half :]] if len(g) % 2 else []
            g = jnp.concatenate([g[:half] + g[half : 2 * half], *rest])
        return g[0]

    return (lax.platform_dependent(g, cpu=by_halves, default=plain),)


to_rows.defvjp(_to_rows_forward, _to_rows_backward)


def space_to_depth(x: jax.Array, block: int) -> jax.Array:
    """Move each block x block square of x [N, H, W, C] into channels: [N, H/b, W/b, b*b*C]."""
    n, h, w, c = x.shape
    x = x.reshape(n, h // block, block, w // block, block, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(n, h // block, w // block, block * block * c)
