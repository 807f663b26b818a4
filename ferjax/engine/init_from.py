"""The weights that a run starts from, where not from random ones: `config.init_from`.

It names another run's workdir, or a `.safetensors` file: one that `ferjax.export` wrote, or ResNet
weights with the names that torchvision and timm give them. It is read before the first step; a run
that goes on from a checkpoint of its own does not read it again.

Of a workdir the EMA weights and statistics are taken, at the best checkpoint (the latest if none
was scored). The two networks must be the same but for the parts that their methods add (a decoder,
a second head) and for the classifier: such a part is taken if both have it, the classifier if the
classes are the same; else they start afresh. For others' files see `models/imported.py`. The
library safetensors reads them, which, unlike a pickle's reader, runs nothing of what is in a file.
"""

import json
import logging
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import FrozenConfigDict

from ferjax.config import UserError
from ferjax.data import splits
from ferjax.engine import checkpoint
from ferjax.engine.state import TrainState
from ferjax.models import imported
from ferjax.workdir import workdir_path

log = logging.getLogger("ferjax")

Path = tuple[str, ...]
Arrays = dict[Path, np.ndarray]  # (collection, "backbone" or a part of the method's, ..., leaf)

SUFFIX = ".safetensors"


def start_from(
    state: TrainState, config: FrozenConfigDict, class_names: tuple[str, ...]
) -> TrainState:
    """The state before step 0 with the weights that `config.init_from` names.

    Parameters and statistics are replaced, and the EMA starts equal to them. Optax's state is all
    zeros before the first step, whatever the weights.

    Args:
      state: fresh, of host arrays.
      config: finalized; `init_from` is not empty.
      class_names: of the network.

    Raises:
      UserError: nothing that can be read is there, or it is of another network; names the layer.
    """
    own = _flat({"params": state.params, "batch_stats": state.batch_stats})
    fresh = _named(own)
    try:
        if config.init_from.endswith(SUFFIX):
            source, found = config.init_from, _from_file(fresh, config, class_names)
        else:
            source, found = _from_workdir(fresh, config, class_names)
    except UserError as error:
        raise type(error)(f"config.init_from={config.init_from}: {error}") from None
    new = {path: found.get(path, array).astype(array.dtype) for path, array in fresh.items()}
    if fresh.keys() != own.keys():
        new = {(path[0], *path[2:]): array for path, array in new.items()}
    tree = {"params": {}, "batch_stats": {}, **unflatten_dict(new)}
    names = [_layer(path) for path in fresh if path not in found]
    log.info(
        "init_from: %d of %d tensors from %s, fresh: %s",
        *(len(fresh) - len(names), len(fresh), source),
        ", ".join(dict.fromkeys(names)) or "none",
    )
    # Copied: an EMA in the parameters' memory could not be donated together with them.
    return state.replace(**tree, ema=jax.tree.map(np.copy, tree))


def _from_workdir(
    fresh: Arrays, config: FrozenConfigDict, class_names: tuple[str, ...]
) -> tuple[str, Arrays]:
    """The source's name, and those of its arrays that fit."""
    workdir = workdir_path(config.init_from)
    if not (workdir / "config.json").exists():
        raise UserError(
            f"no config.json is there: give a run's workdir, or a {SUFFIX} file (of a .pth, which "
            "is a pickle, make one with torch.load and safetensors.torch.save_file)"
        )
    try:
        chosen = checkpoint.choose(workdir, "best")
    except UserError:  # none was scored
        chosen = checkpoint.choose(workdir, "latest")
    try:
        tree, _ = checkpoint.read(chosen)
    except checkpoint.DamagedError as error:
        raise UserError(str(error)) from None
    names = splits.recorded(workdir / "split.json").get("class_names") or class_names
    return f"{workdir}, step {chosen.name}", _match(fresh, _flat(tree["ema"]), names, class_names)


def _match(
    fresh: Arrays, theirs: Arrays, their_classes: Sequence[str], class_names: Sequence[str]
) -> Arrays:
    """Those of another run's arrays that fit."""
    found = _named(theirs)
    if tuple(their_classes) != tuple(class_names) or any(
        found[path].shape != array.shape
        for path, array in fresh.items()
        if _free(path) == "classifier" and path in found
    ):
        found = {path: array for path, array in found.items() if _free(path) != "classifier"}
    for path in sorted(fresh.keys() | found.keys()):
        here, there = (list(a[path].shape) if path in a else None for a in (fresh, found))
        if here != there and not _free(path):
            raise UserError(
                f"its network has {_layer(path)} {there or 'not'}, this run's {here or 'not'}: "
                "give the same config.model and data.channels"
            )
        if there and not (found[path].dtype.kind == "f" and np.isfinite(found[path]).all()):
            raise UserError(f"its {_layer(path)} is not made of finite floats")
    return {p: a for p, a in found.items() if p in fresh and a.shape == fresh[p].shape}


def _from_file(fresh: Arrays, config: FrozenConfigDict, class_names: tuple[str, ...]) -> Arrays:
    """The arrays of a file that fit."""
    try:
        content = workdir_path(config.init_from).read_bytes()
        tensors = safetensors.numpy.load(content)
    except OSError as error:
        raise UserError(f"can't be read: {error.strerror or error}") from None
    except KeyError as error:
        raise UserError(f"it holds tensors of type {error}: save them as float32") from None
    except (safetensors.SafetensorError, ValueError, OverflowError) as error:
        why = " ".join(str(error).split())
        raise UserError(f"it is not a whole safetensors file: {why}") from None
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    if described := header.get("__metadata__", {}).get("ferjax"):
        theirs = {tuple(name.split("/")): array for name, array in tensors.items()}
        try:
            classes = json.loads(described)["classes"]
            return _match(fresh, theirs, classes, class_names)
        except (LookupError, TypeError, ValueError):
            raise UserError("it is not as ferjax.export writes it") from None
    if config.model.name != "resnet":
        raise UserError(f"the file is for config.model.name=resnet, not {config.model.name}")
    inner = {path[2:]: path for path in fresh if path[1] == "backbone"}
    shapes = {short: fresh[path].shape for short, path in inner.items()}
    found = imported.convert(tensors, shapes, config.model.depth)
    return {inner[short]: array for short, array in found.items()}


def _flat(variables: dict[str, Any]) -> Arrays:
    """{(collection, ..., leaf): array} of a network's variables."""
    return flatten_dict({name: variables.get(name) or {} for name in ("params", "batch_stats")})


def _named(flat: Arrays) -> Arrays:
    """The same with "backbone" in each path, as if a method had wrapped the model."""
    if any(path[:2] == ("params", "backbone") for path in flat):
        return flat
    return {(path[0], "backbone", *path[1:]): array for path, array in flat.items()}


def _free(path: Path) -> str:
    """What may differ between two networks: the classifier, or a part of the method's; else ""."""
    if path[1] != "backbone":
        return path[1]
    return "classifier" if path[2] == "classifier" else ""


def _layer(path: Path) -> str:
    """A free part's name, else the array's."""
    return _free(path) or "/".join(path[2:])
