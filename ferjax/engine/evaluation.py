"""The one evaluation path: the logits of a whole split, none dropped, on all devices."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from ferjax.engine.parallel import AXIS, Layout, host
from ferjax.engine.state import View


def make_predict(
    model: nn.Module, view: View, layout: Layout, *, batch_size: int, dtype: Any
) -> Callable[[Any, np.ndarray], np.ndarray]:
    """Builds `predict(variables, images) -> logits`.

    Args:
      model: in evaluation mode a function of each image alone.
      view: the view without randomness; see `ferjax.augment.policies.make_view`.
      batch_size: images at a time over all devices, rounded up to a multiple of them. The last
        batch is filled up with copies, whose logits are cut off.
      dtype: of the views that the network gets.

    Returns:
      A function of variables {"params", "batch_stats"} (replicated) and images uint8 [N, H, W, C]
      that gives float32 or float64 logits [N, classes] in every process.
    """
    size = -(-batch_size // layout.count) * layout.count

    def forward(variables: Any, images: jax.Array, _: Any) -> jax.Array:
        keys = jax.vmap(jax.random.key)(np.zeros(images.shape[0], np.uint32))
        logits = model.apply(variables, view(images, keys).astype(dtype))
        return jax.lax.all_gather(logits, AXIS, tiled=True)

    compiled = layout.wrap(forward)

    def predict(variables: Any, images: np.ndarray) -> np.ndarray:
        logits = []
        for start in range(0, len(images), size):
            rows = np.minimum(np.arange(start, start + size), len(images) - 1)
            logits.append(compiled(variables, layout.shard(images[rows]), {}))
        return np.concatenate([host(x) for x in logits])[: len(images)]

    return predict
