"""A trained network in one safetensors file: its arrays, and in the header what to make of them.

The header's field `ferjax` is JSON: the run's config, the classes' names, the shape of the images,
the step, a CRC-32 for each array, and the facts that the model card is written from. Nothing in the
file is run when it is read.
"""

import json
import os
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from etils import epath
from flax import traverse_util
from ml_collections import FrozenConfigDict

from ferjax import config as configs
from ferjax.config import UserError
from ferjax.engine.checkpoint import checksums

SUFFIX = ".safetensors"
# Networks that come with the package, by name; `python -m ferjax.export --format=safetensors
# --output=ferjax/small.safetensors --licence=Apache-2.0 --workdir=DIR` makes one.
PACKAGED = {"small": Path(__file__).parent / "small.safetensors"}

_NOT_OURS = (AttributeError, KeyError, TypeError, ValueError)  # what other JSON ends in


@dataclass(frozen=True)
class Weights:
    """A trained network as data.

    Attributes:
      config: the run's finalized config.
      step: of the checkpoint.
      classes: the C classes' names.
      image_shape: (H, W, channels) of the images that it was trained on.
      variables: {"params", "batch_stats"}, nested dicts of NumPy arrays.
      facts: what `ferjax.model_card` writes about; {} if not gathered.
    """

    config: FrozenConfigDict
    step: int
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    variables: dict[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)


def is_file(source: Any) -> bool:
    """Whether a name is that of a packaged network or of a safetensors file, not of a workdir."""
    return str(source) in PACKAGED or str(source).endswith(SUFFIX)


def encode(weights: Weights) -> bytes:
    """The file's content."""
    arrays = traverse_util.flatten_dict(weights.variables, sep="/")
    data = weights.config.data
    described = {
        "classes": weights.classes,
        "image_shape": weights.image_shape,
        "image_size": data.image_size or weights.image_shape[0],
        "channels": data.channels,
        "mean": data.mean,
        "std": data.std,
        "step": weights.step,
        "config": weights.config.to_dict(),
        "facts": weights.facts,
        "crc": checksums(arrays),
    }
    described["own_crc"] = _own_crc(described)
    contiguous = {name: np.ascontiguousarray(value) for name, value in arrays.items()}
    # One field: the order of several would differ from run to run.
    return safetensors.numpy.save(contiguous, {"ferjax": json.dumps(described)})


def decode(content: bytes, name: str) -> Weights:
    """Reads and verifies what `encode` made.

    Args:
      content: of the file.
      name: of the file, for the error's line.

    Raises:
      UserError: not such a file, or its content has changed.
    """
    described = _described(content, name)
    try:
        # Files of before have none.
        if described.get("own_crc", _own_crc(described)) != _own_crc(described):
            raise UserError(f"{name} is damaged: its description is not what was written")
        arrays = safetensors.numpy.load(content)
        if checksums(arrays) != described["crc"]:
            raise UserError(f"{name} is damaged: its arrays are not those that were written")
        height, width, channels = described["image_shape"]
        return Weights(
            config=configs.finalize(described["config"]),
            step=described["step"],
            classes=tuple(described["classes"]),
            image_shape=(height, width, channels),
            variables={
                "params": {},
                "batch_stats": {},
                **traverse_util.unflatten_dict(arrays, sep="/"),
            },
            facts=described["facts"],
        )
    except (safetensors.SafetensorError, *_NOT_OURS) as error:
        raise _damaged(name, error) from None


def read(source: str | os.PathLike[str]) -> Weights:
    """Reads a packaged network or a file.

    Raises:
      UserError: no such file, or see `decode`.
    """
    path = _path(source)
    return decode(path.read_bytes(), str(path))


def config(source: str | os.PathLike[str]) -> FrozenConfigDict:
    """The config in a packaged network or a file.

    Raises:
      UserError: no such file, or see `decode`.
    """
    path = _path(source)
    described = _described(path.read_bytes(), str(path))
    try:
        return configs.finalize(described["config"])
    except _NOT_OURS as error:
        raise _damaged(str(path), error) from None


def _own_crc(described: dict[str, Any]) -> int:
    """CRC-32 of the description: the mean and the classes' names decide as the arrays do."""
    plain = {key: value for key, value in described.items() if key != "own_crc"}
    return zlib.crc32(json.dumps(plain, sort_keys=True).encode())


def _damaged(name: str, error: Exception) -> UserError:
    return UserError(f"{name} is damaged: {' '.join(str(error).split())[:200]}")


def _path(source: str | os.PathLike[str]) -> epath.Path:
    path = epath.Path(os.path.expanduser(PACKAGED.get(str(source), source)))
    if not path.is_file():
        raise UserError(f"{path} is not there")
    return path


def _described(content: bytes, name: str) -> dict[str, Any]:
    """The header's description: the file begins with the header's length (8 bytes) and JSON."""
    length = int.from_bytes(content[:8], "little")
    try:
        return json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["ferjax"])
    except KeyError:
        raise UserError(f"{name} says nothing of a ferjax config: export it again") from None
    except (ValueError, TypeError):
        raise UserError(f"{name} is not a safetensors file of ferjax.export") from None
