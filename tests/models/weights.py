"""Random variables of a model, made by NumPy: compiling a model's own init takes seconds."""

import jax
import numpy as np


def random_variables(model, x, seed=0, dtype=np.float32):
    """A tree like `model.init(key, x)`: kernels scaled by fan-in, no trivial scale or statistic."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        name = path[-1].key
        if name == "kernel":
            return rng.normal(0, np.prod(leaf.shape[:-1]) ** -0.5, leaf.shape).astype(dtype)
        if name in ("scale", "var"):
            return rng.uniform(0.5, 1.5, leaf.shape).astype(dtype)
        return rng.normal(0, 0.1, leaf.shape).astype(dtype)

    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    return jax.tree_util.tree_map_with_path(fill, shapes)
