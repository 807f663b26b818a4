"""What the benchmarks share: the command line, a ready step, interleaved timing, the JSON line.

Nothing here imports torch, reads a data set or starts a backend before `Setup` does: the images
are random bytes of FER2013's size, because what they show changes no time.
"""

import collections
import dataclasses
import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from ml_collections import FrozenConfigDict
from options import SIDE, changed, finalize, parse, parser, read_config

from ferjax import machine as host_machine
from ferjax.algorithms.base import BaseAlgorithm
from ferjax.config import EXIT_OK, UserError
from ferjax.data.batches import Batches
from ferjax.engine.assemble import assemble, start_state
from ferjax.engine.parallel import Layout, host
from ferjax.engine.state import build
from ferjax.engine.step import make_call

CLASSES = 7
STEPS = 10_000  # the schedule's length; no benchmark takes as many
CALLS_IN_FLIGHT = 2  # as in ferjax/engine/train.py

Record = dict[str, Any]

__all__ = ["SIDE", "changed", "finalize", "parse", "parser", "read_config"]


@dataclasses.dataclass
class Timing:
    """Some calls in a row: `seconds` by the clock, `host_seconds` that Python itself computed."""

    steps: int
    seconds: float
    host_seconds: float


class Setup:
    """A config made into a training step on random images, with the engine's own parts.

    Args:
      config: finalized.
      images: number of random images; a third of them is labelled.
      side: of the stored images, in pixels.
      plain_views: replace every view by normalisation alone.
      algorithm: instead of the config's.
      devices: those to use, all if None.

    Attributes:
      per_call: steps a call; 0 is 1 on a CPU, else 16, where training takes a divisor of its epoch.
      labeled, unlabeled: images a step over all devices.
    """

    def __init__(
        self,
        config: FrozenConfigDict,
        *,
        images: int = 4096,
        side: int = SIDE,
        plain_views: bool = False,
        algorithm: BaseAlgorithm | None = None,
        devices: Sequence[jax.Device] | None = None,
    ) -> None:
        if config.dtype == "float64":
            jax.config.update("jax_enable_x64", True)
        self.config, self.images, self.side = config, images, side
        self._given = {"plain_views": plain_views, "algorithm": algorithm, "devices": devices}
        self.layout = Layout(config.parallel, devices)
        self.layout.check_batch(config.batch_size, config.microbatches)
        own, self.model = build(config, CLASSES)
        self.algorithm = algorithm or own
        third = max(images // 3, 1)
        self.optimizer, self.step = assemble(
            config,
            self.algorithm,
            self.model,
            steps=STEPS,
            steps_per_epoch=STEPS,
            class_counts=[third / CLASSES] * CLASSES,
            members={"labeled": third, "unlabeled": images - third},
            loops=self.layout.platform != "cpu",
            plain_views=plain_views,
        )
        self.labeled = config.batch_size
        self.unlabeled = self.algorithm.mu * config.batch_size
        rows = np.arange(images)
        self.batches = {"labeled": Batches(rows[:third], self.labeled, config.seed, "labeled")}
        if self.unlabeled:
            self.batches["unlabeled"] = Batches(
                rows[third:], self.unlabeled, config.seed, "unlabeled"
            )
        on_accelerator = self.layout.platform != "cpu"
        self.per_call = config.steps_per_call or (16 if on_accelerator else 1)
        self._calls: dict[int, Any] = {}
        self._at = 0
        self._state: Any = None
        self._data: Any = None

    def init_state(self) -> Any:
        """The state before step 0, as host arrays."""
        state = start_state(
            self.config,
            self.algorithm,
            self.model,
            self.optimizer,
            stored_shape=(self.side, self.side),
            num_classes=CLASSES,
            num_images=self.images,
        )
        return host(state)

    def host_data(self) -> dict[str, np.ndarray]:
        """{"images": uint8 [N, side, side, 1], "targets": float32 [N, classes]}, random."""
        rng = np.random.default_rng(0)
        pixels = rng.integers(0, 256, (self.images, self.side, self.side, 1), dtype=np.uint8)
        labels = rng.integers(0, CLASSES, self.images)
        return {"images": pixels, "targets": np.eye(CLASSES, dtype=np.float32)[labels]}

    def index(self, first: int, end: int) -> dict[str, np.ndarray]:
        """Rows of the steps first ... end - 1: int32 [steps, images a step] of each part."""
        return {n: np.stack([b(s) for s in range(first, end)]) for n, b in self.batches.items()}

    def call(self, count: int) -> Any:
        """The function of `count` steps for all devices; it compiles at its first call."""
        if count not in self._calls:
            self._calls[count] = self.layout.wrap(make_call(self.step, count), donate=True)
        return self._calls[count]

    def arguments(self, count: int) -> tuple[Any, Any, Any]:
        """What `call(count)` takes next: the state and the data on the devices, and indices."""
        if self._data is None:
            self._state = self.layout.replicate(self.init_state())
            self._data = self.layout.replicate(self.host_data())
        index = self.layout.shard(self.index(self._at, self._at + count), axis=1)
        return self._state, index, self._data

    def lower(self, count: int = 1) -> Any:
        """`call(count)`, lowered for its arguments: `.compile()`, `.cost_analysis()`."""
        return self.call(count).lower(*self.arguments(count))

    def flops(self) -> float:
        """Floating-point operations of one step on one device, by XLA's analysis of its program.

        That of one plain step: of a loop the analysis counts one turn.
        """
        if self.config.microbatches > 1:
            whole = changed(self.config, microbatches=1)
            return Setup(whole, images=self.images, side=self.side, **self._given).flops()
        lowered = self.lower(1)
        analysis = lowered.cost_analysis()
        if analysis is None:
            # Of a GPU's or TPU's client JAX analyses compiled programs only, whose operations are
            # those that are left after optimisation.
            from jax._src.lib import _jax

            try:
                client = jax.devices("cpu")[0].client
            except RuntimeError:
                raise UserError(
                    "JAX_PLATFORMS leaves out cpu, which counts FLOPs: add it"
                ) from None
            module = lowered.compiler_ir("hlo").as_hlo_module()
            analysis = _jax.hlo_module_cost_analysis(client, module)
        return float((analysis[0] if isinstance(analysis, list) else analysis)["flops"])

    def run(self, calls: int) -> Timing:
        """Times `calls` calls of `per_call` steps, as the training loop makes them."""
        waiting: collections.deque = collections.deque()
        self.arguments(self.per_call)
        began, host_seconds = time.perf_counter(), 0.0
        for _ in range(calls):
            busy = time.thread_time()
            arguments = self.arguments(self.per_call)
            self._state, metrics = self.call(self.per_call)(*arguments)
            self._at += self.per_call
            host_seconds += time.thread_time() - busy
            waiting.append(metrics)
            if len(waiting) > CALLS_IN_FLIGHT:
                jax.block_until_ready(waiting.popleft())
        jax.block_until_ready(self._state)
        self.metrics = host(waiting[-1])
        return Timing(calls * self.per_call, time.perf_counter() - began, host_seconds)


def machine() -> Record:
    """What this ran on. Starts the backend."""
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device": host_machine.cpu() if device.platform == "cpu" else device.device_kind,
        "devices": jax.device_count(),
        "cores": host_machine.cores(),
        "load": round(os.getloadavg()[0], 1),  # above 0 by what else runs: judge the times by it
        "jax": jax.__version__,
        "python": platform.python_version(),
    }


def memory(compiled: Any = None) -> Record:
    """Peak memory so far, in bytes.

    On an accelerator the allocator's own peak, which may be of the compiler's trials; a CPU has no
    such count: the process's largest resident size. Given a compiled program, also what one call
    needs by its plan (arguments, results that do not reuse them, and temporary buffers).
    """
    statistics_ = jax.local_devices()[0].memory_stats()
    unit = 1 if sys.platform == "darwin" else 1024
    found: Record = {
        "kind": "process resident peak",
        "bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
    }
    if statistics_ and "peak_bytes_in_use" in statistics_:
        found = {"kind": "device peak", "bytes": statistics_["peak_bytes_in_use"]}
    if compiled is not None and (plan := compiled.memory_analysis()) is not None:
        found["program_bytes"] = int(
            plan.argument_size_in_bytes
            + plan.output_size_in_bytes
            - plan.alias_size_in_bytes
            + plan.temp_size_in_bytes
        )
    return found


def median_spread(values: Sequence[float]) -> Record:
    """{"median", "low", "high"} of repeated measurements; low and high are the extremes."""
    return {
        "median": statistics.median(values),
        "low": min(values),
        "high": max(values),
    }


def ratios(above: Sequence[float], below: Sequence[float]) -> Record:
    """The median and extremes of above / below, taken round by round."""
    return median_spread([a / b for a, b in zip(above, below, strict=True)])


def interleave(callables: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Measures each of several things in every round, in turn, so that load hits all alike.

    Every second round goes backwards: what one leaves warm or busy then falls on both sides.
    """
    found: dict[str, list[float]] = {name: [] for name in callables}
    for number in range(rounds):
        for name in list(callables)[:: -1 if number % 2 else 1]:
            found[name].append(callables[name]())
    return found


def emit(record: Mapping[str, Any], table: bool = False) -> None:
    """Prints the record as one JSON line; with `table`, a line a figure before it."""
    if table:
        rows = list(_rows(record))
        width = max(len(name) for name, _ in rows)
        for name, text in rows:
            print(f"{name:{width}}  {text}")
        print()
    print(json.dumps(record), flush=True)


def _rows(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in record.items():
        if isinstance(value, Mapping) and set(value) == {"median", "low", "high"}:
            text = f"{_number(value['median'])}  ({_number(value['low'])} .. "
            yield prefix + key, text + f"{_number(value['high'])})"
        elif isinstance(value, Mapping):
            yield from _rows(value, f"{prefix}{key}.")
        else:
            yield prefix + key, _number(value)


def _number(value: Any) -> str:
    if not isinstance(value, float) or value == 0:
        return str(value)
    return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


@contextmanager
def user_errors() -> Iterator[None]:
    """What the user gave wrong becomes one line on stderr and exit status 2."""
    try:
        yield
    except UserError as error:
        print(f"ferjax: {error}", file=sys.stderr, flush=True)
        sys.exit(error.status)


def run(main: Callable[[Sequence[str] | None], int | None]) -> None:
    """Runs a benchmark's `main(argv)` as a command."""
    with user_errors():
        sys.exit(main(None) or EXIT_OK)
