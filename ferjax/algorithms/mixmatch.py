"""MixMatch (Berthelot et al. 2019, arXiv:1905.02249).

q_u = sharpen(mean of p(weak_1(u)) and p(weak_2(u)), T)                              (eq. 6-7)
X', U' = MixUp of the labelled images with y, and of both views of each u with q_u, each with
         an image of W, a random order of all of them                                (algorithm 1)
loss = mean_{X'} CE(y', p(x')) + lambda r(t) mean_{U'} 1/C |p(u') - q'|^2            (eq. 2-5)

MixUp: l ~ Beta(alpha, alpha) for each image, max(l, 1 - l) of itself and the rest of its partner
(eq. 8-11). Partners come from all devices. alpha is the code's default; the paper's experiments
have .75. r rises linearly over the first 1/64 of training, as in the code.

The guesses come from a forward of each weak view in train mode, without gradient, that leaves the
running statistics alone, as in the code. The mixed images run through one forward, which
normalises labelled and unlabelled ones together (what the code's interleaving approximates) and
updates the running statistics.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from ferjax.algorithms.base import (
    BaseAlgorithm,
    Batch,
    Metrics,
    Net,
    Time,
    accuracy_metric,
    check_fields,
    cross_entropy,
    mean_metric,
    mixup,
    ramp_up,
    sharpen,
    squared_distance,
    weighted_mean,
)
from ferjax.config import UserError


@dataclass(frozen=True)
class Algorithm(BaseAlgorithm):
    """MixMatch.

    Attributes:
      mu: unlabelled images a step for each labelled one.
      temperature: T of the sharpening, above 0.
      alpha: of MixUp's Beta distribution, above 0.
      lambda_u: weight of the squared distance.
      warmup: share of training over which lambda_u rises from 0, in [0, 1].
    """

    mu: int = 1
    temperature: float = 0.5
    alpha: float = 0.5
    lambda_u: float = 100.0
    warmup: float = 1 / 64
    unlabeled_views: ClassVar[tuple[str, ...]] = ("weak", "weak:2")

    def __post_init__(self) -> None:
        check_fields(self, lambda_u=1e6, warmup=1)
        if min(self.temperature, self.alpha) <= 0:
            raise UserError("config.algorithm: temperature and alpha must be above 0")

    def loss(self, net: Net, batch: Batch, extra: Any, t: Time) -> tuple[jax.Array, Metrics, Any]:
        """See the module's docstring."""
        labeled, unlabeled = batch.labeled, batch.unlabeled
        assert unlabeled is not None
        names = self.unlabeled_views
        guesses = [
            jax.nn.softmax(net(unlabeled.views[v], keys=unlabeled.key(f"guess/{v}"), update=False))
            for v in names
        ]
        q = jax.lax.stop_gradient(sharpen((guesses[0] + guesses[1]) / 2, self.temperature))

        images = [labeled.views["weak"], *(unlabeled.views[v] for v in names)]
        targets = [labeled.target, q, q]
        keys = [labeled.key("mixup"), *(unlabeled.key(f"mixup/{v}") for v in names)]
        mixed, targets = mixup(batch, images, targets, keys, self.alpha)
        noise = [labeled.key("model"), *(unlabeled.key(f"model/{v}") for v in names)]
        logits = net(jnp.concatenate(mixed), keys=jnp.concatenate(noise))
        n = labeled.index.shape[0]

        ce_labeled = cross_entropy(logits[:n], targets[0])
        distance = squared_distance(logits[n:], jnp.concatenate(targets[1:]))
        weight = jnp.tile(unlabeled.weight, len(names))
        loss = weighted_mean(ce_labeled, labeled.weight)
        ramp = ramp_up(t.progress, self.warmup)
        loss += self.lambda_u * ramp * weighted_mean(distance, weight)
        metrics = {
            "loss_labeled": mean_metric(ce_labeled, labeled.weight),
            "loss_unlabeled": mean_metric(distance, weight),
            "train_accuracy": accuracy_metric(logits[:n], labeled.target),
            "unlabeled_accuracy": accuracy_metric(q, unlabeled.target),
            "confidence": mean_metric(jnp.max(q, -1)),
        }
        return loss, metrics, extra
