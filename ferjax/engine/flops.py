"""How many floating-point operations a training step takes, by XLA's count."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import FrozenConfigDict

from ferjax.engine.assemble import assemble, start_state
from ferjax.engine.parallel import Layout
from ferjax.engine.state import build
from ferjax.engine.step import make_call


def of_step(
    config: FrozenConfigDict, num_classes: int, image_shape: tuple[int, ...]
) -> float | None:
    """Floating-point operations of one step over the whole batch, an addition counting as one.

    Nothing is compiled or run: the count is of the step as it is traced for one CPU device, before
    any optimisation, with all that it holds: views, loss, gradient, update and averages.

    Args:
      config: finalized.
      num_classes: C.
      image_shape: (H, W, channels) of the images on disk.

    Returns:
      Their number; None where JAX_PLATFORMS leaves the CPU out.
    """
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None
    algorithm, model = build(config, num_classes)
    sizes = {"labeled": config.batch_size}
    if algorithm.mu:
        sizes["unlabeled"] = algorithm.mu * config.batch_size
    images = sum(sizes.values())
    optimizer, step = assemble(
        config,
        algorithm,
        model,
        steps=1,
        steps_per_epoch=1,
        class_counts=[1.0] * num_classes,
        members=sizes,
        loops=False,  # of a loop one turn is counted
    )
    state = start_state(
        config,
        algorithm,
        model,
        optimizer,
        stored_shape=(image_shape[0], image_shape[1]),
        num_classes=num_classes,
        num_images=images,
        abstract=True,
    )
    shape = jax.ShapeDtypeStruct
    index = {name: shape((1, 1, size), np.int32) for name, size in sizes.items()}
    data = {
        "images": shape((images, *image_shape), np.uint8),
        "targets": shape((images, num_classes), jnp.float32),
    }
    layout = Layout("shard_map", [device])
    call: Any = layout.wrap(make_call(step, 1))
    return count(call.lower(state, index, data))


def count(lowered: Any) -> float:
    """Floating-point operations of a function that was lowered for CPUs; of a loop, of one turn."""
    analysis = lowered.cost_analysis()
    return float((analysis[0] if isinstance(analysis, list) else analysis)["flops"])
