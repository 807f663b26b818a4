"""Which images a step sees: a function of (seed, step), without any state.

A set of n images is an endless stream: pass 0 in one random order, pass 1 in another, and so on.
Step s takes the positions s * size ... (s + 1) * size - 1 of that stream. So a run can start at any
step, and every image is seen once a pass.
"""

import functools
import math
import zlib

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

    def __call__(self, step: int) -> np.ndarray:
        """Positions in the training arrays of step `step`: int32 [size]."""
        n = len(self.members)
        stream = np.arange(step * self.size, (step + 1) * self.size, dtype=np.int64)
        passes, offsets = np.divmod(stream, n)
        batch = np.empty(self.size, np.int32)
        for number in np.unique(passes):
            here = passes == number
            batch[here] = self._order(int(number))[offsets[here]]
        return batch

    def _shuffled(self, number: int) -> np.ndarray:
        seed, stream = self._key
        # Raw bits of a counter-based generator: NumPy guarantees that they never change.
        bits = np.random.Philox(key=[seed, stream], counter=[0, number, 0, 0])
        return self.members[np.argsort(bits.random_raw(len(self.members)), kind="stable")]


def steps_per_epoch(labeled: int, unlabeled: int, batch_size: int, mu: int) -> int:
    """ceil(max(labeled / B, unlabeled / (mu B))): one pass over the larger demand."""
    return max(
        math.ceil(labeled / batch_size), math.ceil(unlabeled / (mu * batch_size)) if mu else 0
    )
