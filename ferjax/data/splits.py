"""Which training images are labelled: stratified subsets, from a seed, written to split.json."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from etils import epath

from ferjax.config import UserError, write_json
from ferjax.workdir import workdir_path


@dataclass(frozen=True)
class Subsets:
    """Positions in the training arrays, ascending.

    Attributes:
      labeled: int32 [n], images whose label is used.
      unlabeled: int32 [m], images whose label is hidden; may be empty.
      digest: sha256 over the rows of both, so that two runs can be compared.
      dropped: images in neither because cleaning took them out: counts by reason.
    """

    labeled: np.ndarray
    unlabeled: np.ndarray
    digest: str
    dropped: dict[str, int] = field(default_factory=dict)


def make(
    config: Mapping[str, Any],
    labels: np.ndarray,
    rows: np.ndarray,
    dropped: Mapping[str, np.ndarray] | None = None,
) -> Subsets:
    """The subsets that a `config.data` section describes.

    `labeled` is "all", a share "30%" (of n images, floor(share n) are labelled), a total count
    "2870", or a count for each class "25/class". Shares and totals are stratified: each class
    gets its proportional number, rounded by largest remainders (ties: the lower class first), which
    may be none of a rare class. The same seed gives nested subsets of each class.

    Args:
      config: keys `labeled`, `unlabeled`, `split_seed`, `split_file`.
      labels: int [N], of the training images; those of -1, not known, are never labelled ones.
      rows: int [N], their official row numbers.
      dropped: positions that cleaning leaves out, by reason (see `duplicates.to_drop`). They are
        left out of shares and counts, and of a split_file's images too.

    Raises:
      UserError: the text is none of these, or asks for more images than there are.
    """
    dropped = dropped or {}
    kept = np.ones(len(labels), bool)
    for positions in dropped.values():
        kept[positions] = False
    everything = np.flatnonzero(kept).astype(np.int32)
    known = kept & (labels >= 0)
    candidates = np.flatnonzero(known).astype(np.int32)
    if config["split_file"]:
        named = _read(workdir_path(config["split_file"]), rows)
        if (unknown := labels[named] < 0).any():
            raise UserError(
                f"config.data.split_file={config['split_file']}: row {rows[named[unknown]][0]} has "
                "no label in this data: give a file that was written for the same labels"
            )
        labeled = np.intersect1d(named, candidates)
        if not len(labeled):
            raise UserError(
                f"config.data.clean={config['clean']} drops all images of "
                f"config.data.split_file={config['split_file']}: clean less, or give another file"
            )
    else:
        counts = _counts(config["labeled"], np.bincount(labels[known], minlength=labels.max() + 1))
        labeled = candidates[np.sort(_draw(labels[known], counts, config["split_seed"]))]
    with_labeled = config["unlabeled"] == "all"
    unlabeled = everything if with_labeled else np.setdiff1d(everything, labeled)
    return Subsets(
        labeled.astype(np.int32),
        unlabeled,
        _digest(rows[labeled], rows[unlabeled]),
        {reason: len(positions) for reason, positions in dropped.items()},
    )


def save(
    subsets: Subsets,
    path: epath.Path,
    labels: np.ndarray,
    rows: np.ndarray,
    data_digest: str,
    *,
    class_names: Sequence[str] = (),
    image_shape: Sequence[int] = (),
    unlabeled_digest: str = "",
) -> None:
    """Writes split.json: the labelled official rows, counts for each class, and the digests.

    The names of the network's classes and the images' (H, W, C) stand there, too: what uses the
    run later needs no data set for them. `unlabeled_digest` is of config.data.unlabeled_source.
    """
    content = {
        "digest": subsets.digest,
        "data_digest": data_digest,
        "unlabeled_digest": unlabeled_digest,
        "labeled_count": len(subsets.labeled),
        "unlabeled_count": len(subsets.unlabeled),
        "labeled_per_class": np.bincount(
            labels[subsets.labeled], minlength=len(class_names)
        ).tolist(),
        "dropped_count": sum(subsets.dropped.values()),
        "dropped": subsets.dropped,
        "class_names": list(class_names),
        "image_shape": [int(length) for length in image_shape],
        "labeled_rows": rows[subsets.labeled].tolist(),
    }
    write_json(path, content)


def recorded(path: epath.Path) -> dict[str, Any]:
    """What a split.json says, {} if there is none.

    Raises:
      UserError: it is not a split.json.
    """
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text()))
    except (TypeError, ValueError):
        raise UserError(f"{path} is not what ferjax wrote: delete it or take it back") from None


def is_of(workdir: epath.Path, data_digest: str) -> bool:
    """Whether a run was trained on the data of this digest, as far as its split.json says."""
    own = recorded(workdir / "split.json").get("data_digest")
    return not own or own == data_digest


def _counts(labeled: str, available: np.ndarray) -> np.ndarray:
    text = labeled.strip().replace(" ", "")
    total = int(available.sum())
    if text == "all":
        return available
    if match := re.fullmatch(r"(\d+)/class", text):
        counts = np.full(len(available), int(match[1]))
        if (counts > available).any() or counts[0] == 0:
            raise UserError(
                f"config.data.labeled={labeled}: the smallest class has {available.min()} images "
                f"and a class needs at least 1; choose 1 to {available.min()}"
            )
        return counts
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)%", text):
        # In integers where the share is one, so that floor(30% of 28,709) is exactly 8,612.
        wanted = int(float(match[1]) * total / 100 + 1e-9)
    elif re.fullmatch(r"\d+", text):
        wanted = int(text)
    else:
        raise UserError(
            f"config.data.labeled={labeled}: write all, a share (30%), a count (2870), or a count "
            "for each class (25/class)"
        )
    if not 1 <= wanted <= total:
        raise UserError(
            f"config.data.labeled={labeled} asks for {wanted} labelled images of {total}; "
            f"choose 1 to {total}"
        )
    exact = available * (wanted / total)
    counts = np.floor(exact).astype(int)
    remainders = np.argsort(-(exact - counts), kind="stable")
    counts[remainders[: wanted - counts.sum()]] += 1
    return counts


def _draw(labels: np.ndarray, counts: np.ndarray, seed: int) -> np.ndarray:
    chosen = []
    for label, count in enumerate(counts):
        members = np.flatnonzero(labels == label)
        # Raw bits of a counter-based generator: NumPy guarantees that they never change.
        order = np.argsort(
            np.random.Philox(key=[seed, label]).random_raw(len(members)), kind="stable"
        )
        chosen.append(members[order[:count]])
    return np.concatenate(chosen)


def _read(path: epath.Path, rows: np.ndarray) -> np.ndarray:
    try:
        listed = json.loads(path.read_text())["labeled_rows"]
        if not (isinstance(listed, list) and all(type(row) is int for row in listed)):
            raise TypeError
        wanted = np.asarray(listed, np.int64)
    except FileNotFoundError:
        raise UserError(f"config.data.split_file={path} is not there") from None
    except OSError as error:
        raise UserError(
            f"config.data.split_file={path}: {error.strerror or error}: give a run's split.json"
        ) from None
    except (KeyError, TypeError, ValueError, OverflowError):
        raise UserError(
            f"config.data.split_file={path} holds no list labeled_rows: give a run's split.json"
        ) from None
    position = {int(row): i for i, row in enumerate(rows)}
    missing = [int(row) for row in wanted if int(row) not in position]
    if missing or len(set(wanted.tolist())) != len(wanted) or not len(wanted):
        what = f"row {missing[0]} is not in the training set" if missing else "a row twice or none"
        raise UserError(f"config.data.split_file={path}: {what}; is it of the same data set?")
    return np.sort(np.asarray([position[int(row)] for row in wanted], np.int32))


def _digest(labeled: np.ndarray, unlabeled: np.ndarray) -> str:
    digest = hashlib.sha256()
    for part in (labeled, unlabeled):
        digest.update(np.asarray(part, "<i8").tobytes() + b"|")
    return digest.hexdigest()
