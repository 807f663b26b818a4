"""The decoder of a ladder network (arXiv:1507.02672): from the top of a network down to its image.

It undoes what lies between two rungs of ladder.py, the last layer first: a convolution by a
transposed one, after upsampling where it has a stride (the reference puts zeros between the
pixels); a dense layer by a dense layer; pools and gap by repeating pixels; padding by cutting.
Activations are skipped. Transposed convolutions are written as convolutions of stride 1 with
kernels of their own, which a CPU computes fast (ops.py).
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from ferjax.models import cnn
from ferjax.models.layers import Conv, Dense, batch_moments, param_dtype

DENOISE = ("vanilla", "gaussian", "seed", "none")

Shape = tuple[int, ...]


class Decoder(nn.Module):
    """From the noisy softmax down to rung `lowest`.

    u_L = BN(softmax), u_l = BN(V z^_{l+1}), z^_l = g(z~_l, u_l); these BN have no parameters.

    Attributes:
      ways: for each rung but the top, what lies between it and the next one.
      rungs: the names.
    """

    ways: tuple[tuple[cnn.Entry, ...], ...]
    rungs: tuple[str, ...]
    lowest: int
    sigma: float
    denoise: str
    axis_name: str | None
    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, noisy: list[jax.Array], logits: jax.Array) -> dict[str, jax.Array]:
        """z~ of all rungs and the noisy logits -> z^ of the rungs from `lowest` up, by name."""
        axis_name = None if self.is_initializing() else self.axis_name
        made: dict[str, jax.Array] = {}
        u = nn.softmax(logits)
        for i in range(len(self.rungs) - 1, self.lowest - 1, -1):
            name = self.rungs[i]
            if made:
                u = self._down(u, self.ways[i], noisy[i].shape[1:], name)
            u = standardise(u.astype(param_dtype(self.dtype)), axis_name, self.epsilon)[0]
            u = made[name] = Combinator(self.denoise, self.sigma, name=f"g_{name}")(noisy[i], u)
        return made

    def _down(self, u: jax.Array, way: tuple[cnn.Entry, ...], shape: Shape, name: str) -> jax.Array:
        """V: undoes the layers of `way`, which began at rung `name` with maps of `shape`."""
        shapes = [shape]
        for entry in way[:-1]:
            shapes.append(after(entry, shapes[-1]))
        for i in reversed(range(len(way))):
            (word, numbers, flags), (*size, channels) = way[i], shapes[i]
            if word == "conv":
                kernel, stride = int(numbers[1]), int((*numbers, 1)[2])
                padding = kernel - 1 if "valid" in flags else "same"
                part = Conv(channels, kernel, 1, padding, dtype=self.dtype, name=f"v_{name}_{i}")
                u = resize(part(repeat(u, stride)), *size)
            elif word == "dense":
                # The BN that follows takes the bias out again, unless a map lies in between.
                u = Dense(channels, dtype=self.dtype, name=f"v_{name}_{i}")(u)
            elif word == "gap":
                u = jnp.broadcast_to(u[:, None, None], (len(u), *size, channels))
            elif word == "flatten":
                u = u.reshape(len(u), *size, channels)
            elif word == "space_to_depth":
                u = depth_to_space(u, int(numbers[0]))
            elif word in ("maxpool", "avgpool"):
                u = resize(repeat(u, int(numbers[-1])), *size)
            elif word == "pad":
                pixels = int(numbers[0])
                u = u[:, pixels : pixels + size[0], pixels : pixels + size[1]]
        return u


class Combinator(nn.Module):
    """The denoising function z^ = g(z~, u), with parameters for each channel (maps) or unit.

    With m = a1 sig(a2 u + a3) + a4 u + a5 and v = a6 sig(a7 u + a8) + a9 u + a10:

    - vanilla: z^ = (z~ - m) v + m (eq. 2). a2 and a7 start as 1, the others as 0.
    - gaussian: the same with sig(v) for v: as the mean of a Gaussian z given u, seen through
      Gaussian noise, z^ then lies between m and z~.
    - seed: z^ = z~ + sigma u.
    - none: z^ = u, no way across from the noisy encoder.
    """

    kind: str
    sigma: float

    @nn.compact
    def __call__(self, noisy: jax.Array, u: jax.Array) -> jax.Array:
        """z~ and u, both [N, ..., C] -> z^ of the same shape."""
        if self.kind == "none":
            return u
        if self.kind == "seed":
            return noisy + self.sigma * u
        a = self.param("a", combinator_start, (10, u.shape[-1]), u.dtype)
        m = a[0] * nn.sigmoid(a[1] * u + a[2]) + a[3] * u + a[4]
        v = a[5] * nn.sigmoid(a[6] * u + a[7]) + a[8] * u + a[9]
        if self.kind == "gaussian":
            v = nn.sigmoid(v)
        return (noisy - m) * v + m


def combinator_start(key: jax.Array, shape: Shape, dtype: Any) -> jax.Array:
    """a2 = a7 = 1, the others 0: [10, C]."""
    del key
    return jnp.zeros(shape, dtype).at[jnp.array([1, 6])].set(1)


def standardise(
    x: jax.Array, axis_name: str | None, epsilon: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(x - mean) / sqrt(var + epsilon), mean and variance [C] of x [..., C] over all devices."""
    mean, var = batch_moments(x, axis_name)
    return (x - mean) * lax.rsqrt(var + epsilon), mean, var


def repeat(x: jax.Array, times: int) -> jax.Array:
    """Each pixel of [N, H, W, C] becomes a square of times x times."""
    n, h, w, c = x.shape
    wide = jnp.broadcast_to(x[:, :, None, :, None], (n, h, times, w, times, c))
    return wide.reshape(n, h * times, w * times, c)


def resize(x: jax.Array, height: int, width: int) -> jax.Array:
    """Cuts [N, H, W, C] at the bottom and the right, or fills it up with zeros there."""
    x = x[:, :height, :width]
    return jnp.pad(x, ((0, 0), (0, height - x.shape[1]), (0, width - x.shape[2]), (0, 0)))


def depth_to_space(x: jax.Array, block: int) -> jax.Array:
    """The inverse of `ops.space_to_depth`: [N, h, w, b*b*C] -> [N, h*b, w*b, C]."""
    n, h, w, c = x.shape
    x = x.reshape(n, h, w, block, block, c // block**2).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(n, h * block, w * block, c // block**2)


def after(entry: cnn.Entry, shape: Shape) -> Shape:
    """The shape (without N) that a layer makes of another."""
    word, numbers, flags = entry
    if word == "dense":
        return (int(numbers[0]),)
    if word == "gap":
        return shape[-1:]
    if word == "flatten":
        return (math.prod(shape),)
    if word not in cnn.ON_MAPS:
        return shape
    whole = tuple(int(n) for n in numbers)
    if word == "maxpool" and "same" in flags:  # a resnet's; cnn.py has no such pool
        return (*(-(-side // whole[-1]) for side in shape[:2]), shape[2])
    height, width = (cnn._map_size(word, whole, flags, side) for side in shape[:2])
    made = {"conv": whole[0], "space_to_depth": shape[2] * whole[0] ** 2}
    return (height, width, made.get(word, shape[2]))
