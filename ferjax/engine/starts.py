"""What each start of a run ran on: `<workdir>/starts.jsonl`, a row a start."""

import json
import logging
import os
import platform
import time
from importlib.metadata import version
from typing import Any

from etils import epath

from ferjax import config as configs
from ferjax import machine
from ferjax.engine.metrics import parse_rows
from ferjax.engine.parallel import Layout
from ferjax.workdir import reason, write_errors

log = logging.getLogger("ferjax")

FILE = "starts.jsonl"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def record(workdir: epath.Path, layout: Layout, step: int) -> None:
    """Adds this start, which goes on from `step`; a disk that does not take it is only told of."""
    row = {
        "step": step,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": layout.devices[0].device_kind,
        "devices": layout.count,
        "processes": layout.processes,
        "cpu": machine.cpu(),
        "cores": machine.cores(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "code": configs.code_version(),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }
    try:
        text = "".join(json.dumps(each) + "\n" for each in [*read(workdir), row])
        configs.write_whole(workdir / FILE, text.encode())
    except write_errors(workdir) as error:
        log.warning("%s can't be written: %s", workdir / FILE, reason(error))


def read(workdir: epath.Path) -> list[dict[str, Any]]:
    """All starts, the first one first; [] of a run of an early version.

    A row holds `step` that it went on from, `time` in UTC, `device` (its kind), `devices` and
    `processes` (numbers of them), `cpu` and `cores` of process 0, `xla_flags`, `code`
    (`config.code_version`), and the versions of Python and of `PACKAGES` by their names.
    """
    path = workdir / FILE
    return parse_rows(path.read_bytes().decode(errors="replace")) if path.exists() else []


def last(workdir: epath.Path) -> dict[str, Any]:
    """The last start's row; {} if none is known."""
    return (read(workdir) or [{}])[-1]
