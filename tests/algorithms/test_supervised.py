"""The options of supervised training against NumPy; device count and resume with all of them."""

import fakes
import harness
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fakes import FakeNet

from ferjax.algorithms.base import Batch, Time
from ferjax.algorithms.supervised import Algorithm
from ferjax.config import UserError
from ferjax.data.batches import BalancedBatches
from ferjax.engine.parallel import Layout

COUNTS = (399.5, 43, 409, 721, 483, 317, 496)


@pytest.fixture(scope="module")
def parts():
    part, arrays = fakes.make_part(np.random.default_rng(3), 12, ("weak",), "x", 2.0)
    return Batch(part, None, fakes.one_device, COUNTS), arrays["x:weak"], arrays["x:target"]


def loss(batch, **fields):
    return float(Algorithm(**fields).loss(FakeNet(), batch, {}, Time(0, 0.0))[0])


def test_squared_hinge_is_one_class_against_the_rest(parts):
    batch, logits, target = parts
    margin = np.maximum(0, 1 - (2 * target - 1) * logits)
    expected = (margin**2).sum(1).mean()
    np.testing.assert_allclose(loss(batch, criterion="squared_hinge"), expected, rtol=1e-5)


def test_squared_hinge_of_a_soft_target_is_the_mean_over_its_classes(parts):
    batch, logits, target = parts
    soft = 0.7 * target + 0.3 * np.roll(target, 1, 1)
    expected = [
        np.maximum(0, 1 - (2 * y - 1) * logits) ** 2 for y in (target, np.roll(target, 1, 1))
    ]
    expected = (0.7 * expected[0] + 0.3 * expected[1]).sum(1).mean()
    batch = batch.replace(labeled=batch.labeled.replace(target=jnp.asarray(soft)))
    np.testing.assert_allclose(loss(batch, criterion="squared_hinge"), expected, rtol=1e-5)


@pytest.mark.parametrize("criterion", ["cross_entropy", "squared_hinge"])
def test_balanced_weights_are_inverse_to_the_counts_with_mean_one(parts, criterion):
    batch, logits, target = parts
    counts = np.array(COUNTS)
    weights = counts.sum() / (7 * counts)
    assert np.average(weights, weights=counts) == pytest.approx(1)
    each = fakes.cross_entropy(logits, target)
    if criterion == "squared_hinge":
        each = (np.maximum(0, 1 - (2 * target - 1) * logits) ** 2).sum(1)
    expected = (each * (target @ weights)).mean()
    found = loss(batch, criterion=criterion, weighting="balanced")
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_effective_numbers_lie_between_no_weights_and_balanced_ones(parts):
    batch, logits, target = parts
    counts = np.array(COUNTS)
    beta = 1 - 1 / counts.mean()
    weights = (1 - beta) / (1 - beta**counts)
    weights /= np.average(weights, weights=counts)
    expected = (fakes.cross_entropy(logits, target) * (target @ weights)).mean()
    np.testing.assert_allclose(loss(batch, weighting="effective"), expected, rtol=1e-4)
    assert 1 < weights.max() / weights.min() < counts.max() / counts.min()


def test_a_class_without_labels_spoils_nothing(parts):
    batch, _, target = parts
    present = target.any(0)
    counts = tuple(np.where(present, COUNTS, 0).tolist())
    some = batch.replace(class_counts=(*counts[:3], 0.0, *counts[4:]))
    for fields in ({"weighting": "balanced"}, {"weighting": "effective"}, {"logit_adjustment": 1}):
        assert np.isfinite(loss(some, **fields))


@pytest.mark.parametrize("tau", [1.0, 0.5])
def test_logit_adjustment_adds_the_log_prior_in_the_loss_alone(parts, tau):
    batch, logits, target = parts
    prior = np.array(COUNTS) / sum(COUNTS)
    method = Algorithm(logit_adjustment=tau)
    found, metrics, _ = method.loss(FakeNet(), batch, {}, Time(0, 0.0))
    expected = fakes.cross_entropy(logits + tau * np.log(prior), target).mean()
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    hits = logits.argmax(1) == target.argmax(1)
    assert fakes.means(metrics)["train_accuracy"] == pytest.approx(hits.mean())


def test_mixup_takes_the_place_of_images_and_targets(parts, monkeypatch):
    batch, logits, target = parts
    soft = 0.7 * target + 0.3 * np.roll(target, 1, 0)

    def mix(given, images, targets, keys, alpha):
        assert given is batch
        assert alpha == 0.4
        assert [len(x) for x in (*images, *targets, *keys)] == [12, 12, 12]
        return [0.5 * images[0]], [jnp.asarray(soft)]

    monkeypatch.setattr("ferjax.algorithms.supervised.mixup", mix)
    method = Algorithm(mixup=0.4, label_smoothing=0.1)
    found, metrics, _ = method.loss(FakeNet(), batch, {}, Time(0, 0.0))
    expected = fakes.cross_entropy(0.5 * logits, 0.9 * soft + 0.1 / fakes.C).mean()
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    hits = logits.argmax(1) == target.argmax(1)
    assert fakes.means(metrics)["train_accuracy"] == pytest.approx(hits.mean())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"criterion": "hinge"}, "criterion=hinge: use cross_entropy, squared_hinge"),
        ({"weighting": "inverse"}, "weighting=inverse: use none, balanced, effective"),
        ({"label_smoothing": 1.0}, "label_smoothing=1.0: it must be in"),
        ({"mixup": -1.0}, "mixup=-1.0: it must not be negative"),
        ({"logit_adjustment": -1.0}, "logit_adjustment=-1.0: it must not be negative"),
        ({"logit_adjustment": 1.0, "criterion": "squared_hinge"}, "needs criterion=cross_entropy"),
    ],
)
def test_wrong_options(fields, message):
    with pytest.raises(UserError, match=message):
        Algorithm(**fields)


def leaves(tree):
    return jax.tree.leaves(tree)


def test_all_options_resume_and_do_not_depend_on_the_devices():
    """Weights, smoothing, flips that alternate, balanced batches; test_mixmatch.py has mixup."""
    algorithm = {
        "name": "supervised", "label_smoothing": 0.1, "weighting": "effective"
    }  # fmt: skip
    with harness.float64():
        config = harness.make_config(
            algorithm=algorithm,
            model={"name": "cnn", "layers": ("conv 4 3 4 nobias", "bn", "relu", "gap")},
            views={"weak": {"policy": "none", "flip": 0.5, "flip_style": "alternate"}},
        )
        small = harness.Small(config, steps=6, class_counts=COUNTS)
        members = np.arange(harness.IMAGES // 3)
        labels = harness.make_data()["targets"][members].argmax(1)
        batches = BalancedBatches(members, labels, config.batch_size, config.seed, "labeled")
        small.batches["labeled"] = batches
        one, two = (Layout("pmap", jax.devices()[:n]) for n in (1, 2))
        whole, _ = small.run(one, steps=4)
        half, _ = small.run(one, steps=2)
        rest, _ = small.run(one, steps=2, state=half)
        both, _ = small.run(two, steps=4)
    for a, b, c in zip(leaves(whole), leaves(rest), leaves(both), strict=True):
        assert np.array_equal(a, b)
        np.testing.assert_allclose(c, a, rtol=1e-8, atol=1e-11)
