"""Entropy minimisation (Grandvalet and Bengio 2004, "Semi-supervised learning by entropy
minimization").

loss = mean_b CE(y_b, p(weak(x_b))) + lambda r(t) mean_u H(p(weak(u))),   H(p) = -sum_c p_c log p_c

Eq. 6 of the paper as a loss to be minimised; the gradient flows through both factors of H. Neither
the paper nor the later codes have a default of its own: .06 is the weight that VAT's codes give
to this term, where it is not ramped up (`warmup` 0).

The unlabelled forward has a gradient, is normalised by its own batch, and leaves the running
statistics alone.
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
    entropy,
    mean_metric,
    ramp_up,
    weighted_mean,
)


@dataclass(frozen=True)
class Algorithm(BaseAlgorithm):
    """Entropy minimisation.

    Attributes:
      mu: unlabelled images a step for each labelled one.
      lambda_u: weight of the entropy.
      warmup: share of training over which lambda_u rises from 0, in [0, 1].
    """

    mu: int = 1
    lambda_u: float = 0.06
    warmup: float = 0.0
    unlabeled_views: ClassVar[tuple[str, ...]] = ("weak",)

    def __post_init__(self) -> None:
        check_fields(self, lambda_u=1e6, warmup=1)

    def loss(self, net: Net, batch: Batch, extra: Any, t: Time) -> tuple[jax.Array, Metrics, Any]:
        """See the module's docstring."""
        labeled, unlabeled = batch.labeled, batch.unlabeled
        assert unlabeled is not None
        logits = net(labeled.views["weak"], keys=labeled.key("model"))
        weak = net(unlabeled.views["weak"], keys=unlabeled.key("model"), update=False)

        ce_labeled = cross_entropy(logits, labeled.target)
        spread = entropy(weak)
        weight = self.lambda_u * ramp_up(t.progress, self.warmup)
        loss = weighted_mean(ce_labeled, labeled.weight)
        loss += weight * weighted_mean(spread, unlabeled.weight)
        metrics = {
            "loss_labeled": mean_metric(ce_labeled, labeled.weight),
            "loss_unlabeled": mean_metric(spread, unlabeled.weight),
            "train_accuracy": accuracy_metric(logits, labeled.target),
            "unlabeled_accuracy": accuracy_metric(weak, unlabeled.target),
        }
        return loss, metrics, extra
