"""`synthetic_faces`: drawn faces with the seven emotions, for a quick start and for tests.

Every face is a function of `(SEED, row)` alone, so the set is the same on every machine with the
same OpenCV (it draws) and the same NumPy (whose distributions may change with a release). The
emotion sets brows, eyes and mouth; everything else (proportions, pose, light, contrast, occlusion,
noise, how strong the expression is) varies independently of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import tensorflow_datasets as tfds

from ferjax.config import UserError
from ferjax.data.builder import EMOTIONS, SIDE, ArrayBuilder, Face, encode_png

SEED = 2013
# Shares of the classes: disgust is rare, happy frequent, as in FER2013, only milder.
SHARES = (0.14, 0.07, 0.14, 0.21, 0.15, 0.13, 0.16)

_CANVAS = 144  # drawn at three times the final size, then averaged down

# Unit shapes, made once: they cost more to make than to draw.
_ANGLE = np.linspace(0, 2 * np.pi, 40, endpoint=False)
_CIRCLE = np.stack([np.cos(_ANGLE), np.sin(_ANGLE)], -1)
_PARABOLA = np.stack([np.linspace(-1, 1, 15), np.linspace(-1, 1, 15) ** 2], -1)
_BROW = np.linspace(0, 1, 9)  # from the inner to the outer end
_GRID = np.linspace(-1, 1, SIDE, dtype=np.float32)


@dataclass(frozen=True)
class _Expression:
    """How an emotion moves a face; lengths are shares of half the head's height, up is positive."""

    brow_inner: float = 0.0  # rise of the brow's inner end
    brow_outer: float = 0.0  # rise of its outer end
    brow_arch: float = 0.05  # rise of its middle above the line between its ends
    eye_open: float = 0.10  # half the eye's height
    corner: float = 0.0  # rise of the mouth's corners above its middle
    mouth_open: float = 0.0  # height of the open mouth
    mouth_width: float = 0.30  # half the mouth's width
    lip_rise: float = 0.0  # rise of the upper lip
    teeth: float = 0.0  # how much of the open mouth shows teeth, 0-1
    nose_wrinkle: float = 0.0  # darkness of the folds at the nose, 0-1

    def mix(self, other: "_Expression", share: float) -> "_Expression":
        """This expression moved by `share` of the way towards the other."""
        mine, theirs = vars(self), vars(other)
        return _Expression(**{key: (1 - share) * mine[key] + share * theirs[key] for key in mine})


_NEUTRAL = _Expression()
# Each emotion has one or two typical looks; an image takes one of them.
_LOOKS: Mapping[str, tuple[_Expression, ...]] = {
    "angry": (
        _Expression(-0.17, 0.09, 0.0, 0.075, -0.07, 0.0, 0.25),
        _Expression(-0.17, 0.09, 0.0, 0.085, -0.05, 0.17, 0.29, teeth=0.9),
    ),
    "disgust": (
        _Expression(-0.09, -0.02, 0.02, 0.045, -0.10, 0.10, 0.26, 0.10, 0.3, 1.0),
        _Expression(-0.09, -0.02, 0.02, 0.045, -0.13, 0.0, 0.26, 0.08, 0.0, 1.0),
    ),
    "fear": (
        _Expression(0.19, 0.02, 0.0, 0.165, -0.09, 0.14, 0.32, teeth=0.35),
        _Expression(0.19, 0.02, 0.0, 0.165, -0.05, 0.24, 0.28),
    ),
    "happy": (
        _Expression(0.03, 0.03, 0.08, 0.07, 0.16, 0.0, 0.38),
        _Expression(0.03, 0.03, 0.08, 0.065, 0.16, 0.20, 0.38, teeth=0.8),
    ),
    "sad": (
        _Expression(0.14, -0.10, 0.0, 0.06, -0.15, 0.0, 0.26),
        _Expression(0.14, -0.10, 0.0, 0.035, -0.15, 0.0, 0.24),
    ),
    "surprise": (_Expression(0.17, 0.13, 0.13, 0.17, 0.0, 0.38, 0.19),),
    "neutral": (_NEUTRAL,),
}


@dataclass(eq=False)
class SizeConfig(tfds.core.BuilderConfig):
    """How many faces the splits train, public_test and private_test hold."""

    sizes: tuple[int, int, int] = (2800, 700, 700)


class _Canvas:
    """Draws in face coordinates: x to the right, y up, the head's half height is 1."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.image = np.zeros((_CANVAS, _CANVAS), np.float32)
        turn = rng.normal(0.0, 0.12)  # radians
        scale = _CANVAS * rng.uniform(0.36, 0.44)
        shift = _CANVAS * (0.5 + rng.uniform(-0.055, 0.055, 2))
        cos, sin = np.cos(turn), np.sin(turn)
        self._scale = float(scale)
        # To sixteenths of a pixel, OpenCV's four fractional bits; image rows grow downwards.
        self._linear = np.ascontiguousarray(16 * scale * np.array([[cos, sin], [sin, -cos]]).T)
        self._shift = 16 * shift + 0.5  # half a step: truncation becomes rounding

    def _pixels(self, points: np.ndarray) -> np.ndarray:
        return (points.dot(self._linear) + self._shift).astype(np.int32)

    def fill(self, points: np.ndarray, level: float) -> None:
        cv2.fillPoly(self.image, [self._pixels(points)], level, cv2.LINE_8, 4)

    def line(self, points: np.ndarray, level: float, width: float) -> None:
        thick = max(1, round(width * self._scale))
        cv2.polylines(self.image, [self._pixels(points)], False, level, thick, cv2.LINE_8, 4)


def _ellipse(x: float, y: float, rx: float, ry: float) -> np.ndarray:
    return _CIRCLE * (rx, ry) + (x, y)


def _arc(half_width: float, ends: float, middle: float, center: tuple[float, float]) -> np.ndarray:
    """A parabola over [-half_width, half_width] from height `ends` to `middle`, moved."""
    return _PARABOLA * (half_width, ends - middle) + (center[0], center[1] + middle)


def draw_face(label: int, rng: np.random.Generator) -> np.ndarray:
    """Draws one face.

    Args:
        label: index into `EMOTIONS`.
        rng: where everything random comes from.

    Returns:
        uint8 [48, 48].
    """
    looks = _LOOKS[EMOTIONS[label]]
    look = _NEUTRAL.mix(looks[rng.integers(len(looks))], rng.uniform(0.6, 1.1))
    canvas = _Canvas(rng)
    skin = rng.uniform(0.45, 0.85)
    dark = skin * rng.uniform(0.15, 0.4)
    hair = rng.uniform(0.03, 0.5) * skin
    canvas.image[:] = rng.uniform(0.05, 0.95)

    head = rng.uniform(0.70, 0.84)
    canvas.fill(_ellipse(0, 0.10, head + 0.09, 1.05), hair)
    canvas.fill(_ellipse(0, -0.06, head, 0.96), skin)
    fringe = rng.uniform(0.55, 0.85)
    canvas.fill(_arc(head * 0.8, fringe - 0.15, 1.0, (0, 0)), hair)
    if rng.random() < 0.5:  # shaded jaw
        canvas.line(_arc(head * 0.75, -0.55, -0.95, (0, 0)), skin * 0.9, 0.10)

    _draw_eyes(canvas, look, rng, skin, dark)
    _draw_nose(canvas, look, rng, skin)
    _draw_mouth(canvas, look, rng, skin, dark)
    return _photograph(canvas.image, rng)


def _draw_eyes(
    canvas: _Canvas, look: _Expression, rng: np.random.Generator, skin: float, dark: float
) -> None:
    apart, height = rng.uniform(0.30, 0.38), rng.uniform(0.12, 0.22)
    width = rng.uniform(0.15, 0.20)
    brow_gap, brow_width = rng.uniform(0.21, 0.28), rng.uniform(0.05, 0.10)
    gaze = rng.uniform(-0.05, 0.05)
    for side in (-1.0, 1.0):
        x, y = side * apart, height + rng.normal(0, 0.01)
        opened = max(0.02, look.eye_open * rng.uniform(0.85, 1.15) + rng.normal(0, 0.006))
        upper = _arc(width, 0.0, opened, (x, y))
        lower = _arc(width, 0.0, -opened * 0.8, (x, y))
        canvas.fill(np.concatenate([upper, lower[::-1]]), min(1.0, skin + 0.3))
        canvas.fill(_ellipse(x + gaze, y, 0.075, min(0.085, opened * 0.9)), dark * 0.5)
        canvas.line(upper, dark, 0.04)
        canvas.line(lower, (skin + dark) / 2, 0.02)
        inner = look.brow_inner + rng.normal(0, 0.02)
        outer = look.brow_outer + rng.normal(0, 0.02)
        arch = look.brow_arch + rng.normal(0, 0.01)
        rise = inner + (outer - inner) * _BROW + 4 * arch * _BROW * (1 - _BROW)
        brow_x = x + side * width * (2.3 * _BROW - 1.15)
        canvas.line(np.stack([brow_x, y + brow_gap + rise], -1), dark, brow_width)


def _draw_nose(canvas: _Canvas, look: _Expression, rng: np.random.Generator, skin: float) -> None:
    low, half = rng.uniform(-0.26, -0.16), rng.uniform(0.09, 0.14)
    lean = rng.uniform(-0.02, 0.02)
    shade = skin * rng.uniform(0.6, 0.85)
    canvas.line(np.array([[lean - half * 0.4, 0.12], [lean - half, low]]), shade, 0.03)
    canvas.line(_arc(half, 0.03, -0.02, (lean, low)), shade * 0.85, 0.04)
    if look.nose_wrinkle > 0.05:
        fold = skin * (1 - 0.45 * look.nose_wrinkle)
        for y in (0.04, 0.12):
            canvas.line(_arc(0.10, 0.02, -0.03, (lean, y)), fold, 0.03)
        for side in (-1.0, 1.0):
            line = np.array([[half + 0.04, low + 0.06], [half + 0.17, low - 0.10]])
            canvas.line(line * [side, 1] + [lean, 0], fold, 0.04)


def _draw_mouth(
    canvas: _Canvas, look: _Expression, rng: np.random.Generator, skin: float, dark: float
) -> None:
    place = (rng.normal(0, 0.02), rng.uniform(-0.58, -0.48) + look.corner * 0.3)
    half = look.mouth_width * rng.uniform(0.9, 1.12)
    corner = look.corner + rng.normal(0, 0.018)
    opened = max(0.0, look.mouth_open * rng.uniform(0.8, 1.2))
    lip = skin * rng.uniform(0.5, 0.8)
    width = rng.uniform(0.05, 0.08)
    if opened > 0.04:
        # The upper lip stays nearly flat, or follows a smile; the lower one drops.
        upper = _arc(half, corner, look.lip_rise + 0.25 * opened, place)
        lower = _arc(half, corner, -0.85 * opened, place)
        canvas.fill(np.concatenate([upper, lower[::-1]]), dark * 0.35)
        if look.teeth > 0.2:
            bottom = upper + (lower - upper) * (0.75 * look.teeth)
            canvas.fill(np.concatenate([upper, bottom[::-1]]), min(1.0, skin + 0.32))
        canvas.line(upper, lip, width)
        canvas.line(lower, lip, width)
    else:
        line = _arc(half, corner, look.lip_rise * 0.8, place)
        canvas.line(line, lip, width + 0.05)
        canvas.line(line, dark * 0.8, 0.035)


def _photograph(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """From the drawing (float [0, 1]) to the photo: occlusion, light, contrast, blur, noise."""
    if rng.random() < 0.15:  # a hand, a scarf, a caption
        left, top = rng.integers(-_CANVAS // 8, _CANVAS, 2)
        width, height = rng.integers(_CANVAS // 8, _CANVAS // 3, 2)
        image[max(top, 0) : top + height, max(left, 0) : left + width] = rng.uniform(0, 1)
    image = cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    slope = rng.normal(0, 0.22, 2).astype(np.float32)
    image = image * np.exp(slope[0] * _GRID[:, None] + slope[1] * _GRID[None, :])
    image = (image - 0.5) * rng.uniform(0.55, 1.1) + 0.5 + rng.uniform(-0.12, 0.12)
    if rng.random() < 0.4:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 0.8))
    image = image + rng.normal(0, rng.uniform(0.01, 0.06), image.shape)
    return np.clip(np.rint(image * 255), 0, 255).astype(np.uint8)


def make_face(row: int) -> Face:
    """The face of this row: its class, then its drawing, both from `(SEED, row)`."""
    rng = np.random.default_rng([SEED, row])
    label = int(np.searchsorted(np.cumsum(SHARES)[:-1], rng.random(), side="right"))
    pixels = draw_face(label, rng)
    return Face(row, label, encode_png(pixels), pixels)


class SyntheticFaces(ArrayBuilder):
    """TFDS builder `synthetic_faces`; the config `tiny` is its small sister for tests."""

    RELEASE_NOTES = {"1.0.0": "First version."}  # noqa: RUF012 (TFDS's own attribute)
    BUILDER_CONFIGS = [  # noqa: RUF012
        SizeConfig(name="standard", description="4,200 faces.", sizes=(2800, 700, 700)),
        SizeConfig(name="tiny", description="420 faces, for tests.", sizes=(280, 70, 70)),
    ]

    def __init__(self, *, source: str = "", **kwargs: Any) -> None:
        if source:
            raise UserError(
                f"synthetic_faces is drawn by code and reads no source, but got {source!r}: "
                "leave --config.data.source= empty, or choose --config.data.name=fer2013"
            )
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return self._array_info(
            "Grey 48x48 faces drawn by code with one of seven emotions; pose, proportions, light, "
            "contrast, occlusion, noise and the strength of the expression vary at random.",
            EMOTIONS,
            (SIDE, SIDE, 1),
            "png",
            citation="None: cite ferjax, whose code draws them.",
            license="Apache-2.0, as the code that draws them.",
        )

    def collect(self) -> dict[str, list[Face]]:
        """Draws all splits; rows count on from one split to the next."""
        ends = np.cumsum(self.builder_config.sizes)
        names = ("train", "public_test", "private_test")
        return {
            name: [make_face(row) for row in range(end - size, end)]
            for name, size, end in zip(names, self.builder_config.sizes, ends.tolist(), strict=True)
        }


Builder = SyntheticFaces
