"""FER+: ten people's votes on each image of FER2013, and the labels made of them.

E. Barsoum, C. Zhang, C. Canton Ferrer, Z. Zhang, "Training Deep Networks for Facial Expression
Recognition with Crowd-Sourced Label Distribution", ICMI 2016. The file `fer2013new.csv` has a line
for each of FER2013's rows, in the same order: Usage, the image's name (empty where the authors
removed it), and ten counts of votes.

The classes here are FER2013's seven in their order, and contempt as the eighth, so that the first
seven outputs of a network mean the same under both label sets.
"""

import csv
import hashlib
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ferjax.config import UserError
from ferjax.data import sources
from ferjax.data.arrays import Split
from ferjax.data.builder import EMOTIONS, data_folder
from ferjax.data.fer2013 import download

URL = (
    "https://raw.githubusercontent.com/microsoft/FERPlus/"
    "8ad5426c7b69e86e78afccb42c5f516850f52a28/fer2013new.csv"
)
COLUMNS = (
    "neutral",
    "happiness",
    "surprise",
    "sadness",
    "anger",
    "disgust",
    "fear",
    "contempt",
    "unknown",
    "NF",
)
CLASSES = (*EMOTIONS, "contempt")
# How labels are made: of FER2013's own label, or of votes; seven classes leave contempt out.
LABELS = ("hard", "ferplus8", "ferplus8_majority", "ferplus7", "ferplus7_majority")
# What a network can be scored on: FER2013's own labels, or the majority of FER+'s votes. Images
# without a majority, and those that it calls unknown or no face, have no label.
SCORED = {"ferplus7": "ferplus7_majority", "ferplus8": "ferplus8_majority"}
GIVE = (
    "--config.data.ferplus_source= (in ferjax.data.audit: --data.ferplus_source=) or FERPLUS_SOURCE"
)
# sha256 over the votes and removals of the published file, as `_digest` takes them: line ends and
# quoting may differ between copies.
SHA256 = "40e1f44d562f33c4c3210bceff3e6495b4cd18bfe9543875c30822e91bbf93c0"

_ORDER = np.array([4, 5, 6, 1, 3, 2, 0, 7])  # of the columns of emotions, as CLASSES wants them
_UNKNOWN, _NOT_A_FACE = 8, 9


@dataclass(frozen=True)
class Votes:
    """What people said about each row of FER2013.

    Attributes:
        counts: int32 [rows, 10], votes in the order of `COLUMNS`; they sum to 10 (one row: 9).
        removed: bool [rows], images that the authors took out (their name is empty).
    """

    counts: np.ndarray
    removed: np.ndarray

    @property
    def not_a_face(self) -> np.ndarray:
        """bool [rows]: more than half of the votes say that this is no face."""
        return 2 * self.counts[:, _NOT_A_FACE] > self.counts.sum(axis=1)


def given(source: str = "") -> str:
    """The source named, else `FERPLUS_SOURCE`, else ""."""
    return source or os.environ.get("FERPLUS_SOURCE", "")


def load(source: str = "", data_dir: str = "") -> Votes:
    """The votes of a file, or of the official repository's, which is downloaded once and kept.

    Args:
        source: a copy of the file; empty: `FERPLUS_SOURCE`, else the kept or downloaded one.
        data_dir: TFDS's data directory, where it is kept as `ferplus/fer2013new.csv`.

    Raises:
        UserError: there is no such file, it cannot be downloaded, or it is not the published one.
    """
    if source := given(source):
        return read(source)
    path = data_folder(data_dir) / "ferplus" / "fer2013new.csv"
    if os.path.exists(path):
        return read(os.fspath(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            fetched = Path(folder) / path.name
            download(URL, fetched, f"a copy of fer2013new.csv with {GIVE}", "FER+")
            votes = read(os.fspath(fetched), URL)
            os.replace(fetched, path)  # only once its content is known to be right
    except OSError as error:
        raise UserError(
            f"{path.parent} can't be written ({error.strerror or error}): give another folder with "
            f"TFDS_DATA_DIR, or a copy of the file with {GIVE}"
        ) from None
    return votes


def read(source: str, label: str = "") -> Votes:
    """The votes in a copy of `fer2013new.csv`.

    Args:
        source: its path.
        label: what messages call it, where that is not the path.

    Raises:
        UserError: it cannot be read, or is not the published file.
    """
    label = label or source
    try:
        with Path(os.path.expanduser(source)).open(newline="", encoding="utf-8-sig") as file:
            lines = [line for line in csv.reader(file) if line]
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"cannot read {label} ({reason}): give fer2013new.csv with {GIVE}"
        ) from None
    if not lines or tuple(cell.strip() for cell in lines[0]) != ("Usage", "Image name", *COLUMNS):
        raise UserError(
            f"{label}: its header is not that of fer2013new.csv (Usage,Image name,neutral,...): "
            "get a fresh copy"
        )
    body = lines[1:]
    if len(body) != sources.ROWS:
        raise UserError(
            f"{label} has {len(body):,} rows where FER2013 has {sources.ROWS:,}: get a fresh copy"
        )
    counts = np.empty((len(body), len(COLUMNS)), np.int32)
    ends = iter(sources.USAGES)
    usage, end = next(ends)
    for row, cells in enumerate(body):
        if row == end:
            usage, end = next(ends)
        votes = [cell.strip() for cell in cells[2:]]
        whole = len(votes) == len(COLUMNS) and all(
            v.isascii() and v.isdigit() and len(v) < 3 for v in votes
        )
        if not whole or cells[0].strip() != usage or not 0 < sum(map(int, votes)) <= 10:
            raise UserError(
                f"{label}: row {row} is not {usage}, a name and {len(COLUMNS)} counts of at most "
                "10 votes: get a fresh copy"
            )
        counts[row] = [int(v) for v in votes]
    result = Votes(counts, np.array([not cells[1].strip() for cells in body]))
    if (found := _digest(result)) != SHA256:
        raise UserError(
            f"{label}: these are not the published votes (sha256 {found[:12]}..., expected "
            f"{SHA256[:12]}...): get the original"
        )
    return result


def _digest(votes: Votes) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(votes.counts, np.uint8).data)
    digest.update(np.ascontiguousarray(votes.removed, np.uint8).data)
    return digest.hexdigest()


def relabel(
    split: Split, labels: str, source: str = "", data_dir: str = ""
) -> tuple[Split, np.ndarray, np.ndarray]:
    """FER2013's images with other labels; none is left out.

    Args:
        split: of FER2013.
        labels: one of `LABELS` but `hard`.
        source: of the votes, see `load`.
        data_dir: see `load`.

    Returns:
        The split, whose labels are people's first choices (where there is none, as they were); the
        targets, float32 [N, classes]; and the positions without a target, int32 [M].

    Raises:
        UserError: the votes cannot be had.
    """
    made, first = targets(load(source, data_dir).counts[split.rows], labels)
    nothing = np.flatnonzero(first < 0).astype(np.int32)
    chosen = np.where(first < 0, split.labels, first).astype(np.int32)
    return replace(split, labels=chosen), made, nothing


def class_names(labels: str) -> tuple[str, ...]:
    """The classes of a label set, one of `LABELS`."""
    return CLASSES if labels.startswith("ferplus8") else EMOTIONS


def targets(counts: np.ndarray, labels: str) -> tuple[np.ndarray, np.ndarray]:
    """What a network is trained towards, and the class that people chose first.

    As in the authors' code: an emotion with a single vote is noise and does not count. `majority`
    keeps an image whose first choice has more than half of the votes left. The distribution
    (section 3.4, cross-entropy) takes the emotions in order of votes, ties together, until they
    hold three quarters of the votes or are three; it keeps an image if they hold more than half
    and are at most three, and none of the first choices is unknown or not a face. What is left is
    scaled to sum to 1.

    Seven classes leave contempt out: an image whose first choice it is has no target, and the
    others' votes for it are dropped.

    Args:
        counts: int [N, 10], in the order of `COLUMNS`.
        labels: one of `LABELS` but `hard`.

    Returns:
        float32 [N, classes], all 0 where there is no target, and int32 [N], the first choice (of
        equal ones that which comes first in the file), -1 where there is no target.
    """
    votes = np.where(counts > 1, counts, 0)
    chosen = _majority(votes) if labels.endswith("_majority") else _leading(votes)
    first = chosen.argmax(axis=1)
    kept = (chosen.sum(axis=1) > 0) & (first < _UNKNOWN)
    ours = chosen[:, _ORDER].astype(np.float64)
    if len(class_names(labels)) == len(EMOTIONS):
        kept &= first != COLUMNS.index("contempt")
        ours = ours[:, : len(EMOTIONS)]
    ours[~kept] = 0
    scaled = ours / np.maximum(ours.sum(axis=1, keepdims=True), 1)
    place = np.append(np.argsort(_ORDER), [-1, -1])  # of the columns, among our classes
    return scaled.astype(np.float32), np.where(kept, place[first], -1).astype(np.int32)


def _majority(votes: np.ndarray) -> np.ndarray:
    """The votes of the first choice alone, if it has more than half of them."""
    first = np.eye(votes.shape[1], dtype=votes.dtype)[votes.argmax(axis=1)]
    clear = 2 * votes.max(axis=1) > votes.sum(axis=1)
    return votes * first * clear[:, None]


def _leading(votes: np.ndarray) -> np.ndarray:
    """The votes of the emotions that lead; all 0 if they do not hold enough."""
    total = votes.sum(axis=1)
    left, taken = votes.copy(), np.zeros_like(votes)
    number = np.zeros(len(votes), np.int32)
    going = total > 0
    while True:
        going &= (4 * taken.sum(axis=1) < 3 * total) & (number < 3)
        if not going.any():
            break
        level = left.max(axis=1)
        tied = (left == level[:, None]) & going[:, None] & (level > 0)[:, None]
        # Unknown or not a face ends it; only as the very first choice does it stand for the image.
        # Emotions tied with it come before it, as they do in the file.
        stop = tied[:, _UNKNOWN:].any(axis=1)
        emotions = tied.copy()
        emotions[:, _UNKNOWN:] = False
        alone = stop & ~emotions.any(axis=1) & (taken.sum(axis=1) == 0)
        emotions[alone, _UNKNOWN:] = tied[alone, _UNKNOWN:]
        taken += np.where(emotions, votes, 0)
        left[tied] = 0
        number += emotions.sum(axis=1)
        going &= ~stop & (level > 0)
    enough = (2 * taken.sum(axis=1) > total) & (number <= 3)
    return taken * enough[:, None]
