"""Mean Teacher against NumPy on fixed logits; the teacher is another network on another view."""

import fakes
import numpy as np
from fakes import FakeNet, make_batch, softmax, supervised

from ferjax.algorithms import mean_teacher
from ferjax.algorithms.base import Time


def test_loss_compares_student_and_teacher_on_two_views():
    method = mean_teacher.Algorithm(mu=2)
    batch, a = make_batch(method)
    net = FakeNet()
    loss, _, _ = method.loss(net, batch, {}, Time(0, 0.2))
    teacher = softmax(0.5 * a["u:weak:2"])  # FakeNet's teacher halves the logits
    distance = ((softmax(a["u:weak"]) - teacher) ** 2).mean(1).mean()
    np.testing.assert_allclose(loss, supervised(a) + 50 * 0.5 * distance, rtol=1e-5)
    assert distance > 0.01
    assert net.calls == [("__call__", 6, True), ("__call__", 12, False), ("teacher", 12, False)]
    # The teacher sees noise of its own.
    assert not np.array_equal(net.seen[1], net.seen[2])


def test_same_view_and_same_weights_are_the_only_zero():
    """The loss is 0 where student and teacher agree, so it measures their difference, and not 0
    where they differ although the view is the same."""
    method = mean_teacher.Algorithm(mu=2, warmup=0.0)
    batch, _ = make_batch(method)
    same = batch.unlabeled.replace(
        views=dict.fromkeys(method.unlabeled_views, batch.unlabeled.views["weak"])
    )
    net = FakeNet()
    _, apart, _ = method.loss(net, batch.replace(unlabeled=same), {}, Time(0, 0.0))
    net.teacher = lambda images: images.reshape(len(images), -1)[:, : fakes.C]
    _, agreed, _ = method.loss(net, batch.replace(unlabeled=same), {}, Time(0, 0.0))
    assert fakes.means(agreed)["loss_unlabeled"] == 0
    assert fakes.means(apart)["loss_unlabeled"] > 1e-3


def test_the_student_learns_and_the_teacher_does_not():
    method = mean_teacher.Algorithm(mu=2)
    batch, _ = make_batch(method)
    got = fakes.gradients(method, batch, {}, Time(0, 0.5))
    assert np.abs(got["weak"]).max() > 1e-3
    assert np.abs(got["weak:2"]).max() == 0
