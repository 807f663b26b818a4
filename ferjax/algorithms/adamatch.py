"""AdaMatch (Berthelot et al. 2022, arXiv:2106.04732), with labelled images as its source.

z_x = z' + (z'' - z') l,  l ~ U(0, 1) for each logit: z' of the labelled weak and strong views in a
      forward with the unlabelled ones, z'' of them alone (random logit interpolation, section 3.2)
q_u = N(p(weak(u)) E[p(weak(x))] / E[p(weak(u))])   (distribution alignment; N scales to sum 1)
loss = 1/2 mean_b [CE(y_b, z_weak) + CE(y_b, z_strong)]
     + lambda(t) mean_u 1[max q_u >= tau mean_b max p_weak(x_b)] CE(argmax q_u, p(strong(u)))
lambda(t) = lambda (1/2 - 1/2 cos(min(pi, 2 pi t)))

Sections 3.1-3.4. As in its code: hard targets (the paper: q itself), half the labelled sum, and
expectations that run on. Both are exponential averages here, from the first step's values (the code
averages the unlabelled ones over the last 128 steps, and starts both at 1/C). The threshold is
relative to this step's labelled images. Expectations are over all devices.

The forward of the labelled images alone leaves the running statistics alone; the joint one, which
also makes q, updates them. q has no gradient; both branches of z_x do.
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
    global_mean,
    hard_or_sharp,
    mean_metric,
    moving_average,
    unlabeled_metrics,
    weighted_mean,
)


@dataclass(frozen=True)
class Algorithm(BaseAlgorithm):
    """AdaMatch.

    Attributes:
      mu: unlabelled images a step for each labelled one.
      threshold: tau, relative to the mean confidence on labelled images, in [0, 1].
      lambda_u: weight of the unlabelled loss after half of the training.
      decay: of the average distributions, in [0, 1].
    """

    mu: int = 3
    threshold: float = 0.9
    lambda_u: float = 1.0
    decay: float = 0.999
    labeled_views: ClassVar[tuple[str, ...]] = ("weak", "strong")
    unlabeled_views: ClassVar[tuple[str, ...]] = ("weak", "strong")

    def __post_init__(self) -> None:
        check_fields(self, threshold=1, lambda_u=1e6, decay=1)

    def init_extra(self, num_classes: int, num_images: int) -> Any:
        """`labeled` and `unlabeled` [C]: average predictions on weak views."""
        uniform = jnp.ones((num_classes,)) / num_classes
        return {"labeled": uniform, "unlabeled": jnp.copy(uniform)}

    def loss(self, net: Net, batch: Batch, extra: Any, t: Time) -> tuple[jax.Array, Metrics, Any]:
        """See the module's docstring."""
        labeled, unlabeled = batch.labeled, batch.unlabeled
        assert unlabeled is not None
        n = labeled.index.shape[0]
        views = [part.views[v] for part in (labeled, unlabeled) for v in ("weak", "strong")]
        keys = [part.key(f"model/{v}") for part in (labeled, unlabeled) for v in ("weak", "strong")]
        alone = net(jnp.concatenate(views[:2]), keys=jnp.concatenate(keys[:2]), update=False)
        logits = net(jnp.concatenate(views), keys=jnp.concatenate(keys))
        logits, rest = jnp.split(logits, (2 * n,))
        weak, strong = jnp.split(jax.lax.stop_gradient(rest), 2)[0], jnp.split(rest, 2)[1]
        shape = (2, logits.shape[-1])
        mix = jax.vmap(lambda k: jax.random.uniform(k, shape))(labeled.key("interpolate"))
        mix = jnp.concatenate([mix[:, 0], mix[:, 1]]).astype(logits.dtype)
        logits = logits + (alone - logits) * mix
        x_weak, x_strong = jnp.split(logits, 2)

        p_labeled = jax.nn.softmax(jax.lax.stop_gradient(x_weak))
        q = jax.nn.softmax(weak)
        decay = jnp.where(t.step == 0, 0.0, self.decay)
        extra = {
            name: moving_average(extra[name], global_mean(batch, p), decay)
            for name, p in (("labeled", p_labeled), ("unlabeled", q))
        }
        q = align(q, extra["labeled"], extra["unlabeled"])
        threshold = self.threshold * global_mean(batch, jnp.max(p_labeled, -1))
        mask = (jnp.max(q, -1) >= threshold).astype(q.dtype)

        ce_labeled = (
            cross_entropy(x_weak, labeled.target) + cross_entropy(x_strong, labeled.target)
        ) / 2
        ce_unlabeled = cross_entropy(strong, hard_or_sharp(q, 0)) * mask
        ramp = 0.5 - 0.5 * jnp.cos(jnp.minimum(jnp.pi, 2 * jnp.pi * t.progress))
        loss = weighted_mean(ce_labeled, labeled.weight)
        loss += self.lambda_u * ramp * weighted_mean(ce_unlabeled, unlabeled.weight)
        metrics = {
            "loss_labeled": mean_metric(ce_labeled, labeled.weight),
            "loss_unlabeled": mean_metric(ce_unlabeled, unlabeled.weight),
            "train_accuracy": accuracy_metric(x_weak, labeled.target),
            "threshold": mean_metric(threshold[None]),
            **unlabeled_metrics(q, unlabeled.target, mask),
        }
        return loss, metrics, extra
