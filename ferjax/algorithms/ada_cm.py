"""Ada-CM, facial expressions with an adaptive confidence margin (Li et al. 2022, arXiv:2203.12341).

p_u = (p(weak_1(u)) + p(weak_2(u))) / 2, c = argmax p_u; u is in I if max p_u >= T_c, else in II
loss = lambda_x mean_b CE(y_b, p(weak(x_b))) + mean_u 1[u in I] CE(c, p(strong(u)))
     + lambda_c InfoNCE of the two weak views' features over II

T_c = max(floor, m_c scale / (1 + exp(-e))) after e epochs (section 3.2), m_c the mean confidence on
the labelled images of class c that are classified right; floor for a class that has none, and in
the first epoch. InfoNCE (the code's SimCLR form): both views of all images in II, on all devices,
are anchors; the other view is the positive, all others are negatives; features have length 1, dot
products are divided by .07, and the mean is over the anchors.

The code trains 20 epochs and, after each, runs the EMA model over the labelled images, without
augmentation. Here the `epochs` margins divide whatever the schedule is, and m_c gathers over each
division from the EMA model (evaluation mode) on the labelled weak views of the steps. In the code
the classifier, too, sees features of length 1; here the network stays as it is.

State: the margins, the division that they are of, and its sums. Labelled and both weak views have
forwards with gradients that update the running statistics; the strong one's does not (fixmatch.py:
"apart"; in the code it does).
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
    global_mean,
    hard_or_sharp,
    mean_metric,
    unit,
    unlabeled_metrics,
    weighted_mean,
)
from ferjax.config import UserError


@dataclass(frozen=True)
class Algorithm(BaseAlgorithm):
    """Ada-CM.

    Attributes:
      mu: unlabelled images a step for each labelled one.
      floor: the least margin, in [0, 1].
      scale: of the margins, in [0, 1].
      epochs: divisions of the schedule; margins change between them.
      lambda_x: weight of the labelled loss.
      lambda_c: weight of the contrastive loss.
      temperature: of the contrastive loss.
    """

    mu: int = 1
    floor: float = 0.8
    scale: float = 0.97
    epochs: int = 20
    lambda_x: float = 0.5
    lambda_c: float = 0.1
    temperature: float = 0.07
    unlabeled_views: ClassVar[tuple[str, ...]] = ("weak", "weak:2", "strong")

    def __post_init__(self) -> None:
        check_fields(self, floor=1, scale=1, epochs=1e6, lambda_x=1e6, lambda_c=1e6)
        if self.temperature <= 0:
            raise UserError(
                f"config.algorithm.temperature={self.temperature}: it must be greater than 0"
            )

    def init_extra(self, num_classes: int, num_images: int) -> Any:
        """`margin`, `sum`, `count` [C] and `epoch` int32 []."""
        zeros = jnp.zeros((num_classes,))
        return {
            "margin": zeros + self.floor,
            "sum": zeros,
            "count": jnp.copy(zeros),
            "epoch": jnp.zeros((), jnp.int32),
        }

    def margins(self, extra: Any, progress: Any) -> Any:
        """The state with new margins, and sums of 0, if a division has ended."""
        epoch = jnp.floor(progress * self.epochs).astype(jnp.int32)
        mean = extra["sum"] / jnp.maximum(extra["count"], 1)
        margin = jnp.maximum(mean * self.scale / (1 + jnp.exp(-1.0 * epoch)), self.floor)
        over = epoch != extra["epoch"]
        return {
            "margin": jnp.where(over, margin, extra["margin"]).astype(margin.dtype),
            "sum": jnp.where(over, 0, extra["sum"]),
            "count": jnp.where(over, 0, extra["count"]),
            "epoch": epoch,
        }

    def loss(self, net: Net, batch: Batch, extra: Any, t: Time) -> tuple[jax.Array, Metrics, Any]:
        """See the module's docstring."""
        labeled, unlabeled = batch.labeled, batch.unlabeled
        assert unlabeled is not None

        def both(view: str) -> tuple[jax.Array, jax.Array]:
            keys = unlabeled.key(f"model/{view}")
            fmap = net(unlabeled.views[view], keys=keys, method="features")
            return net(fmap, keys=keys, method="head")

        weak, features = zip(*(both(view) for view in ("weak", "weak:2")), strict=True)
        strong = net(unlabeled.views["strong"], keys=unlabeled.key("model/strong"), update=False)
        logits = net(labeled.views["weak"], keys=labeled.key("model"))

        extra = self.margins(extra, t.progress)
        p = jax.lax.stop_gradient((jax.nn.softmax(weak[0]) + jax.nn.softmax(weak[1])) / 2)
        mask = (jnp.max(p, -1) >= extra["margin"][jnp.argmax(p, -1)]).astype(p.dtype)
        ce_labeled = cross_entropy(logits, labeled.target)
        ce_unlabeled = cross_entropy(strong, hard_or_sharp(p, 0)) * mask
        contrast = info_nce(batch, features, 1 - mask, self.temperature)
        loss = self.lambda_x * weighted_mean(ce_labeled, labeled.weight)
        loss += weighted_mean(ce_unlabeled, unlabeled.weight) + self.lambda_c * contrast

        known = jax.nn.softmax(net.teacher(labeled.views["weak"]))
        right = hard_or_sharp(known, 0) * labeled.target
        size = batch.gather(labeled.weight).shape[0]
        extra["sum"] += size * global_mean(batch, right * known).astype(extra["sum"].dtype)
        extra["count"] += size * global_mean(batch, right).astype(extra["count"].dtype)
        metrics = {
            "loss_labeled": mean_metric(ce_labeled, labeled.weight),
            "loss_unlabeled": mean_metric(ce_unlabeled, unlabeled.weight),
            "loss_contrast": mean_metric(contrast[None]),
            "train_accuracy": accuracy_metric(logits, labeled.target),
            "margin": mean_metric(extra["margin"]),
            **unlabeled_metrics(p, unlabeled.target, mask),
        }
        return loss, metrics, extra


def info_nce(
    batch: Batch, features: tuple[jax.Array, ...], chosen: jax.Array, temperature: float
) -> jax.Array:
    """Mean over all devices' chosen images and views of -log softmax of the positive: [].

    Args:
      features: of two views of the unlabelled images, [N, d] each.
      chosen: [N], 1 for the images that take part, else 0.
    """
    assert batch.unlabeled is not None
    # In at least float32: similarities over a small temperature are large numbers.
    a, b = (unit(x.astype(jnp.promote_types(x.dtype, jnp.float32))) for x in features)
    taking = batch.gather(chosen)
    # gather carries gradients: an image is also a negative of other devices' images.
    pool = jnp.concatenate([batch.gather(a), batch.gather(b)])
    index = batch.unlabeled.index
    own = index[:, None] == batch.gather(index)
    none = jnp.zeros_like(own)
    own = jnp.block([[own, none], [none, own]])
    allowed = jnp.tile(taking > 0, 2) & ~own
    # Not -inf: an anchor without anything to compare to must have no NaN in its gradient.
    products = jnp.matmul(jnp.concatenate([a, b]), pool.T, precision=jax.lax.Precision.HIGHEST)
    similar = jnp.where(allowed, products / temperature, -1e9)
    positive = jnp.tile(jnp.sum(a * b, -1), 2) / temperature
    loss = jax.nn.logsumexp(similar, axis=-1) - positive
    share = jnp.maximum(global_mean(batch, chosen), 1 / len(taking))
    return jnp.mean(loss * jnp.tile(chosen, 2)) / share
