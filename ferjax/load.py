"""A workdir -> what it trained: the config, the data it saw, and a function that predicts."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import FrozenConfigDict

from ferjax import config as configs
from ferjax.augment import policies
from ferjax.config import UserError
from ferjax.data import arrays
from ferjax.engine import checkpoint
from ferjax.engine.evaluation import make_predict
from ferjax.engine.parallel import Layout
from ferjax.engine.state import build, build_view


@dataclass(frozen=True)
class Trained:
    """A trained network.

    Attributes:
      config: the run's finalized config.
      step: the checkpoint's step.
      logits: uint8 [N, H, W, C] images -> float [N, classes].
    """

    config: FrozenConfigDict
    step: int
    logits: Callable[[np.ndarray], np.ndarray]


def load(workdir: Path, *, num_classes: int, which: str = "best", weights: str = "ema") -> Trained:
    """Loads a checkpoint of a workdir onto all devices.

    Args:
      num_classes: of the data set that the run was trained on.
      which: "best" (on public_test), "latest", or a step.
      weights: "ema" or "raw".

    Raises:
      UserError: no such workdir, checkpoint or weights, or the checkpoint is damaged.
    """
    config = configs.load(workdir / "config.json")
    if weights not in ("ema", "raw"):
        raise UserError(f"--weights={weights}: use ema or raw")
    path = checkpoint.choose(workdir, which)
    try:
        tree, _ = checkpoint.read(path)
    except checkpoint.DamagedError as error:
        raise UserError(f"{error}: use another --checkpoint") from None
    if config.dtype == "float64":
        jax.config.update("jax_enable_x64", True)  # for callers that are not commands
    source: dict[str, Any] = tree["ema"] if weights == "ema" else tree
    variables = {name: source[name] for name in ("params", "batch_stats")}
    layout = Layout(config.parallel)
    _, model = build(config, num_classes)
    predict = make_predict(
        model,
        build_view(config, policies.NONE),
        layout,
        batch_size=config.evaluate.batch_size,
        dtype=jnp.dtype(config.dtype),
    )
    on_devices = layout.replicate(variables)
    return Trained(config, int(tree["step"]), lambda images: predict(on_devices, images))


def load_data(
    config: FrozenConfigDict, splits: tuple[str, ...], *, source: str = "", data_dir: str = ""
) -> arrays.Dataset:
    """The splits of a run's data set; `source` and `data_dir` replace what the run recorded.

    A recorded source that is no longer there is not an error if the data is prepared already.
    """
    recorded = config.data.source if os.path.exists(config.data.source) else ""
    return arrays.load(
        config.data.name,
        source=source or recorded,
        data_dir=data_dir or config.data.data_dir,
        splits=splits,
    )
