"""Pi-Model (Laine and Aila 2017, arXiv:1610.02242).

loss = mean_b CE(y_b, p(weak(x_b))) + lambda r(t) mean_u 1/C |p(weak_1(u)) - sg p(weak_2(u))|^2

Two independent weak views of an image, with independent dropout, should get the same prediction
(algorithm 1). As in the later codes, not the paper: the second branch has no gradient (the paper's
has; half of its gradient, in the mean), labelled images take no part in the second term, and r
is linear over the first `warmup` of training; `ramp=sigmoid` is the paper's exp(-5 (1 - t/T)^2).

Both unlabelled forwards are normalised by their own batch and leave the running statistics alone,
as in both reference codes.
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
    ramp_up,
    squared_distance,
    weighted_mean,
)


@dataclass(frozen=True)
class Algorithm(BaseAlgorithm):
    """Pi-Model.

    Attributes:
      mu: unlabelled images a step for each labelled one.
      lambda_u: weight of the consistency loss.
      warmup: share of training over which lambda_u rises, in [0, 1].
      ramp: "linear" or "sigmoid".
    """

    mu: int = 1
    lambda_u: float = 10.0
    warmup: float = 0.4
    ramp: str = "linear"
    unlabeled_views: ClassVar[tuple[str, ...]] = ("weak", "weak:2")

    def __post_init__(self) -> None:
        check_fields(self, lambda_u=1e6, warmup=1)

    def loss(self, net: Net, batch: Batch, extra: Any, t: Time) -> tuple[jax.Array, Metrics, Any]:
        """See the module's docstring."""
        labeled, unlabeled = batch.labeled, batch.unlabeled
        assert unlabeled is not None
        logits = net(labeled.views["weak"], keys=labeled.key("model"))
        first = net(unlabeled.views["weak"], keys=unlabeled.key("model/1"), update=False)
        second = net(unlabeled.views["weak:2"], keys=unlabeled.key("model/2"), update=False)

        target = jax.lax.stop_gradient(jax.nn.softmax(second))
        ce_labeled = cross_entropy(logits, labeled.target)
        distance = squared_distance(first, target)
        weight = self.lambda_u * ramp_up(t.progress, self.warmup, self.ramp)
        loss = weighted_mean(ce_labeled, labeled.weight)
        loss += weight * weighted_mean(distance, unlabeled.weight)
        metrics = {
            "loss_labeled": mean_metric(ce_labeled, labeled.weight),
            "loss_unlabeled": mean_metric(distance, unlabeled.weight),
            "train_accuracy": accuracy_metric(logits, labeled.target),
            "unlabeled_accuracy": accuracy_metric(first, unlabeled.target),
        }
        return loss, metrics, extra
