"""Self-training against NumPy; its targets' way from the teacher's file into the checkpoint."""

import logging

import fakes
import harness
import jax
import numpy as np
import pytest
from fakes import C, cross_entropy, make_batch, one_hot, supervised

from ferjax.algorithms import self_training
from ferjax.algorithms.base import Time, TrainingSet
from ferjax.config import UserError
from ferjax.data import soft_labels
from ferjax.engine.parallel import Layout

IMAGES = 40
NAMES = tuple("abcdefg")


def random_targets(n, seed=0):
    return np.random.default_rng(seed).dirichlet(np.full(C, 0.5), n).astype(np.float32)


@pytest.mark.parametrize("hard", [False, True])
def test_loss(hard):
    method = self_training.Algorithm(mu=3, hard=hard, threshold=0.4, weight=2.0, forward="apart")
    batch, a = make_batch(method)
    rows = np.asarray(batch.unlabeled.index)
    targets = random_targets(IMAGES)
    targets[rows[:2]] = 0  # images that the teacher has not seen
    q = targets[rows]
    mask = q.max(1) >= 0.4
    assert 0.2 < mask.mean() < 0.9
    target = one_hot(q.argmax(1)) if hard else q
    unlabeled = mask * cross_entropy(a["u:strong"], target)
    loss, metrics, extra = fakes.loss(method, batch, {"targets": targets}, Time(0, 0.0))
    np.testing.assert_allclose(loss, supervised(a) + 2 * unlabeled.mean(), rtol=1e-5)
    np.testing.assert_array_equal(extra["targets"], targets)
    found = fakes.means(metrics)
    assert found["mask_rate"] == pytest.approx(mask.mean())
    hits = a["u:target"].argmax(1) == q.argmax(1)
    assert found["pseudo_label_accuracy"] == pytest.approx(hits[mask].mean())
    gradient = fakes.gradients(method, batch, {"targets": targets}, Time(0, 0.0))["strong"]
    norms = np.abs(gradient).max((1, 2, 3))
    assert ((norms > 1e-4) == mask).all()


def test_images_without_a_prediction_count_for_nothing():
    method = self_training.Algorithm(mu=3, hard=True)
    batch, a = make_batch(method)
    extra = method.init_extra(C, IMAGES)
    loss, _, _ = fakes.loss(method, batch, extra, Time(0, 0.0))
    np.testing.assert_allclose(loss, supervised(a), rtol=1e-5)


def test_forwards():
    for form, wanted in (("joint", [24]), ("apart", [6, 18])):
        method = self_training.Algorithm(mu=3, forward=form)
        batch, _ = make_batch(method)
        calls = fakes.calls(method, batch, method.init_extra(C, IMAGES))
        assert [n for _, n, _ in calls] == wanted
        assert [update for _, _, update in calls] == [True, False][: len(wanted)]
    with pytest.raises(UserError, match="use joint or apart"):
        self_training.Algorithm(forward="split")


def teacher(tmp_path, **changes):
    rows = np.arange(0, 60, 2, dtype=np.int32)
    values = {"rows": rows, "probabilities": random_targets(30), "class_names": NAMES}
    values |= {"digest": "d", "labeled_rows": rows[:5]}
    path = tmp_path / "teacher" / "eval" / "train_predictions.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    soft_labels.save(soft_labels.SoftLabels(**{**values, **changes}), path)
    return values, self_training.Algorithm(predictions=str(tmp_path / "teacher"))


def student(rows, labeled=6, digest="d", names=NAMES):
    every = np.arange(len(rows), dtype=np.int32)
    return TrainingSet(np.asarray(rows, np.int32), every[:labeled], every, names, digest)


def test_targets_are_found_by_row(tmp_path, caplog):
    values, method = teacher(tmp_path)
    rows = [0, 2, 4, 6, 8, 30, 32, 2**30]  # the last one from elsewhere
    extra = {"targets": np.zeros((len(rows), C), np.float32)}
    with caplog.at_level(logging.WARNING, "ferjax"):
        found = method.read_extra(extra, student(rows))["targets"]
    np.testing.assert_array_equal(found[:-1], values["probabilities"][np.array(rows[:-1]) // 2])
    assert not found[-1].any()
    assert "1 training images have no prediction" in caplog.text
    assert "has learnt from" not in caplog.text
    with caplog.at_level(logging.WARNING, "ferjax"):
        method.read_extra(extra, student(rows, labeled=3))
    assert (
        "has learnt from the labels of 2 images that this run takes for unlabelled" in caplog.text
    )


def test_what_does_not_fit_gets_one_line(tmp_path):
    extra = {"targets": np.zeros((2, C), np.float32)}
    _, method = teacher(tmp_path)
    nowhere = self_training.Algorithm(predictions="runs/nowhere")
    command = "python -m ferjax.evaluate --workdir=runs/nowhere --split=train --keep_predictions"
    for who, of, message in (
        (self_training.Algorithm(), student([0, 2]), "is empty: give the workdir"),
        (nowhere, student([0, 2]), command),
        (self_training.Algorithm("x/y.npz"), student([0, 2]), "evaluate --keep_predictions writes"),
        (method, student([0, 2], digest="e"), "of other images"),
        (method, student([0, 2], names=NAMES[::-1]), "the classes are a, b"),
        (method, student([2**30, 2**30 + 1]), "none of the images that this run uses without"),
    ):
        with pytest.raises(UserError, match=message) as error:
            who.read_extra(extra, of)
        assert str(error.value).startswith("config.algorithm.predictions=")


def test_one_and_four_devices():
    with harness.float64():
        config = harness.make_config(
            algorithm={"name": "self_training", "mu": 2},
            model={"name": "cnn", "layers": ("conv 4 3 4 nobias", "bn", "relu", "gap")},
            views={"weak": {"policy": "none"}, "strong": {"policy": "none", "cutout": 0.5}},
        )
        run = harness.Small(config)
        start = run.init()
        start = start.replace(extra={"targets": random_targets(harness.IMAGES).astype(float)})
        one, metrics = run.run(Layout("pmap", jax.devices()[:1]), steps=3, state=start)
        four, _ = run.run(Layout("pmap", jax.devices()[:4]), steps=3, state=start)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(four), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-8, atol=1e-11)
    assert (metrics["loss_unlabeled"][0] > 0).all()
    np.testing.assert_array_equal(one.extra["targets"], start.extra["targets"])
    pairs = zip(jax.tree.leaves(start.params), jax.tree.leaves(one.params), strict=True)
    assert min(np.abs(a - b).max() for a, b in pairs) > 1e-6
