"""Batches are a function of (seed, step)."""

import numpy as np
import pytest

from ferjax.data.batches import BalancedBatches, Batches, steps_per_epoch

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


LABELS = np.repeat([0, 2, 5], [30, 5, 2])  # of MEMBERS


def balanced(size=8, seed=0):
    return BalancedBatches(MEMBERS, LABELS, size, seed, "labeled")


def test_balanced_batches_show_each_class_once_a_round_and_each_image_once_a_pass_of_its_class():
    batches = balanced()
    seen = np.concatenate([batches(s) for s in range(45)])  # 120 rounds of 3 classes
    label_of = dict(zip(MEMBERS.tolist(), LABELS.tolist(), strict=True))
    labels = np.array([label_of[i] for i in seen.tolist()])
    rounds = labels.reshape(-1, 3)
    assert (np.sort(rounds) == [0, 2, 5]).all()
    # Neither every second nor every third image (microbatches) is of some classes only.
    for every in (2, 3):
        for start in range(every):
            assert set(labels[start::every]) == {0, 2, 5}
    assert len({tuple(row) for row in rounds.tolist()}) == 6
    counts = np.bincount(seen, minlength=137)[100:]
    assert counts.tolist() == [4] * 30 + [24] * 5 + [60] * 2
    first = seen[labels == 0]
    assert sorted(first[:30]) == MEMBERS[:30].tolist()
    assert first[:30].tolist() != first[30:60].tolist()


def test_balanced_batches_are_a_function_of_seed_and_step():
    forward, backward = balanced(), balanced()
    expected = [forward(s).tolist() for s in range(20)]
    assert [backward(s).tolist() for s in reversed(range(20))] == expected[::-1]
    assert balanced(seed=1)(0).tolist() != expected[0]
    # The stream is cut into steps: other sizes cut the same stream elsewhere.
    halves = balanced(size=4)
    assert [*halves(0).tolist(), *halves(1).tolist()] == expected[0]
    assert expected[0] == BALANCED_FROZEN


BALANCED_FROZEN = [135, 131, 109, 136, 134, 105, 128, 132]
