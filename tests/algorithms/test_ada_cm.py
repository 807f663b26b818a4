"""Ada-CM against NumPy on fixed logits: margins, partition, contrast."""

import fakes
import numpy as np
import pytest
from fakes import C, cross_entropy, make_batch, one_hot, softmax, supervised

from ferjax.algorithms import ada_cm
from ferjax.algorithms.base import Time


def contrast(first, second, temperature):
    """SimCLR's loss, written out anchor by anchor."""
    z = np.concatenate([first, second])
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
    n, losses = len(first), []
    for i in range(2 * n):
        others = [j for j in range(2 * n) if j != i]
        dots = z[others] @ z[i] / temperature
        losses.append(np.log(np.exp(dots).sum()) - z[i] @ z[(i + n) % (2 * n)] / temperature)
    return np.mean(losses)


def test_loss_and_margins_over_some_epochs():
    method = ada_cm.Algorithm(mu=3, epochs=4, floor=0.4, temperature=0.5)
    extra = method.init_extra(C, 100)
    margin, sums, counts, epoch = np.full(C, 0.4), np.zeros(C), np.zeros(C), 0
    for step in range(8):
        progress = step / 8
        batch, a = make_batch(method, seed=step)
        sure, b = make_batch(method, seed=step, scale=8.0)  # labelled images that are known well
        batch = batch.replace(labeled=sure.labeled)
        a |= {name: x for name, x in b.items() if name.startswith("x:")}
        loss, _, extra = fakes.loss(method, batch, extra, Time(step, progress))
        if int(progress * 4) != epoch:
            epoch = int(progress * 4)
            means = np.divide(sums, counts, where=counts > 0, out=np.zeros(C))
            margin = np.maximum(0.4, means * 0.97 / (1 + np.exp(-epoch)))
            sums, counts = np.zeros(C), np.zeros(C)
        p = (softmax(a["u:weak"]) + softmax(a["u:weak:2"])) / 2
        mask = p.max(1) >= margin[p.argmax(1)]
        assert 0 < mask.sum() < len(mask)
        unlabeled = (mask * cross_entropy(a["u:strong"], one_hot(p.argmax(1)))).mean()
        features = [
            np.asarray(batch.unlabeled.views[v], np.float64).reshape(len(p), -1)[~mask]
            for v in ("weak", "weak:2")
        ]
        expected = 0.5 * supervised(a) + unlabeled + 0.1 * contrast(*features, 0.5)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
        known = softmax(0.5 * a["x:weak"])  # FakeNet's teacher
        for row, y in zip(known, a["x:target"].argmax(1), strict=True):
            if row.argmax() == y:
                sums[y] += row[y]
                counts[y] += 1
        for name, value in {"margin": margin, "sum": sums, "count": counts}.items():
            np.testing.assert_allclose(extra[name], value, rtol=1e-5, atol=1e-6)
        assert int(extra["epoch"]) == epoch
    assert (margin > 0.4).any()
    # The strong view alone records no statistics.
    assert [c[2] for c in fakes.calls(method, batch, extra) if c[0] == "__call__"] == [False, True]


@pytest.mark.parametrize(("floor", "learning"), [(0.0, "strong"), (1.0, "weak")])
def test_each_subset_learns_its_own_way(floor, learning):
    """All images in I: only strong views learn; all in II: only weak ones. Neither has NaN."""
    method = ada_cm.Algorithm(mu=3, floor=floor)
    batch, _ = make_batch(method)
    got = fakes.gradients(method, batch, method.init_extra(C, 100), Time(0, 0.0))
    for view, gradient in got.items():
        assert (np.abs(gradient).max() > 1e-4) == view.startswith(learning)
