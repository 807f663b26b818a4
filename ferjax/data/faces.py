"""Faces in pictures: found by OpenCV's frontal Haar cascade, cut out and brought to one size."""

import os
from typing import Any

import cv2
import numpy as np

from ferjax.config import UserError

SEARCH_SIDE = 800  # pixels; larger pictures are searched for faces at this size
SMALLEST = 24  # pixels a side, then


def make_cascade() -> cv2.CascadeClassifier:
    """The detector; one object serves one thread at a time."""
    folder = os.path.join(os.path.dirname(cv2.__file__), "data")
    return cv2.CascadeClassifier(os.path.join(folder, "haarcascade_frontalface_default.xml"))


def faces(picture: np.ndarray, cascade: Any) -> list[list[int]]:
    """Boxes [x, y, width, height] of the faces in a picture, the largest first.

    Args:
      picture: uint8, grey [H, W] or RGB [H, W, 3], 0-255.
      cascade: of `make_cascade`.
    """
    grey = picture if picture.ndim == 2 else cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    shrink = min(1.0, SEARCH_SIDE / max(grey.shape))
    if min(grey.shape) * shrink < SMALLEST:
        return []  # OpenCV can't shrink a strip to nothing
    if shrink < 1:
        grey = cv2.resize(grey, None, fx=shrink, fy=shrink, interpolation=cv2.INTER_AREA)
    smallest = (SMALLEST, SMALLEST)
    boxes = cascade.detectMultiScale(grey, scaleFactor=1.1, minNeighbors=5, minSize=smallest)
    ordered = sorted(boxes, key=lambda box: -int(box[2]) * int(box[3]))
    return [[int(value / shrink) for value in box] for box in ordered]


def fit(image: np.ndarray, shape: tuple[int, int, int], name: str = "the image") -> np.ndarray:
    """An image as the network wants it: the middle square, resized (areas are averaged), uint8.

    Args:
      image: grey [H, W] or [H, W, 1] or RGB [H, W, 3]; uint8, or floats in [0, 1].
      shape: (H, W, channels) of the result.
      name: of the image, for the error's line.

    Raises:
      UserError: an array of another shape, type or range.
    """
    image = np.asarray(image)
    if image.ndim == 2:
        image = image[..., None]
    if image.ndim != 3 or image.shape[-1] not in (1, 3) or 0 in image.shape:
        raise UserError(f"{name}: shape {image.shape}: give [H, W], [H, W, 1] or [H, W, 3]")
    if np.issubdtype(image.dtype, np.floating):
        # A NaN fails the comparison, too.
        if not (image.min() >= 0 and image.max() <= 1):
            raise UserError(f"{name}: floats from {image.min()} to {image.max()}: give [0, 1]")
        image = np.rint(image * 255.0).astype(np.uint8)
    if image.dtype != np.uint8:
        raise UserError(f"{name}: type {image.dtype}: give uint8, or floats in [0, 1]")
    side = min(image.shape[:2])
    top, left = ((length - side) // 2 for length in image.shape[:2])
    image = image[top : top + side, left : left + side]
    # Areas are averaged where it gets smaller: else single pixels decide.
    how = cv2.INTER_AREA if side > shape[0] else cv2.INTER_LINEAR
    if image.shape[-1] == 3 and shape[-1] == 1:
        image = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY)
    out = cv2.resize(np.ascontiguousarray(image), (shape[1], shape[0]), interpolation=how)
    out = out.reshape(*shape[:2], -1)
    return np.broadcast_to(out, shape).copy()
