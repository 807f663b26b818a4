"""Images that stay on disk: read, decoded and handed over batch by batch, with Grain.

The resident path (`data.pipeline=device`) copies all images to the devices once. A set that is too
large for that is streamed: which images a step sees is the same function of (seed, step), so there
is no order to save, and a run resumes at any step; only the pixels travel with each step.
"""

import functools
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from tensorflow_datasets.proto import tf_example_pb2

from ferjax.config import UserError
from ferjax.data import illumination

Positions = Callable[[int], np.ndarray]

_CHUNK = 4096  # records looked through at a time for their labels
_AHEAD = 3  # steps a worker has ready


class Records:
    """The images of ArrayRecord files as something that is indexed like an array.

    Pixels are decoded when they are asked for, and not compared with the set's digest as those of
    `arrays.read` are; the files' own checksums find damage.

    Attributes:
      shape: (N, H, W, C).
      labels: int32 [N]; rows: int32 [N], ascending: the order of the images.
    """

    def __init__(self, paths: Sequence[str], shape: Sequence[int], treatment: str = "none") -> None:
        self._source = ArrayRecordDataSource(list(paths))
        self._treatment = treatment
        count = len(self._source)
        labels, rows = np.empty(count, np.int32), np.empty(count, np.int32)
        for start in range(0, count, _CHUNK):
            places = range(start, min(start + _CHUNK, count))
            for place, record in zip(places, self._source.__getitems__(places), strict=True):
                feature = tf_example_pb2.Example.FromString(record).features.feature
                labels[place] = feature["label"].int64_list.value[0]
                rows[place] = feature["row"].int64_list.value[0]
        self._order = np.argsort(rows, kind="stable")
        self.labels, self.rows = labels[self._order], rows[self._order]
        self.shape = (count, *shape)

    def __len__(self) -> int:
        return self.shape[0]

    def treated(self, treatment: str) -> "Records":
        """The same images after `illumination.apply(..., treatment)`."""
        other = object.__new__(Records)
        other.__dict__.update(self.__dict__, _treatment=treatment)
        return other

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        """uint8 [n, H, W, C] of int positions [n].

        Raises:
          ValueError: a record's image can't be decoded, or has another shape.
        """
        places = self._order[np.asarray(positions)].tolist()
        shape = self.shape[1:]
        flag = cv2.IMREAD_GRAYSCALE if shape[-1] == 1 else cv2.IMREAD_COLOR_RGB
        images = np.empty((len(places), *shape), np.uint8)
        for image, record in zip(images, self._source.__getitems__(places), strict=True):
            feature = tf_example_pb2.Example.FromString(record).features.feature
            encoded = np.frombuffer(feature["image"].bytes_list.value[0], np.uint8)
            image[:] = np.asarray(cv2.imdecode(encoded, flag)).reshape(shape)
        return illumination.apply(images, self._treatment)


class Joined:
    """Images of several sources, one after the other.

    Args:
      sources: `Records` or uint8 arrays [N_i, H, W, C], of equal H, W and C.
    """

    def __init__(self, sources: Sequence[Any]) -> None:
        self._sources = list(sources)
        self._ends = np.cumsum([len(source) for source in sources])
        self.shape = (int(self._ends[-1]), *sources[0].shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def treated(self, treatment: str) -> "Joined":
        """See `Records.treated`."""
        return Joined([illumination.apply(source, treatment) for source in self._sources])

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        """See `Records.__getitem__`."""
        positions = np.asarray(positions)
        images = np.empty((len(positions), *self.shape[1:]), np.uint8)
        which = np.searchsorted(self._ends, positions, side="right")
        for number, source in enumerate(self._sources):
            here = which == number
            first = self._ends[number] - len(source)
            images[here] = source[positions[here] - first]
        return images


class Stream:
    """The images of consecutive steps, read ahead by worker processes.

    Args:
      batches: part of the batch -> positions of a step's images, for all devices.
      images: `Records` or `Joined`.
      share: what this process takes of `shares` equal, consecutive parts of a batch.
      first, end: the steps first ... end - 1 will be taken, in order.
      workers: processes that read and decode; 0: threads of this one; -1: half of the cores' number
        of processes, at most 8.

    Raises:
      UserError: Grain is not installed.
    """

    def __init__(
        self,
        batches: Mapping[str, Positions],
        images: Any,
        *,
        share: int = 0,
        shares: int = 1,
        first: int,
        end: int,
        workers: int,
    ) -> None:
        try:
            import grain
        except ImportError:
            raise UserError(
                "config.data.pipeline=stream needs Grain: pip install '.[stream]'"
            ) from None
        load = functools.partial(_load, dict(batches), images, share, shares)
        steps = grain.MapDataset.range(first, end).map(load)
        if workers < 0:
            workers = max(1, min(8, (os.cpu_count() or 1) // 2))
        if workers:
            read = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_AHEAD)
            options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=_AHEAD)
            found = steps.to_iter_dataset(read).mp_prefetch(options, worker_init_fn=_ignore_signals)
        else:
            threads = 2 if end - first > 1 else 1
            found = steps.to_iter_dataset(
                grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * _AHEAD)
            )
        self._iterator = iter(found)
        self._waited, self._began = 0.0, 0.0

    def take(self, count: int) -> dict[str, np.ndarray]:
        """The images of the next `count` steps: uint8 [count, n, H, W, C] by part of the batch."""
        asked = time.monotonic()
        steps = [next(self._iterator) for _ in range(count)]
        if self._began:
            self._waited += time.monotonic() - asked
        else:  # the start of the workers does not count
            self._began = time.monotonic()
        return {name: np.stack([step[name] for step in steps]) for name in steps[0]}

    @property
    def waiting(self) -> float:
        """The share of the time since the first `take` for which others had to wait."""
        return self._waited / max(time.monotonic() - self._began, 1e-9) if self._began else 0.0

    def close(self) -> None:
        """Ends the workers."""
        if hasattr(self._iterator, "close"):
            self._iterator.close()


def _load(
    batches: Mapping[str, Positions], images: Any, share: int, shares: int, step: int
) -> dict[str, np.ndarray]:
    parts = {}
    for name, positions in batches.items():
        mine = np.split(positions(int(step)), shares)[share]
        parts[name] = images[mine]
    return parts


def _ignore_signals(worker: int, count: int) -> None:
    """A signal to the whole group is for the training process, which still needs its images."""
    del worker, count
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
