"""The step trains the same model whatever the number of devices and however they are driven."""

import types

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ferjax.config import UserError
from ferjax.engine.parallel import Layout, Polls

CASES = [("pmap", 1), ("pmap", 2), ("pmap", 4), ("shard_map", 4)]


@pytest.fixture(scope="module")
def runs():
    with harness.float64():
        small = harness.Small(harness.make_config())
        return {
            case: small.run(Layout(case[0], jax.devices()[: case[1]]))  # 20 steps
            for case in CASES
        }


@pytest.mark.parametrize("case", CASES[1:])
def test_same_losses_and_state_on_any_devices(runs, case):
    state, metrics = runs["pmap", 1]
    other_state, other_metrics = runs[case]
    assert metrics["loss"][0].dtype == np.float64
    assert len(metrics["loss"][0]) == harness.STEPS
    assert np.ptp(metrics["loss"][0]) > 0.1  # it does train
    for name, (total, weight) in metrics.items():
        with np.errstate(invalid="ignore"):
            expected, found = total / weight, np.divide(*other_metrics[name])
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12, err_msg=name)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(other_state), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-8, atol=1e-11)


def test_steps_in_one_call_equal_steps_in_many(runs):
    with harness.float64():
        small = harness.Small(harness.make_config())
        state, metrics = small.run(Layout("pmap", jax.devices()[:2]), steps=4, per_call=4)
    expected = runs["pmap", 2][1]["loss"][0][:4]
    np.testing.assert_allclose(metrics["loss"][0], expected, rtol=1e-10)
    assert state.step == 4


@pytest.mark.parametrize("kind", ["pmap", "shard_map"])
def test_gradient_equals_a_single_device_reference(kind):
    """One plain SGD step on 4 devices moves the weights by the gradient of a global-batch loss
    written without axes, keys by position, or the engine."""
    config = harness.make_config(
        algorithm={"name": "supervised"},
        model={"name": "cnn", "layers": harness.LAYERS[:-1]},
        views={"weak": {"policy": "none"}},
        optimizer={
            "learning_rate": 1.0,
            "schedule": "constant",
            "momentum": 0.0,
            "weight_decay": 0.0,
        },
    )
    with harness.float64():
        small = harness.Small(config)
        before = small.init()
        after, _ = small.run(Layout(kind, jax.devices()[:4]), steps=1)
        data, rows = harness.make_data(), small.index(0, 1)["labeled"][0]
        images = (data["images"][rows] / 255.0 - config.data.mean[0]) / config.data.std[0]
        alone = small.model.clone(axis_name=None)

        def loss(params):
            variables = {"params": params, "batch_stats": before.batch_stats}
            logits, _ = alone.apply(variables, jnp.asarray(images), True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy(logits, data["targets"][rows]).mean()

        grads = jax.grad(loss)(before.params)
        assert optax.global_norm(grads) > 0.1
    moved = jax.tree.map(lambda a, b: a - b, before.params, after.params)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(moved), strict=True):
        # The view is float32: the images agree to its precision only.
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-6)


def test_processes_with_unlike_numbers_of_devices_are_refused():
    devices = [types.SimpleNamespace(process_index=p, platform="cpu") for p in (0, 0, 1)]
    with pytest.raises(UserError, match="2 of process 0, 1 of process 1: give each"):
        Layout("pmap", devices)


def test_batch_that_devices_do_not_divide():
    with pytest.raises(UserError, match="not divisible by the 4 devices: use 8 or 12"):
        Layout("pmap").check_batch(10)
    with pytest.raises(UserError, match=r"use 4$"):
        Layout("pmap").check_batch(3)
    Layout("pmap").check_batch(8)


def test_a_flag_that_was_acted_on_is_not_acted_on_again():
    polls = Polls(types.SimpleNamespace(processes=2))
    saved, stopped = [], []
    for call in range(20):
        wishes = np.array([call == 12, call >= 5 and not saved], np.int32)
        stop, due = polls.agree(wishes, wishes)
        if due:
            saved.append(call)
            polls.forget(1)
        if stop:
            stopped.append(call)
    assert saved == [7]
    assert stopped == [14]
