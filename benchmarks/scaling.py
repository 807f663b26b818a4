"""How the cost of a training step grows with batch, image, network, mu, devices and steps a call.

    python benchmarks/scaling.py [--config=FILE[:VARIANT]] [--axes=batch,image] [--quick] [--table]
        [--plot=FILE.png] [--config.a.b=value]

Prints one JSON line with a row for each point. An axis changes one thing of the config:

    batch    labelled images a step: 16 to 1024; the unlabelled ones grow with them
    image    side of a view in pixels: 48, 96, 224
    network  ResNet-18, -34, -50, at 224 pixels
    mu       unlabelled images for each labelled one: 1 to 15
    devices  1, 2, 4, ... devices share the same batch
    steps    K steps in one call: 1 to 64

What is counted, and how:

    gflop      floating-point operations of one step on one device, by XLA's analysis of the lowered
               program; every branch that is taken at random counts
    gbytes     bytes that one step on one device reads and writes, by XLA's analysis of the compiled
               program; only of K = 1, because of a loop the analysis counts one turn
    program_mb what one call needs by the compiled program's plan: arguments, results that do not
               reuse them, temporary buffers
    collectives  number, bytes, and bytes that each device sends in a ring, by kind, in one step of
               the compiled program (benchmarks/hlo.py)
    ms         of one step: median and extremes of rounds in which the points of an axis take
               turns, after compilation. host_ms: that Python itself computed in it
    null       was not measured: `note` says why. On a CPU a step of more than --limit GFLOP is
               lowered, not compiled and not run

Devices that are not there are virtual ones of a CPU, in a process of its own: that gives their work
and communication; a speed would mean nothing and is not measured. Views are made inside the step;
with --quick they are normalisation alone, which compiles sooner. On a CPU a loop makes convolution
gradients 11-30 times slower, by XLA (so ferjax takes K = 1 there): the axis `steps` has a tiny
network there, to show the loop and what a call costs. Weights are random: no figure depends on
them. --quick ends within 3 minutes on two cores.
"""

import argparse
import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import hlo
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import FrozenConfigDict

from ferjax.config import UserError
from ferjax.engine.state import TrainState, fresh_state

AXES = ("batch", "image", "network", "mu", "devices", "steps")
ROOT = Path(__file__).parent.parent
VIRTUAL = 4  # CPU devices that stand for those that are not there
TINY = {"name": "cnn", "layers": ("space_to_depth 4", "conv 8 3 nobias", "bn", "relu", "gap")}
LOOP_NOTE = "tiny network: a CPU's loop makes convolution gradients 11-30 times slower"
COLUMNS = ("axis", "value", "gflop", "gbytes", "program_mb", "compile_s", "ms", "images_per_second")


@dataclasses.dataclass(frozen=True)
class Point:
    """One point of an axis."""

    axis: str
    value: int
    config: FrozenConfigDict
    devices: int = 1
    note: str = ""


class Step(common.Setup):
    """A step whose programs are compiled ahead, so that they can be read as well as run."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.compiled: dict[int, Any] = {}

    def call(self, count: int) -> Any:
        """The compiled program where there is one."""
        return self.compiled.get(count) or super().call(count)

    def compile(self) -> float:
        """Compiles the call of `per_call` steps; gives the seconds that XLA took."""
        lowered = self.lower(self.per_call)
        began = time.perf_counter()
        self.compiled[self.per_call] = lowered.compile()
        return time.perf_counter() - began

    def init_state(self) -> TrainState:
        """A state of the right shapes and random weights: real ones take seconds to compile."""
        size = self.config.data.image_size or self.config.data.crop or self.side
        state = jax.eval_shape(
            lambda seed: fresh_state(
                self.model,
                self.algorithm,
                self.optimizer,
                seed,
                image_shape=(size, size, self.config.data.channels),
                num_classes=common.CLASSES,
                num_images=self.images,
                dtype=jnp.promote_types(self.config.dtype, jnp.float32),
            ),
            jax.ShapeDtypeStruct((), jnp.uint32),
        )
        rng = np.random.default_rng(0)

        def normal(x: Any) -> np.ndarray:
            return (0.05 * rng.standard_normal(x.shape, np.float32)).astype(x.dtype)

        params = jax.tree.map(normal, state.params)
        statistics = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), state.batch_stats)
        zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state)
        return zeros.replace(
            params=params,
            batch_stats=statistics,
            ema={"params": params, "batch_stats": statistics},
        )


def points(axis: str, config: FrozenConfigDict, quick: bool, platform: str) -> list[Point]:
    """The points of one axis.

    Raises:
      UserError: the axis mu for a method without unlabelled images.
    """
    small = {"batch_size": 8, **({"algorithm__mu": 1} if "mu" in config.algorithm else {})}
    base = common.changed(config, **small) if quick else config

    def make(values: Sequence[int], key: str, source: FrozenConfigDict = base) -> list[Point]:
        return [Point(axis, v, common.changed(source, **{key: v})) for v in values]

    if axis == "batch":
        return make((16, 48) if quick else (16, 32, 64, 128, 256, 512, 1024), "batch_size")
    if axis == "image":
        return make((48, 96) if quick else (48, 96, 224), "data__image_size")
    if axis == "network":
        net = common.changed(base, model={"name": "resnet"}, data__image_size=48 if quick else 224)
        return make((18, 34, 50), "model__depth", net)
    if axis == "mu":
        if "mu" not in config.algorithm:
            raise UserError(f"--axes=mu: {config.algorithm.name} has no unlabelled images")
        return make((1, 7) if quick else (1, 2, 3, 5, 7, 11, 15), "algorithm__mu")
    if axis == "devices":
        doubled = [2**i for i in range(jax.device_count().bit_length())]
        return [Point(axis, n, base, n) for n in doubled]
    values = (1, 4, 16) if quick else (1, 2, 4, 8, 16, 32, 64)
    if platform != "cpu":
        return make(values, "steps_per_call")
    tiny = common.changed(base, model=TINY, **small)
    return [dataclasses.replace(p, note=LOOP_NOTE) for p in make(values, "steps_per_call", tiny)]


def measure(wanted: list[Point], *, limit: float, rounds: int, quick: bool) -> list[common.Record]:
    """The rows of one axis; its points are timed in turn."""
    rows, timed = [], {}
    virtual = wanted[0].axis == "devices" and jax.devices()[0].platform == "cpu"
    for point in wanted:
        step = Step(
            point.config,
            images=512,
            plain_views=quick,
            devices=jax.devices()[: point.devices],
        )
        print(f"scaling: {point.axis} {point.value}", file=sys.stderr, flush=True)
        row = describe(point, step)
        rows.append(row)
        if step.layout.platform == "cpu" and row["gflop"] > limit:
            row["note"] = f"more than --limit={limit:g} GFLOP a step: lowered only"
            continue
        try:
            row["compile_s"] = step.compile()
            row |= read(step)
            print(json.dumps(row), file=sys.stderr, flush=True)  # in case the rest is cut off
            if not virtual:
                step.run(2)  # the first calls touch memory for the first time
                timed[len(rows) - 1] = step
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            row["note"] = "does not fit into memory"
        if virtual:
            row["note"] = "virtual devices of one CPU: work and communication, no speed"
    calls = {at: calls_for(step) for at, step in timed.items()}
    host: dict[int, list[float]] = {at: [] for at in timed}

    def once(at: int) -> float:
        timing = timed[at].run(calls[at])
        host[at].append(1e3 * timing.host_seconds / timing.steps)
        return 1e3 * timing.seconds / timing.steps

    found = common.interleave({at: lambda at=at: once(at) for at in timed}, rounds)
    for at, values in found.items():
        images = timed[at].labeled + timed[at].unlabeled
        rows[at]["ms"] = common.median_spread(values)
        rows[at]["host_ms"] = common.median_spread(host[at])
        rows[at]["images_per_second"] = 1e3 * images / rows[at]["ms"]["median"]
    return rows


def calls_for(step: Step) -> int:
    """How many calls take about a third of a second, at least 1."""
    seconds = step.run(1).seconds
    return min(max(math.ceil(0.3 / seconds), 1), 200)


def describe(point: Point, step: Step) -> common.Record:
    """A row with the work of a step; what was not measured is None."""
    config = step.config
    network = " ".join(str(config.model[k]) for k in ("name", "depth") if k in config.model)
    state = jax.eval_shape(step.init_state)
    return {
        "axis": point.axis,
        "value": point.value,
        "network": f"tiny {network}" if point.note == LOOP_NOTE else network,
        "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
        "image": config.data.image_size or step.side,
        "labeled": step.labeled,
        "unlabeled": step.unlabeled,
        "devices": point.devices,
        "steps_per_call": step.per_call,
        "gflop": step.flops() / 1e9,
        **dict.fromkeys(("gbytes", "program_mb", "compile_s", "collectives")),
        **dict.fromkeys(("ms", "host_ms", "images_per_second")),
        "note": point.note,
    }


def read(step: Step) -> common.Record:
    """What the compiled program says of itself."""
    compiled = step.compiled[step.per_call]
    plan, analysis = compiled.memory_analysis(), compiled.cost_analysis()
    analysis = analysis[0] if isinstance(analysis, list) else analysis
    needed = plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes
    # XLA keeps collectives over one device, which send nothing.
    found = [c for c in hlo.collectives(compiled.as_text()) if c.group != 1]
    return {
        "gbytes": analysis["bytes accessed"] / 1e9 if step.per_call == 1 else None,
        "program_mb": (needed - plan.alias_size_in_bytes) / 1e6,
        "collectives": hlo.summary(found),
    }


def virtual_devices(argv: Sequence[str]) -> list[common.Record]:
    """The axis `devices` on virtual ones, in a process of its own: they share the cores."""
    dropped = ("--axes", "--plot", "--table")
    given = [a for a in argv if a.split("=")[0] not in dropped]
    flags = f"--xla_force_host_platform_device_count={VIRTUAL}"
    done = subprocess.run(
        [sys.executable, __file__, *given, "--axes=devices"],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])["rows"]


def table(rows: list[common.Record]) -> str:
    """Aligned columns, a line a row; "-" is what was not measured."""
    lines = [[*COLUMNS, "collectives"]]
    for row in rows:
        ms = row["ms"]
        cells = {**row, "ms": ms and f"{ms['median']:.4g} ({ms['low']:.4g}..{ms['high']:.4g})"}
        found = [
            f"{kind} x{c['count']} {c['bytes'] / 1e6:.3g} MB"
            for kind, c in (row["collectives"] or {}).items()
        ]
        lines.append([*(_cell(cells[name]) for name in COLUMNS), ", ".join(found) or "-"])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures the axes that were asked for and prints them."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="default: configs/fixmatch.py, of a CPU its variant cpu")
    parser.add_argument("--axes", default=",".join(AXES))
    parser.add_argument("--quick", action="store_true", help="small sizes, normalisation as view")
    parser.add_argument("--limit", type=float, default=15.0, help="GFLOP a step to run on a CPU")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--table", action="store_true", help="print a table before the JSON line")
    parser.add_argument("--plot", help="write a figure to this file")
    # One device with all threads, whether a config is named or not; before a backend starts.
    os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=1")
    if not any(a.split("=")[0] in ("--config", "-h", "--help") for a in argv):
        variant = ":cpu" if jax.default_backend() == "cpu" else ""
        argv = [*argv, f"--config={ROOT}/configs/fixmatch.py{variant}"]
    args, config = common.parse(parser, argv)
    axes = args.axes.split(",")
    if unknown := [axis for axis in axes if axis not in AXES]:
        raise UserError(f"--axes={unknown[0]}: choose from {','.join(AXES)}")
    # A compilation that is only looked up is no measurement.
    jax.config.update("jax_enable_compilation_cache", False)
    rows = []
    for axis in axes:
        if axis == "devices" and jax.default_backend() == "cpu" and jax.device_count() < VIRTUAL:
            rows += virtual_devices(argv)
            continue
        wanted = points(axis, config, args.quick, jax.default_backend())
        rows += measure(wanted, limit=args.limit, rounds=args.rounds, quick=args.quick)
    if args.table:
        print(table(rows), end="\n\n")
    if args.plot:
        from scaling_plot import draw

        draw(rows, Path(args.plot))
    views = "normalisation" if args.quick else "the config's"
    head = {"benchmark": "scaling", "config": args.config, "views": views}
    common.emit({**head, "machine": common.machine(), "rows": rows})


if __name__ == "__main__":
    common.run(main)
