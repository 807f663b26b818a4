"""Images that stay on disk: read, decoded and handed over batch by batch, with Grain.

The resident path (`data.pipeline=device`) copies all images to the devices once. A set that is too
large for that is streamed: which images a step sees is the same function of (seed, step), so there
is no order to save, and a run resumes at any step; only the pixels travel with each step.
"""

import functools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from tensorflow_datasets.proto import tf_example_pb2

from ferjax import machine
from ferjax.config import UserError
from ferjax.data import illumination
from ferjax.data.builder import unreadable

Positions = Callable[[int], np.ndarray]

_CHUNK = 256  # records that a thread looks through at a time for their labels
_AHEAD = 3  # steps a worker has ready
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Records:
    """The images of ArrayRecord files as something that is indexed like an array.

    All records are looked through once for their labels. Pixels are decoded when they are asked
    for, and not compared with the set's digest as those of `arrays.read` are; the files' own
    checksums find damage.

    Attributes:
      shape: (N, H, W, C).
      labels: int32 [N]; rows: int32 [N], ascending: the order of the images.
    """

    def __init__(self, paths: Sequence[str], shape: Sequence[int], treatment: str = "none") -> None:
        self._paths = list(paths)
        self._source = ArrayRecordDataSource(self._paths)
        self._treatment = treatment
        count = len(self._source)
        labels, rows = np.empty(count, np.int32), np.empty(count, np.int32)

        def look(start: int) -> None:
            places = range(start, min(start + _CHUNK, count))
            for place, record in zip(places, self._source.__getitems__(places), strict=True):
                feature = tf_example_pb2.Example.FromString(record).features.feature
                labels[place] = feature["label"].int64_list.value[0]
                rows[place] = feature["row"].int64_list.value[0]

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(look, range(0, count, _CHUNK)))
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

    def __getitem__(self, positions: np.ndarray | slice) -> np.ndarray:
        """uint8 [n, H, W, C] of int positions [n], or of a slice.

        Raises:
          UserError: a record is damaged.
        """
        places = self._order[positions].tolist()
        shape = self.shape[1:]
        flag = cv2.IMREAD_GRAYSCALE if shape[-1] == 1 else cv2.IMREAD_COLOR_RGB
        images = np.empty((len(places), *shape), np.uint8)
        try:
            for image, record in zip(images, self._source.__getitems__(places), strict=True):
                feature = tf_example_pb2.Example.FromString(record).features.feature
                encoded = np.frombuffer(feature["image"].bytes_list.value[0], np.uint8)
                image[:] = np.asarray(cv2.imdecode(encoded, flag)).reshape(shape)
        except (OSError, RuntimeError, ValueError, LookupError, cv2.error) as error:
            raise unreadable(Path(self._paths[0]).parent, error) from error
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

    def __getitem__(self, positions: np.ndarray | slice) -> np.ndarray:
        """See `Records.__getitem__`."""
        positions = np.arange(len(self))[positions]
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
      workers: processes that read and decode; 0: threads of this one; -1: half as many as there are
        cores for each of the `neighbours`, at least 1 and at most 8.
      neighbours: processes on this host that train.

    Raises:
      UserError: Grain is not installed, or a record is damaged.
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
        neighbours: int = 1,
    ) -> None:
        try:
            import grain
        except ImportError:
            raise UserError(
                "images that are read from disk while training (config.data.pipeline=stream, or "
                "auto with more of them than a device has room for) need Grain: "
                "pip install '.[stream]'"
            ) from None
        load = functools.partial(_load, dict(batches), images, share, shares)
        steps = grain.MapDataset.range(first, end).map(load)
        if workers < 0:
            workers = max(1, min(8, machine.cores() // 2 // neighbours))
        if workers:
            read = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_AHEAD)
            options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=_AHEAD)
            found = steps.to_iter_dataset(read).mp_prefetch(options, worker_init_fn=_settle)
        else:
            threads = 2 if end - first > 1 else 1
            found = steps.to_iter_dataset(
                grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * _AHEAD)
            )
        # Workers inherit the mask: a signal to the whole group waits until they ignore it.
        old = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            self._iterator = iter(found)
            self._first = [next(self._iterator)] if end > first else []
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, old)
        self._waited, self._began = 0.0, time.monotonic()

    def take(self, count: int) -> dict[str, np.ndarray]:
        """The images of the next `count` steps: uint8 [count, n, H, W, C] by part of the batch."""
        asked = time.monotonic()
        steps = [self._first.pop() if self._first else next(self._iterator) for _ in range(count)]
        self._waited += time.monotonic() - asked
        return {name: np.stack([step[name] for step in steps]) for name in steps[0]}

    @property
    def waiting(self) -> float:
        """The share of the time since the first images were there for which `take` had to wait."""
        return self._waited / max(time.monotonic() - self._began, 1e-9)

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


def _settle(worker: int, count: int) -> None:
    """In a new worker: a signal to the group is for the trainer; without that the worker ends."""
    del worker, count
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Grain's workers would outlive a trainer that was killed."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)
