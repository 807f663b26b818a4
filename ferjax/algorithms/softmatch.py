"""SoftMatch (Chen et al. 2023, arXiv:2301.10921).

loss = mean_b CE(y_b, p(weak(x_b))) + lambda mean_u w_u CE(argmax q_u, p(strong(u)))
w_u = exp(-n^2 min(c_u - m, 0)^2 / (2 v)),   c_u = max a(q_u),   q_u = sg p(weak(u))

A truncated Gaussian instead of a threshold (eq. 5-8; n = 2 is the code's): m and v are running
averages of the mean and the unbiased variance of c_u over all devices, updated before they are
used, from 1/C and 1. a aligns q to the uniform distribution, in the weights only, not in the
targets (section 3.3): a(q) = N(q pi / EMA(mean q)), with N scaling to sum 1 and pi = 1/C.
FER2013 is unbalanced: `alignment=labeled` takes for pi the running average of the labelled images'
classes, `none` aligns nothing. The averages of classes start as plain means over the steps (the
code: as the first step's values, where a rare class may be missing).

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
    align,
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
from ferjax.config import UserError


@dataclass(frozen=True)
class Algorithm(BaseAlgorithm):
    """SoftMatch.

    Attributes:
      mu: unlabelled images a step for each labelled one.
      sigmas: n, above 0: the larger, the narrower the weight.
      lambda_u: weight of the unlabelled loss.
      decay: of the averages, in [0, 1].
      alignment: of the confidences, to "uniform", "labeled" or "none".
      temperature: 0 for hard pseudo-labels, else T of sharpened ones.
      forward: "joint", "split" or "apart".
    """

    mu: int = 7
    sigmas: float = 2.0
    lambda_u: float = 1.0
    decay: float = 0.999
    alignment: str = "uniform"
    temperature: float = 0.0
    forward: str = "split"
    unlabeled_views: ClassVar[tuple[str, ...]] = ("weak", "strong")

    def __post_init__(self) -> None:
        check_fields(self, sigmas=1e6, lambda_u=1e6, decay=1, temperature=1e6)
        if not self.sigmas:
            raise UserError("config.algorithm.sigmas=0: it must be above 0")
        if self.alignment not in ("uniform", "labeled", "none"):
            raise UserError(
                f"config.algorithm.alignment={self.alignment}: use uniform, labeled or none"
            )

    def init_extra(self, num_classes: int, num_images: int) -> Any:
        """`mean` and `variance` [] of the confidence; `labeled` and `unlabeled` classes [C]."""
        uniform = jnp.ones((num_classes,)) / num_classes
        return {
            "mean": uniform[0],
            "variance": jnp.ones(()),
            "labeled": uniform,
            "unlabeled": jnp.copy(uniform),
        }

    def loss(self, net: Net, batch: Batch, extra: Any, t: Time) -> tuple[jax.Array, Metrics, Any]:
        """See the module's docstring."""
        labeled, unlabeled = batch.labeled, batch.unlabeled
        assert unlabeled is not None
        logits, weak, strong = forward_views(net, batch, self.forward)
        weak = jax.lax.stop_gradient(weak)

        q = jax.nn.softmax(weak)
        extra = dict(extra)
        decay = jnp.minimum(self.decay, t.step / (t.step + 1))  # the plain mean at first
        for name, values in (("labeled", labeled.target), ("unlabeled", q)):
            extra[name] = moving_average(extra[name], global_mean(batch, values), decay)
        if self.alignment != "none":
            uniform = jnp.full_like(extra["labeled"], 1 / q.shape[-1])
            wanted = extra["labeled"] if self.alignment == "labeled" else uniform
            q = align(q, wanted, extra["unlabeled"])
        confidence = jnp.max(q, -1)
        everywhere = batch.gather(confidence)
        ddof = min(1, len(everywhere) - 1)  # the variance of one is 0, not 0/0
        now = {"mean": jnp.mean(everywhere), "variance": jnp.var(everywhere, ddof=ddof)}
        extra |= {name: moving_average(extra[name], now[name], self.decay) for name in now}
        below = jnp.minimum(confidence - extra["mean"], 0.0)
        variance = jnp.maximum(extra["variance"], jnp.finfo(q.dtype).tiny)  # decay=0 can make it 0
        weight = jnp.exp(-(self.sigmas**2) * below**2 / (2 * variance))

        ce_labeled = cross_entropy(logits, labeled.target)
        ce_unlabeled = cross_entropy(strong, hard_or_sharp(weak, self.temperature)) * weight
        loss = weighted_mean(ce_labeled, labeled.weight)
        loss += self.lambda_u * weighted_mean(ce_unlabeled, unlabeled.weight)
        metrics = {
            "loss_labeled": mean_metric(ce_labeled, labeled.weight),
            "loss_unlabeled": mean_metric(ce_unlabeled, unlabeled.weight),
            "train_accuracy": accuracy_metric(logits, labeled.target),
            **unlabeled_metrics(weak, unlabeled.target, weight),
        }
        return loss, metrics, extra
