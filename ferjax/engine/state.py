"""What a step changes: the training state, and the network that a config describes."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from ml_collections import FrozenConfigDict

from ferjax.algorithms.base import BaseAlgorithm
from ferjax.augment import policies
from ferjax.config import find, section
from ferjax.engine.parallel import AXIS

View = Callable[..., jax.Array]


class TrainState(flax.struct.PyTreeNode):
    """Everything that a step reads and writes; it has no device axis.

    Attributes:
      step: int32 [], steps done.
      seed: uint32 [], of batches, views and noise.
      params: the student's parameters.
      batch_stats: its BatchNorm statistics, {} if it has none.
      opt_state: Optax's state.
      ema: {"params", "batch_stats"}: running averages of both.
      extra: the algorithm's own state.
    """

    step: jax.Array
    seed: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    ema: dict[str, Any]
    extra: Any


def build(config: FrozenConfigDict, num_classes: int) -> tuple[BaseAlgorithm, nn.Module]:
    """The algorithm and its (wrapped) network that a finalized config describes."""
    algorithm = find("algorithms", config.algorithm.name)(**section(config, "algorithm"))
    model = find("models", config.model.name)(
        num_classes=num_classes,
        axis_name=AXIS,
        dtype=jnp.dtype(config.dtype),
        **section(config, "model"),
    )
    return algorithm, algorithm.wrap(model)


def build_view(config: FrozenConfigDict, policy: policies.Policy) -> View:
    """A view function of the config's size, channels and normalisation."""
    data = config.data
    return policies.make_view(
        policy,
        size=data.image_size or None,
        mean=data.mean,
        std=data.std,
        channels=data.channels,
        crop=data.crop,
        standardize=data.illumination == "standardize",
    )


def fresh_state(
    model: nn.Module,
    algorithm: BaseAlgorithm,
    optimizer: optax.GradientTransformation,
    seed: jax.Array,
    *,
    image_shape: tuple[int, int, int],
    num_classes: int,
    num_images: int,
    dtype: jnp.dtype = jnp.float32,
) -> TrainState:
    """The state before step 0, as a function that JAX can trace.

    Args:
      model: already wrapped by the algorithm.
      seed: uint32 []; weights come from it alone.
      image_shape: (H, W, C) of a view.
      num_images: rows of the training arrays, for per-image state.
      dtype: of parameters and statistics; float64 only in tests of tight tolerances.
    """
    variables = model.init(jax.random.key(seed), jnp.zeros((1, *image_shape), dtype))
    variables = jax.tree.map(lambda x: x.astype(dtype), variables)
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        seed=seed,
        params=params,
        batch_stats=batch_stats,
        opt_state=optimizer.init(params),
        ema={"params": params, "batch_stats": batch_stats},
        extra=algorithm.init_extra(num_classes, num_images),
    )


def init_state(
    model: nn.Module,
    algorithm: BaseAlgorithm,
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    abstract: bool = False,
    **sizes: Any,
) -> TrainState:
    """`fresh_state`, computed in one program; `abstract`: its shapes and dtypes, nothing computed.

    The shapes alone are enough for a checkpoint to be restored, and spare a start a program.
    """
    # XLA:CPU takes 8 s to optimise the random numbers of a small network's kernels, which run once;
    # level 1 takes 2 s and gives the same weights. Level 0 rounds differently.
    on_cpu = jax.default_backend() == "cpu"
    options = {"xla_backend_optimization_level": 1} if on_cpu else None
    fresh = functools.partial(fresh_state, model, algorithm, optimizer, **sizes)
    if abstract:
        return jax.eval_shape(fresh, jax.ShapeDtypeStruct((), jnp.uint32))
    return jax.jit(fresh, compiler_options=options)(jnp.asarray(seed, jnp.uint32))
