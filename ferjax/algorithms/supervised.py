"""Supervised training: cross-entropy on the labelled images, nothing else.

loss = mean_b w_b CE(y_b, p(weak(x_b)))
"""

from dataclasses import dataclass
from typing import Any

import jax

from ferjax.algorithms.base import (
    BaseAlgorithm,
    Batch,
    Metrics,
    Net,
    Time,
    accuracy_metric,
    cross_entropy,
    mean_metric,
    weighted_mean,
)
from ferjax.config import UserError


@dataclass(frozen=True)
class Algorithm(BaseAlgorithm):
    """Supervised baseline.

    Attributes:
      label_smoothing: share of the target that is spread over all classes, in [0, 1).
    """

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise UserError(
                f"config.algorithm.label_smoothing={self.label_smoothing}: it must be in [0, 1)"
            )

    def loss(self, net: Net, batch: Batch, extra: Any, t: Time) -> tuple[jax.Array, Metrics, Any]:
        """See the module's docstring."""
        del t
        images = batch.labeled
        logits = net(images.views["weak"], keys=images.key("model"))
        smooth = self.label_smoothing
        target = images.target * (1 - smooth) + smooth / images.target.shape[-1]
        ce = cross_entropy(logits, target)
        metrics = {
            "loss_labeled": mean_metric(ce, images.weight),
            "train_accuracy": accuracy_metric(logits, images.target),
        }
        return weighted_mean(ce, images.weight), metrics, extra
