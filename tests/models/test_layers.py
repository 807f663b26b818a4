"""Convolution and pooling against plain forms; BatchNorm and dropout against the batch's layout."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from ferjax.models import ops
from ferjax.models.layers import BatchNorm, Conv, Dropout, PReLU

SAME3 = ((1, 1), (1, 1))


def plain_conv(x, kernel, stride, pads):
    dims = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (stride, stride), pads, dimension_numbers=dims)


def numpy_conv(x, kernel, stride, pads):
    x = np.pad(x, ((0, 0), *pads, (0, 0)))
    size = kernel.shape[0]
    height, width = ((side - size) // stride + 1 for side in x.shape[1:3])
    out = np.zeros((x.shape[0], height, width, kernel.shape[-1]))
    for i in range(height):
        for j in range(width):
            patch = x[:, i * stride : i * stride + size, j * stride : j * stride + size]
            out[:, i, j] = np.tensordot(patch, kernel, 3)
    return out


@pytest.mark.parametrize(
    ("side", "channels", "size", "stride", "pads"),
    [
        (12, 5, 3, 1, SAME3),
        (11, 1, 3, 1, SAME3),
        (9, 3, 3, 1, ((0, 0), (0, 0))),
        (7, 1, 5, 1, ((0, 0), (0, 0))),
        (10, 2, 5, 1, ((2, 2), (2, 2))),
        (8, 2, 2, 1, ((0, 1), (0, 1))),
        (4, 3, 3, 1, ((3, 3), (3, 3))),
        (9, 3, 3, 2, SAME3),
        (6, 3, 1, 1, ((0, 0), (0, 0))),
    ],
)
def test_convolution_equals_the_plain_one_with_its_gradients(side, channels, size, stride, pads):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x = jnp.asarray(rng.normal(size=(3, side, side, channels)))
        kernel = jnp.asarray(rng.normal(size=(size, size, channels, 4)))

        def value_and_gradients(conv):
            def loss(x, kernel):
                return jnp.sum(jnp.sin(conv(x, kernel, stride, pads)))

            return jax.jit(jax.value_and_grad(loss, (0, 1)))(x, kernel)

        value, gradients = value_and_gradients(ops.conv2d)
        expected, expected_gradients = value_and_gradients(plain_conv)
        independent = np.sin(numpy_conv(np.asarray(x), np.asarray(kernel), stride, pads)).sum()
        np.testing.assert_allclose(value, independent, rtol=1e-11)
        np.testing.assert_allclose(value, expected, rtol=1e-11)
        for got, want in zip(gradients, expected_gradients, strict=True):
            np.testing.assert_allclose(got, want, atol=1e-11)


@pytest.mark.parametrize("channels", [1, 3])
def test_convolution_under_vmap_over_kernels_and_differentiated_twice(channels):
    rng = np.random.default_rng(1)
    with jax.enable_x64(True):
        x = jnp.asarray(rng.normal(size=(2, 2, 8, 8, channels)))
        kernel = jnp.asarray(rng.normal(size=(2, 3, 3, channels, 3)))

        def slope(conv, x, kernel):
            return jax.grad(lambda x: jnp.sum(jnp.sin(conv(x, kernel, 1, SAME3))))(x)

        def results(conv):
            @jax.jit
            def both(x, kernel):
                first = jax.vmap(partial(slope, conv))(x, kernel)
                inner = partial(slope, conv, x[0])
                return first, jax.grad(lambda k: jnp.sum(jnp.cos(inner(k))))(kernel[0])

            return both(x, kernel)

        for got, want in zip(results(ops.conv2d), results(plain_conv), strict=True):
            np.testing.assert_allclose(got, want, atol=1e-11)


def test_convolution_refuses_forward_mode_loudly():
    x, kernel = jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 2))
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda k: ops.conv2d(x, k, 1, SAME3), (kernel,), (kernel,))


@pytest.mark.parametrize("kind", ["pmap", "shard_map"])
def test_convolution_gradient_over_devices(kind):
    rng = np.random.default_rng(2)
    with jax.enable_x64(True):
        x = jnp.asarray(rng.normal(size=(4, 2, 9, 9, 3)))
        kernel = jnp.asarray(rng.normal(size=(3, 3, 3, 5)))

        def gradient(x, kernel, conv=ops.conv2d):
            return jax.grad(lambda k: jnp.mean(jnp.sin(conv(x, k, 1, SAME3))))(kernel)

        def averaged(x, kernel):
            return lax.pmean(gradient(x, kernel), "d")

        if kind == "pmap":
            got = jax.pmap(averaged, "d", in_axes=(0, None), out_axes=None)(x, kernel)
        else:
            mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
            split, same = PartitionSpec("d"), PartitionSpec()
            mapped = jax.shard_map(
                lambda x, k: averaged(x[0], k),
                mesh=mesh,
                in_specs=(split, same),
                out_specs=same,
                check_vma=False,
            )
            got = jax.jit(mapped)(x, kernel)
        want = jax.jit(partial(gradient, conv=plain_conv))(x.reshape(8, 9, 9, 3), kernel)
        np.testing.assert_allclose(got, want, atol=1e-14)


@pytest.mark.parametrize("kind", ["max", "mean"])
@pytest.mark.parametrize(("window", "stride", "side"), [(2, 2, 12), (5, 5, 11), (3, 2, 11)])
def test_pools_equal_reduce_window_with_gradients(kind, window, stride, side):
    rng = np.random.default_rng(3)
    with jax.enable_x64(True):
        x = jnp.asarray(rng.normal(size=(2, side, side, 3)))

        def reference(x):
            shape, strides = (1, window, window, 1), (1, stride, stride, 1)
            if kind == "max":
                return lax.reduce_window(x, -jnp.inf, lax.max, shape, strides, "VALID")
            return lax.reduce_window(x, 0.0, lax.add, shape, strides, "VALID") / window**2

        pool = ops.max_pool if kind == "max" else ops.avg_pool

        def result(f):
            return jax.jit(lambda x: (f(x), jax.grad(lambda x: jnp.sum(jnp.sin(f(x))))(x)))(x)

        ours = result(lambda x: pool(x, window, stride))
        for got, want in zip(ours, result(reference), strict=True):
            np.testing.assert_allclose(got, want, atol=1e-14)


def test_max_pool_pads_with_what_never_wins():
    x = -jnp.ones((1, 4, 4, 1))
    np.testing.assert_array_equal(ops.max_pool(x, 3, 2, padding=1), -jnp.ones((1, 2, 2, 1)))


def test_space_to_depth_keeps_each_block_in_its_channels():
    x = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    y = ops.space_to_depth(jnp.asarray(x), 2)
    assert y.shape == (2, 2, 3, 12)
    np.testing.assert_array_equal(y[1, 1, 2], x[1, 2:4, 4:6].ravel())


def test_batchnorm_against_numpy_and_its_running_statistics():
    rng = np.random.default_rng(4)
    x = rng.normal(3, 2, (6, 4, 4, 5)).astype(np.float32)
    norm = BatchNorm(momentum=0.75, epsilon=1e-3)
    variables = norm.init(jax.random.key(0), x, False)
    y, updated = norm.apply(variables, x, True, mutable=["batch_stats"])
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    np.testing.assert_allclose(y, (x - mean) / np.sqrt(var + 1e-3), atol=1e-5)
    np.testing.assert_allclose(updated["batch_stats"]["mean"], 0.25 * mean, rtol=1e-5)
    np.testing.assert_allclose(updated["batch_stats"]["var"], 0.75 + 0.25 * var, rtol=1e-5)
    # Without a mutable collection the same output comes out and nothing is recorded.
    np.testing.assert_array_equal(norm.apply(variables, x, True), y)


@pytest.mark.parametrize("devices", [2, 4])
def test_batchnorm_over_devices_equals_one_device(devices):
    rng = np.random.default_rng(5)
    with jax.enable_x64(True):
        x = jnp.asarray(rng.normal(1, 2, (8, 3, 3, 4)))
        single = BatchNorm(dtype=jnp.float64)
        variables = single.init(jax.random.key(0), x, False)

        def loss(variables, x, norm):
            y, updated = norm.apply(variables, x, True, mutable=["batch_stats"])
            return jnp.mean(jnp.sin(y) * (1 + y)), updated["batch_stats"]

        def step(variables, x, norm):
            (value, stats), gradient = jax.value_and_grad(loss, has_aux=True)(variables, x, norm)
            return value, stats, gradient["params"]

        def over_devices(variables, x):
            norm = BatchNorm(axis_name="d", dtype=jnp.float64)
            value, stats, gradient = step(variables, x, norm)
            return lax.pmean(value, "d"), stats, lax.pmean(gradient, "d")

        shards = x.reshape(devices, -1, 3, 3, 4)
        mapped = jax.pmap(over_devices, "d", in_axes=(None, 0), out_axes=None)
        got = jax.tree.leaves(mapped(variables, shards))
        want = jax.tree.leaves(jax.jit(partial(step, norm=single))(variables, x))
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("gaussian", [False, True])
def test_dropout_of_a_row_depends_on_its_key_alone(gaussian):
    drop = Dropout(0.25, gaussian)
    keys = jax.random.split(jax.random.key(0), 6)
    x = jnp.ones((6, 2000))
    whole = drop.apply({}, x, True, keys)
    halves = [drop.apply({}, x[i : i + 3], True, keys[i : i + 3]) for i in (0, 3)]
    np.testing.assert_array_equal(whole, np.concatenate(halves))
    order = np.array([3, 1, 5, 0, 2, 4])
    np.testing.assert_array_equal(drop.apply({}, x, True, keys[order]), whole[order])
    np.testing.assert_allclose(whole.mean(), 1, atol=0.03)
    np.testing.assert_allclose(whole.std(), np.sqrt(0.25 / 0.75), atol=0.03)
    if not gaussian:
        assert set(np.unique(whole)) == {0, np.float32(1 / 0.75)}
    np.testing.assert_array_equal(drop.apply({}, x, False, None), x)
    with pytest.raises(ValueError, match="one typed PRNG key per row"):
        drop.apply({}, x, True, None)


def test_prelu_slopes_one_element_at_a_time():
    x = jnp.asarray([[-2.0, 3.0], [4.0, -5.0]])
    y = PReLU().apply({"params": {"slope": jnp.asarray([0.5, 0.1])}}, x)
    np.testing.assert_allclose(y, [[-1, 3], [4, -0.5]], rtol=1e-6)


def test_convolution_in_bfloat16_has_float32_parameters():
    x = jnp.asarray(np.random.default_rng(6).normal(size=(2, 6, 6, 3)), jnp.float32)
    conv = Conv(4, 3, use_bias=True, dtype=jnp.bfloat16)
    variables = conv.init(jax.random.key(0), x)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    y = conv.apply(variables, x)
    assert y.dtype == jnp.bfloat16
    exact = Conv(4, 3, use_bias=True).apply(variables, x)
    np.testing.assert_allclose(np.float32(y), exact, atol=0.05)


@pytest.mark.parametrize("count", [1, 2, 7, 64])
def test_rows_of_one_array_give_it_the_sum_of_their_gradients(count):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5)), jnp.float32)
    g = np.random.default_rng(1).normal(size=(count, 3, 5)).astype(np.float32)
    rows, back = jax.vjp(jax.jit(lambda x: ops.to_rows(x, count)), x)
    np.testing.assert_array_equal(rows, np.broadcast_to(x, (count, 3, 5)))
    np.testing.assert_allclose(back(g)[0], g.astype(np.float64).sum(0), rtol=1e-5, atol=1e-5)
