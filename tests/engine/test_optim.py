"""Schedules and updates against plain NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ferjax import config as configs
from ferjax.engine.optim import dense_kernels, kernels, make_optimizer, make_schedule


def section(**changes):
    c = configs.base().optimizer
    c.update(changes)
    return c


@pytest.mark.parametrize("schedule", ["cosine", "cosine_7_16", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 2.0])
def test_schedules(schedule, warmup):
    steps, per_epoch, rate = 100, 10, 0.4
    f = make_schedule(
        section(schedule=schedule, warmup_epochs=warmup, learning_rate=rate), steps, per_epoch
    )
    w = int(warmup * per_epoch)
    for k in (0, 5, w, 37, 99):
        if k < w:
            expected = rate * k / w
        else:
            x = (k - w) / (steps - w)
            expected = (
                rate
                * {
                    "cosine": 0.5 * (1 + math.cos(math.pi * x)),
                    "cosine_7_16": math.cos(7 * math.pi / 16 * x),
                    "constant": 1.0,
                }[schedule]
            )
        np.testing.assert_allclose(f(k), expected, rtol=1e-5, atol=1e-7 * rate)


PARAMS = {"a": {"kernel": jnp.array([1.0, -2.0]), "bias": jnp.array([3.0])}}
GRADS = {"a": {"kernel": jnp.array([0.5, 0.25]), "bias": jnp.array([-1.0])}}


def run(config, steps=3):
    optimizer = make_optimizer(config, lambda _: 0.1)
    state, params = optimizer.init(PARAMS), PARAMS
    for _ in range(steps):
        updates, state = optimizer.update(GRADS, state, params)
        params = jax.tree.map(lambda p, u: p + u, params, updates)
    return params["a"]


def test_sgd_nesterov_with_decay_on_kernels_only():
    found = run(section(weight_decay=0.01))
    for name, decay in (("kernel", 0.01), ("bias", 0.0)):
        w, v = np.array(PARAMS["a"][name], float), 0.0
        for _ in range(3):
            g = np.array(GRADS["a"][name]) + decay * w
            v = 0.9 * v + g
            w = w - 0.1 * (g + 0.9 * v)
        np.testing.assert_allclose(found[name], w, rtol=1e-5)


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adam_couples_and_adamw_decouples_decay(name):
    found = run(section(name=name, weight_decay=0.1))
    for leaf, decay in (("kernel", 0.1), ("bias", 0.0)):
        w, m, v = np.array(PARAMS["a"][leaf], float), 0.0, 0.0
        for t in range(1, 4):
            g = np.array(GRADS["a"][leaf]) + (decay * w if name == "adam" else 0)
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            move = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
            w = w - 0.1 * (move + (decay * w if name == "adamw" else 0))
        np.testing.assert_allclose(found[leaf], w, rtol=1e-4)


def test_clipping_is_of_the_whole_gradient():
    config = section(clip_norm=0.1, momentum=0.0, weight_decay=0.0, nesterov=False)
    found = run(config, steps=1)
    norm = math.sqrt(0.5**2 + 0.25**2 + 1)
    np.testing.assert_allclose(found["bias"], 3.0 + 0.1 * 0.1 / norm, rtol=1e-6)


def test_mask_takes_kernels():
    tree = {"conv": {"kernel": 0}, "prelu": {"slope": 0}, "bn": {"scale": 0, "bias": 0}}
    assert kernels(tree) == {
        "conv": {"kernel": True},
        "prelu": {"slope": False},
        "bn": {"scale": False, "bias": False},
    }


def test_decay_of_dense_kernels_alone():
    params = {
        "conv": {"kernel": jnp.ones((3, 3, 1, 2)), "bias": jnp.ones(2)},
        "dense": {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)},
    }
    assert dense_kernels(params) == {
        "conv": {"kernel": False, "bias": False},
        "dense": {"kernel": True, "bias": False},
    }
    config = section(weight_decay=0.5, decayed="dense", momentum=0.0, nesterov=False)
    optimizer = make_optimizer(config, lambda _: 0.1)
    nothing = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(nothing, optimizer.init(params), params)
    np.testing.assert_allclose(updates["dense"]["kernel"], -0.05)
    for module, leaf in (("conv", "kernel"), ("conv", "bias"), ("dense", "bias")):
        assert not updates[module][leaf].any()
