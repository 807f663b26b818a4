"""One device's update: views -> loss -> gradient -> mean over devices -> Optax -> EMA."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from ferjax.algorithms.base import BaseAlgorithm, Batch, Metrics, Part, Time
from ferjax.engine.parallel import AXIS
from ferjax.engine.state import TrainState, View

Step = Callable[[TrainState, Any, Any], tuple[TrainState, Metrics]]


class BoundNet:
    """The `Net` of one loss evaluation: collects the statistics that its calls record."""

    def __init__(self, model: nn.Module, params: Any, batch_stats: Any, ema: Any) -> None:
        self._model, self._params, self._ema = model, params, ema
        self.batch_stats = batch_stats

    def __call__(
        self,
        images: jax.Array,
        *,
        keys: jax.Array | None = None,
        update: bool = True,
        method: str = "__call__",
    ) -> Any:
        """Runs the student; see `ferjax.algorithms.base.Net`."""
        variables = {"params": self._params, "batch_stats": self.batch_stats}
        out, changed = self._model.apply(
            variables, images, train=True, keys=keys, method=method, mutable=["batch_stats"]
        )
        if update:
            self.batch_stats = changed.get("batch_stats", self.batch_stats)
        return out

    def teacher(self, images: jax.Array) -> Any:
        """Runs the EMA in evaluation mode, without gradient."""
        return self._model.apply(jax.lax.stop_gradient(self._ema), images)


def make_step(
    model: nn.Module,
    algorithm: BaseAlgorithm,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    views: Mapping[str, View],
    *,
    steps: int,
    ema_decay: float,
    dtype: Any = jnp.float32,
    microbatches: int = 1,
    loops: bool = True,
    skip_not_finite: bool = False,
    class_counts: Sequence[float] = (),
    alternating: Mapping[str, int] | None = None,
) -> Step:
    """Builds `step(state, index, data) -> (state, metrics)` for one device.

    Inside, the axis `AXIS` spans all devices. `index` is {"labeled": int32 [b], "unlabeled":
    int32 [mu b]}: this device's share, in global order. `data` is {"images": uint8 [N, H, W, C],
    "targets": float [N, classes]}. Metrics are (sum, weight) pairs over all devices.

    Args:
      views: name -> view function, see `ferjax.augment.policies.make_view`.
      steps: the schedule's length, for `Time.progress`.
      ema_decay: d; at step t the average keeps min(d, (1 + t) / (10 + t)).
      dtype: of the views that the network gets.
      microbatches: parts that the share is worked off in, one after the other, to save memory;
        their gradients and metrics are averaged. BatchNorm and other statistics over the batch,
        MixUp's partners and what images are contrasted with are those of a part, and running
        averages, a method's thresholds among them, move with each part. Without all these the
        result is the same.
      loops: whether the parts may run in a loop; else the program repeats them, because convolution
        gradients inside any XLA:CPU loop are 11-30 times slower (BUILD_NOTES.md).
      skip_not_finite: leave the state as it was, but for `step`, where the loss or the gradient is
        NaN or infinite; such a step has no weight in the metrics, but counts in `skipped`. The
        optimizer's schedule stays behind by as many steps, the metric `learning_rate` does not.
      class_counts: labelled images of each class, for `Batch.class_counts`.
      alternating: images of each part of the batch, "labeled" and "unlabeled", if views alternate.
    """

    full = jnp.promote_types(dtype, jnp.float32)

    def turns(state: TrainState, position: Any, rows: jax.Array, members: int) -> jax.Array:
        """How often the images were seen before, each from a start of its own: int32 [n]."""
        size = rows.shape[0] * jax.lax.axis_size(AXIS)
        # Taken apart, because step * size may not fit into 32 bits; members * size has to.
        whole, rest, position = jax.tree.map(
            jnp.uint32, (state.step // members, state.step % members, position)
        )
        seen = whole * size + (rest * size + position) // members
        key = jax.random.fold_in(jax.random.key(state.seed), zlib.crc32(b"turns"))
        starts = jax.vmap(lambda row: jax.random.bits(jax.random.fold_in(key, row)))(rows)
        return (seen % 2 + starts % 2).astype(jnp.int32)

    def part(
        name: str, wanted: tuple[str, ...], chosen: Any, key: Any, state: TrainState, data: Any
    ) -> Part:
        rows, images = chosen if isinstance(chosen, tuple) else (chosen, data["images"][chosen])
        position = jax.lax.axis_index(AXIS) * rows.shape[0] + jnp.arange(rows.shape[0])
        key = jax.random.fold_in(key, zlib.crc32(name.encode()))
        keys = jax.vmap(lambda p: jax.random.fold_in(key, p))(position)
        target = data["targets"][rows]
        # Targets keep full precision: soft ones must still sum to 1.
        bare = Part({}, target.astype(full), jnp.ones(rows.shape, full), rows, keys)
        more = (turns(state, position, rows, alternating[name]),) if alternating else ()
        made = {v: views[v.split(":")[0]](images, bare.key(v), *more).astype(dtype) for v in wanted}
        return bare.replace(views=made)

    def make_batch(state: TrainState, index: Mapping[str, jax.Array], data: Any) -> Batch:
        key = jax.random.fold_in(jax.random.key(state.seed), state.step)
        wanted = algorithm.labeled_views, algorithm.unlabeled_views
        labeled = part("labeled", wanted[0], index["labeled"], key, state, data)
        unlabeled = None
        if "unlabeled" in index:
            unlabeled = part("unlabeled", wanted[1], index["unlabeled"], key, state, data)
        gather = lambda x: jax.lax.all_gather(x, AXIS, tiled=True)  # noqa: E731
        return Batch(labeled, unlabeled, gather, tuple(class_counts))

    def step(state: TrainState, index: Any, data: Any) -> tuple[TrainState, Metrics]:
        batch = make_batch(state, index, data)
        time = Time(state.step, state.step / steps)

        def loss_fn(params: Any, batch: Batch, batch_stats: Any, extra: Any) -> Any:
            net = BoundNet(model, params, batch_stats, state.ema)
            loss, metrics, extra = algorithm.loss(net, batch, extra, time)
            return loss, (net.batch_stats, extra, metrics)

        def work(carry: Any, batch: Batch) -> Any:
            batch_stats, extra = carry
            gradient = jax.value_and_grad(loss_fn, has_aux=True)
            (loss, (*carry, metrics)), grads = gradient(state.params, batch, batch_stats, extra)
            return tuple(carry), (loss, metrics, grads)

        start = state.batch_stats, state.extra
        if microbatches == 1:
            (batch_stats, extra), (loss, metrics, grads) = work(start, batch)
        else:
            (batch_stats, extra), (loss, metrics, grads) = _in_parts(
                work, start, batch, microbatches, loops
            )
        # Each device holds the same number of images, so the mean of local means is the mean.
        grads = jax.lax.pmean(grads, AXIS)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
        ema = jax.tree.map(
            lambda old, new: old + ((1 - decay) * (new - old)).astype(old.dtype),
            state.ema,
            {"params": params, "batch_stats": batch_stats},
        )
        one = jnp.ones((), loss.dtype)
        metrics = jax.lax.psum(metrics, AXIS)
        # Weight 1 whatever the number of devices, so that a row may span a change of them.
        metrics["loss"] = (jax.lax.pmean(loss, AXIS), one)
        metrics["grad_norm"] = (optax.global_norm(grads), one)
        metrics["learning_rate"] = (jnp.asarray(schedule(state.step), loss.dtype), one)
        new = state.replace(
            params=params, batch_stats=batch_stats, opt_state=opt_state, ema=ema, extra=extra
        )
        if skip_not_finite:
            finite = jnp.isfinite(metrics["loss"][0]) & jnp.isfinite(metrics["grad_norm"][0])
            new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
            metrics = jax.tree.map(lambda x: jnp.where(finite, x, 0), metrics)
            metrics["skipped"] = (1 - finite.astype(loss.dtype), one)
        return new.replace(step=state.step + 1), metrics

    return step


def _in_parts(work: Callable, start: Any, batch: Batch, count: int, loops: bool) -> Any:
    """Carries `start` through `work` on `count` parts of the batch.

    Returns:
      The last carry, and (mean loss, summed metrics, mean gradients).
    """
    # A part is every count-th row, which makes it the same rows whatever the number of devices.
    parts = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch)

    def add(carry: Any, part: Batch) -> Any:
        inner, sums = carry
        inner, (loss, metrics, grads) = work(inner, part)
        new = loss / count, metrics, jax.tree.map(lambda g: g / count, grads)
        return (inner, jax.tree.map(jnp.add, sums, new)), None

    shapes = jax.eval_shape(lambda: work(start, jax.tree.map(lambda x: x[0], parts))[1])
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    if loops:
        return jax.lax.scan(add, (start, zeros), parts)[0]
    carry = start, zeros
    for i in range(count):
        carry, _ = add(carry, jax.tree.map(lambda x, i=i: x[i], parts))
    return carry


def make_call(step: Step, count: int) -> Step:
    """Repeats `step` `count` times: index [count, ...] in, metrics [count] out.

    One step runs without a loop: convolution gradients inside any XLA:CPU loop are 11-30 times
    slower (BUILD_NOTES.md), so on a CPU `count` is 1.
    """
    if count > 1:
        return lambda state, index, data: jax.lax.scan(
            lambda carry, rows: step(carry, rows, data), state, index
        )

    def once(state: TrainState, index: Any, data: Any) -> tuple[TrainState, Metrics]:
        state, metrics = step(state, jax.tree.map(lambda x: x[0], index), data)
        return state, jax.tree.map(lambda x: x[None], metrics)

    return once
