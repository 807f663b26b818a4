"""What every method owes the engine: it trains, resumes bit-exactly, and whatever the number of
devices, all in float64; and hidden labels stay hidden."""

import fakes
import harness
import jax
import numpy as np
import pytest

from ferjax.algorithms.base import Time
from ferjax.config import find
from ferjax.engine.parallel import Layout

# Small batches, low thresholds, and no slow start, so that every term acts in the first steps.
METHODS = {
    "pseudo_label": {"threshold": 0.15, "warmup": 0.0},
    "entropy_min": {},
    "pi_model": {"warmup": 0.0},
    "mean_teacher": {"warmup": 0.0},
    "uda": {"threshold": 0.15, "tsa": "linear", "mu": 1},
    "vat": {"warmup": 0.0},
    "flexmatch": {"threshold": 0.15, "mu": 1},
    "freematch": {"decay": 0.9, "mu": 1},
    "softmatch": {"decay": 0.9, "mu": 1, "alignment": "labeled"},
    "mixmatch": {"warmup": 0.0},
    "adamatch": {"decay": 0.9, "mu": 1},
    "remixmatch": {"decay": 0.9, "strong_views": 1, "warmup": 0.0},
    "ada_cm": {"floor": 0.16, "epochs": 10},
}
# Those with statistics, state, partners or negatives from all devices.
ACROSS = ("uda", "vat", "flexmatch", "freematch", "softmatch", "mixmatch", "adamatch")
ACROSS = (*ACROSS, "remixmatch", "ada_cm")


def small(name):
    return harness.Small(
        harness.make_config(
            algorithm={"name": name, **METHODS[name]},
            model={"name": "cnn", "layers": ("conv 4 3 4 nobias", "bn", "relu", "gap")},
            # Views that compile fast; the weak one is random too.
            views={
                "weak": {"policy": "none", "flip": 0.5},
                "strong": {"policy": "none", "flip": 0.5, "cutout": 0.5},
            },
        ),
        steps=6,
    )


def leaves(tree):
    return jax.tree.leaves(tree)


def layout(count):
    return Layout("pmap", jax.devices()[:count])


@pytest.mark.parametrize("name", METHODS)
def test_trains_resumes_and_is_the_same_on_two_devices(name):
    with harness.float64():
        run = small(name)
        start = run.init()
        whole, metrics = run.run(layout(1), steps=4)
        half, _ = run.run(layout(1), steps=2)
        rest, _ = run.run(layout(1), steps=2, state=half)
        two = run.run(layout(2), steps=4)[0] if name in ACROSS else None
    for a, b, c in zip(leaves(start), leaves(whole), leaves(rest), strict=True):
        assert np.array_equal(b, c)
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert np.isfinite(b).all()
    pairs = zip(leaves(start.params), leaves(whole.params), strict=True)
    moved = [np.abs(a - b).max() for a, b in pairs]
    assert min(moved) > 1e-6  # every parameter learns, the extra heads' too
    unlabeled, weight = metrics["loss_unlabeled"]
    assert (np.abs(unlabeled / weight) > 1e-7).all()
    if leaves(start.extra):
        pairs = zip(leaves(start.extra), leaves(whole.extra), strict=True)
        changed = [not np.array_equal(a, b) for a, b in pairs]
        assert all(changed) or name == "ada_cm"  # its margins may still be at their floor
    if two is not None:
        for a, b in zip(leaves(whole), leaves(two), strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("name", METHODS)
def test_hidden_labels_change_neither_loss_nor_state(name):
    method = find("algorithms", name)(**METHODS[name])
    batch, _ = fakes.make_batch(method)
    lied_to = batch.replace(
        unlabeled=batch.unlabeled.replace(target=np.roll(batch.unlabeled.target, 1, 1))
    )
    extra = method.init_extra(fakes.C, 40)
    results = [fakes.loss(method, b, extra, Time(1, 0.4)) for b in (batch, lied_to)]
    (loss, _, state), (other_loss, _, other_state) = results
    assert float(loss) == float(other_loss)
    for a, b in zip(leaves(state), leaves(other_state), strict=True):
        assert np.array_equal(a, b)
