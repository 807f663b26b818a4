"""The rows of a sweep: which config with which changes, for which seeds, against which figures.

A sweep file is a Python file with `get_sweep(cpu)` that returns a `Sweep`. Its configs are files
too, named as `ferjax.main` takes them, so that each run of a sweep is one plain command.
"""

import copy
import dataclasses
import functools
import hashlib
import importlib.util
import json
import math
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import FrozenConfigDict

from ferjax import config as configs
from ferjax.command import MISTAKES, blame
from ferjax.config import UserError
from ferjax.data import batches, fer2013, splits

# Keys that name what is trained on by its place; of two machines' paths the end is compared.
_PATHS = ("init_from", "data.unlabeled_source", "algorithm.predictions")
# Keys in which two runs of a row may differ.
_OF_THE_RUN = (*(key for key in configs.FREE_KEYS if key not in _PATHS), "seed", "data.split_seed")

# What `--quick` trains: some steps of a network of 700 numbers on 280 drawn faces.
_QUICK_LAYERS = ("space_to_depth 4", "conv 8 3 nobias", "bn", "relu", "gap")
_QUICK: dict[str, Any] = {
    "data.name": "synthetic_faces/tiny",
    "data.source": "",
    "data.unlabeled_source": "",
    "data.crop": 0,
    "data.labels": "hard",
    "data.clean": "none",
    "data.image_size": 0,
    "data.channels": 1,
    "data.mean": (0.5077,),
    "data.std": (0.2551,),
    "init_from": "",
    "dtype": "float32",
    "epochs": 2,
    "batch_size": 32,
    "microbatches": 1,
    "ema_decay": 0.9,
    "evaluate.every_epochs": 1,
    "optimizer.warmup_epochs": 0.0,
    "log_every": 4,
}
_QUICK_LABELS_A_CLASS = 25  # of FER2013, for one label of a class of the tiny set


@dataclass(frozen=True)
class Row:
    """One line of a table: runs that differ in their seed alone.

    Attributes:
      name: unique in its sweep; names its directory.
      config: a config file and its variant, "configs/fixmatch.py:cpu"; relative to the directory
        above the sweep file's `configs`. It is read when the row is run.
      changes: config keys, "data.labeled", and their values.
      seeds: a run for each. Without a `split_seed` it is also the seed of the labelled subset, so
        that all rows see the same labels for one seed.
      split_seed: of the labelled subset of all runs.
      steps: trains the least whole number of epochs with so many steps (FER2013's sizes); 0: the
        epochs of the config.
      published: percent that others reached, None if nobody did.
      source: of that figure, and by which rules.
      reach: percent that is to be reached.
      beats: name of another row that is to be beaten, by `margin` points.
      margin: see `beats`.
      on: where it is to be run: "C" on two CPU cores, "G" on a GPU or TPU.
      section: heading of RESULTS.md.
      series: line of the sweep's plot.
      x: its place on that line; None: the plot has a place for each row instead.
      scored: "" one network; else how several views or seeds are put together: "flip", "ten_crop",
        "ensemble", "flip_ensemble" or "ten_crop_ensemble".
      note: what a reader of the table must know.
      quick: further changes for `--quick`.
    """

    name: str
    config: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2)
    split_seed: int | None = None
    steps: int = 0
    published: float | None = None
    source: str = ""
    reach: float | None = None
    beats: str = ""
    margin: float = 0.0
    on: str = ""
    section: str = ""
    series: str = ""
    x: float | None = None
    scored: str = ""
    note: str = ""
    quick: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sweep:
    """Rows that are run one after another and compared.

    Attributes:
      title: of the table and the plot.
      rows: in the table's order.
      x_label: of the plot, where rows have an `x`.
      note: under the table.
      name: of the file; set by `load`.
      root: what the rows' config files are relative to; set by `load`.
    """

    title: str
    rows: Sequence[Row]
    x_label: str = ""
    note: str = ""
    name: str = ""
    root: Path = Path()


def load(path: Path | str, *, cpu: bool = False) -> Sweep:
    """What `get_sweep` of a sweep file returns.

    Args:
      path: of the file.
      cpu: rows for two CPU cores instead of an accelerator.

    Raises:
      UserError: no such file, or its rows make no sense.
    """
    path = Path(path).resolve()
    spec = importlib.util.spec_from_file_location("ferjax_sweep", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise UserError(f"{path} is not a sweep file: for example configs/sweeps/label_ratio.py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_sweep"):
            raise UserError(f"{path} defines no get_sweep(cpu): it is not a sweep file")
        sweep = module.get_sweep(cpu)
        if not isinstance(sweep, Sweep):
            raise UserError(f"{path}: get_sweep(cpu) returns no ferjax.rows.Sweep")
    except (*MISTAKES, OSError) as error:
        raise UserError(f"{path}: {blame(error)}") from None
    names = [row.name for row in sweep.rows]
    for row in sweep.rows:
        if not re.fullmatch(r"\w[\w.+-]*", row.name) or names.count(row.name) > 1:
            raise UserError(f"{path}: row {row.name!r}: names are unique, of letters, digits, ._+-")
        if not row.seeds:
            raise UserError(f"{path}: row {row.name!r} has no seeds")
        if row.beats and row.beats not in names:
            raise UserError(f"{path}: row {row.name!r} is to beat {row.beats!r}, which is no row")
    above = [parent.parent for parent in path.parents if parent.name == "configs"]
    return dataclasses.replace(sweep, name=path.stem, root=above[0] if above else Path.cwd())


def configuration(row: Row, seed: int, root: Path) -> FrozenConfigDict:
    """The finalized config of one run, as `ferjax.main` makes it of `arguments`.

    Raises:
      UserError: names the row.
    """
    config = _finalize(row, root)
    if row.steps:
        length = _length(row.steps, config)
        config = FrozenConfigDict(_updated(config.to_dict(), length))
    return with_seed(config, row, seed)


def with_seed(config: FrozenConfigDict, row: Row, seed: int) -> FrozenConfigDict:
    """A row's finalized config with another seed."""
    return FrozenConfigDict(_updated(config.to_dict(), _seeds(row, seed)))


def has_split_of(row: Row, config: FrozenConfigDict) -> bool:
    """Whether a run with a row's config has learnt from the labels that the row wants."""
    wanted = wanted_split(row, config.seed)
    own = config.data.labeled != "all" and config.data.split_seed != wanted
    return not own and not config.data.split_file


def wanted_split(row: Row, seed: int) -> int:
    """The seed of the labelled subset of one of a row's runs."""
    return seed if row.split_seed is None else row.split_seed


def _seeds(row: Row, seed: int) -> dict[str, int]:
    return {"seed": seed, "data.split_seed": wanted_split(row, seed)}


def arguments(row: Row, seed: int, root: Path) -> list[str]:
    """Flags of `ferjax.main` for one run; the config file is named relative to `root`."""
    changes = {**row.changes, **_seeds(row, seed)}
    if row.steps:
        changes |= _length(row.steps, _finalize(row, root))
    return [
        f"--config={row.config}",
        *(f"--config.{key}={_text(value)}" for key, value in changes.items()),
    ]


def command(row: Row, seed: int, root: Path) -> str:
    """The command of one run, for a shell in `root`."""
    return shlex.join(["python", "-m", "ferjax.main", *arguments(row, seed, root)])


def shrink(row: Row, root: Path) -> Row:
    """The row with a network, data and a schedule of seconds, to try a sweep out."""
    config = configuration(row, row.seeds[0], root)
    less = {**_QUICK, "data.labeled": _fewer(config.data.labeled)}
    dropped: tuple[str, ...] = ("model.",)
    if "predictions" in config.algorithm:  # of a teacher, which nobody has trained
        less["algorithm.name"] = "pseudo_label"
        dropped = ("model.", "algorithm.")
    if "mu" in config.algorithm:
        less["algorithm.mu"] = 1
    less |= {"model.name": "cnn", "model.layers": _QUICK_LAYERS}
    kept = {k: v for k, v in row.changes.items() if not k.startswith(dropped)}
    return dataclasses.replace(row, changes={**kept, **less, **row.quick}, steps=0)


def changed(config: FrozenConfigDict) -> dict[str, Any]:
    """The keys of a finalized config that say what is trained and are not at their default.

    Neither seeds nor paths nor what only says how it is run; a key that a later version adds, with
    a default that means "as before", changes nothing here.
    """
    plain = config.to_dict()
    defaults = configs.finalize(
        {
            **configs.base().to_dict(),
            "algorithm": {"name": config.algorithm.name},
            "model": {"name": config.model.name},
            "views": {name: {"policy": view["policy"]} for name, view in plain["views"].items()},
        }
    ).to_dict()
    flat = dict(_flatten(defaults))
    named = {"algorithm.name", "model.name", "data.name", "data.labeled", "epochs", "batch_size"}
    named |= {f"views.{name}.policy" for name in plain["views"]}

    def portable(key: str, value: Any) -> Any:
        if key in _PATHS:
            if key == "data.unlabeled_source":  # image_folder:DIR
                kind, colon, folder = value.rpartition(":")
                return kind + colon + Path(folder).name
            path, file = Path(value), ""
            if path.parent.name == "eval":  # a file in a run's workdir
                # Its own predictions are what the workdir alone stands for.
                file = path.name.replace("train_predictions.npz", "")
                path = path.parents[1]
            # A sweep's runs are <row>/<seed>: the last part alone is the seed.
            return "/".join([*path.parts[-2:], *([file] if file else [])])
        return list(value) if isinstance(value, tuple) else value

    return {
        key: portable(key, value)
        for key, value in _flatten(plain)
        if (key in named or flat[key] != value)
        and not any(key == own or key.startswith(own + ".") for own in _OF_THE_RUN)
    }


def digest(config: FrozenConfigDict) -> str:
    """A short name for what all seeds of a row have in common."""
    text = json.dumps(changed(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _finalize(row: Row, root: Path) -> FrozenConfigDict:
    """The row's config with the seed of its file."""
    path, _, variant = row.config.partition(":")
    try:
        original = configs.from_file(root / path, variant).to_dict()
        given = _updated(original, row.changes)
        return configs.finalize(configs.switch_modules(given, original))
    except UserError as error:
        raise UserError(f"row {row.name}: {error}") from None
    except MISTAKES as error:
        raise UserError(f"row {row.name}: {path}: {blame(error)}") from None


def _updated(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of nested dicts with some dotted keys set."""
    out = copy.deepcopy(dict(tree))
    for key, value in changes.items():
        *sections, last = key.split(".")
        section = out
        for name in sections:
            section = section.setdefault(name, {})
        section[last] = value
    return out


def _length(steps: int, config: FrozenConfigDict) -> dict[str, int]:
    """The keys for the least whole number of epochs of FER2013 with so many steps.

    Few labels make short epochs: a run is scored about 64 times at most.
    """
    sizes = _sizes(config.data.labeled, config.data.unlabeled)
    mu = config.algorithm.get("mu", 0)
    epochs = math.ceil(steps / batches.steps_per_epoch(*sizes, config.batch_size, mu))
    every = max(config.evaluate.every_epochs, epochs // 64)
    return {"epochs": epochs, "evaluate.every_epochs": every}


@functools.cache
def _sizes(labeled: str, unlabeled: str) -> tuple[int, int]:
    """How many images of FER2013 are labelled, and how many unlabelled."""
    counts = fer2013.CLASS_TABLE["train"]
    labels = np.repeat(np.arange(len(counts)), counts)
    keys = {"labeled": labeled, "unlabeled": unlabeled, "split_seed": 0, "split_file": ""}
    subsets = splits.make(keys, labels, np.arange(len(labels)))
    return len(subsets.labeled), len(subsets.unlabeled)


def _fewer(labeled: str) -> str:
    """`config.data.labeled` for the tiny set, which has 40 images a class."""
    if labeled.endswith("/class"):
        return f"{max(1, int(labeled.removesuffix('/class')) // _QUICK_LABELS_A_CLASS)}/class"
    return "10%" if labeled.isdigit() else labeled


def _text(value: Any) -> str:
    """A value as a flag of a config takes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, str | int | float) else repr(tuple(value))


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
