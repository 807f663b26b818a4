"""ResNet-18, 34, 50 and 101 (He et al. 2016), laid out as torchvision's.

Bottlenecks carry their stride on the 3x3 convolution ("v1.5"). Against torchvision one thing is
added: the stem "cifar", 3x3 with stride 1 and no pooling, which suits 48-pixel faces.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ferjax.config import UserError
from ferjax.models import ops
from ferjax.models.layers import BatchNorm, Conv, Dense, check_ranges, param_dtype, remat_block

# depth -> (blocks of each stage, bottleneck?)
DEPTHS = {
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
    101: ((3, 4, 23, 3), True),
}


class Block(nn.Module):
    """Residual block: conv-BN-ReLU (two 3x3, or 1x1-3x3-1x1) plus shortcut, then ReLU."""

    width: int
    stride: int
    bottleneck: bool
    project: bool
    norm: dict[str, Any]
    zero_init: bool
    dtype: Any

    def setup(self) -> None:
        """Convolutions and norms; `project` puts a strided 1x1 convolution on the shortcut."""
        outer = self.width * (4 if self.bottleneck else 1)
        if self.bottleneck:
            plan = [(self.width, 1, 1), (self.width, 3, self.stride), (outer, 1, 1)]
        else:
            plan = [(self.width, 3, self.stride), (outer, 3, 1)]
        self.convs = [
            Conv(f, size, stride, size // 2, dtype=self.dtype) for f, size, stride in plan
        ]
        last = nn.initializers.zeros if self.zero_init else nn.initializers.ones
        ones = nn.initializers.ones
        self.norms = [
            BatchNorm(**self.norm, scale_init=last if i == len(plan) - 1 else ones)
            for i in range(len(plan))
        ]
        if self.project:
            self.shortcut = Conv(outer, 1, self.stride, 0, dtype=self.dtype)
            self.shortcut_norm = BatchNorm(**self.norm)

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[N, H, W, C] -> [N, H/stride, W/stride, outer]."""
        y = x
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y = norm(conv(nn.relu(y) if i else y), train)
        if self.project:
            x = self.shortcut_norm(self.shortcut(x), train)
        return nn.relu(x + y)


class Model(nn.Module):
    """ResNet classifier of float images [N, H, W, C].

    `zero_init` starts the last BatchNorm scale of every block at 0 (Goyal et al. 2017).
    `bn_momentum` is the share of the running statistics that a step keeps. `remat` computes each
    block again for its gradient instead of keeping its maps: less memory.
    """

    num_classes: int = 7
    axis_name: str | None = None
    dtype: Any = jnp.float32
    depth: int = 18
    stem: str = "imagenet"
    width: int = 64
    bn_momentum: float = 0.9
    bn_epsilon: float = 1e-5
    zero_init: bool = False
    remat: bool = False

    def setup(self) -> None:
        """Stem, four stages, classifier."""
        if self.depth not in DEPTHS:
            raise UserError(f"model.depth {self.depth}: choose one of {sorted(DEPTHS)}")
        if self.stem not in ("imagenet", "cifar"):
            raise UserError(f"model.stem {self.stem!r}: choose imagenet or cifar")
        check_ranges(
            width=(self.width, 1, math.inf),
            bn_momentum=(self.bn_momentum, 0, 1),
            bn_epsilon=(self.bn_epsilon, 1e-12, math.inf),
        )
        norm = {
            "axis_name": self.axis_name,
            "momentum": self.bn_momentum,
            "epsilon": self.bn_epsilon,
            "dtype": self.dtype,
        }
        size, stride = (7, 2) if self.stem == "imagenet" else (3, 1)
        self.stem_conv = Conv(self.width, size, stride, size // 2, dtype=self.dtype)
        self.stem_norm = BatchNorm(**norm)
        counts, bottleneck = DEPTHS[self.depth]
        block = remat_block(Block) if self.remat else Block
        blocks = []
        for stage, count in enumerate(counts):
            for i in range(count):
                first = i == 0
                blocks.append(
                    block(
                        width=self.width * 2**stage,
                        stride=2 if first and stage > 0 else 1,
                        bottleneck=bottleneck,
                        project=first and (stage > 0 or bottleneck),
                        norm=norm,
                        zero_init=self.zero_init,
                        dtype=self.dtype,
                    )
                )
        self.blocks = blocks
        self.classifier = Dense(self.num_classes, dtype=param_dtype(self.dtype))

    def features(
        self, x: jax.Array, train: bool = False, keys: jax.Array | None = None
    ) -> jax.Array:
        """Last feature map [N, h, w, c] of x [N, H, W, C]."""
        x = nn.relu(self.stem_norm(self.stem_conv(x), train))
        if self.stem == "imagenet":
            x = ops.max_pool(x, 3, 2, padding=1)
        for block in self.blocks:
            x = block(x, train)
        return x

    def head(
        self, fmap: jax.Array, train: bool = False, keys: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Feature map [N, h, w, c] -> logits [N, num_classes] and penultimate vector [N, c]."""
        vector = fmap.astype(param_dtype(self.dtype)).mean((1, 2))
        return self.classifier(vector).astype(param_dtype(self.dtype)), vector

    def __call__(
        self, x: jax.Array, train: bool = False, keys: jax.Array | None = None
    ) -> jax.Array:
        """Logits [N, num_classes] of images x [N, H, W, C]; keys are not used (no dropout)."""
        return self.head(self.features(x, train, keys), train, keys)[0]
