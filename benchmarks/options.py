"""Flags and configs of the benchmarks; `common` hands these on.

A benchmark takes --config=FILE[:VARIANT] and any number of --config.a.b=VALUE, as training does.
"""

import argparse
import ast
import importlib.util
import os
from collections.abc import Mapping, Sequence
from typing import Any
from unittest import mock

from ml_collections import ConfigDict, FrozenConfigDict

from ferjax import config as configs
from ferjax.config import UserError
from ferjax.runtime import recycle_memory, xla_flags

SIDE = 48  # of FER2013's images


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The flags that every benchmark has; `doc` is its docstring."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    made.add_argument("--config", required=True, help="a config file, or FILE:VARIANT")
    made.add_argument("--images", type=int, default=4096, help="random training images")
    made.add_argument("--side", type=int, default=SIDE, help="their side in pixels")
    made.add_argument("--table", action="store_true", help="print a table before the JSON line")
    return made


def parse(
    made: argparse.ArgumentParser, argv: Sequence[str] | None
) -> tuple[argparse.Namespace, FrozenConfigDict]:
    """The flags and the finalized config, with `--config.a.b=value` applied.

    Raises:
      UserError: see `read_config`; argparse itself exits with 2 on unknown flags.
    """
    args, rest = made.parse_known_args(argv)
    if unknown := [text for text in rest if not text.startswith("--config.")]:
        made.error(f"unknown argument {unknown[0]}")
    config = read_config(args.config, [text.removeprefix("--config.") for text in rest])
    # Before a backend starts, here and in the processes that are started from here.
    recycle_memory(os.environ)
    xla_flags(config.batch_size // config.microbatches, deterministic=config.deterministic)
    return args, config


def read_config(path: str, overrides: Sequence[str] = ()) -> FrozenConfigDict:
    """A config file ("FILE" or "FILE:VARIANT") with overrides "a.b=value", finalized.

    Raises:
      UserError: no such file, or a key or value that the config refuses.
    """
    given = configs.from_file(*path.split(":", 1))
    original = given.to_dict()
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--config.{text}: write --config.{key}=VALUE")
        *sections, last = key.split(".")
        place = given
        for name in sections:
            if not isinstance(place.get(name), ConfigDict):
                raise UserError(f"--config.{key}: {name} is not a section of the config")
            place = place[name]
        with place.unlocked(), place.ignore_type():
            place[last] = _value(value)
    return finalize(configs.switch_modules(given.to_dict(), original))


def finalize(given: Mapping[str, Any]) -> FrozenConfigDict:
    """`ferjax.config.finalize`, also where TFDS is not installed: no data set is read here."""
    if importlib.util.find_spec("tensorflow_datasets"):
        return configs.finalize(given)
    find = configs.find
    with mock.patch.object(configs, "find", lambda kind, name: kind == "data" or find(kind, name)):
        return configs.finalize(given)


def changed(config: FrozenConfigDict, **changes: Any) -> FrozenConfigDict:
    """A config with some keys changed: `changed(c, dtype="float32", algorithm__mu=1)`."""
    given = config.to_dict()
    for key, value in changes.items():
        *sections, last = key.split("__")
        place = given
        for name in sections:
            place = place[name]
        place[last] = value
    return finalize(given)


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
