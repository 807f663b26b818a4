"""The ladder network (Rasmus et al. 2015, arXiv:1507.02672).

loss = mean_b CE(y_b, p~(weak(x_b))) + sum_l lambda_l mean_u |z_l - (z^_l - mean_l)/std_l|^2 / d_l

Algorithm 1. p~ is the noisy encoder's prediction: N(0, sigma^2) is added to the image and after
every normalisation. z_l, mean_l and std_l are the clean encoder's, whose weights are the same; z^_l
is what the decoder makes of the noisy encoder's z~_l and of z^_{l+1}. d_l is the number of units of
layer l. ferjax/models/ladder.py says what the layers of each network are, decoder.py how they are
undone and what the denoising functions are.

Labelled and unlabelled images are normalised apart. As in the reference code the second term is of
unlabelled images only, so give it all images (`data.unlabeled=all`) to have it as in the paper, and
gradients flow into the clean encoder too. The clean encoder runs on unlabelled images only, and
its forward updates the running statistics, with which evaluation normalises (the reference code:
those of labelled images). The top layer has scale and bias as every other (there: an option).

The published weights, (1000, 10, .1, .1 ...), are for pixels in [0, 1] of mostly black digits; with
standardised pixels all layers cost about the same, and lambda_0 of 1 to 10 is as much.
`cost_layers=top` with weights=(1,) is the Gamma-model: no decoder but the top's denoising function.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
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
    mean_metric,
    weighted_mean,
)
from ferjax.config import UserError
from ferjax.models.decoder import DENOISE
from ferjax.models.ladder import NORMS, Ladder


@dataclass(frozen=True)
class Algorithm(BaseAlgorithm):
    """Ladder network.

    Attributes:
      mu: unlabelled images a step for each labelled one.
      sigma: standard deviation of the noise.
      denoise: vanilla | gaussian | seed | none, see `ferjax.models.decoder.Combinator`.
      cost_layers: "all", "top", or layers by name or number (0 is the image), as in "0 conv_4".
      weights: lambda_0, lambda_1 ... from the image upwards; the last holds for all further layers.
      norms: of layers without BatchNorm: added | kept, see ferjax/models/ladder.py.
    """

    mu: int = 1
    sigma: float = 0.3
    denoise: str = "vanilla"
    cost_layers: str = "all"
    weights: tuple[float, ...] = (1000.0, 10.0, 0.1)
    norms: str = "added"
    unlabeled_views: ClassVar[tuple[str, ...]] = ("weak",)

    def __post_init__(self) -> None:
        check_fields(self, sigma=1e6)
        for name, choices in (("denoise", DENOISE), ("norms", NORMS)):
            if (value := getattr(self, name)) not in choices:
                raise UserError(f"config.algorithm.{name}={value}: use {', '.join(choices)}")
        if not self.weights or min(self.weights) < 0:
            raise UserError(f"config.algorithm.weights={self.weights}: give numbers of 0 or more")

    def wrap(self, model: nn.Module) -> nn.Module:
        """Adds the decoder, and a BatchNorm where norms="added"."""
        return Ladder(model, self.sigma, self.denoise, self.cost_layers, self.weights, self.norms)

    def loss(self, net: Net, batch: Batch, extra: Any, t: Time) -> tuple[jax.Array, Metrics, Any]:
        """See the module's docstring."""
        labeled, unlabeled = batch.labeled, batch.unlabeled
        assert unlabeled is not None
        images = unlabeled.views["weak"]
        clean = net(images, method="clean")
        noisy = net(images, keys=unlabeled.key("model"), method="noisy", update=False)
        both: Any = (noisy, clean)
        costs = net(both, method="costs", update=False)
        logits = net(
            labeled.views["weak"], keys=labeled.key("model"), method="noisy", update=False
        ).logits

        ce_labeled = cross_entropy(logits, labeled.target)
        denoising = sum((weight * cost for weight, cost in costs.values()), jnp.zeros(len(images)))
        loss = weighted_mean(ce_labeled, labeled.weight)
        loss += weighted_mean(denoising, unlabeled.weight)
        metrics = {
            "loss_labeled": mean_metric(ce_labeled, labeled.weight),
            "loss_unlabeled": mean_metric(denoising, unlabeled.weight),
            "train_accuracy": accuracy_metric(logits, labeled.target),
            "unlabeled_accuracy": accuracy_metric(clean.logits, unlabeled.target),
        }
        for name, (_, cost) in costs.items():
            metrics[f"cost_{name}"] = mean_metric(cost, unlabeled.weight)
        return loss, metrics, extra
