"""A workdir, or a file of weights -> what was trained: a config, and a network that predicts.

The module is its own shortest form: `ferjax.load("runs/x")` is `ferjax.load.load("runs/x")`.
"""

import math
import os
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import FrozenConfigDict

from ferjax import config as configs
from ferjax import weights as weights_files
from ferjax.analysis import scores
from ferjax.augment import policies
from ferjax.config import UserError
from ferjax.data import arrays, illumination, splits
from ferjax.data.faces import fit
from ferjax.engine import checkpoint as checkpoints
from ferjax.engine.evaluation import make_predict
from ferjax.engine.parallel import Layout
from ferjax.engine.state import build, build_view
from ferjax.weights import Weights
from ferjax.workdir import workdir_path

FEW = 16  # images; up to so many are predicted in a batch of this size


@dataclass(frozen=True)
class Predictions:
    """What a network says of N images.

    Attributes:
      probabilities: float64 [N, C]; each row adds up to 1.
      labels: the N likeliest classes' names.
      classes: the C classes' names, in the order of the columns.
    """

    probabilities: np.ndarray
    labels: list[str]
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Trained:
    """A trained network.

    Attributes:
      config: the run's finalized config.
      step: the checkpoint's step.
      classes: the C classes' names.
      image_shape: (H, W, channels) of the images that it was trained on.
      logits: uint8 [N, H, W, channels] images of any (H, W) that the network takes -> float [N, C].
        corrected=True: of images whose illumination was corrected as the config says.
      features: the same images -> the last layer's inputs [N, D]; None if the network has none.
      gradcam: the same images -> maps [N, h, w] of what speaks for the likeliest class, at least 0
        (Selvaraju et al. 2017, eq. 1 and 2, on the last feature map); None if it has none.
      weights: what it was built from.
    """

    config: FrozenConfigDict
    step: int
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    logits: Callable[..., np.ndarray]
    features: Callable[[np.ndarray], np.ndarray] | None = None
    gradcam: Callable[[np.ndarray], np.ndarray] | None = None
    weights: Weights | None = None

    def predict(self, images: np.ndarray | Sequence[np.ndarray]) -> Predictions:
        """Classifies faces of any size.

        An image is grey [H, W] or [H, W, 1] or colour (red, green, blue) [H, W, 3]; its values are
        uint8 levels, or floats in [0, 1]. It should show one face that fills it. What is not square
        is cut to the square in its middle, then brought to the size and the channels of the images
        that the network was trained on.

        Args:
          images: one image; or several, as a list or as an array [N, H, W], [N, H, W, 1] or
            [N, H, W, 3]. Three axes are one image if the last has length 1 or 3.

        Returns:
          Predictions of N images; N = 1 for one image.

        Raises:
          UserError: an array of another shape, type or range; says which image.
        """
        several = _several(images)
        faces = [fit(one, self.image_shape, f"image {i}") for i, one in enumerate(several)]
        if not faces:
            return Predictions(np.zeros((0, len(self.classes))), [], self.classes)
        probabilities = scores.softmax(self.logits(np.stack(faces)))
        labels = [self.classes[i] for i in probabilities.argmax(-1)]
        return Predictions(probabilities, labels, self.classes)


def load(
    workdir: str | Path,
    *,
    checkpoint: str = "best",
    weights: str = "ema",
    data_dir: str = "",
) -> Trained:
    """Loads a trained network onto all devices.

    >>> import ferjax
    >>> model = ferjax.load("small")  # comes with the package
    >>> model = ferjax.load("runs/quickstart")  # doctest: +SKIP
    >>> model.predict(photo).labels  # doctest: +SKIP
    ['happy']

    Args:
      workdir: of a run, finished or not; or a safetensors file that `ferjax.export` wrote; or
        "small", the network that comes with the package (a workdir of that name: "./small").
      checkpoint: "best" (on public_test), "latest", or a step; of a workdir.
      weights: "ema" or "raw"; of a workdir.
      data_dir: where prepared data is, if not as the run recorded; read for the classes' names
        where the workdir, of an early version, does not hold them.

    Raises:
      UserError: no such workdir, checkpoint or weights, or the checkpoint is damaged.
    """
    return build_trained(
        read_weights(workdir, checkpoint=checkpoint, weights=weights, data_dir=data_dir)
    )


def read_config(workdir: str | Path) -> FrozenConfigDict:
    """The config of what `load` takes; no device is touched."""
    if weights_files.is_file(workdir):
        return weights_files.config(workdir)
    return configs.load(workdir_path(workdir) / "config.json")


def read_weights(
    workdir: str | Path,
    *,
    checkpoint: str = "best",
    weights: str = "ema",
    data_dir: str = "",
) -> Weights:
    """What `load` puts onto the devices, as host arrays; see there."""
    if weights_files.is_file(workdir):
        if (str(checkpoint), weights) != ("best", "ema"):
            raise UserError(
                f"{workdir} holds one set of weights: leave --checkpoint and --weights out"
            )
        return weights_files.read(workdir)
    path = workdir_path(workdir)
    config = configs.load(path / "config.json")
    if weights not in ("ema", "raw"):
        raise UserError(f"--weights={weights}: use ema or raw")
    try:
        tree, _ = checkpoints.read(checkpoints.choose(path, str(checkpoint)))
    except checkpoints.DamagedError as error:
        raise UserError(f"{error}: use another --checkpoint") from None
    classes, image_shape = _described(path, config, data_dir)
    source: dict[str, Any] = tree["ema"] if weights == "ema" else tree
    return Weights(
        config=config,
        step=int(tree["step"]),
        classes=classes,
        image_shape=image_shape,
        variables={name: source[name] for name in ("params", "batch_stats")},
    )


def build_trained(weights: Weights) -> Trained:
    """The network of these weights, on all devices."""
    config = weights.config
    if config.dtype == "float64":
        jax.config.update("jax_enable_x64", True)  # for callers that are not commands
    layout = Layout(config.parallel)
    _, model = build(config, len(weights.classes))
    on_devices = layout.replicate(weights.variables)

    def mapper(network: Any) -> Callable[..., np.ndarray]:
        view, dtype = build_view(config, policies.NONE), jnp.dtype(config.dtype)
        few, many = (
            make_predict(network, view, layout, batch_size=size, dtype=dtype)
            for size in (FEW, config.evaluate.batch_size)
        )

        def run(images: np.ndarray, *, corrected: bool = False) -> np.ndarray:
            if not corrected:
                images = illumination.apply(images, config.data.illumination)
            return (few if len(images) <= FEW else many)(on_devices, images)

        return run

    return Trained(
        config=config,
        step=weights.step,
        classes=weights.classes,
        image_shape=weights.image_shape,
        logits=mapper(model),
        features=mapper(_Penultimate(model)) if hasattr(model, "features") else None,
        gradcam=mapper(_GradCam(model)) if hasattr(model, "features") else None,
        weights=weights,
    )


def _described(
    workdir: epath.Path, config: FrozenConfigDict, data_dir: str
) -> tuple[tuple[str, ...], tuple[int, int, int]]:
    """The classes' names and the images' shape, as the run wrote them down, else of its data."""
    recorded = splits.recorded(workdir / "split.json")
    names, shape = recorded.get("class_names"), recorded.get("image_shape")
    if names and shape:
        return tuple(names), (shape[0], shape[1], shape[2])
    info = arrays.builder(config.data.name, data_dir=data_dir or config.data.data_dir).info
    height, width, channels = info.features["image"].shape
    return tuple(info.features["label"].names), (height, width, channels)


def load_data(
    config: FrozenConfigDict,
    splits: tuple[str, ...],
    *,
    recorded: Mapping[str, Any] | None = None,
    source: str = "",
    data_dir: str = "",
) -> arrays.Dataset:
    """The splits of a run's data set; `source` and `data_dir` replace what the run recorded.

    A recorded source that is no longer there, or is not any more what it was, is not an error if
    the data of that time are prepared still.

    Args:
      config: of the run.
      splits: to read.
      recorded: what the run's split.json says, by which its set is found; None: not known.
      source: see `arrays.builder`.
      data_dir: see `arrays.builder`.
    """
    name, data_dir = config.data.name, data_dir or config.data.data_dir
    own, digest = "", (recorded or {}).get("data_digest")
    if recorded and digest and not source:
        own = arrays.prepared_as(name, digest, recorded.get("class_names", ()), data_dir)
    if not own and not source and os.path.exists(config.data.source):
        source = config.data.source
    name = own or name
    return arrays.load(
        name,
        source=source,
        data_dir=data_dir,
        splits=splits,
        room=math.inf if config.data.pipeline == "device" else Layout().room(),
    )


def _several(images: np.ndarray | Sequence[np.ndarray]) -> Sequence[np.ndarray]:
    if isinstance(images, list | tuple):
        return images
    array = np.asarray(images)
    if array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (1, 3)):
        return [array]
    if array.ndim == 4 or (array.ndim == 3 and array.shape[-1] > 4):
        return list(array)
    raise UserError(
        f"images of shape {array.shape}: give one image, grey or RGB without transparency, a list, "
        "or [N, H, W(, C)]"
    )


@dataclass(frozen=True)
class _Penultimate:
    """A network whose result is its last layer's input."""

    model: Any

    def apply(self, variables: Any, x: jax.Array) -> jax.Array:
        return self.model.apply(variables, x, method=lambda m, y: m.head(m.features(y))[1])


@dataclass(frozen=True)
class _GradCam:
    """A network whose result are its Grad-CAM maps."""

    model: Any

    def apply(self, variables: Any, x: jax.Array) -> jax.Array:
        maps = self.model.apply(variables, x, method="features")

        def likeliest(maps: jax.Array) -> jax.Array:
            logits, _ = self.model.apply(variables, maps, method="head")
            return jnp.sum(jnp.max(logits, -1))

        weights = jnp.mean(jax.grad(likeliest)(maps), (1, 2), keepdims=True)
        return jax.nn.relu(jnp.sum(weights * maps, -1))


class _Callable(types.ModuleType):
    """`ferjax.load` names this module once it is imported: so the module is called."""

    def __call__(self, workdir: str | Path, **options: Any) -> Trained:
        return load(workdir, **options)


sys.modules[__name__].__class__ = _Callable
