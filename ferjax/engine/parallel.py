"""How many devices there are, and how one device's function becomes everybody's.

All functions that run on devices take (state, shard, shared): the state and `shared` are the same
on every device, `shard` has a leading axis over devices. This is the only file that knows.
"""

import collections
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ferjax.config import UserError

AXIS = "devices"


class Layout:
    """All devices of all processes, as one axis.

    Args:
      kind: "pmap", or "shard_map" for `jit(shard_map(...))`; both give the same numbers.
      devices: those to use, all if None.

    Raises:
      UserError: some processes have more devices than others.
    """

    def __init__(self, kind: str = "pmap", devices: Sequence[jax.Device] | None = None) -> None:
        self.kind = kind
        # Process by process, as `shard_own` and pmap have them.
        self.devices = sorted(devices or jax.devices(), key=lambda d: d.process_index)
        self.count = len(self.devices)
        self.local = [d for d in self.devices if d.process_index == jax.process_index()]
        self.platform = self.devices[0].platform
        self.process, self.processes = jax.process_index(), jax.process_count()
        counts = collections.Counter(d.process_index for d in self.devices)
        if len(set(counts.values())) > 1:
            each = ", ".join(f"{number} of process {p}" for p, number in sorted(counts.items()))
            raise UserError(f"devices: {each}: give each process as many")
        # pmap takes what is replicated over this process's devices, shard_map over all.
        mesh_devices = self.local if kind == "pmap" else self.devices
        self.mesh = Mesh(np.asarray(mesh_devices), (AXIS,), axis_types=(AxisType.Auto,))

    def replicate(self, tree: Any) -> Any:
        """Host arrays, the same in every process, to every device."""
        sharding = NamedSharding(self.mesh, PartitionSpec())

        def copy(x: Any) -> jax.Array:
            return jax.make_array_from_callback(np.shape(x), sharding, np.asarray(x).__getitem__)

        return jax.tree.map(copy, tree)

    def shard(self, tree: Any, axis: int = 0) -> Any:
        """Global host arrays, split along `axis` over the devices: what `wrap`'s functions take.

        Each process is given the global array and passes on its own part.
        """

        def split(x: np.ndarray) -> Any:
            parts = np.stack(np.split(x, self.count, axis))
            if self.kind == "pmap":
                here = self.process * len(self.local)
                return parts[here : here + len(self.local)]
            sharding = NamedSharding(self.mesh, PartitionSpec(AXIS))
            return jax.make_array_from_callback(parts.shape, sharding, lambda i: parts[i])

        return jax.tree.map(split, tree)

    def shard_own(self, tree: Any, axis: int = 0) -> Any:
        """As `shard`, given only this process's part of each array."""

        def split(x: np.ndarray) -> Any:
            parts = np.stack(np.split(x, len(self.local), axis))
            if self.kind == "pmap":
                return parts
            sharding = NamedSharding(self.mesh, PartitionSpec(AXIS))
            return jax.make_array_from_process_local_data(sharding, parts)

        return jax.tree.map(split, tree)

    def room(self) -> float:
        """Bytes that training images may take on each device: a quarter of its memory."""
        if self.platform != "cpu":
            memory = self.local[0].memory_stats() or {}
            return memory.get("bytes_limit", math.inf) / 4
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 4 / len(self.local)

    def wrap(self, function: Callable, *, donate: bool = False) -> Callable:
        """`function(state, shard, shared) -> replicated`, compiled for all devices.

        Args:
          function: written for one device, with collectives over `AXIS`; all that it returns must
            be the same on every device.
          donate: whether the state's memory is given away.
        """
        donated = (0,) if donate else ()
        if self.kind == "pmap":
            return jax.pmap(
                function,
                axis_name=AXIS,
                in_axes=(None, 0, None),
                out_axes=None,
                devices=self.local if self.processes == 1 else None,
                donate_argnums=donated,
            )
        same, split = PartitionSpec(), PartitionSpec(AXIS)

        def one(state: Any, shard: Any, shared: Any) -> Any:
            return function(state, jax.tree.map(lambda x: x[0], shard), shared)

        mapped = jax.shard_map(
            one,
            mesh=self.mesh,
            in_specs=(same, split, same),
            out_specs=same,
            # With the check on, pmean of gradients silently gives n times the gradient.
            check_vma=False,
        )
        return jax.jit(mapped, donate_argnums=donated)

    def wishes(self, own: Sequence[bool]) -> np.ndarray:
        """This process's flags as an array [flags, devices] for `shard(..., axis=1)`."""
        return np.repeat(np.asarray(own, np.int32)[:, None], self.count, axis=1)

    def check_batch(self, batch_size: int, microbatches: int = 1) -> None:
        """Refuses a batch that the devices, each with its microbatches, do not divide.

        Raises:
          UserError: names the nearest sizes that they do.
        """
        unit = self.count * microbatches
        below = batch_size // unit * unit
        if below != batch_size:
            near = [str(n) for n in (below, below + unit) if n > 0]
            each = f" with {microbatches} microbatches each" if microbatches > 1 else ""
            raise UserError(
                f"config.batch_size={batch_size} is not divisible by the {self.count} devices"
                f"{each}: use {' or '.join(near)}"
            )

    def describe(self) -> list[str]:
        """Lines: a head, then each device (of more than 16 the first and the last)."""
        head = f"devices: {self.count} in {self.processes} process(es), driven by {self.kind}"
        names = [f"  {d.id}: {d.device_kind} of process {d.process_index}" for d in self.devices]
        return [head, *(names if len(names) <= 16 else [names[0], "  ...", names[-1]])]


def any_wish(wishes: jax.Array) -> jax.Array:
    """Inside a wrapped function: this device's part of `wishes` -> int32 [flags], set by any."""
    if not wishes.size:  # jaxlib 0.11.2 for CPUs crashes over an empty array that is handed through
        return jnp.zeros(0, wishes.dtype)
    return jax.lax.pmax(wishes[:, 0], AXIS)


class Polls:
    """Flags that all processes set and clear at the same call, whichever of them set one.

    Each call carries every process's own flags, and returns those that any has set. They are read
    `LATE` calls later, so that no device waits for it; a single process need not ask.
    """

    LATE = 2

    def __init__(self, layout: Layout) -> None:
        self._alone = layout.processes == 1
        self._unread: collections.deque = collections.deque()

    def agree(self, own: Sequence[bool], returned: Any) -> list[bool]:
        """The flags to act on after a call that was given `own` and returned `any_wish`'s array."""
        if self._alone:
            return list(own)
        self._unread.append((returned, frozenset()))
        if len(self._unread) <= self.LATE:
            return [False] * len(own)
        returned, gone = self._unread.popleft()
        return [bool(flag) and i not in gone for i, flag in enumerate(host(returned))]

    def forget(self, place: int) -> None:
        """The flag of this place that rides in unread calls counts no more.

        All processes call this after the same call: what was asked for has been done.
        """
        self._unread = collections.deque((r, gone | {place}) for r, gone in self._unread)


def host(tree: Any) -> Any:
    """Replicated device arrays as NumPy arrays."""
    return jax.tree.map(np.asarray, jax.device_get(tree))
