"""A policy's own random operations: the fields that a config may set.

| field | operation and range |
|---|---|
| flip | left-right, with this probability |
| flip_style | "random"; "alternate": drawn once an image, then every other pass (Jordan 2024) |
| crop | shift by whole pixels in [-p, p], p = round(crop side), by `fill` ("constant" reflects) |
| resized_crop | area U(range) of the image, aspect log U(resized_crop_aspect), cut to the image |
| shift | whole pixels, up to these fractions of the width and the height |
| rotation, shear | +- degrees (shear by `shear_unit`); shear is horizontal |
| zoom | magnification U(range), both axes alike |
| affine_p | probability of each of shift, rotation, shear, zoom |
| affine_style | "plain": as said here; "keras": the four in Keras' way, below |
| brightness, contrast | factor 1 + U(-b, b), with probability jitter_p each, before RandAugment |
| cutout | square, this fraction of the side ("fixed") or U(0, it) ("uniform"), centred anywhere |
| erase | probability of one rectangle of U(erase_area) of the area, aspect log U(erase_aspect) |

"keras" is `ImageDataGenerator`: rotation, shift, shear and zoom, composed in this order into one
map about the centre (`geometric.keras_affine`); shifts are fractions of a pixel too, each axis has
its own zoom, and a zoom above 1 shows more, smaller. Two things differ. Keras flips last, here the
flip is first: with ranges that are the same on both sides the views' distribution is the same. And
Keras' centre is off by a pixel in most of its releases.

Keras' `shear_range` was in radians up to release 2.1.2 and is in degrees since 2.1.3 (16 January
2018; its documentation said radians until the end of March 2018). The slides give no release. Their
.1, .2 and .4 are read as radians, 5.7, 11.5 and 22.9 degrees: as degrees none of them would move a
pixel of a 48-pixel image by more than a sixth. `shear_unit="degrees"` is the other reading.
"""

import math
from dataclasses import dataclass, fields

from ferjax.augment import geometric, occlusion, randaugment
from ferjax.config import UserError

FLIP_STYLES = ("random", "alternate")
AFFINE_STYLES = ("plain", "keras")
SHEAR_UNITS = ("degrees", "radians")


@dataclass(frozen=True)
class Policy:
    """The random operations of a view. The module's tables say what each field does.

    Fields are numbers, strings and tuples of numbers, so that a config can hold them. A field out
    of its range raises `UserError`.
    """

    flip: float = 0.0
    flip_style: str = "random"
    crop: float = 0.0
    resized_crop: tuple[float, ...] = ()
    resized_crop_aspect: tuple[float, ...] = (3 / 4, 4 / 3)
    shift: tuple[float, ...] = (0.0, 0.0)
    rotation: float = 0.0
    shear: float = 0.0
    shear_unit: str = "degrees"
    zoom: tuple[float, ...] = (1.0, 1.0)
    affine_p: float = 1.0
    affine_style: str = "plain"
    fill: str = "nearest"
    fill_value: float = 0.5  # of the "constant" fill: 0 is black, 1 white
    brightness: float = 0.0
    contrast: float = 0.0
    jitter_p: float = 1.0
    ops: int = 0
    op_p: float = 1.0
    magnitude: str = "original"
    cutout: float = 0.0
    cutout_style: str = "fixed"
    erase: float = 0.0
    erase_area: tuple[float, ...] = (0.02, 0.33)
    erase_aspect: tuple[float, ...] = (0.3, 3.3)

    def __post_init__(self) -> None:
        for field in fields(self):
            if isinstance(getattr(self, field.name), list):
                object.__setattr__(self, field.name, tuple(getattr(self, field.name)))
        unit = ("flip", "affine_p", "fill_value", "jitter_p", "op_p", "cutout", "erase")
        for name in (*unit, "brightness", "contrast", "crop"):
            self._require(0 <= getattr(self, name) <= 1, name, "between 0 and 1")
        for name, choices in (
            ("fill", geometric.FILLS),
            ("magnitude", randaugment.MAGNITUDES),
            ("cutout_style", occlusion.STYLES),
            ("flip_style", FLIP_STYLES),
            ("affine_style", AFFINE_STYLES),
            ("shear_unit", SHEAR_UNITS),
        ):
            self._require(getattr(self, name) in choices, name, f"one of {', '.join(choices)}")
        self._require(self.ops >= 0, "ops", "0 or more")
        self._require(0 <= self.rotation <= 180, "rotation", "between 0 and 180 degrees")
        self._require(0 <= self.shear_degrees < 90, "shear", "from 0 to below 90 degrees")
        shift_fits = len(self.shift) == 2 and all(0 <= v <= 1 for v in self.shift)
        self._require(shift_fits, "shift", "two fractions (of width, of height)")
        for name in ("zoom", "resized_crop", "resized_crop_aspect", "erase_area", "erase_aspect"):
            value = getattr(self, name)
            numbers = all(isinstance(v, int | float) and math.isfinite(v) for v in value)
            ordered = numbers and len(value) == 2 and 0 < value[0] <= value[1]
            self._require(
                ordered or (name, value) == ("resized_crop", ()), name, "(low, high) above 0"
            )
        self._require(self.erase_area[1] <= 1, "erase_area", "shares of the area, 1 at most")
        self._require(not (self.resized_crop and self.crop), "crop", "0 where resized_crop is set")
        alternate_fits = self.flip_style == "random" or self.flip == 0.5
        self._require(alternate_fits, "flip", "0.5 where flip_style is alternate")
        keras_fits = self.affine_style == "plain" or self.affine_p == 1
        self._require(keras_fits, "affine_p", "1 where affine_style is keras")

    def _require(self, fits: bool, name: str, rule: str) -> None:
        if not fits:
            raise UserError(f"view policy: {name}={getattr(self, name)!r}: must be {rule}")

    @property
    def shear_degrees(self) -> float:
        """The shear's range in degrees."""
        return math.degrees(self.shear) if self.shear_unit == "radians" else self.shear

    @property
    def still(self) -> bool:
        """Whether no pixel moves, if the size stays."""
        moves = (self.rotation, self.shear, self.ops, self.zoom != (1.0, 1.0), *self.shift)
        return not any((self.flip, self.crop, self.resized_crop, *moves))

    @property
    def random(self) -> bool:
        """Whether views differ between keys."""
        return not self.still or any((self.brightness, self.contrast, self.cutout, self.erase))

    @property
    def aligned(self) -> bool:
        """Whether rows stay rows and columns columns: no rotation and no shear."""
        return not (self.rotation or self.shear or self.ops)

    @property
    def whole(self) -> bool:
        """Whether pixels are only moved by whole pixels, if the size stays."""
        steps = self.affine_style == "plain" or not any(self.shift)
        return steps and self.aligned and not self.resized_crop and self.zoom == (1.0, 1.0)
