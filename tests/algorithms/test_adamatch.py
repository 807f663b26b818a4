"""AdaMatch against NumPy on fixed logits: alignment, relative threshold, interpolation."""

import fakes
import numpy as np
from fakes import C, FakeNet, cross_entropy, make_batch, one_hot, softmax

from ferjax.algorithms import adamatch, base
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


def test_logits_are_interpolated_at_random(monkeypatch):
    """Each logit of each labelled view by itself, between the two forwards' (section 3.2)."""

    class Shifted(FakeNet):
        """Adds 10 where images are many, as they are in the forward of all of them."""

        def __call__(self, images, **kwargs):
            return super().__call__(images, **kwargs) + 10 * (len(images) > 12)

    seen = []

    def spy(logits, target):
        seen.append(np.asarray(logits))
        return base.cross_entropy(logits, target)

    monkeypatch.setattr(adamatch, "cross_entropy", spy)
    method = adamatch.Algorithm(mu=3)
    batch, a = make_batch(method)
    method.loss(Shifted(), batch, method.init_extra(C, 9), Time(0, 0.5))
    mixed = dict(zip(("weak", "strong"), seen, strict=False))
    shares = np.stack([(mixed[view] - a[f"x:{view}"]) / 10 for view in mixed])
    assert shares.shape == (2, len(a["x:target"]), C)
    assert shares.min() > 0
    assert shares.max() < 1
    assert len(np.unique(shares.round(5))) == shares.size
    assert abs(shares.mean() - 0.5) < 0.15


def test_only_strong_views_learn():
    method = adamatch.Algorithm(mu=3)
    batch, _ = make_batch(method)
    got = fakes.gradients(method, batch, method.init_extra(C, 9), Time(0, 0.5))
    assert np.abs(got["strong"]).max() > 1e-3
    assert np.abs(got["weak"]).max() == 0
