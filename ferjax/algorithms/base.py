"""The contract between the engine and a training method, and the losses that methods share.

The engine makes a `Batch` and a `Net`, calls `Algorithm.loss` on each device inside the step, and
averages the gradients over the devices. A method is one file with a frozen dataclass `Algorithm`.
"""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

Metrics = dict[str, tuple[jax.Array, jax.Array]]


class Part(flax.struct.PyTreeNode):
    """The labelled or the unlabelled images of one device's share of a step.

    Attributes:
      views: name -> float [n, H, W, C], normalised.
      target: float [n, classes], one-hot or soft. Of unlabelled images it is the hidden truth, for
        measurement only: a loss that reads it cheats.
      weight: float [n], of each image in the loss.
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
    """What one device sees of a step; `gather` collects [n, ...] from all devices in order."""

    labeled: Part
    unlabeled: Part | None
    gather: Callable[[jax.Array], jax.Array] = flax.struct.field(pytree_node=False)


class Time(NamedTuple):
    """Where training is: `step` int32 [], `progress` float [] in [0, 1)."""

    step: jax.Array
    progress: jax.Array


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
        train: bool = True,
        update: bool = True,
        method: str = "__call__",
    ) -> Any:
        """Logits float [N, classes] of images [N, H, W, C]; `keys` [N] for dropout and noise."""
        ...

    def teacher(self, images: jax.Array, *, method: str = "__call__") -> Any:
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

    def wrap(self, model: nn.Module) -> nn.Module:
        """Adds trainable parts to the network; the result must have the same call."""
        return model

    def loss(self, net: Net, batch: Batch, extra: Any, t: Time) -> tuple[jax.Array, Metrics, Any]:
        """The local mean loss [], metrics as (sum, weight) pairs, and the new extra."""
        raise TypeError(f"{type(self).__name__} defines no loss")


def cross_entropy(logits: jax.Array, target: jax.Array) -> jax.Array:
    """-sum_c target_c log softmax(logits)_c; [N, C] and [N, C] -> [N]."""
    return -jnp.sum(target * jax.nn.log_softmax(logits), axis=-1)


def weighted_mean(values: jax.Array, weight: jax.Array) -> jax.Array:
    """mean(values * weight) over the images: [N], [N] -> []."""
    return jnp.mean(values * weight)


def mean_metric(values: jax.Array, weight: jax.Array | float = 1.0) -> tuple[jax.Array, jax.Array]:
    """The pair (sum, weight) of a weighted mean over [N] values."""
    weight = jnp.broadcast_to(jnp.asarray(weight, values.dtype), values.shape)
    return jnp.sum(values * weight), jnp.sum(weight)


def accuracy_metric(logits: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The pair (sum, weight) of top-1 accuracy: [N, C], [N, C] -> ([], [])."""
    correct = jnp.argmax(logits, -1) == jnp.argmax(target, -1)
    return mean_metric(correct.astype(logits.dtype))
