"""A small training step on random images, for tests of the engine."""

import contextlib

import jax
import numpy as np

from ferjax import config as configs
from ferjax.data.batches import Batches
from ferjax.engine.assemble import assemble, start_state
from ferjax.engine.parallel import Layout, host
from ferjax.engine.state import build
from ferjax.engine.step import make_call

LAYERS = ("conv 4 3 nobias", "bn", "relu", "maxpool 4", "gap", "dropout 0.25")
IMAGES, SIDE, CLASSES, STEPS = 96, 16, 7, 20


@contextlib.contextmanager
def float64():
    """Double precision, so that tolerances can be tight enough to catch bugs."""
    with jax.enable_x64(True):
        yield


def make_config(**changes):
    c = configs.base()
    c.data.name = "synthetic_faces/tiny"
    c.batch_size = 8
    c.dtype = "float64"
    c.algorithm = {"name": "fixmatch", "mu": 2, "threshold": 0.2}
    c.model = {"name": "cnn", "layers": LAYERS}
    # Cutout instead of RandAugment, whose program takes most of a small step's compilation.
    c.views.strong = {"policy": "weak", "cutout": 0.5}
    for key, value in changes.items():
        if key == "optimizer":
            c.optimizer.update(value)
        else:
            c[key] = value
    return configs.finalize(c)


def make_data(seed=0):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (IMAGES, SIDE, SIDE, 1), dtype=np.uint8)
    labels = rng.integers(0, CLASSES, IMAGES)
    return {"images": images, "targets": np.eye(CLASSES)[labels]}


class Small:
    """A config made into a step; `run` takes it through some steps on a layout."""

    def __init__(self, config, steps=STEPS, loops=False, class_counts=()):
        self.config, self.steps, self.calls = config, steps, {}
        self.initial = None
        self.algorithm, self.model = build(config, CLASSES)
        self.optimizer, self.step = assemble(
            config,
            self.algorithm,
            self.model,
            steps=steps,
            steps_per_epoch=steps,
            class_counts=class_counts,
            members={"labeled": IMAGES // 3, "unlabeled": IMAGES - IMAGES // 3},
            loops=loops,
        )
        size, mu = config.batch_size, self.algorithm.mu
        self.batches = {"labeled": Batches(np.arange(IMAGES // 3), size, config.seed, "labeled")}
        if mu:
            rest = np.arange(IMAGES // 3, IMAGES)
            self.batches["unlabeled"] = Batches(rest, mu * size, config.seed, "unlabeled")

    def init(self):
        """A new copy of the initial state, which is computed once."""
        if self.initial is None:
            self.initial = host(
                start_state(
                    self.config,
                    self.algorithm,
                    self.model,
                    self.optimizer,
                    stored_shape=(SIDE, SIDE),
                    num_classes=CLASSES,
                    num_images=IMAGES,
                )
            )
        return jax.tree.map(np.copy, self.initial)

    def index(self, first, end):
        return {n: np.stack([b(s) for s in range(first, end)]) for n, b in self.batches.items()}

    def run(self, layout: Layout, steps=None, per_call=1, state=None):
        """The state and the metrics {name: (sums [steps], weights [steps])} after some steps."""
        key = (layout.kind, layout.count, per_call)
        if key not in self.calls:  # compiled once for all tests of a module
            self.calls[key] = layout.wrap(make_call(self.step, per_call), donate=True)
        call = self.calls[key]
        state = layout.replicate(self.init() if state is None else state)
        data, rows = layout.replicate(make_data()), []
        first = int(host(state.step))
        for s in range(first, first + (steps or self.steps), per_call):
            state, metrics = call(state, layout.shard(self.index(s, s + per_call), axis=1), data)
            rows.append(host(metrics))
        return host(state), jax.tree.map(lambda *x: np.concatenate(x), *rows)
