"""Optax chains and learning-rate schedules from a config."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import optax


def make_schedule(config: Mapping[str, Any], steps: int, steps_per_epoch: int) -> optax.Schedule:
    """The learning rate as a function of the step.

    After a linear warm-up of `warmup_epochs` from 0: `cosine` falls to 0 as
    lr (1 + cos(pi k / K)) / 2; `cosine_7_16` is FixMatch's lr cos(7 pi k / (16 K)), which ends at
    .195 lr; `constant` stays. k and K count the steps after the warm-up.
    """
    rate = config["learning_rate"]
    warmup = min(round(config["warmup_epochs"] * steps_per_epoch), steps)
    rest = max(steps - warmup, 1)
    if config["schedule"] == "cosine":
        main = optax.cosine_decay_schedule(rate, rest)
    elif config["schedule"] == "cosine_7_16":
        main = lambda k: rate * jax.numpy.cos(7 * math.pi / 16 * k / rest)  # noqa: E731
    else:
        main = optax.constant_schedule(rate)
    if not warmup:
        return main
    return optax.join_schedules([optax.linear_schedule(0.0, rate, warmup), main], [warmup])


def make_optimizer(
    config: Mapping[str, Any], schedule: optax.Schedule
) -> optax.GradientTransformation:
    """Clipping, weight decay on kernels only (not BatchNorm, bias or PReLU slopes), the update.

    sgd and adam add weight_decay * w to the gradient (L2); adamw decouples it (Loshchilov & Hutter
    2019). `decayed` is "kernels", or "dense": those of dense layers, not of convolutions.
    """
    decay = config["weight_decay"]
    kernel_mask = kernels if config["decayed"] == "kernels" else dense_kernels
    chain = [optax.clip_by_global_norm(config["clip_norm"])] if config["clip_norm"] else []
    if config["name"] == "adamw":
        chain.append(
            optax.adamw(schedule, config["b1"], config["b2"], weight_decay=decay, mask=kernel_mask)
        )
        return optax.chain(*chain)
    if decay:
        chain.append(optax.add_decayed_weights(decay, kernel_mask))
    if config["name"] == "adam":
        chain.append(optax.adam(schedule, config["b1"], config["b2"]))
    else:
        momentum = config["momentum"] or None
        chain.append(optax.sgd(schedule, momentum, nesterov=config["nesterov"]))
    return optax.chain(*chain)


def kernels(params: Any) -> Any:
    """True for the leaves named `kernel`."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def dense_kernels(params: Any) -> Any:
    """True for the kernels [in, out] of dense layers."""
    return jax.tree.map(lambda chosen, leaf: chosen and leaf.ndim == 2, kernels(params), params)
