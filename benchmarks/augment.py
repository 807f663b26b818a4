"""Views a second of ferjax, Pillow and batched torch tensors; augmentation's share of a step.

    python benchmarks/augment.py --config=configs/fixmatch.py [--config.key=value ...]
        [--batch=N] [--rounds=R] [--no-share] [--table]

Views alone, of random 48-pixel images: `weak` and `strong` as the config's views say, and at 224
pixels with three channels `seed_crop` and `strong` after that crop (the poster's). Counted are
finished views (normalised floats) a second.

- `ours`: one jitted call for the batch, the images on the device; compilation is not counted.
- `pillow`: `peer_views.PillowView`, one image after the other on one thread.
- `pillow_pool`: the same in a DataLoader with a worker a core, its batches collated and received.
- `tensors`: `peer_views.TensorView`, batched torch operations on the same device as ours, after
  the style of torchvision's tensor transforms, which would go image by image; on one thread or on
  all cores, whichever is faster.

The peers need `pip install ".[bench]"`; without PyTorch they are left out and named in `missing`.
The peers run in a process of their own; all are timed in turn in every round. `ratio` is the peer's
time over ours, round by round: above 1 we are faster.

The share: the config's training step and the same step whose views are normalisation alone, timed
in turn; share = 1 - plain / full, round by round. Its extremes say how much of it is noise of the
machine: on a busy one the share may come out below 0.
"""

import importlib.util
import time
from collections.abc import Mapping, Sequence
from typing import Any

import common
import jax
import numpy as np
from worker import Worker

from ferjax.augment import policies
from ferjax.config import section

POSTER = {"size": 224, "channels": 3, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
AUGMENT_SECONDS = 0.5  # of one engine in one round


def cases(config: Any) -> dict[str, tuple[policies.Policy, dict[str, Any]]]:
    """name -> policy and the arguments of `make_view`."""
    data = config.data
    own = {
        "size": data.image_size or None,
        "channels": data.channels,
        "mean": data.mean,
        "std": data.std,
    }
    strong = policies.Policy(
        **{
            **vars(policies.STRONG),
            "crop": 0.0,
            "resized_crop": policies.SEED_CROP.resized_crop,
        }
    )
    found = {name: (policies.Policy(**section(config.views, name)), own) for name in config.views}
    return {
        **found,
        "seed_crop_224": (policies.SEED_CROP, dict(POSTER)),
        "strong_224": (strong, dict(POSTER)),
    }


class OurViews:
    """Jitted views of one batch of random images."""

    def __init__(self, made: Mapping[str, Any], images: np.ndarray) -> None:
        self.images = jax.device_put(images)
        self.keys = jax.random.split(jax.random.key(0), len(images))
        self.views = {
            name: jax.jit(policies.make_view(policy, **arguments))
            for name, (policy, arguments) in made.items()
        }

    def run(self, name: str, turns: int) -> float:
        """Seconds of some batches."""
        began = time.perf_counter()
        for _ in range(turns):
            out = self.views[name](self.images, self.keys)
        jax.block_until_ready(out)
        return time.perf_counter() - began


def make_peer(*args: Any) -> Any:
    """`PeerViews`, whose torch is imported where it runs."""
    from augment_peer import PeerViews

    return PeerViews(*args)


def rate(engine: Any, name: str, batch: int) -> Any:
    """A function that gives seconds a view, from as many batches as fill `AUGMENT_SECONDS`."""
    engine.run(name, 1)  # compiles, or starts the workers
    turns = max(1, round(AUGMENT_SECONDS / engine.run(name, 1)))
    return lambda: engine.run(name, turns) / (turns * batch)


def share(config: Any, args: Any) -> dict[str, Any]:
    """How much of the training step the views take."""
    setups = {
        name: common.Setup(config, images=args.images, side=args.side, plain_views=plain)
        for name, plain in (("full", False), ("plain", True))
    }
    for setup in setups.values():
        setup.run(1)
    slowest = max(setup.run(1).seconds for setup in setups.values())
    calls = max(1, round(2 * AUGMENT_SECONDS / slowest))

    def timed(setup: common.Setup) -> Any:
        return lambda: setup.run(calls).seconds / (calls * setup.per_call)

    found = common.interleave({n: timed(s) for n, s in setups.items()}, args.rounds)
    full, plain = found["full"], found["plain"]
    return {
        "step_ms": common.median_spread([1e3 * s for s in full]),
        "step_without_views_ms": common.median_spread([1e3 * s for s in plain]),
        "share": common.median_spread([1 - b / a for a, b in zip(full, plain, strict=True)]),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark."""
    flags = common.parser(__doc__)
    flags.add_argument("--batch", type=int, default=128, help="images of a batch of views")
    flags.add_argument("--rounds", type=int, default=5)
    flags.add_argument("--no-share", action="store_true", help="leave out the training step")
    args, config = common.parse(flags, argv)
    made = cases(config)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (args.batch, args.side, args.side, 1), dtype=np.uint8)
    record: dict[str, Any] = {
        "benchmark": "augment",
        "config": args.config,
        "batch": args.batch,
        "machine": common.machine(),
        "rounds": args.rounds,
        "missing": [] if importlib.util.find_spec("torch") else ["torch"],
        "views_per_second": {},
        "ratio": {},
    }
    ours, peer = OurViews(made, images), None
    if not record["missing"]:
        described = {
            name: (vars(policy), {"image_size": a["size"] or 0, **a})
            for name, (policy, a) in made.items()
        }
        peer = Worker(make_peer, described, images)
    try:
        for name in made:
            turns = {"ours": rate(ours, name, args.batch)}
            if peer:
                for kind in ("pillow", "pillow_pool", "tensors"):
                    turns[kind] = rate(peer, f"{kind}:{name}", args.batch)
            found = common.interleave(turns, args.rounds)
            record["views_per_second"][name] = {
                kind: common.median_spread([1 / s for s in seconds])
                for kind, seconds in found.items()
            }
            record["ratio"][name] = {
                kind: common.ratios(seconds, found["ours"])
                for kind, seconds in found.items()
                if kind != "ours"
            }
            if peer:
                peer.rest()
    finally:
        if peer:
            peer.close()
    if not args.no_share:
        record["training_step"] = share(config, args)
    common.emit(record, args.table)


if __name__ == "__main__":
    common.run(main)
