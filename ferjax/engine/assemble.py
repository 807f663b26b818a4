"""How a config, a method and a network become a training step, and the state before step 0."""

from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax.numpy as jnp
import optax
from ml_collections import FrozenConfigDict

from ferjax.algorithms.base import BaseAlgorithm
from ferjax.augment import policies
from ferjax.config import UserError, section
from ferjax.engine.optim import make_optimizer, make_schedule
from ferjax.engine.state import TrainState, build_view, init_state
from ferjax.engine.step import Step, make_step


def assemble(
    config: FrozenConfigDict,
    algorithm: BaseAlgorithm,
    model: nn.Module,
    *,
    steps: int,
    steps_per_epoch: int,
    class_counts: Sequence[float],
    members: Mapping[str, int],
    loops: bool,
    plain_views: bool = False,
) -> tuple[optax.GradientTransformation, Step]:
    """The optimizer, and one device's step.

    Args:
      config: finalized.
      algorithm: the config's (`state.build`), or another one.
      model: already wrapped by the algorithm.
      steps: the schedule's length.
      steps_per_epoch: what the schedule's warm-up is counted in.
      class_counts: labelled images of each class.
      members: images of each part of the batch, "labeled" and "unlabeled".
      loops: see `make_step`.
      plain_views: replace every view by normalisation alone.

    Raises:
      UserError: the config lacks a view that the method needs.
    """
    for view in {*algorithm.labeled_views, *algorithm.unlabeled_views}:
        if view.split(":")[0] not in config.views:
            raise UserError(f"config.views.{view} is missing: {config.algorithm.name} needs it")
    policy = {name: policies.Policy(**section(config.views, name)) for name in config.views}
    alternates = any(view.flip_style == "alternate" for view in config.views.values())
    schedule = make_schedule(config.optimizer, steps, steps_per_epoch)
    optimizer = make_optimizer(config.optimizer, schedule)
    step = make_step(
        model,
        algorithm,
        optimizer,
        schedule,
        {n: build_view(config, policies.NONE if plain_views else p) for n, p in policy.items()},
        steps=steps,
        ema_decay=config.ema_decay,
        dtype=jnp.dtype(config.dtype),
        microbatches=config.microbatches,
        loops=loops,
        skip_not_finite=config.on_nan == "skip",
        class_counts=class_counts,
        alternating=members if alternates else None,
    )
    return optimizer, step


def start_state(
    config: FrozenConfigDict,
    algorithm: BaseAlgorithm,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    *,
    stored_shape: tuple[int, int],
    num_classes: int,
    num_images: int,
    abstract: bool = False,
) -> TrainState:
    """The state before step 0.

    Args:
      config: finalized; the other parts are what `assemble` was given and made of it.
      stored_shape: (H, W) of the images on disk.
      num_classes: C.
      num_images: rows of the training arrays, for per-image state.
      abstract: its shapes and dtypes only, nothing is computed.

    Raises:
      UserError: a crop that is larger than the images.
    """
    data = config.data
    if data.crop > min(stored_shape):
        raise UserError(
            f"config.data.crop={data.crop}: the images have {stored_shape[0]} x {stored_shape[1]} "
            "pixels"
        )
    size = data.image_size or data.crop
    height, width = (size, size) if size else stored_shape
    return init_state(
        model,
        algorithm,
        optimizer,
        seed=config.seed,
        image_shape=(height, width, data.channels),
        num_classes=num_classes,
        num_images=num_images,
        dtype=jnp.promote_types(config.dtype, jnp.float32),
        abstract=abstract,
    )
