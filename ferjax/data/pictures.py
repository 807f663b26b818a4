"""Picture files of any kind and size, as a user has them."""

import io
import math
import os
import warnings
from collections.abc import Collection
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".pgm", ".ppm"}
MOST_PIXELS, MOST_BYTES = 2**27, 2**29  # of a picture and of its file
_TOO_LARGE = f"more than {MOST_PIXELS // 10**6} megapixels: shrink it first"
_NO_PICTURE = "not a picture that OpenCV reads"


def read(path: str | os.PathLike[str]) -> np.ndarray | str:
    """An RGB picture uint8 [H, W, 3] turned upright by its EXIF data, or why there is none.

    A picture of more than `MOST_PIXELS` is not decoded, whatever its file's size: reading takes a
    bounded amount of memory.
    """
    content = read_file(path)
    if isinstance(content, str):
        return content
    size = declared_size(content)
    return size if isinstance(size, str) else decode(content)


def read_file(path: str | os.PathLike[str]) -> bytes | str:
    """A file's content, or why it can't be had; a pipe, whose reading would never end, is none."""
    if os.path.exists(path) and not os.path.isfile(path):
        return "not a file"
    try:
        if os.path.getsize(path) > MOST_BYTES:
            return f"larger than {MOST_BYTES >> 20} MB"
        return Path(path).read_bytes()
    except OSError as error:
        return error.strerror or "can't be read"


def declared_size(content: bytes) -> int | str:
    """How many pixels a picture's header says it has, or why it is not to be decoded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content)) as header:  # reads no pixels
                size = math.prod(header.size)
    except Image.DecompressionBombError:
        return _TOO_LARGE
    except Exception:  # Pillow's readers raise many kinds for broken headers
        return _NO_PICTURE
    return _TOO_LARGE if size > MOST_PIXELS else size


def decode(content: bytes) -> np.ndarray | str:
    """`read`, of a picture whose declared size is fit."""
    try:
        picture = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR_RGB)
    except cv2.error:
        picture = None
    return _NO_PICTURE if picture is None else np.asarray(picture)


def below(folder: Path, suffixes: Collection[str] = SUFFIXES) -> list[Path]:
    """The picture files in a folder and all folders in it, by name; hidden ones are left out."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in suffixes
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    )
