"""ferjax's networks in PyTorch, as its users write them: NCHW, `torch.nn` layers, one class each.

`load` copies a Flax model's variables in, so that both frameworks compute the same function. One
detail differs between the ports that users have and ours: a strided 3x3 convolution pads both sides
there, only the far side here (as TensorFlow does). `exact=True` pads like ours, which costs a copy;
timed peers leave it off. Parameters are the same either way.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as f
from torch import Tensor, nn

from ferjax.config import UserError
from ferjax.models.cnn import PRESETS, parse
from ferjax.models.resnet import DEPTHS


class FarPaddedConv2d(nn.Conv2d):
    """A convolution padded as TensorFlow's "same": the odd pixel goes to the far side."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, F, ceil(H / stride), ceil(W / stride)]."""
        size, stride = self.kernel_size[0], self.stride[0]
        pads: list[int] = []
        for side in (x.shape[3], x.shape[2]):
            total = max((-(-side // stride) - 1) * stride + size - side, 0)
            pads += [total // 2, total - total // 2]
        return f.conv2d(f.pad(x, pads), self.weight, self.bias, stride)


def same_conv(
    channels: int, width: int, size: int, stride: int = 1, *, exact: bool, bias: bool = False
) -> nn.Conv2d:
    """A convolution that keeps the size (divided by the stride)."""
    if size % 2 == 0 or (exact and stride > 1):
        return FarPaddedConv2d(channels, width, size, stride, bias=bias)
    return nn.Conv2d(channels, width, size, stride, size // 2, bias=bias)


class WideBlock(nn.Module):
    """BN-act-conv-BN-act-conv plus shortcut."""

    def __init__(
        self,
        channels: int,
        width: int,
        stride: int,
        first: bool,
        slope: float,
        norm: Any,
        exact: bool,
    ) -> None:
        super().__init__()
        self.first, self.slope = first, slope
        self.norm1 = norm(channels)
        self.conv1 = same_conv(channels, width, 3, stride, exact=exact)
        self.norm2 = norm(width)
        self.conv2 = same_conv(width, width, 3, exact=exact)
        self.shortcut = None
        if channels != width:
            self.shortcut = nn.Conv2d(channels, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, width, H / stride, W / stride]."""
        y = f.leaky_relu(self.norm1(x), self.slope, inplace=True)
        if self.first:
            x = y
        y = f.leaky_relu(self.norm2(self.conv1(y)), self.slope, inplace=True)
        return self.conv2(y) + (x if self.shortcut is None else self.shortcut(x))


class WideResNet(nn.Module):
    """WRN-depth-width."""

    def __init__(self, c: Mapping[str, Any], channels: int, classes: int, exact: bool) -> None:
        super().__init__()

        def norm(width: int) -> nn.BatchNorm2d:
            return nn.BatchNorm2d(width, c["bn_epsilon"], 1 - c["bn_momentum"])

        self.slope = c["slope"]
        self.stem = same_conv(channels, 16, 3, exact=exact)
        self.blocks, width = nn.ModuleList(), 16
        for stage in range(3):
            for i in range((c["depth"] - 4) // 6):
                wide, stride = 16 * c["width"] * 2**stage, 2 if stage and i == 0 else 1
                first = stage == 0 and i == 0
                self.blocks.append(WideBlock(width, wide, stride, first, self.slope, norm, exact))
                width = wide
        self.last_norm = norm(width)
        self.drop = nn.Dropout(c["dropout"])
        self.classifier = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, C, H, W] -> logits [N, classes]."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        x = f.leaky_relu(self.last_norm(x), self.slope, inplace=True)
        return self.classifier(self.drop(f.adaptive_avg_pool2d(x, 1).flatten(1)))


class ResidualBlock(nn.Module):
    """conv-BN-ReLU (two 3x3, or 1x1-3x3-1x1) plus shortcut, then ReLU, as torchvision's."""

    def __init__(
        self, channels: int, width: int, stride: int, bottleneck: bool, project: bool, norm: Any
    ) -> None:
        super().__init__()
        outer = width * (4 if bottleneck else 1)
        plan = [(width, 3, stride), (outer, 3, 1)]
        if bottleneck:
            plan = [(width, 1, 1), (width, 3, stride), (outer, 1, 1)]
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        before = channels
        for wide, size, step in plan:
            self.convs.append(nn.Conv2d(before, wide, size, step, size // 2, bias=False))
            self.norms.append(norm(wide))
            before = wide
        self.shortcut = self.shortcut_norm = None
        if project:
            self.shortcut = nn.Conv2d(channels, outer, 1, stride, bias=False)
            self.shortcut_norm = norm(outer)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, outer, H / stride, W / stride]."""
        y = x
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y = norm(conv(f.relu(y, inplace=True) if i else y))
        if self.shortcut is not None:
            x = self.shortcut_norm(self.shortcut(x))
        return f.relu(x + y, inplace=True)


class ResNet(nn.Module):
    """ResNet-18, 34, 50 or 101."""

    def __init__(self, c: Mapping[str, Any], channels: int, classes: int) -> None:
        super().__init__()

        def norm(width: int) -> nn.BatchNorm2d:
            return nn.BatchNorm2d(width, c["bn_epsilon"], 1 - c["bn_momentum"])

        self.imagenet, width = c["stem"] == "imagenet", c["width"]
        size, stride = (7, 2) if self.imagenet else (3, 1)
        self.stem_conv = nn.Conv2d(channels, width, size, stride, size // 2, bias=False)
        self.stem_norm = norm(width)
        counts, bottleneck = DEPTHS[c["depth"]]
        self.blocks, before = nn.ModuleList(), width
        for stage, count in enumerate(counts):
            for i in range(count):
                wide, stride = width * 2**stage, 2 if stage and i == 0 else 1
                project = i == 0 and (stage > 0 or bottleneck)
                self.blocks.append(ResidualBlock(before, wide, stride, bottleneck, project, norm))
                before = wide * (4 if bottleneck else 1)
        self.classifier = nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, C, H, W] -> logits [N, classes]."""
        x = f.relu(self.stem_norm(self.stem_conv(x)), inplace=True)
        if self.imagenet:
            x = f.max_pool2d(x, 3, 2, 1)
        for block in self.blocks:
            x = block(x)
        return self.classifier(f.adaptive_avg_pool2d(x, 1).flatten(1))


class PReLU(nn.Module):
    """A slope for each element of a row, as Keras has it; `nn.PReLU` has one a channel."""

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.zeros(*shape))

    def forward(self, x: Tensor) -> Tensor:
        """[N, ...] -> the same shape."""
        return torch.where(x > 0, x, self.slope * x)


class GaussianDropout(nn.Module):
    """Multiplies by N(1, rate / (1 - rate)) in training."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.deviation = (rate / (1 - rate)) ** 0.5

    def forward(self, x: Tensor) -> Tensor:
        """[N, ...] -> the same shape."""
        return x * (1 + self.deviation * torch.randn_like(x)) if self.training else x


class Cnn(nn.Module):
    """The layer list of `ferjax.models.cnn`; layers are named by their place, as there."""

    def __init__(
        self, c: Mapping[str, Any], channels: int, side: int, classes: int, exact: bool
    ) -> None:
        super().__init__()
        shape: tuple[int, ...] = (channels, side, side)
        self.order: list[str] = []
        for i, entry in enumerate(parse(tuple(c["layers"]) or PRESETS[c["preset"]])):
            layer = _layer(*entry, shape, c, exact)
            self.order.append(f"{entry[0]}_{i}")
            self.add_module(self.order[-1], layer)
            with torch.no_grad():
                after = layer.eval()(torch.zeros(1, *shape)).shape[1:]
            # How Flax orders what follows: rows H, W, C here, and block channels last.
            if entry[0] == "flatten":
                self.flattened: tuple[int, ...] | None = shape
            if entry[0] == "space_to_depth":
                self.blocked = (int(entry[1][0]), shape[0])
            shape = tuple(after)
            layer.train()
        self.classifier = nn.Linear(shape[0], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, C, H, W] -> logits [N, classes]."""
        for name in self.order:
            x = getattr(self, name)(x)
        return self.classifier(x)


def _layer(
    word: str,
    numbers: tuple[float, ...],
    flags: frozenset[str],
    shape: tuple[int, ...],
    c: Mapping[str, Any],
    exact: bool,
) -> nn.Module:
    whole = [int(n) for n in numbers]
    if word == "conv":
        width, size, stride = (*whole, 1)[:3]
        bias = "nobias" not in flags
        if "valid" in flags:
            return nn.Conv2d(shape[0], width, size, stride, bias=bias)
        return same_conv(shape[0], width, size, stride, exact=exact, bias=bias)
    if word == "bn":
        norm = nn.BatchNorm2d if len(shape) == 3 else nn.BatchNorm1d
        return norm(shape[0], c["bn_epsilon"], 1 - c["bn_momentum"])
    if word == "gap":
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    made = {
        "relu": lambda: nn.ReLU(inplace=True),
        "leaky_relu": lambda: nn.LeakyReLU(numbers[0], inplace=True),
        "prelu": lambda: PReLU(shape),
        "pad": lambda: nn.ZeroPad2d(whole[0]),
        "space_to_depth": lambda: nn.PixelUnshuffle(whole[0]),
        "maxpool": lambda: nn.MaxPool2d(*whole),
        "avgpool": lambda: nn.AvgPool2d(*whole),
        "flatten": nn.Flatten,
        "dense": lambda: nn.Linear(shape[0], whole[0]),
        "dropout": lambda: nn.Dropout(numbers[0]),
        "gaussian_dropout": lambda: GaussianDropout(numbers[0]),
    }
    return made[word]()


def build(config: Mapping[str, Any], *, side: int, classes: int, exact: bool = False) -> nn.Module:
    """The network of a finalized config.

    Raises:
      UserError: the peer does not have this model.
    """
    model, channels = config["model"], config["data"]["channels"]
    if model["name"] == "wide_resnet":
        return WideResNet(model, channels, classes, exact)
    if model["name"] == "resnet":
        return ResNet(model, channels, classes)
    if model["name"] == "cnn":
        return Cnn(model, channels, side, classes, exact)
    raise UserError(
        f"the PyTorch peer has no model {model['name']}: it has wide_resnet, resnet and cnn"
    )


def load(network: nn.Module, params: Mapping[str, Any]) -> None:
    """Copies the parameters of the Flax model of the same config into the network."""
    blocked, flattened = getattr(network, "blocked", None), getattr(network, "flattened", None)

    def put(target: Tensor, values: np.ndarray) -> None:
        with torch.no_grad():
            target.copy_(torch.from_numpy(np.array(values, np.float32)))

    for name, module in network.named_modules():
        if not any(True for _ in module.parameters(recurse=False)):
            continue
        place = params
        for key in _keys(name):
            place = place[key]
        if isinstance(module, nn.Conv2d):
            kernel = np.asarray(place["kernel"])
            if blocked and kernel.shape[2] == blocked[0] ** 2 * blocked[1]:
                h, w, _, width = kernel.shape
                kernel = kernel.reshape(h, w, blocked[0] ** 2, blocked[1], width)
                kernel, blocked = kernel.swapaxes(2, 3).reshape(h, w, -1, width), None
            put(module.weight, kernel.transpose(3, 2, 0, 1))
        elif isinstance(module, nn.Linear):
            kernel = np.asarray(place["kernel"])
            if flattened:
                c, h, w = flattened
                kernel = kernel.reshape(h, w, c, -1).transpose(2, 0, 1, 3)
                kernel, flattened = kernel.reshape(c * h * w, -1), None
            put(module.weight, kernel.T)
        elif isinstance(module, PReLU):
            slope = np.asarray(place["slope"])
            put(module.slope, slope.transpose(2, 0, 1) if slope.ndim == 3 else slope)
        else:
            put(module.weight, place["scale"])
        if getattr(module, "bias", None) is not None:
            put(module.bias, place["bias"])


def _keys(name: str) -> list[str]:
    """`blocks.0.conv1` -> ["blocks_0", "conv1"]: Flax numbers the members of a list in the name."""
    keys: list[str] = []
    for part in name.split("."):
        if part.isdigit():
            keys[-1] += f"_{part}"
        else:
            keys.append(part)
    return keys
