"""The contract between the engine and a training method, and the losses that methods share.

The engine makes a `Batch` and a `Net`, calls `Algorithm.loss` on each device inside the step, and
averages the gradients over the devices. A method is one file with a frozen dataclass `Algorithm`.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from ferjax.config import UserError

Metrics = dict[str, tuple[jax.Array, jax.Array]]


class Part(flax.struct.PyTreeNode):
    """The labelled or the unlabelled images of one device's share of a step.

    Attributes:
      views: name -> float [n, H, W, C], normalised.
      target: float [n, classes], one-hot or soft. Of unlabelled images it is the hidden truth, for
        measurement only: a loss that reads it cheats; zeros where the data set has no label.
      weight: float [n], of each image in the loss; the engine gives each 1.
      index: int32 [n], the image's row in the training arrays.
      keys: typed random keys [n], one for each global position in the batch.
    """

    views: Mapping[str, jax.Array]
    target: jax.Array
    weight: jax.Array
    index: jax.Array
    keys: jax.Array

    def key(self, name: str) -> jax.Array:
        """Random keys [n] for one purpose: the same whatever the number of devices."""
        return jax.vmap(lambda k: jax.random.fold_in(k, zlib.crc32(name.encode())))(self.keys)


class Batch(flax.struct.PyTreeNode):
    """What one device sees of a step; `gather` collects [n, ...] from all devices in order.

    `class_counts` are the labelled images of each class in the whole set (votes may make fractions
    of them); () where they are not known.
    """

    labeled: Part
    unlabeled: Part | None
    gather: Callable[[jax.Array], jax.Array] = flax.struct.field(pytree_node=False)
    class_counts: tuple[float, ...] = flax.struct.field(pytree_node=False, default=())


class Time(NamedTuple):
    """Where training is: `step` int32 [], `progress` float [] in [0, 1)."""

    step: jax.Array
    progress: jax.Array


class TrainingSet(NamedTuple):
    """The training images, for what is read from files about them.

    Attributes:
      rows: int32 [N], the official row of each image, ascending.
      labeled: int32 [n], positions of the labelled ones.
      unlabeled: int32 [m], positions of those that are used without label.
      class_names: of the network.
      digest: of the data set; equal digests mean equal rows, labels and pixels.
    """

    rows: np.ndarray
    labeled: np.ndarray
    unlabeled: np.ndarray
    class_names: tuple[str, ...]
    digest: str


class Net(Protocol):
    """The network bound to this step's parameters.

    A call runs the student in train mode and records batch statistics; `update=False` records
    none and is pure: the only form allowed inside an inner gradient or transform. `method` names
    another method of the model, whose result is returned as it is.
    """

    def __call__(
        self,
        images: jax.Array,
        *,
        keys: jax.Array | None = None,
        update: bool = True,
        method: str = "__call__",
    ) -> Any:
        """Logits float [N, classes] of images [N, H, W, C]; `keys` [N] for dropout and noise."""
        ...

    def teacher(self, images: jax.Array) -> jax.Array:
        """Logits of the EMA weights and statistics in evaluation mode."""
        ...


@dataclass(frozen=True)
class BaseAlgorithm:
    """What every method may override; fields are hyperparameters with published defaults.

    Attributes:
      mu: unlabelled images a step for each labelled one; 0 for none. A field where it is not 0.
      labeled_views: the views of labelled images; a name is a key of `config.views`, and
        "weak:2" is a second, independent draw of the view "weak".
      unlabeled_views: the same for unlabelled images.
    """

    mu = 0  # not a field here: a method without unlabelled images has no such key
    labeled_views: ClassVar[tuple[str, ...]] = ("weak",)
    unlabeled_views: ClassVar[tuple[str, ...]] = ()

    def init_extra(self, num_classes: int, num_images: int) -> Any:
        """State of the method's own that must survive a restart: a pytree of arrays, or {}."""
        del num_classes, num_images
        return {}

    def read_extra(self, extra: Any, train: TrainingSet) -> Any:
        """Fills `extra` [host arrays] from files, of the same shapes; not called on a restart."""
        del train
        return extra

    def wrap(self, model: nn.Module) -> nn.Module:
        """Adds trainable parts to the network; the result must have the same call."""
        return model

    def loss(self, net: Net, batch: Batch, extra: Any, t: Time) -> tuple[jax.Array, Metrics, Any]:
        """The local mean loss [], metrics as (sum, weight) pairs, and the new extra."""
        raise TypeError(f"{type(self).__name__} defines no loss")


def cross_entropy(logits: jax.Array, target: jax.Array) -> jax.Array:
    """-sum_c target_c log softmax(logits)_c; [N, C] and [N, C] -> [N]."""
    return -jnp.sum(target * jax.nn.log_softmax(logits), axis=-1)


def squared_hinge(logits: jax.Array, target: jax.Array) -> jax.Array:
    """L2-SVM, one class against the rest (Tang 2013, eq. 10): [N, C] and [N, C] -> [N].

    sum_c max(0, 1 - s_c z_c)^2 with s_c = 1 for the image's class and -1 for the others; of a soft
    target the mean over its classes: sum_c y_c max(0, 1 - z_c)^2 + (1 - y_c) max(0, 1 + z_c)^2. Its
    margin term |w|^2 / 2 is the weight decay of the last layer.
    """
    own, other = jax.nn.relu(1 - logits) ** 2, jax.nn.relu(1 + logits) ** 2
    return jnp.sum(target * own + (1 - target) * other, axis=-1)


def class_prior(batch: Batch, like: jax.Array) -> jax.Array:
    """Shares of the classes among the labelled images, [C]; equal ones where they are not known."""
    counts = jnp.asarray(batch.class_counts or (1.0,) * like.shape[-1], like.dtype)
    return counts / counts.sum()


def class_weights(batch: Batch, target: jax.Array, kind: str) -> jax.Array:
    """Weights of images by the classes of their targets: [N, C] -> [N].

    "balanced" is in inverse proportion to a class's labelled images n_c; "effective" to
    1 - beta^n_c (Cui et al. 2019, eq. 2; its beta is free, here 1 - 1/n with n the mean of n_c).
    Over the labelled images the mean weight is 1.
    """
    prior = class_prior(batch, target)
    number = prior
    if kind == "effective":
        mean = max(sum(batch.class_counts) / target.shape[-1], 2.0)
        number = -jnp.expm1(prior * target.shape[-1] * mean * jnp.log1p(-1 / mean))
    weights = jnp.where(prior > 0, 1 / jnp.where(prior > 0, number, 1.0), 0.0)
    weights /= jnp.sum(prior * weights)
    return jnp.matmul(target, weights, precision=jax.lax.Precision.HIGHEST)


def adjust_logits(batch: Batch, logits: jax.Array, tau: float) -> jax.Array:
    """z + tau log prior, for the loss alone (Menon et al. 2021, eq. 10): [N, C] -> [N, C].

    The network then predicts as if classes were equally frequent. A class without labelled images
    counts as one with a thousandth of the mean.
    """
    prior = class_prior(batch, logits)
    return logits + tau * jnp.log(jnp.maximum(prior, 1e-3 / logits.shape[-1]))


def entropy(logits: jax.Array) -> jax.Array:
    """-sum_c p_c log p_c of p = softmax(logits); [N, C] -> [N]."""
    return -jnp.sum(jax.nn.softmax(logits) * jax.nn.log_softmax(logits), axis=-1)


def squared_distance(logits: jax.Array, target: jax.Array) -> jax.Array:
    """mean_c (softmax(logits)_c - target_c)^2; [N, C] and [N, C] -> [N]."""
    return jnp.mean((jax.nn.softmax(logits) - target) ** 2, axis=-1)


def weighted_mean(values: jax.Array, weight: jax.Array) -> jax.Array:
    """mean(values * weight) over the images: [N], [N] -> []."""
    return jnp.mean(values * weight)


def mean_metric(values: jax.Array, weight: jax.Array | float = 1.0) -> tuple[jax.Array, jax.Array]:
    """The pair (sum, weight) of a weighted mean over [N] values."""
    weight = jnp.broadcast_to(jnp.asarray(weight, values.dtype), values.shape)
    return jnp.sum(values * weight), jnp.sum(weight)


def accuracy_metric(logits: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The pair (sum, weight) of top-1 accuracy: [N, C], [N, C] -> ([], []).

    Images without a known label (a target of zeros) have no weight.
    """
    correct = jnp.argmax(logits, -1) == jnp.argmax(target, -1)
    return mean_metric(correct.astype(logits.dtype), is_known(target).astype(logits.dtype))


def is_known(target: jax.Array) -> jax.Array:
    """Whether an image's label is known: targets [N, C] -> bool [N]; those of zeros are not."""
    return jnp.any(target > 0, axis=-1)


def pseudo_labels(
    logits: jax.Array, threshold: float, temperature: float
) -> tuple[jax.Array, jax.Array]:
    """Targets [N, C] and mask [N] (0 or 1) from weak logits [N, C]; no gradient flows back."""
    logits = jax.lax.stop_gradient(logits)
    confidence = jnp.max(jax.nn.softmax(logits), axis=-1)
    return hard_or_sharp(logits, temperature), (confidence >= threshold).astype(logits.dtype)


def hard_or_sharp(logits: jax.Array, temperature: float) -> jax.Array:
    """Targets [N, C] from logits [N, C]: softmax(logits / T), or one-hot argmax where T is 0."""
    if temperature > 0:
        return jax.nn.softmax(logits / temperature)
    return jax.nn.one_hot(jnp.argmax(logits, -1), logits.shape[-1], dtype=logits.dtype)


def sharpen(p: jax.Array, temperature: float) -> jax.Array:
    """p^(1/T) with rows that sum to 1 (MixMatch, eq. 7): [N, C] -> [N, C]."""
    return jax.nn.softmax(jnp.log(p) / temperature)  # a power of p might underflow


def unit(x: jax.Array) -> jax.Array:
    """Each row of [N, ...] scaled to length 1, or 0 if it is 0."""
    full = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    axes = range(1, x.ndim)
    # The largest number first: squares of small ones would underflow. 1 for 0: no NaN's gradient.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(full), axes, keepdims=True))
    full = full / jnp.where(largest > 0, largest, 1)
    squares = jnp.sum(full**2, axes, keepdims=True)
    return (full * jax.lax.rsqrt(jnp.where(squares > 0, squares, 1))).astype(x.dtype)


def forward_views(net: Net, batch: Batch, form: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Logits of labelled weak [n, C], unlabelled weak [m, C] and unlabelled strong views [m, C].

    `form` is "joint", "split" or "apart": see fixmatch.py for what each normalises together and
    which forwards update the running statistics. The caller stops the weak logits' gradient.
    """
    labeled, unlabeled = batch.labeled, batch.unlabeled
    assert unlabeled is not None
    n, m = labeled.index.shape[0], unlabeled.index.shape[0]
    views = [labeled.views["weak"], unlabeled.views["strong"], unlabeled.views["weak"]]
    keys = [labeled.key("model"), unlabeled.key("model/strong"), unlabeled.key("model/weak")]
    if form == "joint":
        logits = net(jnp.concatenate(views), keys=jnp.concatenate(keys))
        logits, strong, weak = jnp.split(logits, (n, n + m))
    elif form == "split":
        weak = net(views[2], keys=keys[2])
        logits = net(jnp.concatenate(views[:2]), keys=jnp.concatenate(keys[:2]))
        logits, strong = jnp.split(logits, (n,))
    else:
        weak = net(views[2], keys=keys[2])
        strong = net(views[1], keys=keys[1], update=False)
        logits = net(views[0], keys=keys[0])
    return logits, weak, strong


def unlabeled_metrics(weak: jax.Array, truth: jax.Array, mask: jax.Array) -> Metrics:
    """How many pseudo-labels count, and how many are right: logits and truth [N, C], mask [N].

    Whether they are right is asked of images whose hidden label the data set knows. The share that
    counts is also given apart for these and for the others (`unlabeled/`, pictures from elsewhere):
    if it is much smaller there, those pictures look unlike the labelled ones.
    """
    hit = (jnp.argmax(weak, -1) == jnp.argmax(truth, -1)).astype(mask.dtype)
    known = is_known(truth).astype(mask.dtype)
    return {
        "mask_rate": mean_metric(mask),
        "mask_rate_known": mean_metric(mask, known),
        "mask_rate_unknown": mean_metric(mask, 1 - known),
        "pseudo_label_accuracy": mean_metric(hit, mask * known),
        "unlabeled_accuracy": mean_metric(hit, known),
    }


def ramp_up(progress: jax.Array | float, share: float, shape: str = "linear") -> Any:
    """A weight that rises from 0 (from .0067 if "sigmoid") to 1 in the first `share` of training.

    "linear" is x = min(progress / share, 1); "sigmoid" is exp(-5 (1 - x)^2) (Laine and Aila).
    """
    if not share:
        return 1.0
    x = jnp.minimum(progress / share, 1.0)
    return jnp.exp(-5.0 * (1.0 - x) ** 2) if shape == "sigmoid" else x


def global_mean(batch: Batch, values: jax.Array) -> jax.Array:
    """Mean over the images of all devices, without gradient: [N, ...] -> [...]."""
    return batch.gather(jax.lax.stop_gradient(values).mean(0)[None]).mean(0)


def moving_average(old: jax.Array, new: jax.Array, decay: jax.Array | float) -> jax.Array:
    """decay * old + (1 - decay) * new, in the dtype of `old`."""
    return (decay * old + (1 - decay) * new).astype(old.dtype)


def align(p: jax.Array, wanted: jax.Array, present: jax.Array) -> jax.Array:
    """Distribution alignment: rows of p [N, C] times wanted / present [C], summing to 1 again."""
    p = p * (wanted + 1e-6) / (present + 1e-6)
    return p / p.sum(-1, keepdims=True)


def mixup(
    batch: Batch,
    images: Sequence[jax.Array],
    targets: Sequence[jax.Array],
    keys: Sequence[jax.Array],
    alpha: float,
) -> tuple[list[jax.Array], list[jax.Array]]:
    """MixUp (Zhang et al. 2018) of some groups of images with partners from all of them.

    Each image keeps l = max(b, 1 - b), b ~ Beta(alpha, alpha), of itself. The partners are one
    random order of all images on all devices: an image with the k-th smallest of the random numbers
    gets the k-th image, groups in turn. So the devices' number changes nothing. (Of microbatches
    each has its own order.)

    Args:
      images, targets, keys: of each group [n_i, ...], [n_i, C] and typed keys [n_i].

    Returns:
      The mixed images and targets of each group.
    """
    draws = [jax.vmap(jax.random.bits)(k) for k in keys]
    order = jnp.sort(jnp.concatenate([batch.gather(d) for d in draws]))
    everything = jnp.concatenate([batch.gather(x) for x in images])
    all_targets = jnp.concatenate([batch.gather(y) for y in targets])

    def beta(key: jax.Array) -> jax.Array:
        key = jax.random.fold_in(key, 1)
        if alpha == 1:  # the same distribution, without a loop that a GPU's host has to steer
            b = jax.random.uniform(key, dtype=jnp.float32)
        else:
            b = jax.random.beta(key, alpha, alpha, dtype=jnp.float32)
        return jnp.maximum(b, 1 - b)

    # Once for all groups: both are many small steps, the second a loop.
    ends = np.cumsum([len(x) for x in images])[:-1]
    partners = jnp.searchsorted(order, jnp.concatenate(draws), method="compare_all")
    shares = jax.vmap(beta)(jnp.concatenate(keys))
    mixed, mixed_targets = [], []
    groups = zip(images, targets, jnp.split(partners, ends), jnp.split(shares, ends), strict=True)
    for x, y, partner, share in groups:
        of_image = share.reshape(-1, *[1] * (x.ndim - 1)).astype(x.dtype)
        mixed.append(of_image * x + (1 - of_image) * everything[partner])
        share = share[:, None].astype(y.dtype)
        mixed_targets.append(share * y + (1 - share) * all_targets[partner])
    return mixed, mixed_targets


def check_fields(algorithm: BaseAlgorithm, **highest: float) -> None:
    """Checks mu (1 or more), `forward`, `ramp`, and that each named field is in [0, highest].

    Raises:
      UserError: names the field.
    """
    if algorithm.mu < 1:
        raise UserError(f"config.algorithm.mu={algorithm.mu}: it must be 1 or more")
    forward = getattr(algorithm, "forward", "joint")
    if forward not in ("joint", "split", "apart"):
        raise UserError(f"config.algorithm.forward={forward}: use joint, split or apart")
    ramp = getattr(algorithm, "ramp", "linear")
    if ramp not in ("linear", "sigmoid"):
        raise UserError(f"config.algorithm.ramp={ramp}: use linear or sigmoid")
    for name, high in highest.items():
        if not 0 <= getattr(algorithm, name) <= high:
            raise UserError(
                f"config.algorithm.{name}={getattr(algorithm, name)}: it must be in [0, {high:g}]"
            )
