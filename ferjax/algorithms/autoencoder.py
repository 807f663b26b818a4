"""An autoencoder: the network's features, learnt from all images without their labels.

loss = mean_i |D(f(x_i + noise n_i)) - x_i|^2 / pixels + mean_b CE(y_b, h(sg f(x_b + noise n_b)))

x are weak views of labelled and unlabelled images, normalised; f is the model's `features` and h
its `head`; n ~ N(0, 1) per pixel. noise = 0 is the plain autoencoder, above 0 the denoising one
(Vincent et al. 2008). Predicting the mean of all pixels costs about 1 where `config.data.mean` and
`std` are the data's. `wrap` adds the decoder D: 3x3 convolutions, each but the last followed by
ReLU and doubled sides, and at the end a sub-pixel one (Shi et al. 2016, arXiv:1609.05158).

The second term trains a probe: no gradient of it, sg, reaches f, which knows no label. So what the
tables of such a run show is how well the classifier reads the classes off features that were
learnt by reconstruction alone, not what the method is for. That is to start another run:

    python -m ferjax.main --config=configs/fixmatch.py --config.init_from=runs/autoencoder

One forward of all images, which updates the running statistics.
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
from ferjax.models.layers import Conv, Wrapper, param_dtype


@dataclass(frozen=True)
class Algorithm(BaseAlgorithm):
    """Autoencoder pre-training.

    Attributes:
      mu: unlabelled images a step for each labelled one.
      noise: standard deviation of the noise on the encoder's input, in normalised units.
      width: channels of the decoder.
    """

    mu: int = 7
    noise: float = 0.0
    width: int = 64
    unlabeled_views: ClassVar[tuple[str, ...]] = ("weak",)

    def __post_init__(self) -> None:
        check_fields(self, noise=1e3)
        if self.width < 1:
            raise UserError(f"config.algorithm.width={self.width}: it must be 1 or more")

    def wrap(self, model: nn.Module) -> nn.Module:
        """Adds the decoder."""
        return WithDecoder(model, self.width)

    def loss(self, net: Net, batch: Batch, extra: Any, t: Time) -> tuple[jax.Array, Metrics, Any]:
        """See the module's docstring."""
        labeled, unlabeled = batch.labeled, batch.unlabeled
        assert unlabeled is not None
        images = jnp.concatenate([labeled.views["weak"], unlabeled.views["weak"]])
        noise = jnp.concatenate([labeled.key("noise"), unlabeled.key("noise")])
        normal = jax.vmap(lambda k: jax.random.normal(k, images.shape[1:], images.dtype))
        noisy = images + self.noise * normal(noise) if self.noise else images
        keys = jnp.concatenate([labeled.key("model"), unlabeled.key("model")])
        made, logits = net(noisy, keys=keys, method="reconstruct")
        squares = jnp.mean((made - images.astype(made.dtype)) ** 2, axis=(1, 2, 3))
        logits = logits[: len(labeled.index)]
        ce_labeled = cross_entropy(logits, labeled.target)
        weight = jnp.concatenate([labeled.weight, unlabeled.weight])
        loss = weighted_mean(squares, weight) + weighted_mean(ce_labeled, labeled.weight)
        metrics = {
            "loss_labeled": mean_metric(ce_labeled, labeled.weight),
            "loss_unlabeled": mean_metric(squares, weight),
            "train_accuracy": accuracy_metric(logits, labeled.target),
        }
        return loss, metrics, extra


class WithDecoder(Wrapper):
    """A model with a decoder of its features; its call is the model's."""

    width: int

    def setup(self) -> None:
        """The decoder."""
        self.decoder = Decoder(self.width, getattr(self.backbone, "dtype", jnp.float32))

    def reconstruct(
        self, x: jax.Array, train: bool = False, keys: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """x [N, H, W, C] -> its reconstruction and the probe's logits [N, num_classes]."""
        fmap = self.features(x, train, keys)
        return self.decoder(fmap, x.shape), self.head(jax.lax.stop_gradient(fmap), train, keys)[0]

    def __call__(
        self, x: jax.Array, train: bool = False, keys: jax.Array | None = None
    ) -> jax.Array:
        """Logits [N, num_classes] of images x [N, H, W, C]."""
        if self.is_initializing():
            self.reconstruct(x, train, keys)
        return self.backbone(x, train, keys)


class Decoder(nn.Module):
    """A feature map back to an image."""

    width: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Feature map [N, h, w, c] -> images of `shape` (N, H, W, C), at least float32."""
        n, height, width, channels = shape
        block = 2 if 2 * x.shape[1] <= height else 1
        grid = -(-height // block), -(-width // block)
        while 2 * x.shape[1] <= grid[0]:
            x = nn.relu(Conv(self.width, 3, use_bias=True, dtype=self.dtype)(x))
            x = x.repeat(2, 1).repeat(2, 2)
        if x.shape[1:3] != grid:
            x = jax.image.resize(x, (n, *grid, x.shape[3]), "linear")
        x = Conv(channels * block**2, 3, use_bias=True, dtype=self.dtype)(x)
        x = x.reshape(n, *grid, block, block, channels).transpose(0, 1, 3, 2, 4, 5)
        x = x.reshape(n, grid[0] * block, grid[1] * block, channels)
        return x[:, :height, :width].astype(param_dtype(self.dtype))
