"""Copies: which images are equal, which are nearly equal, and what cleaning leaves out of training.

Everything here is NumPy on arrays in host memory and knows no data set by name. Equal means equal
decoded pixels. Nearly equal means that the images, averaged over a coarse grid, correlate:
Pearson's r is blind to brightness and contrast, and averaging to noise, compression and sharpness.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from ferjax.config import UserError

THUMBNAIL = 16  # pixels a side
MAX_PAIRS = 2_000_000  # 32 MB of positions and correlations
CLEAN = ("none", "leaks", "strict")
_BLOCK = 2048  # rows of one block of the correlation matrix: 16 MiB


def exact_ids(images: np.ndarray) -> np.ndarray:
    """One number for each distinct image.

    Args:
        images: uint8 [N, H, W, C].

    Returns:
        int32 [N]: the position of the first image with the same pixels.
    """
    first: dict[bytes, int] = {}
    # Whole images as keys: equality is exact, and a dict keeps each distinct one once.
    ids = (first.setdefault(image.tobytes(), place) for place, image in enumerate(images))
    return np.fromiter(ids, np.int32, len(images))


def groups(ids: np.ndarray) -> list[np.ndarray]:
    """The sets of at least two positions that share an id, by their first position.

    Args:
        ids: int [N], as `exact_ids` or `connected` make them.
    """
    order = np.argsort(ids, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(ids[order])) + 1)
    return sorted((part for part in parts if len(part) > 1), key=lambda part: int(part[0]))


def is_blank(images: np.ndarray) -> np.ndarray:
    """bool [N]: whether all pixels of an image (uint8 [N, H, W, C]) are the same."""
    flat = images.reshape(len(images), -1)
    return flat.max(axis=1) == flat.min(axis=1)


def constant_lines(images: np.ndarray) -> np.ndarray:
    """How many lines of an image hold one single value, as padding does: int [N].

    The larger of the counts of rows and of columns; colour channels count as more pixels.

    Args:
        images: uint8 [N, H, W, C].
    """
    rows = (images.max(axis=(2, 3)) == images.min(axis=(2, 3))).sum(axis=1)
    columns = (images.max(axis=(1, 3)) == images.min(axis=(1, 3))).sum(axis=1)
    return np.maximum(rows, columns)


def thumbnails(images: np.ndarray, side: int = THUMBNAIL) -> np.ndarray:
    """Coarse versions whose dot products are correlations.

    Args:
        images: uint8 [N, H, W, C]; colour is averaged.
        side: of the grid that pixels are averaged over.

    Returns:
        float32 [N, side * side]: mean 0 and length 1 in each row; all 0 for a blank image, which
        then correlates with nothing.
    """
    small = np.empty((len(images), side * side), np.float32)
    for place, image in enumerate(images):
        grey = image[..., 0] if image.shape[-1] == 1 else image.mean(axis=-1)
        averaged = cv2.resize(grey.astype(np.float32), (side, side), interpolation=cv2.INTER_AREA)
        small[place] = averaged.ravel()
    small -= small.mean(axis=1, keepdims=True)
    length = np.linalg.norm(small, axis=1, keepdims=True)
    # A hundredth of a grey level is rounding, not content.
    return np.where(length > 0.01 * side, small / np.maximum(length, 1e-9), 0).astype(np.float32)


@dataclass(frozen=True)
class Pairs:
    """Pairs of nearly equal images, the most alike first.

    Attributes:
        first: int32 [P], positions; smaller than those of `second`.
        second: int32 [P], positions.
        correlation: float32 [P], from the threshold to 1.
    """

    first: np.ndarray
    second: np.ndarray
    correlation: np.ndarray

    def __len__(self) -> int:
        return len(self.first)


def near_pairs(thumbs: np.ndarray, threshold: float, members: np.ndarray | None = None) -> Pairs:
    """All pairs whose thumbnails correlate by at least `threshold`.

    The matrix of correlations is worked off in blocks of 16 MiB: N^2 side^2 / 2 multiplications.

    Args:
        thumbs: float32 [N, D] from `thumbnails`.
        threshold: Pearson's r, in (0, 1].
        members: int [M], ascending positions to look at, such as one of each set of equal images;
            None: all.

    Raises:
        UserError: the threshold is no correlation, or so low that pairs no longer fit in memory.
    """
    if not 0 < threshold <= 1:
        raise UserError(
            f"--threshold={threshold}: a correlation above 0 and at most 1, such as .95"
        )
    places = np.arange(len(thumbs)) if members is None else np.asarray(members)
    thumbs = thumbs[places]
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    count = 0
    least = np.float32(threshold - 1e-6)  # rounding must not cost a pair at r = threshold
    for i in range(0, len(thumbs), _BLOCK):
        for j in range(i, len(thumbs), _BLOCK):
            block = thumbs[i : i + _BLOCK] @ thumbs[j : j + _BLOCK].T
            flat = np.flatnonzero(block >= least)
            a, b = np.divmod(flat, block.shape[1])
            keep = a + i < b + j
            a, b, r = a[keep], b[keep], block.ravel()[flat[keep]]
            count += len(a)
            if count > MAX_PAIRS:
                raise UserError(
                    f"--threshold={threshold}: more than {MAX_PAIRS:,} pairs are that alike; "
                    "raise it"
                )
            found.append((places[a + i], places[b + j], r))
    empty = (np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32))
    first, second, r = map(np.concatenate, zip(empty, *found, strict=True))
    order = np.lexsort((second, first, -r))
    return Pairs(
        first[order].astype(np.int32),
        second[order].astype(np.int32),
        np.minimum(r[order], 1).astype(np.float32),
    )


def connected(count: int, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Which positions hang together by pairs: int32 [count], the smallest of each set."""
    parent = np.arange(count, dtype=np.int32)

    def root(place: int) -> int:
        while parent[place] != place:
            parent[place] = parent[parent[place]]
            place = int(parent[place])
        return place

    for a, b in zip(first.tolist(), second.tolist(), strict=True):
        a, b = root(a), root(b)
        parent[max(a, b)] = min(a, b)
    return np.array([root(place) for place in range(count)], np.int32)


def conflicts(ids: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """bool [N]: whether an image has a copy with another label.

    Args:
        ids: int [N] from `exact_ids`.
        labels: int [N]; -1, not known, agrees with all.
    """
    known = labels >= 0
    low = np.full(len(ids), np.iinfo(np.int32).max, np.int32)
    high = np.full(len(ids), -1, np.int32)
    np.minimum.at(low, ids[known], labels[known])
    np.maximum.at(high, ids[known], labels[known])
    return (low < high)[ids]


def to_drop(
    mode: str, images: np.ndarray, labels: np.ndarray, tests: Sequence[np.ndarray]
) -> Mapping[str, np.ndarray]:
    """What cleaning leaves out of training, by reason; no image is named twice.

    `leaks`: copies of test images. `strict`: also blank images, images with a copy in training that
    has another label, and all but the first of equal images.

    Args:
        mode: one of `CLEAN`.
        images: uint8 [N, H, W, C], of training.
        labels: int [N], of training.
        tests: uint8 [M, H, W, C] of each test split.

    Returns:
        Reason -> ascending positions, int32; the reasons are `leak`, `blank`, `conflict` and
        `repeat`, as far as the mode has them.
    """
    if mode not in CLEAN:
        raise UserError(f"config.data.clean={mode}: there are {', '.join(CLEAN)}")
    if mode == "none":
        return {}
    tested = {image.tobytes() for split in tests for image in split}
    reasons = {"leak": np.array([image.tobytes() in tested for image in images], bool)}
    if mode == "strict":
        ids = exact_ids(images)
        reasons["blank"] = is_blank(images)
        reasons["conflict"] = conflicts(ids, labels)
        reasons["repeat"] = ids != np.arange(len(ids))
    known = np.zeros(len(images), bool)
    dropped = {}
    for reason, mask in reasons.items():
        dropped[reason] = np.flatnonzero(mask & ~known).astype(np.int32)
        known |= mask
    return dropped
