"""RandAugment's pool: what is drawn from an image's random numbers, and what each operation does.

The table of operations and their ranges stands in `ferjax/augment/policies.py`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ferjax.augment import geometric, photometric
from ferjax.augment.geometric import Affine, affine

OPS = (
    "identity",
    "autocontrast",
    "equalize",
    "brightness",
    "contrast",
    "colour",
    "sharpness",
    "posterize",
    "solarize",
    "rotate",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
)
MAGNITUDES = ("original", "uniform")
NUMBERS = 4  # random numbers that one slot takes


class Drawn(NamedTuple):
    """What was drawn: arrays [N, slots]. Each operation reads the argument of its own kind."""

    op: jax.Array  # int32, place in OPS; identity where nothing is applied
    factor: jax.Array
    bits: jax.Array
    threshold: jax.Array
    degrees: jax.Array
    fraction: jax.Array  # tangent of a shear, or share of the side of a translation


def index(uniform: jax.Array, count: int) -> jax.Array:
    """Numbers in [0, 1) -> int32 in 0..count-1, each as probable as the others."""
    return jnp.minimum(jnp.floor(uniform * count).astype(jnp.int32), count - 1)


def draw(numbers: jax.Array, op_p: float, magnitude: str) -> Drawn:
    """Reads operation, whether it is applied, magnitude and sign from numbers [N, 4 slots].

    Args:
      numbers: uniform in [0, 1).
      op_p: probability that a slot's operation is applied.
      magnitude: "original" (levels 1..9 and a sign) or "uniform".
    """
    kind, apply, level, sign = (numbers[:, i::NUMBERS] for i in range(NUMBERS))
    op = jnp.where(apply < op_p, index(kind, len(OPS)), OPS.index("identity"))
    if magnitude == "uniform":
        return Drawn(
            op=op,
            factor=0.05 + 0.9 * level,
            bits=4 + index(level, 4),
            threshold=256.0 * level,
            degrees=60.0 * level - 30.0,
            fraction=0.6 * level - 0.3,
        )
    tenths = 1 + index(level, 9)
    sign = jnp.where(sign < 0.5, -1.0, 1.0)
    return Drawn(
        op=op,
        factor=0.1 + 0.18 * tenths,
        bits=8 - 4 * tenths // 10,
        threshold=(256 - 256 * tenths // 10).astype(jnp.float32),
        degrees=sign * 3.0 * tenths,
        fraction=sign * 0.03 * tenths,
    )


def _where(op: jax.Array, name: str, value: jax.Array, other: float) -> jax.Array:
    return jnp.where(op == OPS.index(name), value, other)


def table(counts: jax.Array, drawn: Drawn, slot: int) -> jax.Array:
    """One slot's per-pixel operation: histograms [N, C, 256] -> tables [N, C, 256].

    The identity where the slot's operation is none of these.
    """
    op, factor, bits, threshold = (
        v[:, slot, None, None] for v in (drawn.op, drawn.factor, drawn.bits, drawn.threshold)
    )
    tables = {
        "autocontrast": photometric.autocontrast(counts),
        "equalize": photometric.equalize(counts),
        "brightness": photometric.brightness(factor),
        "contrast": photometric.contrast(photometric.mean_luma(counts), factor),
        "posterize": photometric.posterize(bits),
        "solarize": photometric.solarize(threshold),
    }
    chosen = jnp.broadcast_to(photometric.levels(), counts.shape)
    for name, values in tables.items():
        chosen = jnp.where(op == OPS.index(name), values, chosen)
    return chosen


def enhancement(drawn: Drawn, name: str) -> jax.Array:
    """The product of all factors drawn for an operation, [N]; 1 where it was not drawn."""
    return jnp.prod(_where(drawn.op, name, drawn.factor, 1.0), axis=1)


def move(drawn: Drawn, slot: int, h: int, w: int) -> Affine:
    """One slot's geometric operation on images of h x w pixels, or the identity."""
    op, degrees, fraction = (v[:, slot] for v in (drawn.op, drawn.degrees, drawn.fraction))
    return geometric.rotation(_where(op, "rotate", degrees, 0.0)) @ affine(
        op.shape[0],
        shear_x=_where(op, "shear_x", fraction, 0.0),
        shear_y=_where(op, "shear_y", fraction, 0.0),
        shift_x=_where(op, "translate_x", jnp.round(fraction * w), 0.0),
        shift_y=_where(op, "translate_y", jnp.round(fraction * h), 0.0),
    )
