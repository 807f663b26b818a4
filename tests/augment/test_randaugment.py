"""What RandAugment draws: every operation alike, arguments over their ranges."""

import jax
import numpy as np
import pytest

from ferjax.augment import randaugment
from ferjax.augment.policies import STRONG, STRONG_USB
from ferjax.augment.randaugment import OPS


@pytest.mark.parametrize("policy", [STRONG, STRONG_USB])
def test_each_operation_is_drawn_alike(policy):
    numbers = jax.random.uniform(jax.random.key(0), (4096, 4 * policy.ops))
    ops = randaugment.draw(numbers, policy.op_p, policy.magnitude)
    count = ops.op.size
    found = np.bincount(np.asarray(ops.op).ravel(), minlength=len(OPS)) / count
    share = policy.op_p / len(OPS)
    wanted = np.full(len(OPS), share)
    wanted[0] += 1 - policy.op_p
    assert np.all(np.abs(found - wanted) < 5 * np.sqrt(wanted * (1 - wanted) / count))
    if policy is STRONG:
        assert set(np.unique(ops.bits)) == {5, 6, 7, 8}
        assert {float(v) for v in np.unique(ops.threshold)} == {
            256 - 256 * k // 10 + 0.0 for k in range(1, 10)
        }
        np.testing.assert_allclose(np.unique(ops.factor), 0.1 + 0.18 * np.arange(1, 10), rtol=1e-6)
        assert sorted({abs(round(float(v))) for v in np.unique(ops.degrees)}) == list(
            range(3, 28, 3)
        )
        assert abs(np.mean(ops.degrees)) < 1
    else:
        assert set(np.unique(ops.bits)) == {4, 5, 6, 7}
        assert 0.05 <= ops.factor.min() < 0.06 < 0.94 < ops.factor.max() <= 0.95
        assert 0 <= ops.threshold.min() < 2 < 254 < ops.threshold.max() <= 256
        assert -30 <= ops.degrees.min() < -29 < 29 < ops.degrees.max() <= 30
    assert -0.3 <= ops.fraction.min() < -0.26 < 0.26 < ops.fraction.max() <= 0.3


TURN = np.deg2rad(20)
COS, SIN = np.cos(TURN), np.sin(TURN)


@pytest.mark.parametrize(
    ("name", "matrix"),
    [
        ("rotate", (COS, -SIN, 0, SIN, COS, 0)),
        ("shear_x", (1, 0.27, 0, 0, 1, 0)),
        ("shear_y", (1, 0, 0, 0.27, 1, 0)),
        ("translate_x", (1, 0, round(0.27 * 40), 0, 1, 0)),
        ("translate_y", (1, 0, 0, 0, 1, round(0.27 * 24))),
        ("solarize", (1, 0, 0, 0, 1, 0)),
    ],
)
def test_each_move_is_the_map_that_pillow_is_given(name, matrix):
    """x, y of a pixel of the result -> where it is taken from, about the middle; 40 x 24 pixels."""
    zero = np.zeros((1, 1), np.float32)
    drawn = randaugment.Drawn(
        op=np.full((1, 1), OPS.index(name)),
        factor=zero,
        bits=zero,
        threshold=zero,
        degrees=zero + 20,
        fraction=zero + np.float32(0.27),
    )
    found = np.ravel(randaugment.move(drawn, 0, 24, 40))
    np.testing.assert_allclose(found, matrix, atol=1e-6)
