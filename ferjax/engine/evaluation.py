"""The one evaluation path: the logits of a whole split, none dropped, on all devices."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ferjax.engine.parallel import AXIS, Layout, Polls, any_wish, host
from ferjax.engine.state import View


class Interrupted(Exception):
    """An evaluation was told to stop."""


def make_predict(
    model: nn.Module, view: View, layout: Layout, *, batch_size: int, dtype: Any
) -> Callable[..., np.ndarray]:
    """Builds `predict(variables, images) -> logits`.

    Args:
      model: in evaluation mode a function of each image alone.
      view: the view without randomness; see `ferjax.augment.policies.make_view`.
      batch_size: images at a time over all devices, rounded up to a multiple of them. The last
        batch is filled up with copies, whose logits are cut off.
      dtype: of the views that the network gets.

    Returns:
      A function of variables {"params", "batch_stats"} (replicated), images uint8 [N, H, W, C] and
      optionally `stop`, which is asked before each batch. It gives float32 or float64 logits
      [N, classes] in every process, or raises `Interrupted` once `stop()` was true in any.
    """
    size = -(-batch_size // layout.count) * layout.count

    def forward(variables: Any, shard: Any, _: Any) -> tuple[jax.Array, jax.Array]:
        images = shard["images"]
        keys = jax.vmap(jax.random.key)(np.zeros(images.shape[0], np.uint32))
        logits: Any = model.apply(variables, view(images, keys).astype(dtype))
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        return jax.lax.all_gather(logits, AXIS, tiled=True), any_wish(shard["wishes"])

    compiled = layout.wrap(forward)

    def predict(
        variables: Any, images: np.ndarray, stop: Callable[[], bool] = lambda: False
    ) -> np.ndarray:
        logits, polls = [], Polls(layout)
        for start in range(0, len(images), size):
            rows = np.minimum(np.arange(start, start + size), len(images) - 1)
            wish = [bool(stop())]
            shard = {"images": layout.shard(images[rows])}
            shard["wishes"] = layout.shard(layout.wishes(wish), axis=1)
            out, agreed = compiled(variables, shard, {})
            logits.append(out)
            if polls.agree(wish, agreed)[0]:
                raise Interrupted
            if len(logits) > Polls.LATE:
                # What is asked of the device stays a little ahead of what it has done.
                logits[-1 - Polls.LATE] = host(logits[-1 - Polls.LATE])
        return np.concatenate([host(x) for x in logits])[: len(images)]

    return predict
