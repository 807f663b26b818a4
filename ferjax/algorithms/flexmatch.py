"""FlexMatch, FixMatch with curriculum pseudo-labelling (Zhang et al. 2021, arXiv:2110.08263).

loss = mean_b CE(y_b, p(weak(x_b)))
     + lambda mean_u 1[max q_u >= tau_c(u)] CE(argmax q_u, p(strong(u))),  q_u = sg p(weak(u))
tau_c = tau M(b_c),   M(b) = b / (2 - b),   b_c = s_c / max(max_c s_c, s_unused)    (eq. 5-7, 11-12)

c(u) = argmax q_u; s_c is the number of unlabelled images whose latest confident class (max q >=
tau) is c, s_unused of those that have had none. The thresholds of a step come from the state before
it (algorithm 1), so in the first step all are 0. The second mean is over all unlabelled images.

State: for each image its latest confident class, -1 for none yet, -2 for not yet drawn (labelled
images stay so). As in the paper's code, but for s_unused before every image has been drawn once:
there undrawn images count as unused. The state knows no more than which rows have been drawn.

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
    hard_or_sharp,
    mean_metric,
    unlabeled_metrics,
    weighted_mean,
)

UNUSED, UNDRAWN = -1, -2


@dataclass(frozen=True)
class Algorithm(BaseAlgorithm):
    """FlexMatch.

    Attributes:
      mu: unlabelled images a step for each labelled one.
      threshold: tau, the highest threshold of a class, in [0, 1].
      lambda_u: weight of the unlabelled loss.
      temperature: 0 for hard pseudo-labels, else T of sharpened ones.
      forward: "joint", "split" or "apart".
    """

    mu: int = 7
    threshold: float = 0.95
    lambda_u: float = 1.0
    temperature: float = 0.0
    forward: str = "split"
    unlabeled_views: ClassVar[tuple[str, ...]] = ("weak", "strong")

    def __post_init__(self) -> None:
        check_fields(self, threshold=1, lambda_u=1e6, temperature=1e6)

    def init_extra(self, num_classes: int, num_images: int) -> Any:
        """`latest`: int32 [num_images]."""
        return {"latest": jnp.full((num_images,), UNDRAWN, jnp.int32)}

    def loss(self, net: Net, batch: Batch, extra: Any, t: Time) -> tuple[jax.Array, Metrics, Any]:
        """See the module's docstring."""
        labeled, unlabeled = batch.labeled, batch.unlabeled
        assert unlabeled is not None
        logits, weak, strong = forward_views(net, batch, self.forward)
        weak = jax.lax.stop_gradient(weak)

        confidence, guess = jnp.max(jax.nn.softmax(weak), -1), jnp.argmax(weak, -1)
        thresholds = self.threshold * learning_status(extra["latest"], weak.shape[-1])
        mask = (confidence >= thresholds[guess]).astype(weak.dtype)
        ce_labeled = cross_entropy(logits, labeled.target)
        ce_unlabeled = cross_entropy(strong, hard_or_sharp(weak, self.temperature)) * mask
        loss = weighted_mean(ce_labeled, labeled.weight)
        loss += self.lambda_u * weighted_mean(ce_unlabeled, unlabeled.weight)

        news = jnp.where(confidence >= self.threshold, guess, UNUSED)
        latest = record(extra["latest"], batch.gather(unlabeled.index), batch.gather(news))
        metrics = {
            "loss_labeled": mean_metric(ce_labeled, labeled.weight),
            "loss_unlabeled": mean_metric(ce_unlabeled, unlabeled.weight),
            "train_accuracy": accuracy_metric(logits, labeled.target),
            "threshold": mean_metric(thresholds),
            **unlabeled_metrics(weak, unlabeled.target, mask),
        }
        return loss, metrics, {"latest": latest}


def learning_status(latest: jax.Array, num_classes: int) -> jax.Array:
    """M(b_c) [C] in [0, 1] from each image's latest confident class [num_images]."""
    counts = jnp.sum(latest[:, None] == jnp.arange(num_classes), axis=0)
    most = jnp.maximum(jnp.max(counts), jnp.sum(latest == UNUSED))
    share = counts / jnp.maximum(most, 1)
    return share / (2 - share)


def record(latest: jax.Array, index: jax.Array, news: jax.Array) -> jax.Array:
    """Writes the classes `news` [M] (or UNUSED) of the images `index` [M], from all devices.

    An image that is in the batch twice gets the later one: the order of a scatter's writes is not
    defined, so the place in the batch decides, by a maximum, and replicas stay equal.
    """
    place = jnp.arange(len(news), dtype=jnp.int32)
    last = jnp.full(latest.shape, -1).at[index].max(jnp.where(news >= 0, place, -1))
    drawn = latest.at[index].max(UNUSED)
    return jnp.where(last >= 0, news[jnp.maximum(last, 0)], drawn).astype(latest.dtype)
