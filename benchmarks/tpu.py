"""What a TPU would run, without a TPU: the step compiled for v5e chips, and a model of its time.

    pip install --no-deps --target DIR libtpu
    FERJAX_LIBTPU=DIR python benchmarks/tpu.py --config=configs/fixmatch.py [--topologies=v5e:4x4]
        [--batch-per-chip=16] [--table]

Compiles one step for each topology with libtpu's own compiler (minutes each on two cores) and reads
from the program, for one chip: floating-point operations, bytes of memory traffic and of
temporaries, collectives by kind with their number and bytes, and gathers other than those of image
rows. From these a model, not a measurement, of a step's time:

    compute  = max(FLOP / (peak x MATMUL_SHARE), bytes / HBM bandwidth)
    exchange = sum over all-reduces of 2 (n-1)/n x bytes / ICI bandwidth + hops x latency
    time     = compute + exchange             (nothing overlaps; memory at its full bandwidth)

and the efficiency of `--chips` chips against one, with the batch per chip kept (weak scaling) and
with the whole batch kept (strong scaling; compute is taken to shrink with the batch). Assumptions
are the constants below, from Google's table of v5e; 512 chips are two slices of 256, whose
gradients cross the data-centre network.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import options

from ferjax.config import UserError

PEAK = 197e12  # bf16 FLOP/s of a v5e chip
HBM = 819e9  # bytes/s
ICI = 200e9  # bytes/s of a chip over its four links together
HOP = 1e-6  # s, of an all-reduce for each hop around the ring of one axis
DCN = 12.5e9  # bytes/s of a host with eight chips between slices
DCN_LATENCY = 1e-4  # s
SLICE = 256  # chips of the largest slice
MATMUL_SHARE = 0.4  # of the peak that convolutions of this size are taken to reach


def main(argv: Sequence[str] | None = None) -> int:
    import common

    made = options.parser(__doc__)
    made.add_argument("--topologies", default="v5e:4x4", help="comma-separated")
    made.add_argument("--batch-per-chip", type=int, default=0, help="0: the config's batch size")
    made.add_argument("--chips", default="8,64,512")
    made.add_argument("--program", default="", help=argparse.SUPPRESS)
    args, config = options.parse(made, argv)
    if args.program:
        print(json.dumps(compile_step(config, args)))
        return 0
    directory = os.environ.get("FERJAX_LIBTPU", "")
    if not directory:
        raise UserError("FERJAX_LIBTPU is not set: pip install --no-deps --target DIR libtpu")
    programs = {}
    for topology in args.topologies.split(","):
        programs[topology] = in_subprocess(sys.argv[1:] if argv is None else argv, topology)
    first = next(iter(programs.values()))
    chips = [int(text) for text in args.chips.split(",")]
    record = {
        "benchmark": "tpu",
        "config": args.config,
        "programs": programs,
        "model_of_time": {str(n): efficiency(first, n) for n in chips},
    }
    common.emit(record, args.table)
    return 0


def in_subprocess(argv: Sequence[str], topology: str) -> dict[str, Any]:
    """`compile_step` where libtpu can be loaded: jax in this process must not find it."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([os.environ["FERJAX_LIBTPU"], *filter(None, sys.path)]),
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is there to be shared
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    done = subprocess.run(
        [sys.executable, __file__, *argv, f"--program={topology}"],
        capture_output=True,
        text=True,
        env=environment,
    )
    if done.returncode:
        raise RuntimeError(f"{topology}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compile_step(config: Any, args: Any) -> dict[str, Any]:
    """What one chip of `args.program` would run, as numbers."""
    import re
    import time

    import common
    import hlo
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import NamedSharding, PartitionSpec

    devices = topologies.get_topology_desc(args.program, "tpu").devices
    chips = len(devices)
    size = (args.batch_per_chip or config.batch_size // chips or 1) * chips
    config = options.changed(config, batch_size=size, parallel="shard_map", steps_per_call=1)
    setup = common.Setup(config, images=max(args.images, 4 * size * 8), devices=devices)
    mesh = setup.layout.mesh

    def spec(x: Any, *axes: str) -> Any:
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(np.shape(x), np.asarray(x).dtype, sharding=sharding)

    index = setup.index(0, 1)
    parts = {n: x.reshape(1, chips, -1).swapaxes(0, 1) for n, x in index.items()}
    began = time.monotonic()
    compiled = (
        setup.call(1)
        .lower(
            jax.tree.map(spec, setup.init_state()),
            jax.tree.map(lambda x: spec(x, "devices"), parts),
            jax.tree.map(spec, setup.host_data()),
        )
        .compile()
    )
    seconds = time.monotonic() - began
    text, cost, memory = compiled.as_text(), compiled.cost_analysis(), compiled.memory_analysis()
    found = hlo.collectives(text)
    gathers = [line for line in text.splitlines() if re.search(r"= \S+ gather\(", line)]
    return {
        "chips": chips,
        "batch_per_chip": size // chips,
        "compile_seconds": round(seconds, 1),
        "flops": cost["flops"],
        "bytes_accessed": cost["bytes accessed"],
        "temporary_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "collectives": hlo.summary(found),
        "large_gathers": sum("slice_sizes={1," not in line for line in gathers),
    }


def efficiency(program: dict[str, Any], chips: int) -> dict[str, float]:
    """The model of the docstring: step time and efficiency on `chips` chips."""

    def compute(share: float) -> float:
        flops, traffic = program["flops"] * share, program["bytes_accessed"] * share
        return max(flops / (PEAK * MATMUL_SHARE), traffic / HBM)

    reduced = program["collectives"].get("all-reduce", {"count": 0, "bytes": 0})
    n = min(chips, SLICE)
    ring = 2 * (n - 1) / n
    exchange = ring * reduced["bytes"] / ICI + reduced["count"] * 2 * math.isqrt(n) * HOP
    if chips > SLICE:
        exchange += 2 * reduced["bytes"] / DCN + reduced["count"] * DCN_LATENCY
    # Strong scaling keeps the batch of eight chips of the compiled share.
    share = min(1.0, 8 / chips)
    return {
        "weak_step_ms": 1e3 * (compute(1) + exchange),
        "weak_efficiency": compute(1) / (compute(1) + exchange),
        "strong_step_ms": 1e3 * (compute(share) + exchange),
        "strong_efficiency": compute(share) / (compute(share) + exchange),
    }


if __name__ == "__main__":
    import common

    common.run(main)
