"""FixMatch (Sohn et al. 2020, arXiv:2001.07685).

loss = mean_b CE(y_b, p(weak(x_b)))
     + lambda * mean_u 1[max q_u >= tau] CE(target(q_u), p(strong(u))),   q_u = sg p(weak(u))

The second mean is over all mu B unlabelled images, not over those above the threshold (eq. 4).
target(q) is its argmax (eq. 4), or softmax(log q / T) when `temperature` T > 0.

q comes from the student of this same step, in train mode, as in the reference code, not from the
EMA. `joint` runs labelled, weak and strong views through one concatenated forward, whose BatchNorm
statistics mix all three, as the reference does. `split` runs the weak views through a forward
without gradient, then labelled and strong views together: 31 instead of 45 units of work for each
labelled image at mu = 7. Both forwards of `split` normalise by their own batch and both update the
running statistics: else these would see unlabelled images only strongly distorted.

`apart` costs the same as `split` and runs labelled, weak and strong views through a forward each;
the running statistics come from the labelled and the weak ones, as images look in evaluation. In
`split` the labelled images are normalised among strong views and the weak ones are not, so early
in training pseudo-labels are worse than the network is: 36 % right where evaluation mode gave 45 %
(BUILD_NOTES.md). Without BatchNorm all three are the same function.

Not in the reference code, off by default: `warmup`, the share of training over which lambda rises
linearly from 0 (a short schedule starts with no pseudo-label worth having).
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
    forward_views,
    mean_metric,
    pseudo_labels,
    ramp_up,
    unlabeled_metrics,
    weighted_mean,
)


@dataclass(frozen=True)
class Algorithm(BaseAlgorithm):
    """FixMatch; the defaults are the paper's (table 4).

    Attributes:
      mu: unlabelled images a step for each labelled one.
      threshold: tau, the least confidence of a pseudo-label, in [0, 1].
      lambda_u: weight of the unlabelled loss.
      temperature: 0 for hard pseudo-labels, else T of sharpened ones.
      warmup: share of training over which lambda_u rises from 0, in [0, 1].
      forward: "joint", "split" or "apart".
    """

    mu: int = 7
    threshold: float = 0.95
    lambda_u: float = 1.0
    temperature: float = 0.0
    warmup: float = 0.0
    forward: str = "split"
    unlabeled_views: ClassVar[tuple[str, ...]] = ("weak", "strong")

    def __post_init__(self) -> None:
        check_fields(self, threshold=1, warmup=1, lambda_u=1e6, temperature=1e6)

    def loss(self, net: Net, batch: Batch, extra: Any, t: Time) -> tuple[jax.Array, Metrics, Any]:
        """See the module's docstring."""
        labeled, unlabeled = batch.labeled, batch.unlabeled
        assert unlabeled is not None
        logits, weak, strong = forward_views(net, batch, self.forward)

        target, mask = pseudo_labels(weak, self.threshold, self.temperature)
        ce_labeled = cross_entropy(logits, labeled.target)
        ce_unlabeled = cross_entropy(strong, target)
        loss = weighted_mean(ce_labeled, labeled.weight)
        loss += (
            self.lambda_u
            * ramp_up(t.progress, self.warmup)
            * weighted_mean(ce_unlabeled, mask * unlabeled.weight)
        )
        metrics = {
            "loss_labeled": mean_metric(ce_labeled, labeled.weight),
            "loss_unlabeled": mean_metric(ce_unlabeled * mask, unlabeled.weight),
            "train_accuracy": accuracy_metric(logits, labeled.target),
            **unlabeled_metrics(weak, unlabeled.target, mask),
        }
        return loss, metrics, extra
