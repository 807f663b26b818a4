"""Batches are a function of (seed, step)."""

import numpy as np
import pytest

from ferjax.data.batches import Batches, steps_per_epoch

MEMBERS = np.arange(100, 137)


def test_every_image_once_a_pass():
    batches = Batches(MEMBERS, 8, seed=0, stream="labeled")
    seen = np.concatenate([batches(s) for s in range(37)])  # 8 passes over 37 images
    for i in range(8):
        assert sorted(seen[37 * i : 37 * (i + 1)]) == MEMBERS.tolist()
    assert not (seen[:37] == seen[37:74]).all()


def test_any_step_in_any_order():
    forward, backward = (Batches(MEMBERS, 8, seed=5, stream="x") for _ in range(2))
    expected = [forward(s).tolist() for s in range(30)]
    assert [backward(s).tolist() for s in reversed(range(30))] == expected[::-1]


def test_seed_and_stream_give_other_orders():
    orders = [Batches(MEMBERS, 37, s, n)(0).tolist() for s, n in ((0, "a"), (1, "a"), (0, "b"))]
    assert len({tuple(o) for o in orders}) == 3


def test_a_batch_may_be_larger_than_the_set():
    batch = Batches(np.arange(3), 8, 0, "labeled")(4)
    assert np.bincount(batch).tolist() in ([3, 3, 2], [3, 2, 3], [2, 3, 3])


def test_the_order_never_changes():
    """Frozen on purpose: a new NumPy must not change what a seed means."""
    assert Batches(np.arange(10), 10, 0, "labeled")(0).tolist() == FROZEN


FROZEN = [6, 2, 9, 0, 4, 1, 5, 8, 7, 3]


@pytest.mark.parametrize(
    ("args", "steps"),
    [
        ((8612, 20097, 64, 7), 135),
        ((8612, 20097, 64, 1), 315),
        ((64, 0, 64, 0), 1),
        ((65, 9, 64, 7), 2),
    ],
)
def test_steps_per_epoch(args, steps):
    assert steps_per_epoch(*args) == steps
