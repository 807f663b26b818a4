"""Training metrics: sums on the device, rows in metrics.jsonl, curves in TensorBoard."""

import collections
import contextlib
import errno
import importlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics as clu_metrics
from etils import epath

from ferjax.engine.parallel import host
from ferjax.workdir import (
    UPLOAD_SECONDS,
    Mirror,
    OwnedObject,
    Throttle,
    is_remote,
    reason,
    write_errors,
)

log = logging.getLogger("ferjax")

# Fields of a row that depend on the clock; all others are functions of the config. images/s is
# that of the steps alone; the first row of a start has its compilation in it.
CLOCK_FIELDS = ("seconds", "images_per_second")

PICTURE_SECONDS = 60.0  # least time between pictures for TensorBoard

SKIPS_IN_A_ROW = 10  # steps that are not finite, after which --config.on_nan=skip gives up


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
    "eval": scores at the step). Only process 0 writes. On a disk a row is there at once; an object
    in a bucket can't be appended to: there it is written anew, at most every UPLOAD_SECONDS and by
    `flush`.

    Args:
      workdir: the run's directory.
      step: rows after this step are dropped: they belong to a part that is trained again.
      active: whether this process writes.
      unscored: whether `step` is still to be scored, so that a score of it is dropped too.
    """

    def __init__(
        self, workdir: epath.Path, step: int, active: bool = True, unscored: bool = False
    ) -> None:
        self._path, self._active = workdir / "metrics.jsonl", active
        self._owed = ""  # rows that the disk has not taken yet
        self._events = None
        self._pictured = -math.inf
        self._object: OwnedObject | None = None
        self._mirror: Mirror | None = None
        if not active:
            return
        if is_remote(workdir):
            self._object, self._due = OwnedObject(self._path), Throttle(UPLOAD_SECONDS)
            old = parse_rows(self._object.read() or "")
        else:
            old = read_rows(self._path)
        kept = [
            row
            for row in old
            if row["step"] < step
            or (row["step"] == step and not (unscored and row["kind"] == "eval"))
        ]
        self._lines, self._written = [json.dumps(row) + "\n" for row in kept], -1
        if self._object:
            self._flush_rows()
        else:
            temporary = self._path.with_suffix(".jsonl.new")
            temporary.write_text("".join(self._lines))
            os.replace(temporary, self._path)
        self._mirror = Mirror(workdir / "events") if self._object else None
        try:
            # Imports TensorFlow: only where the extra [tensorboard] is installed.
            from clu import metric_writers

            # It would take what JAX has left of a GPU's memory.
            importlib.import_module("tensorflow").config.set_visible_devices([], "GPU")
            # On this machine's disk first: TensorFlow's own gs:// is in a package of its own.
            events = self._mirror.local if self._mirror else workdir / "events"
            self._events = metric_writers.SummaryWriter(str(events))
        except ImportError:
            log.debug("no TensorBoard events: the extra [tensorboard] is not installed")
        except Exception as error:  # a broken TensorFlow must not stop a training
            log.warning("no TensorBoard events: %s", error)

    def write(self, row: dict[str, Any]) -> None:
        """Appends a row; NaN and infinities become null, so that the file stays JSON."""
        if not self._active:
            return
        clean = {k: None if _not_finite(v) else v for k, v in row.items()}
        if self._object:
            self._lines.append(json.dumps(clean) + "\n")
            if self._due():
                # What fails now is written later; a save does not come before it.
                with contextlib.suppress(*write_errors(self._path)):
                    self.flush()
        else:
            self._owed += json.dumps(clean) + "\n"
            with contextlib.suppress(OSError):  # on a full disk; a save does not come before it
                self._append()
        scalars = {f"{row['kind']}/{k}": v for k, v in clean.items() if isinstance(v, int | float)}
        self._show(lambda events: events.write_scalars(row["step"], scalars))

    def write_images(self, step: int, draw: Callable[[], dict[str, np.ndarray]]) -> None:
        """Pictures for TensorBoard, uint8 [N, H, W, 3] by name, if it is there.

        Drawing takes time from short epochs: it is left out for PICTURE_SECONDS after the last one.
        """
        if self._events is None or time.monotonic() - self._pictured < PICTURE_SECONDS:
            return
        pictures = {f"eval/{name}": picture for name, picture in draw().items()}
        self._show(lambda events: events.write_images(step, pictures))
        self._pictured = time.monotonic()

    def flush(self) -> None:
        """Until all rows are in the workdir: before a save, which must not be newer than they.

        Raises:
          one of `write_errors`: the bucket does not take them; OvertakenError if another process
            has written rows.
        """
        self._flush_rows()
        if self._mirror and self._events is not None:
            self._show(lambda events: events.flush())
            self._mirror.upload()

    def _show(self, write: Callable[[Any], None]) -> None:
        """Writes for TensorBoard, if it is there; its errors must not stop a training."""
        if self._events is None:
            return
        try:
            write(self._events)
        except Exception as error:  # a full disk is no OSError to TensorFlow
            log.warning("no more TensorBoard events: %s", error)
            self._events = None

    def _append(self) -> None:
        """Appends the rows that are owed, all or none."""
        data = self._owed.encode()
        file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            end = os.fstat(file).st_size
            if os.write(file, data) < len(data):
                os.ftruncate(file, end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(file)
        self._owed = ""

    def _flush_rows(self) -> None:
        if self._owed:
            self._append()
        if self._object and self._written != len(self._lines):
            self._object.write("".join(self._lines))
            self._written = len(self._lines)

    def close(self) -> None:
        """Flushes rows and events."""
        self._show(lambda events: events.close())
        if self._active:
            try:
                self._flush_rows()
                if self._mirror:
                    self._mirror.close()
            except write_errors(self._path) as error:
                log.warning("the last rows are not in %s: %s", self._path, reason(error))


@jax.tree_util.register_pytree_node_class
class Packed(Mapping):
    """Metrics as one array, which is read from a device at once: name -> (sums, weights).

    Reading two arrays a metric one by one took 1 ms each on a busy CPU, 5 % of a small step.

    Args:
      names: of the metrics.
      values: [2 M, ...], the sums and weights of each in turn.
    """

    def __init__(self, names: tuple[str, ...], values: Any) -> None:
        self._names, self._values = names, values

    @classmethod
    def of(cls, metrics: Mapping[str, tuple[jax.Array, jax.Array]]) -> "Packed":
        """Packs metrics of equal shapes, inside a compiled function."""
        names = tuple(sorted(metrics))
        return cls(names, jnp.stack([value for name in names for value in metrics[name]]))

    def __getitem__(self, name: str) -> tuple[Any, Any]:
        if name not in self._names:
            raise KeyError(name)
        place = 2 * self._names.index(name)
        return self._values[place], self._values[place + 1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def tree_flatten(self) -> tuple[tuple[Any], tuple[str, ...]]:
        """For JAX."""
        return (self._values,), self._names

    @classmethod
    def tree_unflatten(cls, names: tuple[str, ...], values: Sequence[Any]) -> "Packed":
        """For JAX."""
        return cls(names, *values)


class NotFiniteError(Exception):
    """The loss or the gradient is NaN or infinite."""


class Recorder:
    """Reads the metrics of calls some calls later, so that the device never waits for the host.

    Args:
      run: the `Experiment`.
      writer: gets a row every `log_every` steps.
      content: of `to_json`, from the checkpoint that the run goes on from.
      last_good: the newest saved step, for the message when training diverges.
    """

    def __init__(
        self, run: Any, writer: Writer, content: Any, last_good: Callable[[], int | None]
    ) -> None:
        self.shown: dict[str, str] = {}
        self._run, self._writer, self._last_good = run, writer, last_good
        self._sums = Accumulator(content)
        self._unread: collections.deque = collections.deque()
        self._images_a_step = sum(b.size for b in run.batches.values())
        self._started = self._row_at = time.monotonic()
        self._row_steps, self._row_pause, self._rate = 0, 0.0, 0.0
        self._skipped = 0  # steps in a row that were left out

    def add(self, first: int, metrics: Any) -> None:
        """Takes the metrics (sums [k], weights [k]) of the call that started at step `first`."""
        self._unread.append((first, metrics))

    def read(self, limit: int) -> None:
        """Waits until at most `limit` calls are unread, and writes the rows that are full.

        Raises:
          NotFiniteError: names the step and the last good checkpoint.
        """
        while len(self._unread) > limit:
            first, metrics = self._unread.popleft()
            metrics = host(metrics)
            count = len(metrics["loss"][0])
            self._row_steps += count  # of the whole call: its time is one measurement
            for i in range(count):
                self._check(first + i, {name: pair[0][i] for name, pair in metrics.items()})
                self._sums.add({name: (s[i], w[i]) for name, (s, w) in metrics.items()})
                self._write(first + i + 1)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """What happens inside (evaluation, saving) is left out of images/s."""
        began = time.monotonic()
        yield
        self._row_pause += time.monotonic() - began

    def check_state(self, state: Any) -> None:
        """Refuses to save what has diverged although the loss was finite.

        Raises:
          NotFiniteError: a number of the state (host arrays) is NaN or infinite.
        """
        for path, leaf in jax.tree_util.tree_leaves_with_path(state):
            if np.issubdtype(leaf.dtype, np.floating) and not np.isfinite(leaf).all():
                self._refuse(jax.tree_util.keystr(path), "not finite", int(state.step) - 1)

    def to_json(self) -> dict[str, list[float]]:
        """The sums of the row that is not full yet."""
        return self._sums.to_json()

    def _write(self, done: int) -> None:
        if done % self._run.config.log_every and done != self._run.steps:
            return
        now = time.monotonic()
        means = self._sums.take()
        if self._row_steps:
            seconds = now - self._row_at - self._row_pause
            self._rate = self._row_steps * self._images_a_step / seconds
            self._row_at, self._row_steps, self._row_pause = now, 0, 0.0
        clock = {"seconds": now - self._started, "images_per_second": self._rate}
        epoch = done / self._run.per_epoch
        self._writer.write({"kind": "train", "step": done, "epoch": epoch, **means, **clock})
        kept = {name: means.get(name) for name in ("loss", "mask_rate")}
        self.shown = {name: f"{value:.3f}" for name, value in kept.items() if value is not None}

    def _check(self, step: int, values: dict[str, Any]) -> None:
        self._skipped = self._skipped + 1 if values.get("skipped") else 0
        if self._skipped:
            log.warning("step %d was skipped: its loss or gradient is not finite", step)
            if self._skipped == SKIPS_IN_A_ROW:
                self._refuse(
                    "the loss or its gradient", f"not finite, {SKIPS_IN_A_ROW}th time", step
                )
        for name, what in (("loss", "the loss"), ("grad_norm", "the gradient's norm")):
            if not math.isfinite(values[name]):
                self._refuse(what, values[name], step)

    def _refuse(self, what: str, value: Any, step: int) -> None:
        last = self._last_good()
        note, where = self._run.workdir / "not_finite.json", ""
        if self._run.layout.process == 0:
            content = {
                "step": step,
                "what": what,
                "value": str(value),
                "rows": self._run.rows(step),
            }
            with contextlib.suppress(*write_errors(note)):  # the message below matters more
                note.unlink(missing_ok=True)  # of an earlier step
                note.write_text(json.dumps(content) + "\n")
                where = f"; the rows of the step's images are in {note}"
        raise NotFiniteError(
            f"{what} is {value} at step {step}; the last good checkpoint is "
            f"{f'step {last}' if last else 'none'}{where}: "
            "lower config.optimizer.learning_rate or clip with config.optimizer.clip_norm, in "
            "another --workdir"
        )


def read_rows(path: epath.Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a torn last line is left out."""
    return parse_rows(path.read_text() if path.exists() else "")


def parse_rows(text: str) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl's text; a torn last line is left out."""
    rows = []
    for line in text.splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def training_seconds(rows: Sequence[Mapping[str, Any]]) -> float:
    """Training time over all starts: the clock of a row is that of its start.

    A start is told by a clock that goes back; one whose first row comes later than the last row
    before it is not seen.
    """
    total = clock = 0.0
    for row in rows:
        if row["seconds"] < clock:
            total += clock
        clock = row["seconds"]
    return total + clock


def parameter_table(params: Any) -> str:
    """Names, shapes and sizes of all parameters, with the total."""
    from clu import parameter_overview

    return parameter_overview.get_parameter_overview(params, include_stats=False)


def count_parameters(params: Any) -> int:
    """How many numbers a tree holds."""
    return sum(math.prod(np.shape(x)) for x in jax.tree.leaves(params))


def _not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
