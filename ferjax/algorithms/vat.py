"""Virtual adversarial training (Miyato et al. 2018, arXiv:1704.03976).

loss = mean_b CE(y_b, p(weak(x_b))) + lambda r(t) mean_u KL(sg p(x_u), p(x_u + eps d_u))
     + lambda_entropy mean_u H(p(x_u)),   x_u = weak(u)

d_u, |d_u| = 1, is the direction that changes the prediction most: one step of the power method
(eq. 11-12) from Gaussian noise. The references take the gradient of KL(p(x), p(x + xi d)) with
xi = 1e-6 for the product of KL's Hessian and d. In float32 that is mostly rounding noise, since so
small a step hardly changes the logits' digits, and no xi serves both float32 and bfloat16. Here the
limit xi -> 0 is computed, J^T (diag p - p p^T) J d with J = d logits / d x, for the same work. It
takes reverse mode alone, which is all that the convolutions allow.

The entropy term and the linear ramp r are those of the later codes (Oliver et al. 2018); the paper
has the former as "VAT + EntMin".

All unlabelled forwards have the same dropout, are normalised by their own batch and leave the
running statistics alone, as in the reference codes; so does the one for d_u, which has no gradient.
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
    entropy,
    mean_metric,
    ramp_up,
    unit,
    weighted_mean,
)


@dataclass(frozen=True)
class Algorithm(BaseAlgorithm):
    """VAT.

    Attributes:
      mu: unlabelled images a step for each labelled one.
      epsilon: length of the perturbation of a normalised image.
      lambda_u: weight of the divergence.
      lambda_entropy: weight of the entropy.
      warmup: share of training over which lambda_u rises from 0, in [0, 1].
    """

    mu: int = 1
    epsilon: float = 6.0
    lambda_u: float = 0.3
    lambda_entropy: float = 0.06
    warmup: float = 0.4
    unlabeled_views: ClassVar[tuple[str, ...]] = ("weak",)

    def __post_init__(self) -> None:
        check_fields(self, epsilon=1e6, lambda_u=1e6, lambda_entropy=1e6, warmup=1)

    def loss(self, net: Net, batch: Batch, extra: Any, t: Time) -> tuple[jax.Array, Metrics, Any]:
        """See the module's docstring."""
        labeled, unlabeled = batch.labeled, batch.unlabeled
        assert unlabeled is not None
        images, keys = unlabeled.views["weak"], unlabeled.key("model")

        def student(x: jax.Array) -> jax.Array:
            return net(x, keys=keys, update=False)

        logits = net(labeled.views["weak"], keys=labeled.key("model"))
        weak, pull = jax.vjp(student, images)
        noise = jax.vmap(lambda k: jax.random.normal(k, images.shape[1:]))(unlabeled.key("vat"))
        direction = worst_direction(weak, pull, unit(noise.astype(images.dtype)))
        moved = student(images + jax.lax.stop_gradient(self.epsilon * direction))

        target = jax.lax.stop_gradient(weak)
        ce_labeled = cross_entropy(logits, labeled.target)
        divergence = cross_entropy(moved, jax.nn.softmax(target)) - entropy(target)
        spread = entropy(weak)
        weight = self.lambda_u * ramp_up(t.progress, self.warmup)
        loss = weighted_mean(ce_labeled, labeled.weight)
        loss += weight * weighted_mean(divergence, unlabeled.weight)
        loss += self.lambda_entropy * weighted_mean(spread, unlabeled.weight)
        metrics = {
            "loss_labeled": mean_metric(ce_labeled, labeled.weight),
            "loss_unlabeled": mean_metric(divergence, unlabeled.weight),
            "entropy": mean_metric(spread, unlabeled.weight),
            "train_accuracy": accuracy_metric(logits, labeled.target),
            "unlabeled_accuracy": accuracy_metric(weak, unlabeled.target),
        }
        return loss, metrics, extra


def worst_direction(logits: jax.Array, pull: Any, direction: jax.Array) -> jax.Array:
    """One power step: unit(J^T (diag p - p p^T) J d).

    Args:
      logits: [N, C].
      pull: u [N, C] -> (J^T u,), from `jax.vjp` of the logits by the images.
      direction: d, of the images' shape [N, H, W, C'].
    """
    # J d is the transpose of `pull`, so no forward mode is needed.
    (push,) = jax.vjp(lambda u: pull(u)[0], jnp.zeros_like(logits))[1](direction)
    p = jax.nn.softmax(logits)
    fisher = p * (push - jnp.sum(p * push, -1, keepdims=True))
    return unit(pull(fisher)[0])
