"""The views of `ferjax/augment/policies.py` as PyTorch users make them, for the benchmarks' peers.

`PillowView` is the pipeline of the reference codes: one grey image at a time, each drawn operation
applied and rounded by itself; a random resized crop or a resize comes first. `TensorView` is the
same list as tensor operations: where torchvision would go image by image (each has its own draws),
the images that drew one operation are gathered and changed together, which is faster. Operations,
ranges and probabilities are those of ferjax; random numbers are not.
"""

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as f
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from ferjax.augment.randaugment import OPS
from ferjax.config import UserError

GREY = 127.5
# Fields that these pipelines leave out; a policy that sets one has no peer.
UNUSED = {
    "shift": (0.0, 0.0),
    "rotation": 0.0,
    "shear": 0.0,
    "zoom": (1.0, 1.0),
    "brightness": 0.0,
    "contrast": 0.0,
    "erase": 0.0,
    "flip_style": "random",
}


def check(policy: Mapping[str, Any]) -> None:
    """Refuses a policy with operations that the peer does not have.

    Raises:
      UserError: names the field.
    """
    for name, off in UNUSED.items():
        if policy[name] != off:
            raise UserError(f"the PyTorch peer has no {name} in its views: leave it at {off}")


def magnitude(op: str, style: str, side: int, drawn: Sequence[Any], m: Any = math) -> Any:
    """The strength of an operation, by the ranges of `policies.py`'s table.

    Args:
      drawn: a number in [0, 1), one of 1 ... 9 and one of -1 and 1; or tensors of them, for which
        `m` is torch.
    """
    level, tenths, sign = drawn
    uniform = style == "uniform"
    if op in ("brightness", "contrast", "colour", "sharpness"):
        return 0.05 + 0.9 * level if uniform else 0.1 + 0.18 * tenths
    if op == "posterize":
        return 4 + m.floor(4 * level) if uniform else 8 - 4 * tenths // 10
    if op == "solarize":
        return m.ceil(256 * level) if uniform else 256 - 256 * tenths // 10
    if op == "rotate":
        return 60 * level - 30 if uniform else sign * 3.0 * tenths
    share = 0.6 * level - 0.3 if uniform else sign * 0.03 * tenths
    return m.floor(share * side + 0.5) if op.startswith("translate") else share


def draw() -> tuple[float, int, int]:
    """What `magnitude` makes a strength of."""
    return random.random(), random.randint(1, 9), random.choice((-1, 1))


def draw_many(n: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The same for n images, on their device."""
    whole = torch.randint(1, 10, (n,), device=device), torch.randint(2, (n,), device=device)
    return torch.rand(n, device=device), whole[0], 2 * whole[1] - 1


def crop_box(
    height: int, width: int, scale: Sequence[float], aspect: Sequence[float]
) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of a random resized crop."""
    area = height * width * random.uniform(*scale)
    ratio = math.exp(random.uniform(math.log(aspect[0]), math.log(aspect[1])))
    w, h = min(math.sqrt(area * ratio), width), min(math.sqrt(area / ratio), height)
    left, top = random.uniform(0, width - w), random.uniform(0, height - h)
    return left, top, left + w, top + h


class PillowView:
    """uint8 [H, W] -> float32 [channels, size, size], normalised."""

    def __init__(self, policy: Mapping[str, Any], data: Mapping[str, Any]) -> None:
        check(policy)
        self.policy, self.size, self.channels = policy, data["image_size"], data["channels"]
        self.scale = np.float32(1 / (255 * np.asarray(data["std"]))).reshape(-1, 1, 1)
        self.shift = np.float32(np.divide(data["mean"], data["std"])).reshape(-1, 1, 1)

    def __call__(self, pixels: np.ndarray) -> Tensor:
        """One view of one image."""
        policy, image = self.policy, Image.fromarray(pixels)
        if policy["resized_crop"]:
            box = crop_box(*pixels.shape, policy["resized_crop"], policy["resized_crop_aspect"])
            side = self.size or pixels.shape[0]
            image = image.resize((side, side), Image.Resampling.BILINEAR, box)
        elif self.size and self.size != image.width:
            image = image.resize((self.size, self.size), Image.Resampling.BILINEAR)
        if random.random() < policy["flip"]:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if policy["crop"]:
            image = self._crop(image)
        for _ in range(policy["ops"]):
            op = random.choice(OPS)
            if random.random() < policy["op_p"]:
                level = magnitude(op, policy["magnitude"], image.width, draw())
                image = apply(image, op, level, round(255 * policy["fill_value"]))
        out = np.asarray(image, np.float32)
        if policy["cutout"]:
            out = out.copy()
            top, left, bottom, right = cutout_box(policy, image.width)
            out[top:bottom, left:right] = GREY
        view = torch.from_numpy(out[None] * self.scale - self.shift)
        return view.expand(self.channels, -1, -1)

    def _crop(self, image: Image.Image) -> Image.Image:
        """Pads by reflection and takes a random part of the old size."""
        side = image.width
        pad = round(self.policy["crop"] * side)
        padded = np.pad(np.asarray(image), pad, mode="reflect")
        top, left = random.randint(0, 2 * pad), random.randint(0, 2 * pad)
        return Image.fromarray(padded[top : top + side, left : left + side])


def cutout_box(policy: Mapping[str, Any], side: int) -> tuple[int, int, int, int]:
    """(top, left, bottom, right) of a square centred anywhere and cut at the border."""
    share = random.random() if policy["cutout_style"] == "uniform" else 1.0
    half = round(side * policy["cutout"] * share / 2)
    y, x = random.randrange(side), random.randrange(side)
    return max(y - half, 0), max(x - half, 0), y + half, x + half


def apply(image: Image.Image, op: str, level: float, fill: int) -> Image.Image:
    """One operation of RandAugment's pool on a grey image."""

    def move(matrix: tuple[float, ...]) -> Image.Image:
        kind = Image.Transform.AFFINE
        return image.transform(image.size, kind, matrix, Image.Resampling.BILINEAR, fillcolor=fill)

    done = {
        "identity": lambda: image,
        "autocontrast": lambda: ImageOps.autocontrast(image),
        "equalize": lambda: ImageOps.equalize(image),
        "brightness": lambda: ImageEnhance.Brightness(image).enhance(level),
        "contrast": lambda: ImageEnhance.Contrast(image).enhance(level),
        "colour": lambda: ImageEnhance.Color(image).enhance(level),
        "sharpness": lambda: ImageEnhance.Sharpness(image).enhance(level),
        "posterize": lambda: ImageOps.posterize(image, int(level)),
        "solarize": lambda: ImageOps.solarize(image, int(level)),
        "rotate": lambda: image.rotate(level, Image.Resampling.BILINEAR, fillcolor=fill),
        "shear_x": lambda: move((1, level, 0, 0, 1, 0)),
        "shear_y": lambda: move((1, 0, 0, level, 1, 0)),
        "translate_x": lambda: move((1, 0, level, 0, 1, 0)),
        "translate_y": lambda: move((1, 0, 0, 0, 1, level)),
    }
    return done[op]()


class TensorView:
    """uint8 [N, 1, H, W] on any device -> float32 [N, channels, size, size], normalised."""

    def __init__(self, policy: Mapping[str, Any], data: Mapping[str, Any]) -> None:
        check(policy)
        self.policy, self.size, self.channels = policy, data["image_size"], data["channels"]
        self.mean, self.std = (torch.tensor(data[k]).reshape(1, -1, 1, 1) for k in ("mean", "std"))

    def __call__(self, pixels: Tensor) -> Tensor:
        """One view of each image."""
        policy, n, device = self.policy, len(pixels), pixels.device
        x = pixels.float()
        side = self.size or x.shape[-1]
        if policy["resized_crop"]:
            boxes = crop_boxes(x, policy["resized_crop"], policy["resized_crop_aspect"])
            x = crop_and_resize(x, boxes, side)
        elif side != x.shape[-1]:
            x = f.interpolate(x, (side, side), mode="bilinear", align_corners=False)
        flips = torch.rand(n, 1, 1, 1, device=device) < policy["flip"]
        x = torch.where(flips, x.flip(3), x)
        if policy["crop"]:
            x = shift(x, round(policy["crop"] * side))
        x = x.round()
        for _ in range(policy["ops"]):
            drawn = torch.randint(len(OPS), (n,), device=device)
            unused = torch.rand(n, device=device) >= policy["op_p"]
            drawn[unused] = OPS.index("identity")
            counts = torch.bincount(drawn, minlength=len(OPS)).tolist()
            for op, index in zip(OPS, drawn.argsort().split(counts), strict=True):
                # Colour changes no grey image.
                if not len(index) or op in ("identity", "colour"):
                    continue
                numbers = draw_many(len(index), device)
                level = magnitude(op, policy["magnitude"], side, numbers, torch).float()
                part = apply_batch(x[index], op, level, 255 * policy["fill_value"])
                x = x.index_copy(0, index, part.round().clamp(0, 255))
        if policy["cutout"]:
            share = torch.rand(n, device=device) if policy["cutout_style"] == "uniform" else 1.0
            half = torch.as_tensor(side * policy["cutout"] * share / 2, device=device).round()
            row, column = (torch.randint(side, (n,), device=device) for _ in range(2))
            box = torch.stack([row - half, column - half, row + half, column + half])
            top, left, bottom, right = box.reshape(4, n, 1, 1, 1)
            place = torch.arange(side, device=device)
            rows_ = (place >= top) & (place < bottom)
            columns = (place >= left) & (place < right)
            x = torch.where(rows_.transpose(2, 3) & columns, GREY, x)
        x = (x / 255 - self.mean.to(device)) / self.std.to(device)
        return x.expand(-1, self.channels, -1, -1)


def sample(x: Tensor, matrix: Tensor, fill: float) -> Tensor:
    """Bilinear sampling through maps [N, 2, 3] of coordinates in [-1, 1]."""
    grid = f.affine_grid(matrix, list(x.shape), align_corners=False)
    return f.grid_sample(x - fill, grid, align_corners=False) + fill


def crop_boxes(x: Tensor, scale: Sequence[float], aspect: Sequence[float]) -> Tensor:
    """(left, top, right, bottom) [N, 4] of random resized crops, drawn on the device."""
    height, width = x.shape[2:]
    numbers = torch.rand(4, len(x), device=x.device)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * numbers[0])
    low, high = map(math.log, aspect)
    ratio = torch.exp(low + (high - low) * numbers[1])
    w, h = (area * ratio).sqrt().clamp(max=width), (area / ratio).sqrt().clamp(max=height)
    left, top = numbers[2] * (width - w), numbers[3] * (height - h)
    return torch.stack([left, top, left + w, top + h], 1)


def crop_and_resize(x: Tensor, boxes: Tensor, side: int) -> Tensor:
    """Parts (left, top, right, bottom) [N, 4] of x [N, C, H, W], stretched to side x side."""
    height, width = x.shape[2:]
    left, top, right, bottom = boxes.T
    matrix = torch.zeros(len(x), 2, 3, device=x.device)
    matrix[:, 0, 0], matrix[:, 0, 2] = (right - left) / width, (right + left) / width - 1
    matrix[:, 1, 1], matrix[:, 1, 2] = (bottom - top) / height, (bottom + top) / height - 1
    grid = f.affine_grid(matrix, [len(x), x.shape[1], side, side], align_corners=False)
    return f.grid_sample(x, grid, padding_mode="border", align_corners=False)


def shift(x: Tensor, pad: int) -> Tensor:
    """A random crop of the old size after padding by reflection."""
    n, _, height, width = x.shape
    padded = f.pad(x, (pad,) * 4, mode="reflect")
    top, left = (torch.randint(0, 2 * pad + 1, (n, 1), device=x.device) for _ in range(2))
    rows = (top + torch.arange(height, device=x.device))[:, None, :, None]
    columns = (left + torch.arange(width, device=x.device))[:, None, None, :]
    return padded[torch.arange(n, device=x.device)[:, None, None, None], 0, rows, columns]


def apply_batch(x: Tensor, op: str, level: Tensor, fill: float) -> Tensor:
    """One operation of RandAugment's pool on grey levels [N, 1, H, W], strengths [N]."""
    wide = level[:, None, None, None]
    if op == "autocontrast":
        low, high = x.amin((1, 2, 3), True), x.amax((1, 2, 3), True)
        return torch.where(high > low, (x - low) * (255 / (high - low).clamp(min=1)), x)
    if op == "equalize":
        return equalize(x)
    if op == "brightness":
        return x * wide
    if op == "contrast":
        mean = x.mean((1, 2, 3), True).round()
        return mean + wide * (x - mean)
    if op == "sharpness":
        kernel = torch.tensor([[1.0, 1, 1], [1, 5, 1], [1, 1, 1]], device=x.device) / 13
        smooth = x.clone()
        smooth[:, :, 1:-1, 1:-1] = f.conv2d(x, kernel[None, None]).round()
        return smooth + wide * (x - smooth)
    if op == "posterize":
        step = 2 ** (8 - wide)
        return torch.floor(x / step) * step
    if op == "solarize":
        return torch.where(x < wide, x, 255 - x)
    matrix = torch.eye(2, 3, device=x.device).repeat(len(x), 1, 1)
    if op == "rotate":
        radians = torch.deg2rad(level)
        matrix[:, 0, 0] = matrix[:, 1, 1] = torch.cos(radians)
        matrix[:, 0, 1], matrix[:, 1, 0] = -torch.sin(radians), torch.sin(radians)
    elif op == "shear_x":
        matrix[:, 0, 1] = level
    elif op == "shear_y":
        matrix[:, 1, 0] = level
    else:
        matrix[:, 0 if op == "translate_x" else 1, 2] = 2 * level / x.shape[-1]
    return sample(x, matrix, fill)


def equalize(x: Tensor) -> Tensor:
    """Pillow's histogram equalisation of levels [N, 1, H, W]."""
    n = len(x)
    levels = x.reshape(n, -1).long()
    ones = torch.ones_like(levels, dtype=torch.float32)
    counts = torch.zeros(n, 256, device=x.device).scatter_add_(1, levels, ones)
    highest = levels.amax(1, True)
    step = torch.floor((counts.sum(1, True) - counts.gather(1, highest)) / 255)
    before = counts.cumsum(1) - counts
    table = torch.floor((before + torch.floor(step / 2)) / step.clamp(min=1)).clamp(0, 255)
    changed = table.gather(1, levels)
    return torch.where(step > 0, changed, levels.float()).reshape(x.shape)
