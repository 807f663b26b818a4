"""A workdir -> what it trained: the config, the data it saw, and a network that predicts.

The module is its own shortest form: `ferjax.load("runs/x")` is `ferjax.load.load("runs/x")`.
"""

import os
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import FrozenConfigDict

from ferjax import config as configs
from ferjax.analysis import scores
from ferjax.augment import policies
from ferjax.config import UserError
from ferjax.data import arrays
from ferjax.engine import checkpoint as checkpoints
from ferjax.engine.evaluation import make_predict
from ferjax.engine.parallel import Layout
from ferjax.engine.state import build, build_view

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
      features: the same images -> the last layer's inputs [N, D]; None if the network has none.
      gradcam: the same images -> maps [N, h, w] of what speaks for the likeliest class, at least 0
        (Selvaraju et al. 2017, eq. 1 and 2, on the last feature map); None if it has none.
    """

    config: FrozenConfigDict
    step: int
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    logits: Callable[[np.ndarray], np.ndarray]
    features: Callable[[np.ndarray], np.ndarray] | None = None
    gradcam: Callable[[np.ndarray], np.ndarray] | None = None

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
    """Loads a checkpoint of a workdir onto all devices.

    >>> import ferjax
    >>> model = ferjax.load("runs/quickstart")  # doctest: +SKIP
    >>> model.predict(photo).labels  # doctest: +SKIP
    ['happy']

    Args:
      workdir: of a run, finished or not.
      checkpoint: "best" (on public_test), "latest", or a step.
      weights: "ema" or "raw".
      data_dir: where prepared data is, if not as the run recorded; read for the classes' names of
        data sets whose code does not know them.

    Raises:
      UserError: no such workdir, checkpoint or weights, or the checkpoint is damaged.
    """
    workdir = Path(workdir)
    config = configs.load(workdir / "config.json")
    if weights not in ("ema", "raw"):
        raise UserError(f"--weights={weights}: use ema or raw")
    try:
        tree, _ = checkpoints.read(checkpoints.choose(workdir, str(checkpoint)))
    except checkpoints.DamagedError as error:
        raise UserError(f"{error}: use another --checkpoint") from None
    if config.dtype == "float64":
        jax.config.update("jax_enable_x64", True)  # for callers that are not commands
    info = arrays.builder(config.data.name, data_dir=data_dir or config.data.data_dir).info
    classes = tuple(info.features["label"].names)
    source: dict[str, Any] = tree["ema"] if weights == "ema" else tree
    variables = {name: source[name] for name in ("params", "batch_stats")}
    layout = Layout(config.parallel)
    _, model = build(config, len(classes))
    on_devices = layout.replicate(variables)

    def mapper(network: Any) -> Callable[[np.ndarray], np.ndarray]:
        view, dtype = build_view(config, policies.NONE), jnp.dtype(config.dtype)
        few, many = (
            make_predict(network, view, layout, batch_size=size, dtype=dtype)
            for size in (FEW, config.evaluate.batch_size)
        )
        return lambda images: (few if len(images) <= FEW else many)(on_devices, images)

    return Trained(
        config=config,
        step=int(tree["step"]),
        classes=classes,
        image_shape=tuple(info.features["image"].shape),
        logits=mapper(model),
        features=mapper(_Penultimate(model)) if hasattr(model, "features") else None,
        gradcam=mapper(_GradCam(model)) if hasattr(model, "features") else None,
    )


def fit(image: np.ndarray, shape: tuple[int, int, int], name: str = "the image") -> np.ndarray:
    """An image as the network wants it: the middle square, resized (areas are averaged), uint8.

    Args:
      image: see `Trained.predict`.
      shape: (H, W, channels) of the result.
      name: of the image, for the error's line.

    Raises:
      UserError: an array of another shape, type or range.
    """
    image = np.asarray(image)
    if image.ndim == 2:
        image = image[..., None]
    if image.ndim != 3 or image.shape[-1] not in (1, 3) or 0 in image.shape:
        raise UserError(f"{name}: shape {image.shape}: give [H, W], [H, W, 1] or [H, W, 3]")
    if np.issubdtype(image.dtype, np.floating):
        # A NaN fails the comparison, too.
        if not (image.min() >= 0 and image.max() <= 1):
            raise UserError(f"{name}: floats from {image.min()} to {image.max()}: give [0, 1]")
        image = np.rint(image * 255.0).astype(np.uint8)
    if image.dtype != np.uint8:
        raise UserError(f"{name}: type {image.dtype}: give uint8, or floats in [0, 1]")
    side = min(image.shape[:2])
    top, left = ((length - side) // 2 for length in image.shape[:2])
    image = image[top : top + side, left : left + side]
    # Areas are averaged where it gets smaller: else single pixels decide.
    how = cv2.INTER_AREA if side > shape[0] else cv2.INTER_LINEAR
    if image.shape[-1] == 3 and shape[-1] == 1:
        image = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY)
    out = cv2.resize(np.ascontiguousarray(image), (shape[1], shape[0]), interpolation=how)
    out = out.reshape(*shape[:2], -1)
    return np.broadcast_to(out, shape).copy()


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


def _several(images: np.ndarray | Sequence[np.ndarray]) -> Sequence[np.ndarray]:
    if isinstance(images, list | tuple):
        return images
    array = np.asarray(images)
    if array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (1, 3)):
        return [array]
    if array.ndim in (3, 4):
        return list(array)
    raise UserError(f"images of shape {array.shape}: give one image, a list, or [N, H, W(, C)]")


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
