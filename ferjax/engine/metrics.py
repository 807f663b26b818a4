"""Training metrics: sums on the device, rows in metrics.jsonl, curves in TensorBoard."""

import json
import logging
import math
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from clu import metrics as clu_metrics

log = logging.getLogger("ferjax")

# Fields of a row that depend on the clock; all others are functions of the config.
CLOCK_FIELDS = ("seconds", "images_per_second")


class Accumulator:
    """Weighted means since the last row, as `clu.metrics.Average`s in float64 on the host.

    `to_json` goes into each checkpoint: a run that is resumed between two rows writes the very
    same rows.
    """

    def __init__(self, content: dict[str, list[float]] | None = None) -> None:
        self._means = {
            name: clu_metrics.Average(total=np.float64(total), count=np.float64(count))
            for name, (total, count) in (content or {}).items()
        }

    def add(self, metrics: dict[str, tuple[Any, Any]]) -> None:
        """Adds one step's (sum, weight) pairs."""
        for name, (total, count) in metrics.items():
            new = clu_metrics.Average(total=np.float64(total), count=np.float64(count))
            self._means[name] = self._means[name].merge(new) if name in self._means else new

    def take(self) -> dict[str, float | None]:
        """The means, None where nothing had weight; starts anew."""
        means = {
            name: float(m.total / m.count) if m.count else None for name, m in self._means.items()
        }
        self._means = {}
        return means

    def to_json(self) -> dict[str, list[float]]:
        """A copy that JSON keeps exactly."""
        return {name: [float(m.total), float(m.count)] for name, m in self._means.items()}


class Writer:
    """metrics.jsonl, one object a line, and TensorBoard events where they can be written.

    Rows have `step`, `epoch` and `kind` ("train": means over the steps since the last such row;
    "eval": scores at the step). Only process 0 writes.

    Args:
      workdir: the run's directory.
      step: rows after this step are dropped: they belong to a part that is trained again.
      active: whether this process writes.
    """

    def __init__(self, workdir: Path, step: int, active: bool) -> None:
        self._path, self._active = workdir / "metrics.jsonl", active
        self._events = None
        if not active:
            return
        kept = [row for row in read_rows(self._path) if row["step"] <= step]
        temporary = self._path.with_suffix(".jsonl.new")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        os.replace(temporary, self._path)
        try:
            # Imports TensorFlow: only where the extra [tensorboard] is installed.
            from clu import metric_writers

            self._events = metric_writers.SummaryWriter(str(workdir / "events"))
        except ImportError:
            log.debug("no TensorBoard events: the extra [tensorboard] is not installed")

    def write(self, row: dict[str, Any]) -> None:
        """Appends a row; NaN and infinities become null, so that the file stays JSON."""
        if not self._active:
            return
        clean = {k: None if _not_finite(v) else v for k, v in row.items()}
        with self._path.open("a") as file:
            file.write(json.dumps(clean) + "\n")
        if self._events is not None:
            scalars = {
                f"{row['kind']}/{k}": v for k, v in clean.items() if isinstance(v, int | float)
            }
            self._events.write_scalars(row["step"], scalars)

    def close(self) -> None:
        """Flushes the events."""
        if self._events is not None:
            self._events.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a torn last line is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def parameter_table(params: Any) -> str:
    """Names, shapes and sizes of all parameters, with the total."""
    from clu import parameter_overview

    return parameter_overview.get_parameter_overview(params, include_stats=False)


def count_parameters(params: Any) -> int:
    """How many numbers a tree holds."""
    return sum(math.prod(np.shape(x)) for x in jax.tree.leaves(params))


def _not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
