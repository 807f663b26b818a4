"""Wide ResNet (Zagoruyko and Komodakis 2016) in the form that FixMatch's reference code trains.

Pre-activation blocks with leaky ReLU (slope .1); the first block of the first stage activates
before its shortcut branches off; padding "same" as TensorFlow does it (a strided 3x3 convolution
on an even size pads only the far side, where PyTorch's ports pad both). As in the ports and unlike
the reference, convolutions have no bias: BatchNorm or the next sum makes it redundant.

BatchNorm keeps .999 of its running statistics a step, in TensorFlow's and Flax's terms. That suits
the reference's 2**20 steps: a schedule of a few thousand wants `bn_momentum` .9 to .99, because
after k steps .999**k of the starting values (mean 0, variance 1) are still in.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ferjax.config import UserError
from ferjax.models.layers import (
    BatchNorm,
    Conv,
    Dense,
    Dropout,
    check_ranges,
    kaiming_fan_out,
    param_dtype,
    remat_block,
)


class Block(nn.Module):
    """BN-act-conv-BN-act-conv plus shortcut (a 1x1 convolution where the width changes)."""

    width: int
    stride: int
    project: bool
    activate_before_shortcut: bool
    slope: float
    norm: dict[str, Any]
    dtype: Any

    def setup(self) -> None:
        """Two norms, two 3x3 convolutions, and the shortcut's 1x1 if `project`."""
        self.norm1 = BatchNorm(**self.norm)
        self.conv1 = Conv(self.width, 3, self.stride, dtype=self.dtype)
        self.norm2 = BatchNorm(**self.norm)
        self.conv2 = Conv(self.width, 3, dtype=self.dtype)
        if self.project:
            self.shortcut = Conv(self.width, 1, self.stride, dtype=self.dtype)

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[N, H, W, C] -> [N, ceil(H/stride), ceil(W/stride), width]."""
        y = nn.leaky_relu(self.norm1(x, train), self.slope)
        if self.activate_before_shortcut:
            x = y
        y = nn.leaky_relu(self.norm2(self.conv1(y), train), self.slope)
        y = self.conv2(y)
        return y + (self.shortcut(x) if self.project else x)


class Model(nn.Module):
    """WRN-depth-width classifier of float images [N, H, W, C]; depth = 6 n + 4.

    `remat` computes each block again for its gradient instead of keeping its maps: less memory.
    """

    num_classes: int = 7
    axis_name: str | None = None
    dtype: Any = jnp.float32
    depth: int = 28
    width: int = 2
    dropout: float = 0.0
    slope: float = 0.1
    bn_momentum: float = 0.999
    bn_epsilon: float = 1e-3
    remat: bool = False

    def setup(self) -> None:
        """A 3x3 convolution to 16 channels, three stages, final norm, classifier."""
        if self.depth < 10 or (self.depth - 4) % 6:
            raise UserError(
                f"model.depth {self.depth}: a wide ResNet's depth is 6 n + 4 (16, 28..)"
            )
        check_ranges(
            width=(self.width, 1, math.inf),
            dropout=(self.dropout, 0, 1),
            bn_momentum=(self.bn_momentum, 0, 1),
            bn_epsilon=(self.bn_epsilon, 1e-12, math.inf),
        )
        norm = {
            "axis_name": self.axis_name,
            "momentum": self.bn_momentum,
            "epsilon": self.bn_epsilon,
            "dtype": self.dtype,
        }
        self.stem = Conv(16, 3, dtype=self.dtype, kernel_init=kaiming_fan_out)
        block = remat_block(Block) if self.remat else Block
        blocks, channels = [], 16
        for stage in range(3):
            width = 16 * self.width * 2**stage
            for i in range((self.depth - 4) // 6):
                blocks.append(
                    block(
                        width=width,
                        stride=2 if stage and i == 0 else 1,
                        project=channels != width,
                        activate_before_shortcut=stage == 0 and i == 0,
                        slope=self.slope,
                        norm=norm,
                        dtype=self.dtype,
                    )
                )
                channels = width
        self.blocks = blocks
        self.last_norm = BatchNorm(**norm)
        self.drop = Dropout(self.dropout)
        self.classifier = Dense(
            self.num_classes, nn.initializers.glorot_normal(), dtype=param_dtype(self.dtype)
        )

    def features(
        self, x: jax.Array, train: bool = False, keys: jax.Array | None = None
    ) -> jax.Array:
        """Last feature map [N, h, w, c] of x [N, H, W, C]."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, train)
        return nn.leaky_relu(self.last_norm(x, train), self.slope)

    def head(
        self, fmap: jax.Array, train: bool = False, keys: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Feature map [N, h, w, c] -> logits [N, num_classes] and penultimate vector [N, c]."""
        vector = self.drop(fmap.astype(param_dtype(self.dtype)).mean((1, 2)), train, keys)
        return self.classifier(vector).astype(param_dtype(self.dtype)), vector

    def __call__(
        self, x: jax.Array, train: bool = False, keys: jax.Array | None = None
    ) -> jax.Array:
        """Logits [N, num_classes] of images x [N, H, W, C]; keys [N] are needed by dropout."""
        return self.head(self.features(x, train, keys), train, keys)[0]
