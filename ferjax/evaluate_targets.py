"""What `ferjax.evaluate` scores: a split by one or more sets of labels, or a folder of faces."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import FrozenConfigDict

from ferjax.config import UserError
from ferjax.data import arrays, ferplus, pictures, spool
from ferjax.data.folders import Picture

log = logging.getLogger("ferjax")

LABELS = ("own", "fer2013", *ferplus.SCORED, "both")


@dataclass(frozen=True)
class Target:
    """The labels that some images are scored by.

    Attributes:
      name: "own", "fer2013", "ferplus7" or "ferplus8".
      classes: C names.
      positions: int [M], of the images that have a label.
      labels: int [M], indices into `classes`.
    """

    name: str
    classes: tuple[str, ...]
    positions: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Subject:
    """Images, and one or more ways to score them.

    Attributes:
      name: of the file in `eval/`: the split, or folder_<name>.
      images: uint8 [N, H, W, C].
      targets: the first is the one that everything but the table of label sets is about.
      skipped: pictures of a folder that can't be read: `image` (path) and `error`.
    """

    name: str
    images: np.ndarray
    targets: Sequence[Target]
    skipped: Sequence[dict[str, str]] = field(default_factory=tuple)


def is_fer2013(config: FrozenConfigDict) -> bool:
    """Whether a run's data is FER2013, of which FER+ has votes."""
    return config.data.name.partition("/")[0] == "fer2013"


def label_sets(wanted: str, config: FrozenConfigDict, known: Sequence[str]) -> list[str]:
    """The label sets that --labels names.

    Args:
      wanted: one of `LABELS`. "own": the data's, "both": FER2013's and FER+'s, of the classes that
        the network knows.
      config: of the run.
      known: the network's classes.

    Raises:
      UserError: there is no such set, not for this data, or not for this network.
    """
    if wanted not in LABELS:
        raise UserError(f"--labels={wanted}: use {', '.join(LABELS)}")
    if not is_fer2013(config):
        if wanted == "own":
            return ["own"]
        raise UserError(
            f"--labels={wanted}: FER2013 and FER+ label the data set fer2013, this run's data is "
            f"{config.data.name}: use --labels=own"
        )
    contempt = "contempt" in known
    if wanted == "ferplus8" and not contempt:
        raise UserError("--labels=ferplus8: this run knows no contempt: use --labels=ferplus7")
    if wanted == "both":
        return ["fer2013", "ferplus7", *(["ferplus8"] if contempt else [])]
    return ["fer2013" if wanted == "own" else wanted]


def split_targets(
    config: FrozenConfigDict,
    data: arrays.Dataset,
    split: str,
    names: Sequence[str],
    *,
    source: str = "",
    data_dir: str = "",
) -> list[Target]:
    """The labels of a split.

    FER+'s are the class that more than half of the votes left are for (`ferplus.targets`); images
    without one, and those that people call unknown or no face, are left out.

    Args:
      names: of label sets, see `label_sets`.
      source: of FER+'s votes; empty: as the run recorded, see `ferplus.load`.
      data_dir: where downloaded votes are kept.

    Raises:
      UserError: the votes cannot be had.
    """
    own = data.splits[split]
    found = []
    for name in names:
        if name not in ferplus.SCORED:
            found.append(Target(name, data.class_names, np.arange(len(own)), own.labels))
            continue
        kind = ferplus.SCORED[name]
        voted, _, nothing = ferplus.relabel(
            own, kind, ferplus_source(config, source), data_dir or config.data.data_dir
        )
        kept = np.setdiff1d(np.arange(len(own)), nothing)
        found.append(Target(name, ferplus.class_names(kind), kept, voted.labels[kept]))
    return found


def ferplus_source(config: FrozenConfigDict, source: str) -> str:
    """The votes that are given, else those that the run recorded if they are still there."""
    recorded = config.data.ferplus_source
    return source or (recorded if os.path.exists(recorded) else "")


def read_folder(
    folder: str,
    classes: tuple[str, ...],
    image_shape: tuple[int, int, int],
    *,
    detect: bool = False,
) -> Subject:
    """A user's own faces, `folder/<class>/*.jpg`, read as for training.

    Args:
      folder: with one folder for each class; the case of their names does not matter. A picture, of
        any size, in colour or grey, shows one face that fills it, unless `detect`.
      classes: of the network.
      image_shape: (H, W, channels) of the images that the network was trained on.
      detect: cut out the largest face of each picture first.

    Raises:
      UserError: there is no such folder, it has a folder that is no class, or no picture.
    """
    root = Path(os.path.expanduser(folder))
    if not root.is_dir():
        raise UserError(f"--folder={folder} is not a folder")
    place = {name.casefold(): index for index, name in enumerate(classes)}
    below = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith((".", "__")))
    if unknown := [path.name for path in below if path.name.casefold() not in place]:
        raise UserError(
            f"--folder={folder}: {unknown[0]} is no class of this run: give a folder whose folders "
            f"are named {', '.join(classes)}"
        )
    found = [(path, place[p.name.casefold()]) for p in below for path in pictures.below(p)]
    if not found:
        raise UserError(
            f"--folder={folder} holds no pictures: put them into folders named {', '.join(classes)}"
        )

    read = spool.Reader(image_shape, detect)
    files = [Picture(str(path), str(path), "", label) for path, label in found]
    images, labels, skipped, without = [], [], [], 0
    for file, made in zip(files, spool.in_order(read, files), strict=True):
        if isinstance(made, str):
            skipped.append({"image": file.path, "error": made})
        else:
            images.append(made[0])
            labels.append(file.label)
            without += not made[2]
    if without:
        log.info("no face found in %s of %s pictures: these are taken whole", without, len(images))
    if not images:
        raise UserError(f"--folder={folder}: no picture can be read, such as {found[0][0]}")
    target = Target("own", classes, np.arange(len(images)), np.array(labels, np.int32))
    whole = "_".join(root.resolve().parts[-2:])  # of two folders `test` each has its own scores
    name = "".join(c if c.isalnum() or c in "-_." else "_" for c in whole)
    return Subject(f"folder_{name}", np.stack(images), [target], skipped)


def training_images(
    config: FrozenConfigDict,
    data: arrays.Dataset,
    recorded: dict[str, Any],
    which: str,
    classes: Sequence[str],
    *,
    source: str = "",
    data_dir: str = "",
) -> tuple[np.ndarray, np.ndarray]:
    """Training images and the labels that the run saw, for probes.

    Args:
      config: of the run; by its `data.labels` they are labelled.
      data: with the split "train".
      recorded: the run's split.json.
      which: "labeled": those whose label the run used; "all": all that have one.
      classes: images of others are left out.

    Returns:
      uint8 [n, H, W, C], and int [n], indices into `classes`.

    Raises:
      UserError: there are none.
    """
    train, names = data.splits["train"], data.class_names
    kept = np.arange(len(train))
    if config.data.labels != "hard":
        train, _, nothing = ferplus.relabel(
            train,
            config.data.labels,
            ferplus_source(config, source),
            data_dir or config.data.data_dir,
        )
        names = ferplus.class_names(config.data.labels)
        kept = np.setdiff1d(kept, nothing)
    if which == "labeled":
        kept = kept[np.isin(train.rows[kept], recorded.get("labeled_rows", []))]
    into = np.array([classes.index(name) if name in classes else -1 for name in names])
    labels = into[train.labels[kept]]
    kept, labels = kept[labels >= 0], labels[labels >= 0]
    if not len(kept):
        raise UserError(
            "--probes: no training image has a label that the run's split.json names: is this the "
            "data of the run? Or use --probe_labels=all"
        )
    return train.images[kept], labels
