"""Correction of light and shadow before anything else: `config.data.illumination`.

"equalize" gives each image a flat histogram of levels (OpenCV's `equalizeHist`). "clahe" does so in
each of 4 x 4 tiles, with a limit to how much contrast may grow, and blends between tiles
(`createCLAHE`; Zuiderveld 1994): 4 tiles a side, because one of OpenCV's 8 would hold 36 pixels of
a FER2013 face. Of colour images it is the luma (Y of YCrCb) that is changed. "standardize", each
view's own mean and standard deviation, is part of the normalisation (`augment/policies.py`):
`apply` leaves the images as they are.

Whole images are corrected, once, when training loads them and before a trained network sees them
(`load.py`). Data sets on disk, digests, the audit and cleaning keep the original pixels.
"""

from typing import Any

import cv2
import numpy as np

CLIP_LIMIT, TILES = 2.0, (4, 4)


def apply(images: Any, kind: str) -> Any:
    """Corrects images.

    Args:
      images: uint8 [N, H, W, C], C 1 or 3 (red, green, blue); or `stream.Records`.
      kind: "none", "equalize", "clahe" or "standardize".

    Returns:
      uint8 of the same shape; the same array where nothing is to be done.
    """
    if kind in ("none", "standardize"):
        return images
    if not isinstance(images, np.ndarray):  # on disk: corrected when they are read
        return images.treated(kind)
    # A CLAHE object may not be shared between threads: one a call.
    correct = cv2.equalizeHist
    if kind == "clahe":
        correct = cv2.createCLAHE(CLIP_LIMIT, TILES).apply
    out = np.empty_like(images)
    for image, result in zip(images, out, strict=True):
        if image.shape[-1] == 1:
            result[..., 0] = correct(np.ascontiguousarray(image[..., 0]))
        else:
            luma = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2YCrCb)
            luma[..., 0] = correct(np.ascontiguousarray(luma[..., 0]))
            result[...] = cv2.cvtColor(luma, cv2.COLOR_YCrCb2RGB)
    return out
