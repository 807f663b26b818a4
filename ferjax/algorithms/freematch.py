"""FreeMatch (Wang et al. 2023, arXiv:2205.07246).

loss = mean_b CE(y_b, p(weak(x_b)))
     + lambda mean_u 1[max q_u >= tau_c(u)] CE(argmax q_u, p(strong(u)))
     + lambda_f sum_c N(p~ / h~)_c log N(p' / h')_c,   q_u = sg p(weak(u)),  c(u) = argmax q_u

Self-adaptive thresholds (eq. 5-8): tau_t = EMA(mean_u max q_u), p~ = EMA(mean_u q_u),
tau_c = tau_t p~_c / max p~, updated before they are used. Self-adaptive fairness (eq. 9-13): p' is
the mean of p(strong(u)) over the images above their threshold, h' the histogram of its classes,
h~ = EMA(histogram of c(u)), N scales to sum 1, and 1/0 counts as 0. Its sign is the paper's (minus
a cross-entropy) and its code's. Without an image above its threshold the term is 0.

The averages start at 1/C (the paper, section 4, and its code). The statistics, and p' and h', are
those of all devices.

q comes from the student in train mode; `forward` says what is normalised together and which
forwards update the running statistics (fixmatch.py).
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
    forward_views,
    global_mean,
    hard_or_sharp,
    mean_metric,
    moving_average,
    unlabeled_metrics,
    weighted_mean,
)


@dataclass(frozen=True)
class Algorithm(BaseAlgorithm):
    """FreeMatch.

    Attributes:
      mu: unlabelled images a step for each labelled one.
      lambda_u: weight of the unlabelled loss.
      lambda_f: weight of the fairness term.
      decay: of the three averages, in [0, 1].
      temperature: 0 for hard pseudo-labels, else T of sharpened ones.
      forward: "joint", "split" or "apart".
    """

    mu: int = 7
    lambda_u: float = 1.0
    lambda_f: float = 0.01
    decay: float = 0.999
    temperature: float = 0.0
    forward: str = "split"
    unlabeled_views: ClassVar[tuple[str, ...]] = ("weak", "strong")

    def __post_init__(self) -> None:
        check_fields(self, lambda_u=1e6, lambda_f=1e6, decay=1, temperature=1e6)

    def init_extra(self, num_classes: int, num_images: int) -> Any:
        """`confidence` [] (tau_t), `mean` [C] (p~) and `histogram` [C] (h~)."""
        uniform = jnp.ones((num_classes,)) / num_classes
        return {"confidence": uniform[0], "mean": uniform, "histogram": uniform}

    def loss(self, net: Net, batch: Batch, extra: Any, t: Time) -> tuple[jax.Array, Metrics, Any]:
        """See the module's docstring."""
        labeled, unlabeled = batch.labeled, batch.unlabeled
        assert unlabeled is not None
        logits, weak, strong = forward_views(net, batch, self.forward)
        weak = jax.lax.stop_gradient(weak)

        q, guess = jax.nn.softmax(weak), jnp.argmax(weak, -1)
        confidence = jnp.max(q, -1)
        seen = {"confidence": confidence, "mean": q, "histogram": hard_or_sharp(weak, 0)}
        extra = {
            name: moving_average(extra[name], global_mean(batch, values), self.decay)
            for name, values in seen.items()
        }
        thresholds = extra["confidence"] * extra["mean"] / jnp.max(extra["mean"])
        mask = (confidence >= thresholds[guess]).astype(weak.dtype)

        ce_labeled = cross_entropy(logits, labeled.target)
        ce_unlabeled = cross_entropy(strong, hard_or_sharp(weak, self.temperature)) * mask
        unfair = fairness(batch, strong, mask, extra["mean"], extra["histogram"])
        loss = weighted_mean(ce_labeled, labeled.weight) + self.lambda_f * unfair
        loss += self.lambda_u * weighted_mean(ce_unlabeled, unlabeled.weight)
        metrics = {
            "loss_labeled": mean_metric(ce_labeled, labeled.weight),
            "loss_unlabeled": mean_metric(ce_unlabeled, unlabeled.weight),
            "loss_fairness": mean_metric(unfair[None]),
            "train_accuracy": accuracy_metric(logits, labeled.target),
            "threshold": mean_metric(thresholds),
            **unlabeled_metrics(weak, unlabeled.target, mask),
        }
        return loss, metrics, extra


def fairness(
    batch: Batch, strong: jax.Array, mask: jax.Array, mean: jax.Array, histogram: jax.Array
) -> jax.Array:
    """sum_c N(p~ / h~)_c log N(p' / h')_c over the images of all devices: []."""
    p = jax.nn.softmax(strong)
    classes = hard_or_sharp(jax.lax.stop_gradient(strong), 0)
    count = global_mean(batch, mask)
    # gather carries gradients: each device's part of p' gets the other devices' too.
    present = batch.gather((p * mask[:, None]).mean(0)[None]).mean(0)
    wanted = normalised(mean, histogram)
    ours = normalised(present, global_mean(batch, classes * mask[:, None]))
    # Where no image counts `ours` is 0, and so is its gradient.
    return jnp.where(count > 0, jnp.sum(wanted * jnp.log(ours + 1e-12)), 0.0)


def normalised(p: jax.Array, histogram: jax.Array) -> jax.Array:
    """p / histogram [C], 0 where the histogram is 0, scaled to sum 1 (or 0 if all is 0)."""
    ratio = jnp.where(histogram > 0, p / jnp.where(histogram > 0, histogram, 1.0), 0.0)
    total = jnp.sum(ratio)
    return ratio / jnp.where(total > 0, total, 1.0)
