"""Test-time augmentation: the images whose predictions are averaged, made on the host."""

import cv2
import numpy as np

from ferjax.config import UserError

KINDS = ("none", "flip", "ten_crop")
CROP = 5 / 6  # of the side: 40 of 48 pixels, as is usual on FER2013


def variants(images: np.ndarray, kind: str, crop: int = 0) -> list[np.ndarray]:
    """The versions of each image.

    Args:
      images: uint8 [N, H, W, C].
      kind: "none": the images; "flip": and mirrored; "ten_crop": the four corners and the middle at
        5/6 of the sides, resized back (bilinear), each also mirrored (Krizhevsky et al. 2012).
      crop: `config.data.crop` of the network. If not 0, the ten crops are of so many pixels, each
        moved to the middle, which is all that the network sees; the rest repeats the border.

    Returns:
      1, 2 or 10 arrays like `images`.

    Raises:
      UserError: no such kind.
    """
    if kind not in KINDS:
        raise UserError(f"--tta={kind}: use {', '.join(KINDS)}")
    versions = [images]
    if kind == "ten_crop":
        height, width = images.shape[1:3]
        h, w = (crop, crop) if crop else (round(CROP * height), round(CROP * width))
        corners = [(top, left) for top in (0, height - h) for left in (0, width - w)]
        corners.append(((height - h) // 2, (width - w) // 2))
        make = _moved if crop else _resized
        versions = [make(images, top, left, h, w) for top, left in corners]
    if kind == "ten_crop" and crop:
        # Cut from the mirrored image: of an odd rest the middle is not in the middle.
        mirrored = images[:, :, ::-1]
        versions += [_moved(mirrored, top, width - left - w, h, w) for top, left in corners]
    elif kind != "none":
        versions += [x[:, :, ::-1] for x in versions]
    return versions


def _resized(images: np.ndarray, top: int, left: int, h: int, w: int) -> np.ndarray:
    """The part that starts at (top, left), resized to the images' size."""
    shape = images.shape
    out = np.empty(shape, np.uint8)
    for i, image in enumerate(images[:, top : top + h, left : left + w]):
        cut = cv2.resize(np.ascontiguousarray(image), (shape[2], shape[1]))
        out[i] = cut.reshape(shape[1:])
    return out


def _moved(images: np.ndarray, top: int, left: int, h: int, w: int) -> np.ndarray:
    """The images moved so that the part that starts at (top, left) is in their middle."""
    height, width = images.shape[1:3]
    rows = np.arange(height) + top - (height - h) // 2
    columns = np.arange(width) + left - (width - w) // 2
    rows, columns = np.clip(rows, 0, height - 1), np.clip(columns, 0, width - 1)
    return images[:, rows[:, None], columns]
