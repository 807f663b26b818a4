"""UDA, Unsupervised Data Augmentation (Xie et al. 2020, arXiv:1904.12848).

loss = 1/|K| sum_{b in K} CE(y_b, p(weak(x_b)))
     + lambda mean_u 1[max q_u > beta] KL(softmax(log q_u / T), p(strong(u))),  q_u = sg p(weak(u))

The sharpened prediction is the target (section 2.4); the confidence is that of q before sharpening;
the second mean is over all unlabelled images. KL and the reference code's KL are the same; its
gradient is the cross-entropy's. A widely used code forgets the sharpening.

Training signal annealing (section 2.4, `tsa`): K are the labelled images with p(y_b) <= eta_t,
eta_t = alpha_t (1 - 1/C) + 1/C, alpha_t = t ("linear"), 1 - exp(-5 t) ("log": releases the labels
early) or exp(5 (t - 1)) ("exp": late), t the share of training done. With "none" K is all of them.
The mean is over K, on all devices, as in the reference code; in that other code over all images.

q comes from the student in train mode; `forward` says what is normalised together and which
forwards update the running statistics (fixmatch.py). The reference is "joint".
"""

import math
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
    entropy,
    forward_views,
    global_mean,
    mean_metric,
    unlabeled_metrics,
    weighted_mean,
)
from ferjax.config import UserError


@dataclass(frozen=True)
class Algorithm(BaseAlgorithm):
    """UDA; the defaults are the paper's for CIFAR-10.

    Attributes:
      mu: unlabelled images a step for each labelled one.
      threshold: beta, the confidence above which an image counts, in [0, 1].
      temperature: T of the sharpened target, above 0.
      lambda_u: weight of the unlabelled loss.
      tsa: "none", "linear", "log" or "exp".
      forward: "joint", "split" or "apart".
    """

    mu: int = 7
    threshold: float = 0.8
    temperature: float = 0.4
    lambda_u: float = 1.0
    tsa: str = "none"
    forward: str = "split"
    unlabeled_views: ClassVar[tuple[str, ...]] = ("weak", "strong")

    def __post_init__(self) -> None:
        check_fields(self, threshold=1, lambda_u=1e6)
        if self.tsa not in ("none", "linear", "log", "exp"):
            raise UserError(f"config.algorithm.tsa={self.tsa}: use none, linear, log or exp")
        if self.temperature <= 0:
            raise UserError(f"config.algorithm.temperature={self.temperature}: it must be above 0")

    def released(self, logits: jax.Array, target: jax.Array, progress: Any) -> jax.Array:
        """1 for each labelled image whose loss counts at this time, else 0: [N]."""
        alpha = {
            "none": lambda t: 2.0,  # a threshold that no probability reaches
            "linear": lambda t: t,
            "log": lambda t: 1 - jnp.exp(-5 * t),
            "exp": lambda t: jnp.exp(5 * (t - 1)),
        }[self.tsa](progress)
        floor = 1 / logits.shape[-1]
        right = jnp.sum(jax.nn.softmax(logits) * target, -1)
        return (right <= alpha * (1 - floor) + floor).astype(logits.dtype)

    def loss(self, net: Net, batch: Batch, extra: Any, t: Time) -> tuple[jax.Array, Metrics, Any]:
        """See the module's docstring."""
        labeled, unlabeled = batch.labeled, batch.unlabeled
        assert unlabeled is not None
        logits, weak, strong = forward_views(net, batch, self.forward)
        weak = jax.lax.stop_gradient(weak)

        released = jax.lax.stop_gradient(self.released(logits, labeled.target, t.progress))
        # The share on all devices; where it is 0, so is each device's sum.
        share = jnp.maximum(global_mean(batch, released), math.ulp(1.0))
        ce_labeled = cross_entropy(logits, labeled.target)
        mask = (jnp.max(jax.nn.softmax(weak), -1) > self.threshold).astype(weak.dtype)
        sharp = weak / self.temperature
        divergence = cross_entropy(strong, jax.nn.softmax(sharp)) - entropy(sharp)
        loss = weighted_mean(ce_labeled, released * labeled.weight) / share
        loss += self.lambda_u * weighted_mean(divergence, mask * unlabeled.weight)
        metrics = {
            "loss_labeled": mean_metric(ce_labeled, released * labeled.weight),
            "loss_unlabeled": mean_metric(divergence * mask, unlabeled.weight),
            "train_accuracy": accuracy_metric(logits, labeled.target),
            "released_rate": mean_metric(released),
            **unlabeled_metrics(weak, unlabeled.target, mask),
        }
        return loss, metrics, extra
