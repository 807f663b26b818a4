"""What `augment.py` times in PyTorch: the views of `peer_views.py`, one batch again and again."""

import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from peer_views import PillowView, TensorView
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ferjax import machine


class PeerViews:
    """The engine that `augment.py` times: views of one batch by Pillow, a pool and tensors.

    Args:
      cases: name -> (policy's fields, {"image_size", "channels", "mean", "std"}).
      images: uint8 [N, H, W, 1].
    """

    def __init__(self, cases: Mapping[str, Any], images: np.ndarray) -> None:
        self.images = images[..., 0]
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.batch = torch.from_numpy(images).permute(0, 3, 1, 2).to(self.device)
        self.workers = machine.cores()
        self.pillow = {name: PillowView(*case) for name, case in cases.items()}
        self.tensors = {name: TensorView(*case) for name, case in cases.items()}
        self.pool: tuple[str, Any] = ("", None)
        self.threads: dict[str, int] = {}

    def run(self, name: str, turns: int) -> float:
        """Seconds of some batches of "pillow:NAME", "pillow_pool:NAME" or "tensors:NAME"."""
        kind, _, case = name.partition(":")
        torch.set_num_threads(1)
        if kind == "pillow_pool":
            return self._run_pool(case, turns)
        if kind == "tensors":
            if case not in self.threads:
                self.threads[case] = self._fewer_or_all(case)
            torch.set_num_threads(self.threads[case])
        return self._run(kind, case, turns)

    def _fewer_or_all(self, case: str) -> int:
        """One thread or one a core, whichever makes these views faster: many work on few bytes."""
        seconds = {}
        for count in (1, self.workers):
            torch.set_num_threads(count)
            self._run("tensors", case, 1)
            seconds[count] = self._run("tensors", case, 1)
        return min(seconds, key=lambda count: seconds[count])

    def _run(self, kind: str, case: str, turns: int) -> float:
        began = time.perf_counter()
        for _ in range(turns):
            if kind == "pillow":
                torch.stack([self.pillow[case](image) for image in self.images])
            else:
                self.tensors[case](self.batch)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def _run_pool(self, case: str, turns: int) -> float:
        """The loader runs steadily while it is timed: see `pytorch_peer.Peer.load`."""
        if self.pool[0] != case:
            faces = _Faces(self.images, self.pillow[case])
            self.pool = (case, _pool(faces, self.workers))
        _, loader = self.pool
        ahead = 2 * self.workers
        loader.sampler.batches = turns + 2 * ahead
        batches = iter(loader)
        for _ in range(ahead):
            next(batches)
        began = time.perf_counter()
        for _ in range(turns):
            next(batches)
        seconds = time.perf_counter() - began
        for _ in batches:
            pass
        return seconds

    def rest(self) -> None:
        """Ends the pool's workers."""
        self.pool = ("", None)


class _Faces(Dataset):
    def __init__(self, images: np.ndarray, view: PillowView) -> None:
        self.images, self.view = images, view

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> Tensor:
        return self.view(self.images[row])


class _Repeated(Sampler):
    """All rows in order, `batches` times."""

    def __init__(self, count: int) -> None:
        self.count, self.batches = count, 1

    def __iter__(self) -> Iterator[int]:
        return (row for _ in range(self.batches) for row in range(self.count))


def _pool(faces: _Faces, workers: int) -> DataLoader:
    return DataLoader(
        faces,
        batch_size=len(faces),
        sampler=_Repeated(len(faces)),
        num_workers=workers,
        persistent_workers=True,
    )
