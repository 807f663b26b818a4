"""FlexMatch against NumPy on fixed logits; its per-image state."""

import fakes
import jax
import jax.numpy as jnp
import numpy as np
from fakes import cross_entropy, make_batch, one_hot, softmax, supervised

from ferjax.algorithms import flexmatch
from ferjax.algorithms.base import Time

IMAGES = 40


def expected_thresholds(latest, tau):
    counts = np.array([(latest == c).sum() for c in range(fakes.C)])
    b = counts / max(counts.max(), (latest == -1).sum(), 1)
    return tau * b / (2 - b)


def test_loss_and_state_over_some_steps():
    method = flexmatch.Algorithm(mu=3, threshold=0.6, lambda_u=2.0)
    extra = method.init_extra(fakes.C, IMAGES)
    latest = np.full(IMAGES, -2)
    rates = []
    for seed in range(5):
        batch, a = make_batch(method, seed=seed, scale=1.5)
        loss, metrics, extra = fakes.loss(method, batch, extra, Time(0, 0.0))
        q = softmax(a["u:weak"])
        guess, confidence = q.argmax(1), q.max(1)
        mask = confidence >= expected_thresholds(latest, 0.6)[guess]
        unlabeled = mask * cross_entropy(a["u:strong"], one_hot(guess))
        np.testing.assert_allclose(loss, supervised(a) + 2 * unlabeled.mean(), rtol=1e-5)
        for row, c, sure in zip(np.asarray(batch.unlabeled.index), guess, confidence, strict=True):
            if sure >= 0.6:
                latest[row] = c
            elif latest[row] == -2:
                latest[row] = -1
        assert np.array_equal(extra["latest"], latest)
        rates.append(fakes.means(metrics)["mask_rate"])
    assert rates[0] == 1 > rates[-1]  # all thresholds start at 0
    # Rows of labelled images, and those beyond the batch, are not among the unused.
    assert (latest[: fakes.N] == -2).all()
    assert (latest == -1).any()


def test_learning_status_warms_up_with_the_unused():
    latest = np.array([-2] * 30 + [-1] * 8 + [0] * 4 + [3])
    status = np.asarray(flexmatch.learning_status(jnp.asarray(latest), fakes.C))
    b0, b3 = 4 / 8, 1 / 8
    expected = [b0 / (2 - b0), 0, 0, b3 / (2 - b3), 0, 0, 0]
    np.testing.assert_allclose(status, expected, rtol=1e-6)
    latest[30:38] = 5  # all used: the most frequent class has the full threshold
    assert flexmatch.learning_status(jnp.asarray(latest), fakes.C)[5] == 1


def test_an_image_twice_in_a_batch_gets_the_later_class():
    latest = jnp.asarray([-2, 3, -2, -1, 2])
    index, news = jnp.asarray([0, 1, 0, 1, 2, 3, 4]), jnp.asarray([5, 4, 6, -1, -1, 1, -1])
    for record in (flexmatch.record, jax.jit(flexmatch.record)):
        assert record(latest, index, news).tolist() == [6, 4, -1, 1, 2]


def test_only_strong_views_learn():
    method = flexmatch.Algorithm(mu=3, threshold=0.8)
    batch, _ = make_batch(method)
    extra = method.init_extra(fakes.C, IMAGES)
    got = fakes.gradients(method, batch, extra, Time(0, 0.0))
    assert np.abs(got["strong"]).max() > 1e-3
    assert np.abs(got["weak"]).max() == 0
