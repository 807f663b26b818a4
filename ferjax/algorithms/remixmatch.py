"""ReMixMatch (Berthelot et al. 2020, arXiv:1911.09785).

q_u = sharpen(N(p(weak(u)) p(y) / p~), T)        (distribution alignment, section 3.1; N sums to 1)
X', U' = MixUp of the labelled images' strong views with y, and of the weak and K strong views of
         each u with q_u, with partners from all of them                             (algorithm 1)
loss = mean_{X'} CE(y', p(x')) + r(t) lambda mean_{U'} CE(q', p(u'))
     + r(t) lambda_s mean_u CE(q_u, p(s_u)) + lambda_r mean_u CE(k_u, rotation(rot90^k_u(s_u)))

Section 3.3; s_u is the first strong view, before MixUp. One guess from the weak view serves all K
strong ones (augmentation anchoring). p(y) is the running average of the labelled images' classes,
p~ of the weak views' predictions; both start as plain means over the steps, for a rare class may be
missing from the first ones (the code: p~ over the last 128 steps from uniform). r rises linearly
over the first 1/64 of training, as in the code; k_u is drawn for each image (the code: a quarter of
the batch each). The strong views are RandAugment's, the paper's are CTAugment's.

`wrap` adds the rotation head, a dense layer on the penultimate vector. The forward for q, without
gradient, and those of s_u and its rotations leave the running statistics alone; the one of all
mixed images updates them. (The code updates them in its last forward only.)
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
    align,
    check_fields,
    cross_entropy,
    global_mean,
    mean_metric,
    mixup,
    moving_average,
    ramp_up,
    sharpen,
    weighted_mean,
)
from ferjax.config import UserError
from ferjax.models.layers import Dense, Wrapper, param_dtype


@dataclass(frozen=True)
class Algorithm(BaseAlgorithm):
    """ReMixMatch.

    Attributes:
      mu: unlabelled images a step for each labelled one.
      strong_views: K.
      temperature: T of the sharpening, above 0.
      alpha: of MixUp's Beta distribution, above 0.
      lambda_u: weight of the mixed unlabelled images.
      lambda_s: weight of the strong view before MixUp.
      lambda_r: weight of the rotation loss.
      warmup: share of training over which lambda_u and lambda_s rise from 0, in [0, 1].
      decay: of the average distributions, in [0, 1].
    """

    mu: int = 1
    strong_views: int = 8
    temperature: float = 0.5
    alpha: float = 0.75
    lambda_u: float = 1.5
    lambda_s: float = 0.5
    lambda_r: float = 0.5
    warmup: float = 1 / 64
    decay: float = 0.999
    labeled_views: ClassVar[tuple[str, ...]] = ("strong",)

    @property
    def unlabeled_views(self) -> tuple[str, ...]:  # type: ignore[override]
        """The weak view and K strong ones."""
        return ("weak", "strong", *(f"strong:{k}" for k in range(2, self.strong_views + 1)))

    def __post_init__(self) -> None:
        check_fields(self, lambda_u=1e6, lambda_s=1e6, lambda_r=1e6, warmup=1, decay=1)
        if min(self.temperature, self.alpha) <= 0:
            raise UserError("config.algorithm: temperature and alpha must be above 0")
        if self.strong_views < 1:
            raise UserError(
                f"config.algorithm.strong_views={self.strong_views}: it must be 1 or more"
            )

    def init_extra(self, num_classes: int, num_images: int) -> Any:
        """`labeled` (p(y)) and `unlabeled` (p~) [C]."""
        uniform = jnp.ones((num_classes,)) / num_classes
        return {"labeled": uniform, "unlabeled": jnp.copy(uniform)}

    def wrap(self, model: nn.Module) -> nn.Module:
        """Adds the rotation head."""
        return WithRotation(model)

    def loss(self, net: Net, batch: Batch, extra: Any, t: Time) -> tuple[jax.Array, Metrics, Any]:
        """See the module's docstring."""
        labeled, unlabeled = batch.labeled, batch.unlabeled
        assert unlabeled is not None
        names = self.unlabeled_views
        guess = net(unlabeled.views["weak"], keys=unlabeled.key("guess"), update=False)
        p = jax.nn.softmax(jax.lax.stop_gradient(guess))
        decay = jnp.minimum(self.decay, t.step / (t.step + 1))  # the plain mean at first
        extra = {
            name: moving_average(extra[name], global_mean(batch, values), decay)
            for name, values in (("labeled", labeled.target), ("unlabeled", p))
        }
        q = sharpen(align(p, extra["labeled"], extra["unlabeled"]), self.temperature)

        images = [labeled.views["strong"], *(unlabeled.views[v] for v in names)]
        keys = [labeled.key("mixup"), *(unlabeled.key(f"mixup/{v}") for v in names)]
        mixed, targets = mixup(batch, images, [labeled.target, *[q] * len(names)], keys, self.alpha)
        noise = [labeled.key("model"), *(unlabeled.key(f"model/{v}") for v in names)]
        logits = net(jnp.concatenate(mixed), keys=jnp.concatenate(noise))
        n = labeled.index.shape[0]

        strong = unlabeled.views["strong"]
        anchored = net(strong, keys=unlabeled.key("model/anchored"), update=False)
        turns = jax.vmap(lambda k: jax.random.randint(k, (), 0, 4))(unlabeled.key("turns"))
        turned = rotate(strong, turns)
        rotation = net(turned, keys=unlabeled.key("model/turned"), update=False, method="rotation")

        ce_labeled = cross_entropy(logits[:n], targets[0])
        ce_mixed = cross_entropy(logits[n:], jnp.concatenate(targets[1:]))
        ce_strong = cross_entropy(anchored, q)
        turn_target = jax.nn.one_hot(turns, 4, dtype=rotation.dtype)
        ce_rotation = cross_entropy(rotation, turn_target)
        weight = jnp.tile(unlabeled.weight, len(names))
        loss = self.lambda_u * weighted_mean(ce_mixed, weight)
        loss += self.lambda_s * weighted_mean(ce_strong, unlabeled.weight)
        loss *= ramp_up(t.progress, self.warmup)
        loss += weighted_mean(ce_labeled, labeled.weight)
        loss += self.lambda_r * weighted_mean(ce_rotation, unlabeled.weight)
        metrics = {
            "loss_labeled": mean_metric(ce_labeled, labeled.weight),
            "loss_unlabeled": mean_metric(ce_mixed, weight),
            "loss_strong": mean_metric(ce_strong, unlabeled.weight),
            "loss_rotation": mean_metric(ce_rotation, unlabeled.weight),
            "train_accuracy": accuracy_metric(logits[:n], labeled.target),
            "unlabeled_accuracy": accuracy_metric(q, unlabeled.target),
            "rotation_accuracy": accuracy_metric(rotation, turn_target),
        }
        return loss, metrics, extra


def rotate(images: jax.Array, turns: jax.Array) -> jax.Array:
    """Each square image of [N, S, S, C] turned by `turns` [N] quarter turns, counter-clockwise."""
    all_turns = jnp.stack([jnp.rot90(images, k, (1, 2)) for k in range(4)])
    return all_turns[turns, jnp.arange(len(turns))]


class WithRotation(Wrapper):
    """A model with a second head that names one of four rotations; its call is the model's."""

    def setup(self) -> None:
        """The head: 4 logits of the penultimate vector."""
        dtype = getattr(self.backbone, "dtype", jnp.float32)
        self.rotation_head = Dense(4, dtype=param_dtype(dtype))

    def rotation(
        self, x: jax.Array, train: bool = False, keys: jax.Array | None = None
    ) -> jax.Array:
        """Logits [N, 4] of images x [N, S, S, C]."""
        vector = self.head(self.features(x, train, keys), train, keys)[1]
        logits = self.rotation_head(vector)
        return logits.astype(param_dtype(logits.dtype))

    def __call__(
        self, x: jax.Array, train: bool = False, keys: jax.Array | None = None
    ) -> jax.Array:
        """Logits [N, num_classes] of images x [N, H, W, C]."""
        if self.is_initializing():
            self.rotation(x, train, keys)
        return self.backbone(x, train, keys)
