"""Test-time augmentation: the images whose predictions are averaged, made on the host."""

import cv2
import numpy as np

from ferjax.config import UserError

KINDS = ("none", "flip", "ten_crop")
CROP = 5 / 6  # of the side: 40 of 48 pixels, as is usual on FER2013


def variants(images: np.ndarray, kind: str) -> list[np.ndarray]:
    """The versions of each image.

    Args:
      images: uint8 [N, H, W, C].
      kind: "none": the images; "flip": and mirrored; "ten_crop": the four corners and the middle at
        5/6 of the sides, resized back (bilinear), each also mirrored (Krizhevsky et al. 2012).

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
        h, w = round(CROP * height), round(CROP * width)
        corners = [(top, left) for top in (0, height - h) for left in (0, width - w)]
        corners.append(((height - h) // 2, (width - w) // 2))
        versions = [
            _resize(images[:, top : top + h, left : left + w], images.shape)
            for top, left in corners
        ]
    if kind != "none":
        versions += [x[:, :, ::-1] for x in versions]
    return versions


def _resize(images: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    out = np.empty(shape, np.uint8)
    for i, image in enumerate(images):
        cut = cv2.resize(np.ascontiguousarray(image), (shape[2], shape[1]))
        out[i] = cut.reshape(shape[1:])
    return out
