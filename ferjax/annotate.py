"""Draws what was found into pictures: a frame around each face and a label beside it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from PIL import Image, ImageDraw, ImageFont

SMALL, LARGE = 360, 2400  # pixels: the shorter side is at least SMALL, the longer at most LARGE
_DARK, _LIGHT = (16, 22, 28), (255, 255, 255)
_FONT = Path(mpl.get_data_path()) / "fonts" / "ttf" / "DejaVuSans-Bold.ttf"

Box = tuple[float, float, float, float]  # left, top, right, bottom


def annotate(picture: np.ndarray, rows: Sequence[dict[str, Any]]) -> Image.Image:
    """A copy in which small pictures are enlarged and large ones reduced, so that labels are read.

    Args:
      picture: RGB uint8 [H, W, 3].
      rows: of `ferjax.predict`: `box` ([x, y, width, height], None for the whole picture, whose
        label is written below it), `label` and `confidence`; or `error`.
    """
    height, width = picture.shape[:2]
    scale = max(1.0, SMALL / min(height, width))
    scale = min(scale, LARGE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    how = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC
    image = Image.fromarray(picture).resize(size, how)
    font_size = round(min(max(16.0, 0.022 * max(size)), 44.0))
    line = max(2, font_size // 8)
    written: list[Box] = []
    draw = ImageDraw.Draw(image)
    for row in rows:
        if row.get("box"):
            x, y, w, h = (value * scale for value in row["box"])
            for inset, colour in ((0, _DARK), (line, _LIGHT)):
                out = line - inset
                corners = (x - out, y - out, x + w + out, y + h + out)
                draw.rectangle(corners, outline=colour, width=line)
    below = []
    for row in rows:
        if not row.get("box"):
            below.append(row.get("error") or _text(row))
            continue
        x, y, w, h = (value * scale for value in row["box"])
        _write(
            draw, _text(row), (x - line, y - line, x + w + line, y + h + line), font_size, written
        )
    return _with_footer(image, below, font_size) if below else image


def _text(row: dict[str, Any]) -> str:
    return f"{row['label']} {100 * row['confidence']:.0f} %"


def _write(draw: ImageDraw.ImageDraw, text: str, box: Box, size: int, written: list[Box]) -> None:
    """A label above the box, else below it, else inside: where there is room."""
    width, height = draw.im.size
    font = _font(text, size, width)
    pad = size // 4
    wide = font.getlength(text) + 2 * pad
    high = sum(font.getmetrics()) + pad
    left = min(max(0.0, box[0]), max(0.0, width - wide))
    tops = [box[1] - high, box[3], box[1], box[3] - high]
    places = [(left, top, left + wide, top + high) for top in tops]
    inside = [p for p in places if p[1] >= 0 and p[3] <= height] or [(left, 0.0, left + wide, high)]
    place = next((p for p in inside if not any(_overlap(p, q) for q in written)), inside[0])
    written.append(place)
    draw.rectangle(place, fill=_DARK)
    draw.text((place[0] + pad, place[1] + pad / 2), text, fill=_LIGHT, font=font)


def _with_footer(image: Image.Image, lines: Sequence[str], size: int) -> Image.Image:
    """The picture with lines of text below it."""
    high = round(1.5 * size)
    out = Image.new("RGB", (image.width, image.height + high * len(lines)), _DARK)
    out.paste(image)
    draw = ImageDraw.Draw(out)
    for place, text in enumerate(lines):
        top = image.height + place * high + size // 6
        draw.text((size // 4, top), text, fill=_LIGHT, font=_font(text, size, image.width))
    return out


def _font(text: str, size: int, width: int) -> ImageFont.FreeTypeFont:
    """The font in which a text fits the width, if one of 8 pixels or more does."""
    font = ImageFont.truetype(str(_FONT), size)
    fits = int(size * (width - size / 2) / max(font.getlength(text), 1))
    return font if fits >= size else ImageFont.truetype(str(_FONT), max(8, fits))


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
