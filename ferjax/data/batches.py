"""Which images a step sees: a function of (seed, step), without any state.

A set of n images is an endless stream: pass 0 in one random order, pass 1 in another, and so on.
Step s takes the positions s * size ... (s + 1) * size - 1 of that stream. So a run can start at any
step, and every image is seen once a pass.
"""

import functools
import math
import zlib
from typing import Any

import numpy as np


class Batches:
    """The batches of one subset.

    Args:
      members: int32 [n], positions in the training arrays.
      size: images a step, over all devices.
      seed: the run's seed.
      stream: a name, so that two subsets are shuffled independently.
    """

    def __init__(self, members: np.ndarray, size: int, seed: int, stream: str) -> None:
        self.members = np.asarray(members, np.int32)
        self.size = size
        self._key = (seed, zlib.crc32(stream.encode()))
        self._order = functools.lru_cache(maxsize=4)(self._shuffled)

    def __getstate__(self) -> dict[str, Any]:
        """For other processes, without the orders that are at hand here."""
        return {k: v for k, v in vars(self).items() if k != "_order"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """See `__getstate__`."""
        vars(self).update(state)
        self._order = functools.lru_cache(maxsize=4)(self._shuffled)

    def __call__(self, step: int) -> np.ndarray:
        """Positions in the training arrays of step `step`: int32 [size]."""
        return self.at(np.arange(step * self.size, (step + 1) * self.size, dtype=np.int64))

    def at(self, places: np.ndarray) -> np.ndarray:
        """Positions in the training arrays at places of the stream: int64 [n] -> int32 [n]."""
        passes, offsets = np.divmod(places, len(self.members))
        batch = np.empty(len(places), np.int32)
        for number in np.unique(passes):
            here = passes == number
            batch[here] = self._order(int(number))[offsets[here]]
        return batch

    def _shuffled(self, number: int) -> np.ndarray:
        seed, stream = self._key
        # Raw bits of a counter-based generator: NumPy guarantees that they never change.
        bits = np.random.Philox(key=[seed, stream], counter=[0, number, 0, 0])
        return self.members[np.argsort(bits.random_raw(len(self.members)), kind="stable")]


class BalancedBatches(Batches):
    """Batches that show each class equally often.

    K places in a row belong to the K classes that have images, in an order of their own, so that
    no part of a batch taken at equal distances holds some classes only. Each place takes the next
    image of its class's own stream: a class's images are seen once before any of them is seen
    again, those of small classes more often than the others'.

    Args:
      labels: int [n], the members' classes.

    The others: see `Batches`.
    """

    def __init__(
        self, members: np.ndarray, labels: np.ndarray, size: int, seed: int, stream: str
    ) -> None:
        super().__init__(members, size, seed, stream)
        present = np.unique(labels)
        self._classes = [
            Batches(self.members[labels == label], 1, seed, f"{stream}/{label}")
            for label in present
        ]
        # A pass over the classes' numbers is a round.
        self._turns = Batches(np.arange(len(present)), 1, seed, f"{stream}/turns")

    def at(self, places: np.ndarray) -> np.ndarray:
        """See `Batches.at`."""
        rounds, turns = places // len(self._classes), self._turns.at(places)
        batch = np.empty(len(places), np.int32)
        for turn, members in enumerate(self._classes):
            batch[turns == turn] = members.at(rounds[turns == turn])
        return batch


def steps_per_epoch(labeled: int, unlabeled: int, batch_size: int, mu: int) -> int:
    """ceil(max(labeled / B, unlabeled / (mu B))): one pass over the larger demand."""
    return max(
        math.ceil(labeled / batch_size), math.ceil(unlabeled / (mu * batch_size)) if mu else 0
    )


def steps_a_call(per_epoch: int, most: int = 32) -> int:
    """K for a GPU or TPU: a divisor of an epoch's steps near 16, or 16; `most` is the largest.

    With a divisor all calls are of one length, and one program is compiled instead of two.
    """
    wanted = min(16, most)
    divisors = [k for k in range(1, min(most, 32) + 1) if per_epoch % k == 0]
    best = min(divisors, key=lambda k: abs(k - wanted))
    return best if 2 * best >= wanted else wanted
