"""Layers that the models share; how a batch is laid out over devices changes nothing.

Parameters, BatchNorm statistics and logits have `param_dtype(dtype)`: float32, or float64 where the
compute dtype is float64. Everything else is computed in `dtype`.
"""

import math
import zlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from ferjax.config import UserError
from ferjax.models import ops

Initializer = Callable[..., jax.Array]

# Kaiming He et al. 2015, "Delving deep into rectifiers", with fan-out as in torchvision's ResNet.
kaiming_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
kaiming_fan_in = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


def check_ranges(**fields: tuple[float, float, float]) -> None:
    """Refuses a model's fields, given as name=(value, least, bound), outside [least, bound).

    Raises:
      UserError: names the first one.
    """
    for name, (value, least, bound) in fields.items():
        if not least <= value < bound:
            raise UserError(f"config.model.{name}={value}: it must be in [{least:g}, {bound:g})")


def param_dtype(dtype: Any) -> Any:
    """The dtype of parameters, statistics and logits for a compute dtype: never below float32."""
    return jnp.promote_types(dtype, jnp.float32)


def remat_block(block: type[nn.Module]) -> type[nn.Module]:
    """A block of call (x, train) that is computed again for its gradient (Chen et al. 2016)."""
    return nn.remat(block, static_argnums=(2,))


class Conv(nn.Module):
    """Two-dimensional convolution of [N, H, W, C] with a square kernel -> [N, H', W', features].

    `padding` is "same", "valid" or a number of pixels on every side.
    """

    features: int
    size: int
    stride: int = 1
    padding: str | int = "same"
    use_bias: bool = False
    kernel_init: Initializer = kaiming_fan_out
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, H, W, C] -> [N, H', W', features]."""
        shape = (self.size, self.size, x.shape[-1], self.features)
        stored = param_dtype(self.dtype)
        kernel = self.param("kernel", self.kernel_init, shape, stored)
        pads = ops.explicit_pads(self.padding, x.shape[1:3], self.size, self.stride)
        y = ops.conv2d(x.astype(self.dtype), kernel.astype(self.dtype), self.stride, pads)
        if self.use_bias:
            y += self.param("bias", nn.initializers.zeros, (self.features,), stored).astype(y.dtype)
        return y


class Dense(nn.Module):
    """Affine map of [N, d] -> [N, features]."""

    features: int
    kernel_init: Initializer = nn.initializers.lecun_normal()
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, d] -> [N, features]."""
        stored = param_dtype(self.dtype)
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), stored)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), stored)
        return x.astype(self.dtype) @ kernel.astype(self.dtype) + bias.astype(self.dtype)


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last (Ioffe and Szegedy 2015).

    With train=True the mean and the (biased) variance are those of the whole batch over
    `axis_name`, in at least float32 and with one all-reduce; the running ones move by 1 - momentum
    towards them if the collection `batch_stats` is mutable, and stay untouched otherwise. With
    train=False the running ones are used.
    """

    axis_name: str | None = None
    momentum: float = 0.9
    epsilon: float = 1e-5
    scale_init: Initializer = nn.initializers.ones
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[..., C] -> the same shape."""
        stored, shape = param_dtype(self.dtype), (x.shape[-1],)
        scale = self.param("scale", self.scale_init, shape, stored)
        bias = self.param("bias", nn.initializers.zeros, shape, stored)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, stored)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape, stored)
        if train:
            axis_name = None if self.is_initializing() else self.axis_name
            mean, var = batch_moments(x.astype(stored), axis_name)
            if self.is_mutable_collection("batch_stats") and not self.is_initializing():
                keep = self.momentum
                running_mean.value = keep * running_mean.value + (1 - keep) * mean
                running_var.value = keep * running_var.value + (1 - keep) * var
        else:
            mean, var = running_mean.value, running_var.value
        factor = scale * lax.rsqrt(var + self.epsilon)
        y = (x.astype(stored) - mean) * factor + bias
        return y.astype(self.dtype)


def batch_moments(x: jax.Array, axis_name: str | None) -> tuple[jax.Array, jax.Array]:
    """Mean and variance [C] of x [..., C], over all devices of the axis if one is named."""
    axes = tuple(range(x.ndim - 1))
    moments = jnp.stack([x.mean(axes), (x * x).mean(axes)])
    if axis_name is not None:
        moments = lax.pmean(moments, axis_name)
    mean, square = moments
    # Rounding can push the difference below zero for a constant channel.
    return mean, jnp.maximum(square - mean * mean, 0)


class PReLU(nn.Module):
    """max(x, 0) + slope * min(x, 0); one slope per element of a row, as in Keras, from 0."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, ...] -> the same shape."""
        slope = self.param("slope", nn.initializers.zeros, x.shape[1:], param_dtype(self.dtype))
        rows = ops.to_rows(slope, x.shape[0]).astype(x.dtype)
        return jnp.maximum(x, 0) + rows * jnp.minimum(x, 0)


class Dropout(nn.Module):
    """Dropout (or multiplicative Gaussian noise) drawn from each row's own key.

    `rate` is the share dropped; with `gaussian` every unit is multiplied by N(1, rate / (1 - rate))
    instead (Srivastava et al. 2014, section 10). The row's key is folded with a number made of the
    layer's path, so layers differ and a row's mask depends on nothing but its key.
    """

    rate: float
    gaussian: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, keys: jax.Array | None) -> jax.Array:
        """Drop units of x [N, ...]; keys is a typed key array [N], needed if train and rate > 0."""
        if not train or self.rate == 0:
            return x
        if keys is None:
            raise ValueError("dropout in train mode needs keys: one typed PRNG key per row")
        salt = zlib.crc32("/".join(self.path).encode())
        keep, shape = 1 - self.rate, x.shape[1:]

        def factor(key: jax.Array) -> jax.Array:
            key = jax.random.fold_in(key, salt)
            if self.gaussian:
                noise = jax.random.normal(key, shape, jnp.float32)
                return 1 + math.sqrt(self.rate / keep) * noise
            # A float32 draw whatever the compute dtype: the same units drop in every precision.
            return (jax.random.uniform(key, shape, jnp.float32) < keep) / jnp.float32(keep)

        return x * jax.vmap(factor)(keys).astype(x.dtype)


class Wrapper(nn.Module):
    """A model that a method adds parts to; its features and head are the model's."""

    backbone: nn.Module

    def features(
        self, x: jax.Array, train: bool = False, keys: jax.Array | None = None
    ) -> jax.Array:
        """The model's."""
        return self.backbone.features(x, train, keys)

    def head(
        self, fmap: jax.Array, train: bool = False, keys: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """The model's."""
        return self.backbone.head(fmap, train, keys)
