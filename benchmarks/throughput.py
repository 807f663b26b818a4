"""Steady-state training steps of a config: images/s, FLOP/s, memory, and PyTorch's in the same run.

    python benchmarks/throughput.py --config=configs/fixmatch.py [--config.key=value ...]
        [--peer=pytorch] [--steps=N] [--rounds=R] [--table]

The steps are the engine's own, on random images of FER2013's size. Compilation comes first and is
told apart; then each round times some calls, as the training loop makes them (two in flight, the
indices sent from the host). Figures are the median and the extremes over the rounds.

- images/s: labelled ones and unlabelled ones of a step over all devices; an unlabelled image has
  two views, and counts once.
- FLOPs of a step: XLA's cost analysis of one plain lowered step (views, forward, gradient, update).
- MFU: the step's FLOP/s over that of one large square matrix product in the config's dtype, which
  one device makes in the same round, times the number of devices.
- host share: processor time of the thread that drives the devices, over the whole time. Training
  also reads metrics, writes rows and asks for its lock, which is not in it.
- memory: the device's peak; on a CPU the process's resident peak and the program's planned bytes.
  A peak only grows, so that it is given for the first form alone.

With --peer=pytorch (needs `pip install ".[bench]"`) each round also times `pytorch_peer.py`: its
step on views that lie ready on the device, and its step with Pillow views from a DataLoader. Ours
always makes its views inside the step. Ours runs as `joint` (the peer's form), as `split`, and as
the config says. Every engine is a process of its own that sleeps while another is measured, so that
thread pools do not compete; the loader's workers do compete with the peer's step, as they do for
its users. Before that, both compute the loss of one batch and the norm of its gradient from the
same weights in float32 and train mode (for FixMatch with threshold 0, so that every pseudo-label
counts; the peer on the CPU, uncompiled); where they differ by more than the tolerance the exit
status is 1. `ratio` is the peer's time over ours, round by round:
above 1 we are faster.
"""

import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import FrozenConfigDict
from worker import Worker

from ferjax.config import EXIT_FAILED, EXIT_OK, UserError
from ferjax.engine.parallel import host
from ferjax.engine.state import build
from ferjax.models.cnn import PRESETS

# Relative, of what the engines must agree in: float32 sums in another order.
TOLERANCES = {"loss": 1e-4, "grad_norm": 1e-3}
ROUND_SECONDS = 2.0  # of each engine, where --steps is not given


class Ours:
    """ferjax's engine: the variants of one config, compiled and ready."""

    def __init__(self, config: Mapping[str, Any], images: int, side: int) -> None:
        self.config = common.finalize(config)
        self.images, self.side = images, side
        self.setups: dict[str, common.Setup] = {}

    def prepare(self, name: str, forward: str = "") -> dict[str, Any]:
        """Compiles one variant and runs its first steps."""
        config = self.config
        if forward:
            config = common.changed(config, algorithm__forward=forward)
        setup = self.setups[name] = common.Setup(config, images=self.images, side=self.side)
        setup.arguments(setup.per_call)
        cached = jax.config.jax_enable_compilation_cache
        # A cold compilation is timed. JAX asks only once whether there is a cache.
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()
        began = time.perf_counter()
        compiled = setup.lower(setup.per_call).compile()
        seconds = time.perf_counter() - began
        jax.config.update("jax_enable_compilation_cache", cached)
        compilation_cache.reset_cache()
        setup.run(1)
        return {
            "compile_seconds": seconds,
            "flops_per_step": setup.flops() * setup.layout.count,
            "steps_per_call": setup.per_call,
            "memory": common.memory(compiled) if len(self.setups) == 1 else None,
            "seconds_per_step": setup.run(1).seconds / setup.per_call,
        }

    def sizes(self) -> tuple[int, int]:
        """Labelled and unlabelled images a step."""
        setup = next(iter(self.setups.values()))
        return setup.labeled, setup.unlabeled

    def run(self, name: str, steps: int) -> tuple[float, float]:
        """Seconds a step and host seconds a step of about `steps` steps."""
        setup = self.setups[name]
        timing = setup.run(max(1, round(steps / setup.per_call)))
        return timing.seconds / timing.steps, timing.host_seconds / timing.steps

    def matmul(self) -> float:
        """FLOP/s of one square matrix product in the config's dtype, times the devices."""
        if not hasattr(self, "_matmul"):
            on_cpu = jax.default_backend() == "cpu"
            side = 1536 if on_cpu else 8192
            x = jax.random.normal(jax.random.key(0), (side, side), jnp.float32)
            x = (x / side**0.5).astype(self.config.dtype)
            self._matmul = (jax.jit(jnp.matmul), x, 4 if on_cpu else 30)
            jax.block_until_ready(self._matmul[0](x, x))
        product, x, turns = self._matmul
        began = time.perf_counter()
        y = x
        for _ in range(turns):
            y = product(x, y)
        jax.block_until_ready(y)
        seconds = (time.perf_counter() - began) / turns
        return 2.0 * len(x) ** 3 / seconds * jax.device_count()

    def reference(self) -> dict[str, Any]:
        """Loss and gradient of the first batch in float32, its views, and the weights for it."""
        config = common.changed(self.config, dtype="float32", microbatches=1)
        algorithm = config.algorithm.to_dict()
        algorithm.update({k: v for k, v in CHECKED.items() if k in algorithm})
        config = common.changed(config, algorithm=algorithm, model=without_dropout(config))
        own, _ = build(config, common.CLASSES)

        class Shown(type(own)):  # type: ignore[misc]
            """The algorithm, but what it sees and finds goes out with the metrics."""

            def loss(self, net: Any, batch: Any, extra: Any, t: Any) -> Any:
                """See `BaseAlgorithm`."""
                loss, _, extra = super().loss(net, batch, extra, t)
                shown = {"labeled": batch.labeled.views["weak"]}
                shown["targets"] = batch.labeled.target
                if batch.unlabeled is not None:
                    shown.update(batch.unlabeled.views)
                one = jnp.ones(())
                return loss, {k: (v, one) for k, v in shown.items()}, extra

        fields = {k: v for k, v in algorithm.items() if k != "name"}
        setup = common.Setup(
            config,
            images=self.images,
            side=self.side,
            algorithm=Shown(**fields),
            devices=jax.devices()[:1],
        )
        state, index, data = setup.arguments(1)
        params = host(state.params)
        with jax.default_matmul_precision("highest"):  # not a GPU's TF32
            _, metrics = setup.call(1)(state, index, data)
        shown = {k: np.asarray(v[0][0]) for k, v in metrics.items() if k != "learning_rate"}
        found = {name: float(shown.pop(name)) for name in TOLERANCES}
        return {"found": found, "batch": shown, "params": params, **setup.host_data()}

    def machine(self) -> dict[str, Any]:
        """See `common.machine`."""
        return common.machine()


# How the two engines are compared: every pseudo-label counts, from the first step.
CHECKED = {"forward": "joint", "threshold": 0.0, "warmup": 0.0}


def without_dropout(config: FrozenConfigDict) -> dict[str, Any]:
    """The model's section with every rate at 0: the engines draw different masks."""
    model = config.model.to_dict()
    if "dropout" in model:
        model["dropout"] = 0.0
    if model["name"] == "cnn":
        layers = model["layers"] or PRESETS[model["preset"]]
        model["layers"] = tuple(
            text.split()[0] + " 0" if "dropout" in text else text for text in layers
        )
    return model


def make_peer(*args: Any) -> Any:
    """`pytorch_peer.Peer`, imported where it runs."""
    from pytorch_peer import Peer

    return Peer(*args)


def summary(
    seconds: Sequence[float], hosts: Sequence[float], labeled: int, unlabeled: int
) -> dict[str, Any]:
    """Figures of one engine from its seconds a step in each round."""
    found = {"ms_per_step": common.median_spread([1e3 * s for s in seconds])}
    if unlabeled:
        found["unlabeled_images_per_second"] = common.median_spread(
            [unlabeled / s for s in seconds]
        )
    found["labeled_images_per_second"] = common.median_spread([labeled / s for s in seconds])
    if hosts:
        found["host_share"] = common.ratios(hosts, seconds)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; the exit status."""
    flags = common.parser(__doc__)
    flags.add_argument("--peer", choices=["pytorch"], help="what to compare with")
    flags.add_argument("--steps", type=int, default=0, help="a round; 0: about two seconds' worth")
    flags.add_argument("--rounds", type=int, default=5)
    flags.add_argument("--workers", type=int, default=0, help="of the peer's loader; 0: by cores")
    flags.add_argument("--compile", default="auto", help="the peer's torch.compile mode, or off")
    args, config = common.parse(flags, argv)
    if args.peer and not importlib.util.find_spec("torch"):
        raise UserError('--peer=pytorch needs PyTorch: pip install ".[bench]"')
    if args.peer and config.dtype == "float64":
        raise UserError("--peer=pytorch: config.dtype=float64 has no peer: use float32 or bfloat16")
    # The engines share a GPU: none may take all of its memory at once.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    given = (config.to_dict(), args.images, args.side)
    workers: list[Worker] = []
    try:
        if not args.peer:
            return measure(args, config, Ours(*given), workers)
        workers.append(Worker(Ours, *given))
        return measure(args, config, workers[0], workers)
    finally:
        for worker in workers:
            worker.close()


def measure(args: Any, config: FrozenConfigDict, ours: Any, workers: list[Worker]) -> int:
    """Prepares all engines, times them in turn and prints the record."""
    own = config.algorithm.get("forward", "own")
    forms, peer = [own], None
    if args.peer:
        # First, because it refuses configs that it can't follow.
        peer = Worker(make_peer, config.to_dict(), args.side, args.workers, args.compile)
        workers.append(peer)
        if "forward" in config.algorithm:
            forms += [form for form in ("joint", "split") if form != own]
    # The config's own form comes first: a device's peak memory only grows.
    prepared = {}
    for form in forms:
        prepared[form] = ours.prepare(form, "" if form == own else form)
        # Minutes on a GPU: what is known must not be lost if the rest is cut off.
        print(json.dumps({form: prepared[form]}), file=sys.stderr, flush=True)
    labeled, unlabeled = ours.sizes()
    record: dict[str, Any] = {
        "benchmark": "throughput",
        "config": args.config,
        **{key: config[key] for key in ("batch_size", "dtype")},
        "algorithm": config.algorithm.to_dict(),
        "model": config.model.to_dict(),
        "image_size": config.data.image_size or args.side,
        "machine": ours.machine(),
        "rounds": args.rounds,
    }
    status = EXIT_OK
    if peer:
        reference = ours.reference()
        theirs = peer.check(reference["params"], reference["batch"])
        for (name, tolerance), value in zip(TOLERANCES.items(), theirs, strict=True):
            record[name] = compared(reference["found"][name], value, tolerance)
            status = status if record[name]["equal"] else EXIT_FAILED
        wanted = ("params", "images", "targets")
        record["peer"] = peer.prepare(*(reference[key] for key in wanted))

    fastest = min(p["seconds_per_step"] for p in prepared.values())
    steps = args.steps or max(1, round(ROUND_SECONDS / fastest))
    per_call = prepared[own]["steps_per_call"]
    steps = -(-steps // per_call) * per_call
    record["steps_per_round"] = steps
    hosts: dict[str, list[float]] = {form: [] for form in forms}

    def timed(form: str) -> Callable[[], float]:
        def run() -> float:
            seconds, busy = ours.run(form, steps)
            hosts[form].append(busy)
            return seconds

        return run

    turns: dict[str, Callable[[], float]] = {"matmul": ours.matmul}
    turns |= {form: timed(form) for form in forms}
    if peer:
        turns["step"] = lambda: peer.resident(steps) / steps
        turns["loader"] = lambda: peer.load(steps) / steps
        peer.load(steps)  # starts the loader's workers
    found = common.interleave(turns, args.rounds)
    record["matmul_flops_per_second"] = common.median_spread(found["matmul"])
    record["ours"] = {}
    for form in forms:
        seconds, flops = found[form], prepared[form]["flops_per_step"]
        rates = [flops / s for s in seconds]
        record["ours"][form] = {
            **summary(seconds, hosts[form], labeled, unlabeled),
            "flops_per_second": common.median_spread(rates),
            "mfu": common.ratios(rates, found["matmul"]),
            **{k: v for k, v in prepared[form].items() if k != "seconds_per_step"},
        }
    if peer:
        for kind in ("step", "loader"):
            record["peer"][kind] = summary(found[kind], [], labeled, unlabeled)
        record["ratio"] = {
            f"{form} / {kind}": common.ratios(found[kind], found[form])
            for form in forms
            for kind in ("step", "loader")
        }
    common.emit(record, args.table)
    if status:
        print("ferjax: the peer's loss or gradient differs: no ratio counts", file=sys.stderr)
    return status


def compared(ours: float, theirs: float, tolerance: float) -> dict[str, Any]:
    """Both figures of one batch, and whether they agree; the tolerance is relative to ours."""
    difference = abs(ours - theirs)
    return {
        "ours": ours,
        "peer": theirs,
        "difference": difference,
        "tolerance": tolerance * abs(ours),
        "equal": difference <= tolerance * abs(ours),
    }


if __name__ == "__main__":
    common.run(main)
