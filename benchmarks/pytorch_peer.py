"""The PyTorch peer of `throughput.py`: the same training as its users write and tune it.

Model and views: `peer_networks.py`, `peer_views.py`. One concatenated forward of labelled, strong
and weak views (FixMatch's reference code and its ports; supervised: labelled ones), cross-entropy,
SGD with Nesterov momentum (or Adam) with weight decay on kernels alone, EMA of parameters and
statistics. Tuned: the fastest of several candidates is taken, measured on this machine with the
training step itself (NCHW or channels-last, then `torch.compile` with the better of them, on a GPU
with and without CUDA graphs; on a CPU all threads or half of them), fused optimizer, multi-tensor
EMA, `set_to_none`, cuDNN's search, TF32, bfloat16 autocast where the config says bfloat16, pinned
memory and asynchronous copies, persistent loader workers.
The learning rate stays at its start: a scheduler would cost the peer a little.
"""

import copy
import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as f
from peer_networks import build, load
from peer_views import PillowView
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler

from ferjax import machine
from ferjax.config import UserError

PREFETCH = 2  # batches a worker, PyTorch's default
Batch = dict[str, Tensor]


def fixmatch_loss(network: nn.Module, batch: Batch, c: Mapping[str, Any]) -> Tensor:
    """FixMatch's joint loss [] of views "labeled", "strong", "weak" and classes "target"."""
    views = torch.cat([batch["labeled"], batch["strong"], batch["weak"]])
    logits = network(views).float()
    labeled, strong, weak = logits.split([len(batch[k]) for k in ("labeled", "strong", "weak")])
    with torch.no_grad():
        confidence, target = weak.softmax(-1).max(-1)
        mask = (confidence >= c["threshold"]).float()
        if c["temperature"]:
            target = (weak / c["temperature"]).softmax(-1)
    unlabeled = f.cross_entropy(strong, target, reduction="none") * mask
    return f.cross_entropy(labeled, batch["target"]) + c["lambda_u"] * unlabeled.mean()


def supervised_loss(network: nn.Module, batch: Batch, c: Mapping[str, Any]) -> Tensor:
    """Cross-entropy [] of the views "labeled"."""
    logits = network(batch["labeled"]).float()
    return f.cross_entropy(logits, batch["target"], label_smoothing=c["label_smoothing"])


# How losses are compared: every pseudo-label counts.
CHECKED = {"threshold": 0.0}
LOSSES = {"fixmatch": fixmatch_loss, "supervised": supervised_loss}


class Trainer:
    """One network with its optimizer and EMA; `step(batch)` trains on a batch.

    Args:
      config: finalized, as a dictionary.
      network: on its device, in its memory format.
      mode: of torch.compile; "off" for none.
    """

    def __init__(self, config: Mapping[str, Any], network: nn.Module, mode: str = "off") -> None:
        self.config, self.network = config, network.train()
        self.device = next(network.parameters()).device
        o = config["optimizer"]
        kernels = [p for p in network.parameters() if p.ndim > 1 and not _is_slope(network, p)]
        held = {id(p) for p in kernels}
        others = [p for p in network.parameters() if id(p) not in held]
        groups = [
            {"params": kernels, "weight_decay": o["weight_decay"]},
            {"params": others, "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        rate, betas = o["learning_rate"], (o["b1"], o["b2"])
        if o["name"] == "sgd":
            nesterov = bool(o["nesterov"] and o["momentum"])
            self.optimizer: torch.optim.Optimizer = torch.optim.SGD(
                groups, rate, o["momentum"], nesterov=nesterov, fused=True
            )
        else:
            kind = torch.optim.Adam if o["name"] == "adam" else torch.optim.AdamW
            self.optimizer = kind(groups, rate, betas, fused=True)
        self.ema = copy.deepcopy(network).eval().requires_grad_(False)
        # Only numbers that are averaged: the counts of batches are whole.
        self.pairs = [
            (new, old)
            for new, old in zip(_values(network), _values(self.ema), strict=True)
            if new.is_floating_point()
        ]
        loss = LOSSES[config["algorithm"]["name"]]
        self.loss: Callable[..., Tensor] = loss
        if mode != "off":
            self.loss = torch.compile(loss, mode=mode)
        self.steps = 0

    def step(self, batch: Batch) -> Tensor:
        """One update; the loss before it, on the device."""
        amp = self.config["dtype"] == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=amp):
            loss = self.loss(self.network, batch, self.config["algorithm"])
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        decay = min(self.config["ema_decay"], (1 + self.steps) / (10 + self.steps))
        with torch.no_grad():
            old = [b for _, b in self.pairs]
            torch._foreach_lerp_(old, [a.detach() for a, _ in self.pairs], 1 - decay)
        self.steps += 1
        return loss.detach()


def _values(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]


def _is_slope(network: nn.Module, parameter: nn.Parameter) -> bool:
    return any(getattr(m, "slope", None) is parameter for m in network.modules())


class LabeledFaces(Dataset):
    """(weak view, class) of an image."""

    def __init__(self, images: np.ndarray, classes: np.ndarray, view: PillowView) -> None:
        self.images, self.classes, self.view = images, classes, view

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return self.view(self.images[row]), int(self.classes[row])


class UnlabeledFaces(Dataset):
    """(weak view, strong view) of an image."""

    def __init__(self, images: np.ndarray, weak: PillowView, strong: PillowView) -> None:
        self.images, self.weak, self.strong = images, weak, strong

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return self.weak(self.images[row]), self.strong(self.images[row])


class Peer:
    """The PyTorch engine that `throughput.py` drives.

    Args:
      config: finalized, as a dictionary.
      side: of the stored images, in pixels.
      workers: of the loaders; 0: all cores where a GPU trains, else half of them.
      mode: "auto", or the one mode of torch.compile to use ("off", "default", ...).
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        side: int,
        workers: int = 0,
        mode: str = "auto",
    ) -> None:
        if config["algorithm"]["name"] not in LOSSES:
            raise UserError(
                f"the PyTorch peer has no {config['algorithm']['name']}: it has {', '.join(LOSSES)}"
            )
        if config["optimizer"]["clip_norm"]:
            raise UserError("the PyTorch peer does not clip: leave config.optimizer.clip_norm at 0")
        plain = {
            "algorithm.criterion": "cross_entropy",
            "algorithm.label_smoothing": 0.0,
            "algorithm.mixup": 0.0,
            "algorithm.weighting": "none",
            "algorithm.logit_adjustment": 0.0,
            "data.crop": 0,
        }
        for key, off in plain.items():
            section, name = key.split(".")
            if config[section].get(name, off) != off:
                raise UserError(f"the PyTorch peer has no {key}: leave it at {off}")
        self.views = {k: PillowView(v, config["data"]) for k, v in config["views"].items()}
        self.config = config
        cores = machine.cores()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        on_gpu = self.device.type == "cuda"
        torch.set_num_threads(cores)
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
        self.workers = workers or (cores if on_gpu else max(cores // 2, 1))
        compiled = ["default", *(["reduce-overhead"] if on_gpu else [])]
        self.modes = ["off", *compiled] if mode == "auto" else [mode]
        self.side = config["data"]["image_size"] or side
        self.mu = config["algorithm"].get("mu", 0)
        self.name = ""  # of the candidate that was chosen, with its trainer, format and batch
        self.trainer: Trainer
        self.format: torch.memory_format
        self.batch: Batch
        self.loaders: tuple[int, list[DataLoader]] = (0, [])

    def check(self, params: Any, batch: Mapping[str, np.ndarray]) -> tuple[float, float]:
        """Loss and norm of its gradient, of NHWC views with a Flax model's parameters.

        In float32 and train mode, on the CPU.
        """
        network = build(self.config, side=self.side, classes=batch["targets"].shape[1], exact=True)
        load(network, params)
        for layer in network.train().modules():
            if "Dropout" in type(layer).__name__:
                layer.eval()
        views = {k: torch.tensor(v).permute(0, 3, 1, 2) for k, v in batch.items() if v.ndim == 4}
        target = torch.tensor(batch["targets"]).argmax(-1)
        settings = dict(self.config["algorithm"], **CHECKED)
        loss_of = LOSSES[self.config["algorithm"]["name"]]
        loss = loss_of(network, {**views, "target": target}, settings)
        loss.backward()
        gradients = [p.grad.norm() for p in network.parameters() if p.grad is not None]
        return float(loss.detach()), float(torch.stack(gradients).norm())

    def prepare(self, params: Any, images: np.ndarray, targets: np.ndarray) -> dict[str, Any]:
        """Times some steps of each candidate and keeps the fastest.

        Both memory formats in the first mode, then the other modes in the better format: a
        compilation takes a minute.

        Args:
          params: initial parameters of the Flax model.
          images: uint8 [N, H, W, 1], for the loaders.
          targets: one-hot [N, classes].
        """
        classes = targets.shape[1]
        self.images, self.classes = images[..., 0], targets.argmax(-1)
        found: dict[str, float | str] = {}
        best, warmed = float("inf"), 0.0

        def attempt(layout: torch.memory_format, mode: str) -> None:
            nonlocal best, warmed
            name = f"{str(layout).removeprefix('torch.')}, compile {mode}"
            network = build(self.config, side=self.side, classes=classes)
            load(network, params)
            trainer = Trainer(self.config, network.to(self.device, memory_format=layout), mode)
            batch = self._resident(classes, layout)
            began = time.perf_counter()
            try:
                # The first steps compile, choose kernels and, for CUDA graphs, record.
                first = 5 if self.device.type == "cuda" else 2 if mode != "off" else 1
                self._timed(trainer, itertools.repeat(batch, first))
            except RuntimeError as error:  # of the compiler: the other candidates remain
                found[name] = f"failed: {error}".splitlines()[0]
                return
            warm = time.perf_counter() - began
            seconds = self._seconds(trainer, batch)
            found[name] = 1e3 * seconds
            if seconds < best:
                best, self.trainer, self.format, self.batch = seconds, trainer, layout, batch
                self.name, warmed = name, warm

        for layout in (torch.contiguous_format, torch.channels_last):
            attempt(layout, self.modes[0])
        for mode in self.modes[1:]:
            attempt(self.format if self.name else torch.contiguous_format, mode)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()  # of the slower ones
        if not self.name:
            raise RuntimeError(f"no candidate of the peer ran: {found}")
        threads = torch.get_num_threads()
        if self.device.type == "cpu" and threads > 1:
            torch.set_num_threads(threads // 2)
            seconds = self._seconds(self.trainer, self.batch)
            found[f"{self.name}, {threads // 2} of {threads} threads"] = 1e3 * seconds
            if seconds > best:
                torch.set_num_threads(threads)
        return {
            "torch": torch.__version__,
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "workers": self.workers,
            "chosen": self.name,
            "candidates_ms": found,
            "first_steps_seconds": warmed,
        }

    def _seconds(self, trainer: Trainer, batch: Batch) -> float:
        """Seconds a step, the better of two times two, or thirty on a GPU."""
        steps = 30 if self.device.type == "cuda" else 2
        return min(self._timed(trainer, itertools.repeat(batch, steps)) / steps for _ in range(2))

    def resident(self, steps: int) -> float:
        """Seconds of some steps on one batch of finished views that lies on the device."""
        return self._timed(self.trainer, itertools.repeat(self.batch, steps))

    def load(self, steps: int) -> float:
        """Seconds of some steps with the loader, from the moment that it runs steadily.

        Steps that use up what the workers fetch ahead come first and are not timed; as many
        batches are left at the end, so that the workers are busy all the time that is timed, and
        idle afterwards, when others are measured.
        """
        if self.loaders[0] != steps:
            self.loaders = (steps, self._loaders(steps + 2 * self._ahead()))
        batches = self._batches(self.loaders[1])
        self._timed(self.trainer, itertools.islice(batches, self._ahead()))
        seconds = self._timed(self.trainer, itertools.islice(batches, steps))
        for _ in batches:
            pass
        return seconds

    def _ahead(self) -> int:
        return PREFETCH * self.workers

    def _timed(self, trainer: Trainer, batches: Any) -> float:
        self._wait()
        began = time.perf_counter()
        for batch in batches:
            trainer.step(batch)
        self._wait()
        return time.perf_counter() - began

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _resident(self, classes: int, layout: torch.memory_format) -> Batch:
        size, channels = self.config["batch_size"], self.config["data"]["channels"]
        shape = (channels, self.side, self.side)
        batch = {"labeled": torch.randn(size, *shape)}
        if self.mu:
            # In the loaders' order: another one would be compiled anew.
            batch["weak"], batch["strong"] = torch.randn(2, self.mu * size, *shape)
        batch = {k: v.to(self.device, memory_format=layout) for k, v in batch.items()}
        batch["target"] = torch.randint(classes, (size,), device=self.device)
        return batch

    def _loaders(self, steps: int) -> list[DataLoader]:
        size, third = self.config["batch_size"], max(len(self.images) // 3, 1)
        weak, images = self.views["weak"], self.images
        sets: list[tuple[Dataset, int, int]] = []
        few = max(self.workers // 8, 1) if self.mu else self.workers
        sets.append((LabeledFaces(images[:third], self.classes[:third], weak), size, few))
        if self.mu:
            faces = UnlabeledFaces(images[third:], weak, self.views["strong"])
            sets.append((faces, size * self.mu, max(self.workers - few, 1)))
        return [
            DataLoader(
                faces,
                batch_size=number,
                sampler=RandomSampler(faces, num_samples=number * steps),
                num_workers=workers,
                pin_memory=self.device.type == "cuda",
                drop_last=True,
                persistent_workers=True,
                prefetch_factor=PREFETCH,
            )
            for faces, number, workers in sets
        ]

    def _batches(self, loaders: list[DataLoader]) -> Iterator[Batch]:
        for (labeled, target), *rest in zip(*loaders, strict=True):
            batch = {"labeled": labeled}
            if rest:
                batch["weak"], batch["strong"] = rest[0]
            batch = {
                k: v.to(self.device, non_blocking=True, memory_format=self.format)
                for k, v in batch.items()
            }
            yield {**batch, "target": target.to(self.device, non_blocking=True)}
