"""Supervised training: the labelled images, nothing else.

loss = mean_b w(y_b) L(y_b', z_b), z_b the logits of weak(x_b)

L is the cross-entropy CE(y, p(z)), or the squared hinge of an L2-SVM (Tang 2013; `squared_hinge`).
Off by default: y' = (1 - s) y + s / C (label smoothing, Szegedy et al. 2016); mixup of images and
targets with partners from all devices (Zhang et al. 2018; `mixup`); class weights w
(`class_weights`); CE(y', p(z + tau log prior)) (logit adjustment, Menon et al. 2021). The last two
take the prior of the labelled images. train_accuracy is of z, and of a mixed image's larger part.
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
    adjust_logits,
    class_weights,
    cross_entropy,
    mean_metric,
    mixup,
    squared_hinge,
    weighted_mean,
)
from ferjax.config import UserError

CRITERIA = {"cross_entropy": cross_entropy, "squared_hinge": squared_hinge}
WEIGHTINGS = ("none", "balanced", "effective")


@dataclass(frozen=True)
class Algorithm(BaseAlgorithm):
    """Supervised baseline.

    Attributes:
      criterion: L, "cross_entropy" or "squared_hinge".
      label_smoothing: s, share of the target that is spread over all classes, in [0, 1).
      mixup: alpha of the Beta distribution; 0 for none.
      weighting: of classes, "none", "balanced" or "effective".
      logit_adjustment: tau, with cross-entropy only; 0 for none.
    """

    criterion: str = "cross_entropy"
    label_smoothing: float = 0.0
    mixup: float = 0.0
    weighting: str = "none"
    logit_adjustment: float = 0.0

    def __post_init__(self) -> None:
        for name, known in (("criterion", tuple(CRITERIA)), ("weighting", WEIGHTINGS)):
            if getattr(self, name) not in known:
                raise UserError(
                    f"config.algorithm.{name}={getattr(self, name)}: use {', '.join(known)}"
                )
        if not 0 <= self.label_smoothing < 1:
            raise UserError(
                f"config.algorithm.label_smoothing={self.label_smoothing}: it must be in [0, 1)"
            )
        for name in ("mixup", "logit_adjustment"):
            if getattr(self, name) < 0:
                raise UserError(
                    f"config.algorithm.{name}={getattr(self, name)}: it must not be negative"
                )
        if self.logit_adjustment and self.criterion != "cross_entropy":
            raise UserError("config.algorithm.logit_adjustment needs criterion=cross_entropy")

    def loss(self, net: Net, batch: Batch, extra: Any, t: Time) -> tuple[jax.Array, Metrics, Any]:
        """See the module's docstring."""
        del t
        images = batch.labeled
        view, target, weight = images.views["weak"], images.target, images.weight
        if self.mixup:
            keys = images.key("mixup")
            (view,), (target,) = mixup(batch, [view], [target], [keys], self.mixup)
        logits = scores = net(view, keys=images.key("model"))
        if self.weighting != "none":
            weight = weight * class_weights(batch, target, self.weighting)
        if self.logit_adjustment:
            scores = adjust_logits(batch, logits, self.logit_adjustment)
        smooth = self.label_smoothing
        target = target * (1 - smooth) + smooth / target.shape[-1]
        losses = CRITERIA[self.criterion](scores, target)
        metrics = {
            "loss_labeled": mean_metric(losses, weight),
            "train_accuracy": accuracy_metric(logits, images.target),
        }
        return weighted_mean(losses, weight), metrics, extra
