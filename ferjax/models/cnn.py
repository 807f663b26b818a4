"""Plain convolutional networks, written down layer by layer in a config.

A network is a tuple of entries, each a word and its numbers:

    conv FILTERS SIZE [same|valid] [nobias] [STRIDE]      bn
    relu   prelu   leaky_relu SLOPE                       pad PIXELS   space_to_depth BLOCK
    maxpool SIZE [STRIDE]   avgpool SIZE [STRIDE]         gap   flatten
    dense UNITS   dropout RATE   gaussian_dropout RATE

Convolutions are "same" with a bias and stride 1 unless said otherwise; pools take no partial
windows and their stride is their size; `gap` is the mean over the map. The final dense layer to the
classes is implied. Everything before `gap` or `flatten` is `features`, the rest is `head`.
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ferjax.config import UserError
from ferjax.models import ops
from ferjax.models.layers import BatchNorm, Conv, Dense, Dropout, PReLU, check_ranges, param_dtype

# The seed's CNN, "Final cnn architecture for fully supervised learning" in its slides: 4,829,319
# numbers for 48x48x1 images and 7 classes, 64 of them BatchNorm statistics.
SEED = (
    "conv 32 3 valid",
    "bn",
    "prelu",
    "pad 2",
    "conv 64 3 valid",
    "prelu",
    "maxpool 5",
    "pad 2",
    "conv 128 3 valid",
    "prelu",
    "pad 2",
    "conv 128 3 valid",
    "prelu",
    "pad 2",
    "avgpool 3",
    "flatten",
    "dense 1024",
    "prelu",
    "dropout 0.25",
    "dense 1024",
    "prelu",
    "dropout 0.25",
)

# For two CPU cores: no map larger than 24x24 (with the first convolution at 48x48 and a pool after
# it a training step took 1.4 times as long), most products at 12x12 and 6x6. 288,647 parameters
# for 48x48x1 images.
_NORM = ("bn", "relu")


def _stages(width: int) -> tuple[str, ...]:
    """Three stages of two convolutions, at 24x24, 12x12 and 6x6 for images of 48 pixels."""
    return (
        "space_to_depth 2",
        *(f"conv {width} 3 nobias", *_NORM) * 2,
        "maxpool 2",
        *(f"conv {2 * width} 3 nobias", *_NORM) * 2,
        "maxpool 2",
        *(f"conv {4 * width} 3 nobias", *_NORM) * 2,
        "gap",
    )


SMALL = _stages(32)
# Twice as wide: 1,148,679 parameters, 4 times the work of a step.
MEDIUM = (*_stages(64), "dropout 0.3")

PRESETS = {"seed": SEED, "small": SMALL, "medium": MEDIUM}

# word -> (fewest numbers, most numbers, flags it takes)
GRAMMAR: dict[str, tuple[int, int, frozenset[str]]] = {
    "conv": (2, 3, frozenset({"same", "valid", "nobias"})),
    "bn": (0, 0, frozenset()),
    "relu": (0, 0, frozenset()),
    "leaky_relu": (1, 1, frozenset()),
    "prelu": (0, 0, frozenset()),
    "pad": (1, 1, frozenset()),
    "space_to_depth": (1, 1, frozenset()),
    "maxpool": (1, 2, frozenset()),
    "avgpool": (1, 2, frozenset()),
    "gap": (0, 0, frozenset()),
    "flatten": (0, 0, frozenset()),
    "dense": (1, 1, frozenset()),
    "dropout": (1, 1, frozenset()),
    "gaussian_dropout": (1, 1, frozenset()),
}
REAL = frozenset({"leaky_relu", "dropout", "gaussian_dropout"})  # their number may have a fraction
TO_VECTOR = frozenset({"gap", "flatten"})
ON_MAPS = frozenset({"conv", "pad", "space_to_depth", "maxpool", "avgpool"})

POOLS: dict[str, Callable[..., jax.Array]] = {
    "maxpool": ops.max_pool,
    "avgpool": ops.avg_pool,
    "space_to_depth": ops.space_to_depth,
}

Entry = tuple[str, tuple[float, ...], frozenset[str]]


def parse(layers: tuple[str, ...]) -> tuple[Entry, ...]:
    """Entries as (word, numbers, flags); UserError names the first one that makes no sense."""
    entries = tuple(_parse_entry(i, text) for i, text in enumerate(layers))
    words = [word for word, _, _ in entries]
    splits = [i for i, word in enumerate(words) if word in TO_VECTOR]
    if len(splits) != 1:
        raise UserError(
            f"model.layers: {len(splits)} entries are gap or flatten, exactly one is needed"
        )
    for i, word in enumerate(words):
        if (word in ON_MAPS and i > splits[0]) or (word == "dense" and i < splits[0]):
            side = "before" if word in ON_MAPS else "after"
            raise UserError(
                f"model.layers[{i}] {layers[i]!r}: {word} belongs {side} {words[splits[0]]}"
            )
    return entries


def _parse_entry(i: int, text: str) -> Entry:
    where = f"model.layers[{i}] {text!r}"
    word, *rest = str(text).split() or [""]
    if word not in GRAMMAR:
        raise UserError(f"{where}: unknown word {word!r}; known: {', '.join(GRAMMAR)}")
    fewest, most, known_flags = GRAMMAR[word]
    flags = frozenset(item for item in rest if item in known_flags)
    numbers = []
    for item in rest:
        if item in flags:
            continue
        try:
            numbers.append(float(item) if word in REAL else int(item))
        except ValueError:
            takes = f"a number or one of {', '.join(sorted(known_flags))}"
            raise UserError(
                f"{where}: {item!r} is not {takes if known_flags else 'a number'}"
            ) from None
    if not fewest <= len(numbers) <= most:
        count = f"{fewest}" if fewest == most else f"{fewest} to {most}"
        raise UserError(f"{where}: {word} takes {count} numbers, not {len(numbers)}")
    low = 0 if word in REAL or word == "pad" else 1
    fits = all(low <= n < math.inf for n in numbers)  # a NaN is neither
    if not fits or ("dropout" in word and numbers[0] >= 1):
        raise UserError(f"{where}: {numbers} is out of range")
    if {"same", "valid"} <= flags:
        raise UserError(f"{where}: same and valid exclude each other")
    return word, tuple(numbers), flags


def _map_size(word: str, numbers: tuple[int, ...], flags: frozenset[str], size: int) -> int:
    """Height or width of the map that an entry makes of one of `size` pixels."""
    if word == "pad":
        return size + 2 * numbers[0]
    if word == "space_to_depth":
        return 0 if size % numbers[0] else size // numbers[0]
    if word == "conv" and "valid" not in flags:
        return -(-size // (numbers[2] if len(numbers) > 2 else 1))
    if word == "conv":
        window, stride = numbers[1], numbers[2] if len(numbers) > 2 else 1
    else:
        window, stride = numbers[0], numbers[-1]
    return (size - window) // stride + 1


class Model(nn.Module):
    """The network that `layers` describes, or where that is empty the preset small, medium or seed.

    `bn_momentum` is the share of the running statistics that a step keeps.
    """

    num_classes: int = 7
    axis_name: str | None = None
    dtype: Any = jnp.float32
    preset: str = "small"
    layers: tuple[str, ...] = ()
    bn_momentum: float = 0.9
    bn_epsilon: float = 1e-3

    def setup(self) -> None:
        """One submodule for each entry that has parameters or noise, named by its place."""
        if not self.layers and self.preset not in PRESETS:
            raise UserError(f"model.preset {self.preset!r}: choose one of {', '.join(PRESETS)}")
        check_ranges(
            bn_momentum=(self.bn_momentum, 0, 1),
            bn_epsilon=(self.bn_epsilon, 1e-12, math.inf),
        )
        self.texts = tuple(self.layers) or PRESETS[self.preset]
        self.entries = parse(self.texts)
        self.names = tuple(f"{entry[0]}_{i}" for i, entry in enumerate(self.entries))
        for name, entry in zip(self.names, self.entries, strict=True):
            setattr(self, name, self._part(*entry))
        self.split = next(i for i, e in enumerate(self.entries) if e[0] in TO_VECTOR)
        self.classifier = Dense(
            self.num_classes, nn.initializers.glorot_uniform(), dtype=param_dtype(self.dtype)
        )

    def _part(
        self, word: str, numbers: tuple[float, ...], flags: frozenset[str]
    ) -> nn.Module | None:
        if word == "conv":
            features, size, stride = (*map(int, numbers), 1)[:3]
            padding = "valid" if "valid" in flags else "same"
            bias = "nobias" not in flags
            return Conv(features, size, stride, padding, use_bias=bias, dtype=self.dtype)
        if word == "dense":
            init = nn.initializers.glorot_uniform()
            return Dense(int(numbers[0]), init, dtype=self.dtype)
        if word == "bn":
            return BatchNorm(self.axis_name, self.bn_momentum, self.bn_epsilon, dtype=self.dtype)
        if word == "prelu":
            return PReLU(dtype=self.dtype)
        if "dropout" in word:
            return Dropout(numbers[0], gaussian=word == "gaussian_dropout")
        return None

    def _apply(self, i: int, x: jax.Array, train: bool, keys: jax.Array | None) -> jax.Array:
        word, numbers, flags = self.entries[i]
        part = getattr(self, self.names[i])
        if word in ON_MAPS:
            whole = tuple(int(n) for n in numbers)
            if min(_map_size(word, whole, flags, side) for side in x.shape[1:3]) < 1:
                raise UserError(
                    f"model.layers[{i}] {self.texts[i]!r}: does not fit a map of "
                    f"{x.shape[1]}x{x.shape[2]} pixels"
                )
            if word == "pad":
                pads = (whole[0], whole[0])
                return jnp.pad(x, ((0, 0), pads, pads, (0, 0)))
            if word != "conv":
                return POOLS[word](x, *whole)
        if isinstance(part, BatchNorm):
            return part(x, train)
        if isinstance(part, Dropout):
            return part(x, train, keys)
        if part is not None:
            return part(x)
        if word == "gap":
            return x.mean((1, 2), dtype=param_dtype(self.dtype))
        if word == "flatten":
            return x.reshape(x.shape[0], -1)
        return nn.leaky_relu(x, numbers[0]) if word == "leaky_relu" else nn.relu(x)

    def features(
        self, x: jax.Array, train: bool = False, keys: jax.Array | None = None
    ) -> jax.Array:
        """Last feature map [N, h, w, c] of x [N, H, W, C]: all entries before gap or flatten."""
        for i in range(self.split):
            x = self._apply(i, x, train, keys)
        return x

    def head(
        self, fmap: jax.Array, train: bool = False, keys: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Feature map [N, h, w, c] -> logits [N, num_classes] and the last dense layer's input."""
        for i in range(self.split, len(self.entries)):
            fmap = self._apply(i, fmap, train, keys)
        return self.classifier(fmap).astype(param_dtype(self.dtype)), fmap

    def __call__(
        self, x: jax.Array, train: bool = False, keys: jax.Array | None = None
    ) -> jax.Array:
        """Logits [N, num_classes] of images x [N, H, W, C]; keys [N] are needed by dropout."""
        return self.head(self.features(x, train, keys), train, keys)[0]
