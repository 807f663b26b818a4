"""AdaMatch against NumPy on fixed logits: alignment, relative threshold, interpolation."""

import fakes
import numpy as np
from fakes import C, FakeNet, cross_entropy, make_batch, one_hot, softmax

from ferjax.algorithms import adamatch
from ferjax.algorithms.base import Time


def test_loss_and_averages_over_some_steps():
    """FakeNet has no batch statistics, so interpolation has no effect here."""
    method = adamatch.Algorithm(mu=3, decay=0.9, lambda_u=2.0)
    extra = method.init_extra(C, 100)
    labeled = present = None
    for step, (progress, ramp) in enumerate(((0.25, 0.5), (0.5, 1.0), (0.9, 1.0))):
        batch, a = make_batch(method, seed=step)
        loss, metrics, extra = fakes.loss(method, batch, extra, Time(step, progress))
        p, q = softmax(a["x:weak"]), softmax(a["u:weak"])
        labeled = p.mean(0) if step == 0 else 0.9 * labeled + 0.1 * p.mean(0)
        present = q.mean(0) if step == 0 else 0.9 * present + 0.1 * q.mean(0)
        q = q * (labeled + 1e-6) / (present + 1e-6)
        q /= q.sum(1, keepdims=True)
        mask = q.max(1) >= 0.9 * p.max(1).mean()
        assert 0 < mask.sum() < len(mask)
        both = [cross_entropy(a[f"x:{v}"], a["x:target"]).mean() for v in ("weak", "strong")]
        unlabeled = (mask * cross_entropy(a["u:strong"], one_hot(q.argmax(1)))).mean()
        np.testing.assert_allclose(loss, np.mean(both) + 2 * ramp * unlabeled, rtol=1e-5)
        np.testing.assert_allclose(fakes.means(metrics)["mask_rate"], mask.mean(), rtol=1e-6)
        # The labelled images alone record no statistics; the joint forward does.
        assert fakes.calls(method, batch, extra) == [
            ("__call__", 12, False),
            ("__call__", 48, True),
        ]
    np.testing.assert_allclose(extra["labeled"], labeled, rtol=1e-5)
    np.testing.assert_allclose(extra["unlabeled"], present, rtol=1e-5)


def test_logits_are_interpolated_at_random():
    """A net that adds 10 to everything where images are many: the labelled logits lie between."""

    class Shifted(FakeNet):
        def __call__(self, images, **kwargs):
            logits = super().__call__(images, **kwargs)
            return logits + 10 * (len(images) > 12) * np.arange(C)

    method = adamatch.Algorithm(mu=3, lambda_u=0.0)
    batch, a = make_batch(method)
    loss = float(method.loss(Shifted(), batch, method.init_extra(C, 9), Time(0, 0.5))[0])
    ends = [
        np.mean([cross_entropy(a[f"x:{v}"] + s * np.arange(C), a["x:target"]).mean() for v in v2])
        for s in (0, 10)
        for v2 in [("weak", "strong")]
    ]
    assert min(ends) < loss < max(ends)


def test_only_strong_views_learn():
    method = adamatch.Algorithm(mu=3)
    batch, _ = make_batch(method)
    got = fakes.gradients(method, batch, method.init_extra(C, 9), Time(0, 0.5))
    assert np.abs(got["strong"]).max() > 1e-3
    assert np.abs(got["weak"]).max() == 0
