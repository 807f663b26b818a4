"""What one step does: EMA, statistics, random numbers, hidden labels."""

import harness
import jax
import numpy as np
import pytest

from ferjax.engine.parallel import Layout, host
from ferjax.engine.step import BoundNet


@pytest.fixture(scope="module")
def one():
    return Layout("pmap", jax.devices()[:1])


@pytest.fixture(scope="module")
def small():
    return harness.Small(harness.make_config(dtype="float32", algorithm={"name": "supervised"}))


def leaves(tree):
    return jax.tree.leaves(tree)


def test_ema_follows_weights_and_statistics(one, small):
    states = [small.init()]
    for _ in range(4):
        states.append(small.run(one, steps=1, state=states[-1])[0])
    ema = {"params": states[0].params, "batch_stats": states[0].batch_stats}
    for t, state in enumerate(states[1:]):
        keep = min(small.config.ema_decay, (1 + t) / (10 + t))
        now = {"params": state.params, "batch_stats": state.batch_stats}
        ema = jax.tree.map(lambda e, x, keep=keep: keep * e + (1 - keep) * x, ema, now)
    for a, b in zip(leaves(ema), leaves(states[-1].ema), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-6)
    assert any(np.abs(a - b).max() > 1e-4 for a, b in zip(leaves(ema), leaves(now), strict=True))


def test_the_net_of_a_loss_is_student_or_average_and_records_what_it_should(small):
    x = np.random.default_rng(3).normal(size=(6, 16, 16, 1)).astype(np.float32)
    model = small.model.clone(axis_name=None)

    def variables(seed):
        return model.init(jax.random.key(seed), x)

    student, ema = variables(0), jax.tree.map(lambda v: v + 0.1, variables(1))

    def output(ema, params):
        net = BoundNet(model, params, student["batch_stats"], ema)
        return net.teacher(x), net

    expected = model.apply(ema, x)
    np.testing.assert_array_equal(output(ema, student["params"])[0], expected)
    assert np.abs(expected - model.apply(student, x)).max() > 1e-3
    by_ema = jax.grad(lambda ema: output(ema, student["params"])[0].sum())(ema)
    assert all((g == 0).all() for g in leaves(by_ema))

    net = output(ema, student["params"])[1]
    keys = jax.random.split(jax.random.key(2), len(x))
    net(x, keys=keys, update=False)
    assert net.batch_stats is student["batch_stats"]
    net(x, keys=keys)
    pairs = zip(leaves(net.batch_stats), leaves(student["batch_stats"]), strict=True)
    assert all((a != b).any() for a, b in pairs)


def test_resumed_steps_are_bit_equal(one, small):
    whole, metrics = small.run(one, steps=6)
    half, first = small.run(one, steps=3)
    rest, second = small.run(one, steps=3, state=half)
    for a, b in zip(leaves(whole), leaves(rest), strict=True):
        assert np.array_equal(a, b)
    joined = np.concatenate([first["loss"][0], second["loss"][0]])
    assert np.array_equal(metrics["loss"][0], joined)


def test_the_seed_decides_the_noise(one, small):
    state = small.init()
    other = state.replace(seed=np.asarray(1, np.uint32))
    losses = [
        float(small.run(one, steps=1, state=s)[1]["loss"][0][0]) for s in (state, state, other)
    ]
    assert losses[0] == losses[1] != losses[2]


def test_learning_rate_and_gradient_norm_are_reported(one, small):
    _, metrics = small.run(one, steps=3)
    rates = metrics["learning_rate"][0]
    rate = small.config.optimizer.learning_rate
    np.testing.assert_allclose(rates[0], rate, rtol=1e-6)
    assert rates[2] < rates[1] < rates[0]
    assert (metrics["grad_norm"][0] > 0).all()


def test_unlabelled_truth_changes_no_weight(one):
    """The engine hands hidden labels over for measurement; training must not depend on them."""
    small = harness.Small(harness.make_config(dtype="float32"))
    call = one.wrap(small.step)
    index = {name: b(0)[None] for name, b in small.batches.items()}
    states = []
    for shift in (0, 1):
        data = harness.make_data()
        hidden = slice(harness.IMAGES // 3, None)
        data["targets"][hidden] = np.roll(data["targets"][hidden], shift, axis=1)
        state, metrics = call(one.replicate(small.init()), index, one.replicate(data))
        states.append(host(state))
    assert float(metrics["mask_rate"][0]) > 0
    for a, b in zip(*(leaves(s) for s in states), strict=True):
        assert np.array_equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("loops", [True, False])
def test_microbatches_change_nothing_without_batch_statistics(one, loops):
    layers = tuple(x for x in harness.LAYERS if x != "bn")
    results = []
    with harness.float64():
        for parts in (1, 4):
            config = harness.make_config(
                microbatches=parts, model={"name": "cnn", "layers": layers}
            )
            results.append(harness.Small(config, loops=loops).run(one, steps=3))
    (plain, metrics), (parted, parted_metrics) = results
    for a, b in zip(leaves(plain), leaves(parted), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-10, atol=1e-13)
    for name, (total, weight) in metrics.items():
        np.testing.assert_allclose(parted_metrics[name][0], total, rtol=1e-10, err_msg=name)
        np.testing.assert_array_equal(parted_metrics[name][1], weight)


def test_microbatches_thread_statistics_from_part_to_part(one):
    """With BatchNorm every part moves the running statistics once."""
    with harness.float64():
        configs = [
            harness.make_config(microbatches=n, algorithm={"name": "supervised"}) for n in (1, 2)
        ]
        plain, parted = (harness.Small(c).run(one, steps=1)[0] for c in configs)
        two = Layout("pmap", jax.devices()[:2])
        halves = harness.Small(configs[1]).run(two, steps=1)[0]
    # The same images are a part's on two devices, each of which has half of it.
    for a, b in zip(leaves(parted), leaves(halves), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-9, atol=1e-12)
    keep = 0.9
    for a, b in zip(leaves(plain.batch_stats), leaves(parted.batch_stats), strict=True):
        assert not np.allclose(a, b)
    means = [jax.tree_util.tree_leaves_with_path(state.batch_stats) for state in (plain, parted)]
    for (path, a), (_, b) in zip(*means, strict=True):
        if "mean" in jax.tree_util.keystr(path):
            # Both parts' means are near the whole batch's; two steps towards it instead of one.
            np.testing.assert_allclose(b, a * (1 - keep**2) / (1 - keep), rtol=0.2, atol=1e-3)


def test_a_step_that_is_not_finite_can_be_skipped(one):
    config = harness.make_config(dtype="float32", algorithm={"name": "supervised"}, on_nan="skip")
    small = harness.Small(config)
    good = small.run(one, steps=1)[0]
    bad = jax.tree.map(np.copy, good)
    bad.params["classifier"]["bias"][:] = np.nan
    state, metrics = small.run(one, steps=1, state=bad)
    assert metrics["skipped"][0] == 1
    assert metrics["loss"] == (0, 0)
    assert state.step == bad.step + 1
    for a, b in zip(leaves(state.replace(step=bad.step)), leaves(bad), strict=True):
        np.testing.assert_array_equal(a, b)
    state, metrics = small.run(one, steps=1, state=good)
    assert metrics["skipped"][0] == 0
    assert not np.array_equal(state.params["classifier"]["bias"], good.params["classifier"]["bias"])
