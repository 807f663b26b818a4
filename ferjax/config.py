"""What the user gives: configs and their checks.

A config file is a Python file with `get_config(variant="")` that starts from `base()`. The sections
`algorithm`, `model` and `views.*` are open: each names a module or a preset, and may set any field
of it. `finalize` fills in the fields that were not set, checks every key and type, and freezes.
"""

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import json
import math
import os
import pkgutil
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from etils import epath
from ml_collections import ConfigDict, FrozenConfigDict

EXIT_OK, EXIT_FAILED, EXIT_USER_ERROR, EXIT_PREEMPTED = 0, 1, 2, 75

# What may differ when a run goes on from its workdir: nothing here changes what is trained.
FREE_KEYS = (
    "name",
    "log_every",
    "data.source",
    "data.unlabeled_source",  # split.json holds the pictures' digest
    "data.ferplus_source",
    "data.data_dir",
    "data.split_file",
    "data.pipeline",
    "data.workers",
    "parallel",
    "steps_per_call",
    "stop_after_steps",
    "stop_after_minutes",
    "cpu_config",
    "next_command",
    "checkpoint",
    "profile",
    "evaluate.batch_size",
)

# What a module must define to be found by its name.
EXPORTS = {"algorithms": "Algorithm", "models": "Model", "data": "Builder"}

# Fields of a model that the engine sets from the data and the devices.
ENGINE_FIELDS = ("num_classes", "axis_name", "dtype", "parent", "name")


class UserError(Exception):
    """Something the user gave is wrong.

    The message is one line: what is wrong, where, and how to mend it. Commands print it without a
    traceback and exit with `status`.
    """

    status = EXIT_USER_ERROR


class UnreachableError(UserError):
    """Something outside did not answer: a server, a bucket, another process.

    What the user gave may be right, so that the same command, started again, may work:
    `tpu_queued.sh` and the JobSets start a 1 again and give up at a 2.
    """

    status = EXIT_FAILED


def base() -> ConfigDict:
    """Every key that a config may set, with its default."""
    return ConfigDict(
        {
            "name": "",  # set from the config's file; names the default workdir
            "seed": 0,  # of weights, batches, views and noise; the labelled subset has its own
            "init_from": "",  # weights to start from: a run's workdir, or ResNet's .safetensors
            "epochs": 30,  # one epoch = ceil(max(labelled / B, unlabelled / (mu B))) steps
            "batch_size": 64,  # B: labelled images a step, over all devices
            # Of the network's activations: float32 | bfloat16 | float64. An accelerator multiplies
            # float32 in its own default precision (TF32; on a TPU bfloat16 passes).
            "dtype": "float32",
            "algorithm": {"name": "fixmatch"},  # ferjax/algorithms/<name>.py and its fields
            "model": {"name": "cnn"},  # ferjax/models/<name>.py and its fields
            "views": {  # ferjax/augment/policies.py: a preset and its fields
                "weak": {"policy": "weak"},
                "strong": {"policy": "strong"},
            },
            "data": {
                "name": "fer2013",  # ferjax/data/<name>.py, or <name>/<its TFDS config>
                "source": "",  # folder, zip or CSV; else FER2013_SOURCE; else downloaded
                "data_dir": "",  # where prepared data is kept; else TFDS_DATA_DIR; else TFDS's own
                "labeled": "all",  # "all" | "30%" | "2870" | "25/class"
                "unlabeled": "rest",  # "rest": without the labelled images | "all": with them
                "unlabeled_source": "",  # more of them: image_folder:DIR, any folder of pictures
                "split_seed": 0,  # which images are labelled
                "split_file": "",  # another run's split.json: the same labelled images
                "clean": "none",  # of training: none | leaks: no copies of test images | strict
                "labels": "hard",  # hard | ferplus7 or ferplus8 (votes) | these with _majority
                "ferplus_source": "",  # fer2013new.csv; else FERPLUS_SOURCE; else downloaded
                # Of labelled images: uniform | balanced, each class equally often: so are then the
                # shares that adamatch, remixmatch and softmatch's alignment=labeled align to.
                "sampling": "uniform",
                "illumination": "none",  # none | equalize | clahe | standardize (each view)
                "pipeline": "auto",  # auto | device: images in its memory | stream: from disk
                "workers": -1,  # processes that read a stream; 0: threads; -1: half the cores
                "crop": 0,  # side of what a view shows: any part in training, else the middle
                "image_size": 0,  # side of a view in pixels; 0: that of the data, or of its crop
                "channels": 1,  # of a view; grey is repeated
                "mean": (0.5077,),  # per channel (or one for all), of pixels / 255
                "std": (0.2551,),
            },
            "optimizer": {
                "name": "sgd",  # sgd | adam | adamw
                "learning_rate": 0.03,
                "schedule": "cosine",  # cosine | cosine_7_16 | constant
                "warmup_epochs": 0.0,  # linear, from 0
                "momentum": 0.9,  # sgd
                "nesterov": True,  # sgd
                "b1": 0.9,  # adam, adamw
                "b2": 0.999,  # adam, adamw
                "weight_decay": 5e-4,  # on kernels; decoupled for adamw, else added to the gradient
                "decayed": "kernels",  # which: kernels (all) | dense (of dense layers only)
                "clip_norm": 0.0,  # of the whole gradient; 0: none
            },
            "ema_decay": 0.999,  # of weights and statistics; starts as min(d, (1 + t) / (10 + t))
            "evaluate": {"every_epochs": 1, "batch_size": 256},
            "checkpoint": {"every_minutes": 5.0, "keep": 2},  # keep: of the latest, at least 2
            "log_every": 20,  # steps a row of metrics.jsonl
            "parallel": "pmap",  # pmap | shard_map
            "deterministic": False,  # the same bits in every run on a GPU, at some cost in speed
            "microbatches": 1,  # parts that a device's batch is worked off in, for less memory
            "on_nan": "stop",  # stop | skip: leave the state as it was, and stop after 10 in a row
            "profile": "",  # START:STEPS: a profiler trace of these steps in <workdir>/profile
            "steps_per_call": 0,  # 0: near 16 on a GPU or TPU, 1 on a CPU
            "stop_after_steps": 0,  # save and exit with 75 at this step; 0: never
            "stop_after_minutes": 0.0,  # the same by the clock of this start; 0: never
            "cpu_config": "",  # what to suggest when this is started on a CPU
            "next_command": "",  # what to suggest at the end
        }
    )


def from_file(path: Path | str, variant: str = "") -> ConfigDict:
    """What `get_config` of a config file returns, for configs that build on another and for sweeps.

    Raises:
      UserError: there is no such file, it defines no `get_config`, or it has no variants.
    """
    spec = importlib.util.spec_from_file_location("ferjax_config", path)
    if spec is None or spec.loader is None or not Path(path).is_file():
        raise UserError(f"{path} is not a config file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"{path} defines no get_config()")
    if variant and not inspect.signature(module.get_config).parameters:
        raise UserError(f"{path} has no variants: give it without :{variant}")
    return module.get_config(*([variant] if variant else []))


def find(kind: str, name: str) -> Any:
    """The class `EXPORTS[kind]` of the module `ferjax.<kind>.<name>`.

    Raises:
      UserError: there is none; names the nearest.
    """
    package = importlib.import_module(f"ferjax.{kind}")
    modules = [m.name for m in pkgutil.iter_modules(package.__path__)]
    if name in modules:
        module = importlib.import_module(f"ferjax.{kind}.{name}")
        if found := getattr(module, EXPORTS[kind], None):
            return found
    usable = [
        m for m in modules if hasattr(importlib.import_module(f"ferjax.{kind}.{m}"), EXPORTS[kind])
    ]
    raise UserError(f"there is no {name!r} in ferjax/{kind}: {_nearest(name, usable)}")


def finalize(config: ConfigDict | Mapping[str, Any]) -> FrozenConfigDict:
    """Fills in, checks and freezes a config.

    Args:
      config: `base()` with some keys changed; open sections may have further keys.

    Returns:
      A complete frozen config: every field of the algorithm, model and views is in it.

    Raises:
      UserError: an unknown key, module or preset (with the nearest names), or a wrong type.
    """
    # Type safety is ours here: an int given for a float is taken as one.
    given = ConfigDict(_plain(config))
    defaults = base().to_dict()
    algorithm, model = (given.get(s, {}).get("name", "") for s in ("algorithm", "model"))
    algorithm_class = find("algorithms", str(algorithm))
    model_class = find("models", str(model))
    defaults["algorithm"] = {"name": algorithm, **field_defaults(algorithm_class)}
    defaults["model"] = {"name": model, **field_defaults(model_class)}
    policies = importlib.import_module("ferjax.augment.policies")
    presets = {k.lower(): v for k, v in vars(policies).items() if isinstance(v, policies.Policy)}
    defaults["views"] = {}
    for view, section in given.get("views", {}).items():
        if not isinstance(section, ConfigDict) or "policy" not in section:
            raise UserError(f"config.views.{view} needs a policy: {', '.join(sorted(presets))}")
        if section.policy not in presets:
            raise UserError(
                f"config.views.{view}.policy={section.policy}: {_nearest(section.policy, presets)}"
            )
        preset = presets[section.policy]
        values = {f.name: getattr(preset, f.name) for f in fields(preset)}
        defaults["views"][view] = {"policy": section.policy, **values}
    full = _fill(given.to_dict(), defaults, "config")
    find("data", full["data"]["name"].partition("/")[0])
    _check_ranges(full)
    return FrozenConfigDict(full)


def switch_modules(given: dict[str, Any], original: dict[str, Any]) -> dict[str, Any]:
    """Lets the command line name another algorithm or model than the config file.

    What the file set for its own module and the new one does not have is dropped; what the command
    line set is kept, and refused by `finalize` if the new module has no such field.

    Args:
      given: the file's config with the command line's changes.
      original: the file's config without them.
    """
    result = dict(given)
    for kind, package in (("algorithm", "algorithms"), ("model", "models")):
        before, after = original.get(kind, {}), given.get(kind, {})
        if not isinstance(after, dict) or before.get("name") == after.get("name"):
            continue
        known = {"name", *field_defaults(find(package, str(after.get("name"))))}
        result[kind] = {
            key: value
            for key, value in after.items()
            if key in known or key not in before or before[key] != value
        }
    return result


def field_defaults(cls: type) -> dict[str, Any]:
    """The settable fields of an `Algorithm` or `Model` dataclass with their defaults."""
    return {
        f.name: f.default
        for f in fields(cls)
        if f.default is not MISSING and f.init and f.name not in ENGINE_FIELDS
    }


def section(config: FrozenConfigDict, name: str) -> dict[str, Any]:
    """The fields of an open section, without the key that names it."""
    return {k: v for k, v in config[name].items() if k not in ("name", "policy")}


def save(config: FrozenConfigDict, path: epath.Path) -> None:
    """Writes a config as JSON."""
    write_json(path, config.to_dict(), indent=2)


def write_json(path: Path | epath.Path, content: Any, indent: int | None = None) -> None:
    """Writes a JSON file; see `write_whole`."""
    write_whole(path, (json.dumps(content, indent=indent) + "\n").encode())


def write_whole(path: Path | epath.Path, content: bytes) -> None:
    """Writes a file whole or not at all: a kill or a full disk in between leaves the old one."""
    if os.fspath(path).startswith("gs://"):  # in a bucket every write is so
        path.write_bytes(content)
        return
    if path.exists() and not path.is_file():  # a pipe, say
        path.write_bytes(content)
        return
    path = path.resolve()  # what a link names
    temporary = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: epath.Path) -> FrozenConfigDict:
    """Reads a config that `save` wrote; it is data: nothing in it is run.

    Raises:
      UserError: no such file, or not a config of this version.
    """
    try:
        return finalize(json.loads(path.read_text()))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} is not there: is {path.parent} a ferjax workdir?") from None
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{path} is not a config: {error}") from None


def differences(old: FrozenConfigDict, new: FrozenConfigDict) -> list[str]:
    """Lines `key: old -> new` for all keys that may not differ between two starts of one run."""
    a, b = dict(_flatten(old.to_dict())), dict(_flatten(new.to_dict()))
    return [
        f"{key}: {a.get(key)!r} -> {b.get(key)!r}"
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key)
        and not any(key == free or key.startswith(free + ".") for free in FREE_KEYS)
    ]


def code_version() -> str:
    """The versions of JAX, Flax and Optax, and a digest of ferjax's own files."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    libraries = (f"{name} {version(name)}" for name in ("jax", "flax", "optax"))
    return f"ferjax {digest.hexdigest()[:16]}, {', '.join(libraries)}"


def _plain(config: Any) -> Any:
    if isinstance(config, ConfigDict):
        config = config.to_dict()
    if isinstance(config, Mapping):
        return {str(k): _plain(v) for k, v in config.items()}
    return tuple(_plain(v) for v in config) if isinstance(config, list | tuple) else config


def _fill(given: dict[str, Any], defaults: dict[str, Any], where: str) -> dict[str, Any]:
    out = dict(defaults)
    for key, value in given.items():
        path = f"{where}.{key}"
        if key not in defaults:
            raise UserError(f"{path} is not a key: {_nearest(key, defaults)}")
        default = defaults[key]
        if isinstance(default, dict):
            if not isinstance(value, dict):
                raise UserError(f"{path}={value!r}: this is a section with {', '.join(default)}")
            out[key] = _fill(value, default, path)
            continue
        if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if isinstance(default, tuple) and isinstance(value, int | float | str):
            value = (value,)
        if isinstance(default, str) and isinstance(value, int | float):
            value = str(value)
        numbers = value if isinstance(value, tuple) else (value,)
        if any(isinstance(x, float) and not math.isfinite(x) for x in numbers):
            raise UserError(f"{path}={value}: expected a finite number, such as {default!r}")
        same = type(value) is type(default)
        if same and isinstance(value, tuple) and default:
            kinds = (int, float) if isinstance(default[0], float) else type(default[0])
            same = all(isinstance(item, kinds) for item in value)
        if not same:
            wanted = type(default).__name__
            raise UserError(f"{path}={value!r}: expected {wanted}, such as {default!r}")
        out[key] = value
    return out


def _check_ranges(c: dict[str, Any]) -> None:
    choices = {
        "dtype": ("float32", "bfloat16", "float64"),
        "parallel": ("pmap", "shard_map"),
        "on_nan": ("stop", "skip"),
        "optimizer.name": ("sgd", "adam", "adamw"),
        "optimizer.schedule": ("cosine", "cosine_7_16", "constant"),
        "optimizer.decayed": ("kernels", "dense"),
        "data.unlabeled": ("rest", "all"),
        "data.labels": (
            "hard",
            "ferplus7",
            "ferplus7_majority",
            "ferplus8",
            "ferplus8_majority",
        ),
        "data.clean": ("none", "leaks", "strict"),
        "data.pipeline": ("auto", "device", "stream"),
        "data.sampling": ("uniform", "balanced"),
        "data.illumination": ("none", "equalize", "clahe", "standardize"),
    }
    flat = dict(_flatten(c))
    for key, allowed in choices.items():
        if flat[key] not in allowed:
            raise UserError(f"config.{key}={flat[key]}: {_nearest(flat[key], allowed)}")
    positive = ["epochs", "batch_size", "log_every", "data.channels", "checkpoint.keep"]
    positive += [
        "microbatches",
        "evaluate.every_epochs",
        "evaluate.batch_size",
        "optimizer.learning_rate",
    ]
    for key in positive:
        if flat[key] <= 0:
            raise UserError(f"config.{key}={flat[key]}: it must be greater than 0")
    not_negative = ["seed", "steps_per_call", "stop_after_steps", "stop_after_minutes"]
    not_negative += ["data.split_seed", "data.image_size", "data.crop", "optimizer.weight_decay"]
    not_negative += ["optimizer.warmup_epochs", "optimizer.clip_norm"]
    for key in not_negative:
        if flat[key] < 0:
            raise UserError(f"config.{key}={flat[key]}: it must not be negative")
    if c["data"]["workers"] < -1:
        raise UserError(f"config.data.workers={c['data']['workers']}: it must be -1 or more")
    for key in ("seed", "data.split_seed"):
        if flat[key] >= 2**32:
            raise UserError(f"config.{key}={flat[key]}: it must be below 2^32")
    for key in ("ema_decay", "optimizer.momentum", "optimizer.b1", "optimizer.b2"):
        if not 0 <= flat[key] < 1:
            raise UserError(f"config.{key}={flat[key]}: it must be in [0, 1)")
    for key in ("mean", "std"):
        if len(c["data"][key]) not in (1, c["data"]["channels"]):
            raise UserError(
                f"config.data.{key}={c['data'][key]}: one value, or one for each of "
                f"{c['data']['channels']} channels"
            )
    _check_combinations(c)


def _check_combinations(c: dict[str, Any]) -> None:
    data, algorithm, usual = c["data"], c["algorithm"], base().data
    own = [key for key in ("mean", "std") if data[key] != usual[key]]
    if data["illumination"] == "standardize" and own:
        raise UserError(
            f"config.data.{own[0]}={data[own[0]]}: config.data.illumination=standardize takes each "
            "view's own; leave mean and std as they are"
        )
    if data["sampling"] == "balanced":
        for key, off in (("weighting", "none"), ("logit_adjustment", 0.0)):
            if algorithm.get(key, off) != off:
                raise UserError(
                    f"config.algorithm.{key}={algorithm[key]}: config.data.sampling=balanced shows "
                    "all classes alike already; use one of them"
                )
        if any(view["flip_style"] == "alternate" for view in c["views"].values()):
            raise UserError("flip_style=alternate needs passes: config.data.sampling=uniform")


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _nearest(name: str, names: Iterable[str]) -> str:
    names = sorted(names)
    near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names)}"
