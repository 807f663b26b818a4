"""Pseudo-Label (Lee 2013, ICML workshop "Challenges in Representation Learning").

loss = mean_b CE(y_b, p(weak(x_b)))
     + lambda r(t) mean_u 1[max p_u >= tau] CE(argmax sg p_u, p_u),   p_u = p(weak(u))

The network's own class is the target for the same view (eq. 15-16); r rises linearly from 0 to 1 in
the first `warmup` of training. The paper has no threshold and its weight rises to 3; threshold and
weight here are those of the later codes (Oliver et al. 2018 and its successors), which also take
the mean over all unlabelled images, not over the confident ones.

The unlabelled forward has a gradient, is normalised by its own batch, and leaves the running
statistics alone, as in both reference codes.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax

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
    pseudo_labels,
    ramp_up,
    unlabeled_metrics,
    weighted_mean,
)


@dataclass(frozen=True)
class Algorithm(BaseAlgorithm):
    """Pseudo-Label.

    Attributes:
      mu: unlabelled images a step for each labelled one.
      threshold: tau, the least confidence of a pseudo-label, in [0, 1].
      lambda_u: weight of the unlabelled loss.
      warmup: share of training over which lambda_u rises from 0, in [0, 1].
    """

    mu: int = 1
    threshold: float = 0.95
    lambda_u: float = 1.0
    warmup: float = 0.4
    unlabeled_views: ClassVar[tuple[str, ...]] = ("weak",)

    def __post_init__(self) -> None:
        check_fields(self, threshold=1, lambda_u=1e6, warmup=1)

    def loss(self, net: Net, batch: Batch, extra: Any, t: Time) -> tuple[jax.Array, Metrics, Any]:
        """See the module's docstring."""
        labeled, unlabeled = batch.labeled, batch.unlabeled
        assert unlabeled is not None
        logits = net(labeled.views["weak"], keys=labeled.key("model"))
        weak = net(unlabeled.views["weak"], keys=unlabeled.key("model"), update=False)

        target, mask = pseudo_labels(weak, self.threshold, 0)
        ce_labeled = cross_entropy(logits, labeled.target)
        ce_unlabeled = cross_entropy(weak, target) * mask
        weight = self.lambda_u * ramp_up(t.progress, self.warmup)
        loss = weighted_mean(ce_labeled, labeled.weight)
        loss += weight * weighted_mean(ce_unlabeled, unlabeled.weight)
        metrics = {
            "loss_labeled": mean_metric(ce_labeled, labeled.weight),
            "loss_unlabeled": mean_metric(ce_unlabeled, unlabeled.weight),
            "train_accuracy": accuracy_metric(logits, labeled.target),
            **unlabeled_metrics(weak, unlabeled.target, mask),
        }
        return loss, metrics, extra
