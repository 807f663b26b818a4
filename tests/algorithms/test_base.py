"""What the methods share, where numbers are extreme."""

import jax
import jax.numpy as jnp
import numpy as np

from ferjax.algorithms import base


def test_unit_keeps_the_direction_of_tiny_rows_and_has_no_nan_at_zero():
    x = np.array([[3.0, 4.0], [3e-30, -4e-30], [0.0, 0.0], [3e25, 4e25]], np.float32)
    expected = [[0.6, 0.8], [0.6, -0.8], [0, 0], [0.6, 0.8]]
    np.testing.assert_allclose(base.unit(jnp.asarray(x)), expected, rtol=1e-6)
    slope = jax.grad(lambda x: base.unit(x)[:, 0].sum())(jnp.asarray(x))
    assert np.isfinite(slope).all()
    # d (a / |x|) / da = b^2 / |x|^3 and d (a / |x|) / db = -a b / |x|^3
    np.testing.assert_allclose(slope[0], [16 / 125, -12 / 125], rtol=1e-6)


def test_sharpen_is_a_power_without_underflow():
    p = np.array([[0.5, 0.3, 0.2], [0.0, 0.25, 0.75]])
    for temperature in (0.5, 1.0, 2.0):
        power = p ** (1 / temperature)
        expected = power / power.sum(-1, keepdims=True)
        np.testing.assert_allclose(base.sharpen(jnp.asarray(p), temperature), expected, rtol=1e-5)
    even = base.sharpen(jnp.full((1, 7), 1 / 7), 0.01)
    np.testing.assert_allclose(even, np.full((1, 7), 1 / 7), rtol=1e-4)
