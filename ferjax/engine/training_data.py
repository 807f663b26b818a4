"""What a config trains on: images, targets, which images are labelled, and where the pixels are."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from ml_collections import FrozenConfigDict

from ferjax.config import UserError
from ferjax.data import arrays, duplicates, ferplus, illumination, splits
from ferjax.engine import processes
from ferjax.engine.parallel import Layout

log = logging.getLogger("ferjax")

SELECTION_SPLIT = "public_test"  # every choice is made on this split, never on private_test
TEST_SPLITS = (SELECTION_SPLIT, "private_test")  # cleaning compares pixels with both, no labels


@dataclass(frozen=True)
class TrainingData:
    """A data set as a run sees it.

    Attributes:
      dataset: "train" with all its images, those without label last, and the test splits that were
        needed; after the correction of `data.illumination`.
      targets: float32 [N, classes] of "train"; zeros where nothing is known.
      class_names: the network's; it is scored on the data set's.
      subsets: which images of "train" are labelled, and which are used without.
      unlabeled_digest: of the pictures from `data.unlabeled_source`; "" without.
      streamed: whether the images of "train" stay on disk (`data.stream.Records`).
    """

    dataset: arrays.Dataset
    targets: np.ndarray
    class_names: tuple[str, ...]
    subsets: splits.Subsets
    unlabeled_digest: str
    streamed: bool


def load(config: FrozenConfigDict, layout: Layout) -> TrainingData:
    """Reads the data set, preparing it first where it is not, and applies `config.data` to it.

    Raises:
      UserError: see `arrays.load`, `splits.make` and `ferplus.relabel`; or what is asked for can't
        be had of this set, or not while it is streamed.
    """
    data = config.data
    # Processes on one host share a CPU's memory.
    beside = processes.neighbours() if layout.platform == "cpu" and layout.processes > 1 else 1
    rooms = {"device": float("inf"), "stream": -1.0, "auto": layout.room() / beside}
    room = processes.least(rooms[data.pipeline])  # hosts' memories may differ
    tests = TEST_SPLITS if data.clean != "none" else (SELECTION_SPLIT,)  # as far as there
    dataset, others, unlabeled_digest = _read(data, tests, room)
    parts = [dataset.splits["train"], *others.values()]
    resident = [isinstance(part.images, np.ndarray) for part in parts]
    if any(resident) and not all(resident):
        # Each process that reads ahead would get a copy of what is in memory.
        dataset, others, unlabeled_digest = _read(data, tests, -1.0)
    for source, split in others.items():
        log.info("%s images without label from %s", f"{len(split):,}", source)
    own = dataset.splits["train"]
    train = arrays.join(own, *others.values())
    streamed = not isinstance(train.images, np.ndarray)
    if streamed and data.clean != "none":
        raise UserError(
            f"config.data.clean={data.clean} compares images in memory, and these are streamed: "
            "use --config.data.pipeline=device"
        )
    there = dataset.splits
    test_images = [there[name].images for name in tests if name in there]
    dropped = duplicates.to_drop(data.clean, train.images, train.labels, test_images)
    targets = np.eye(len(dataset.class_names), dtype=np.float32)[own.labels]
    class_names = dataset.class_names
    if data.labels != "hard":
        if data.name.partition("/")[0] != "fer2013":
            raise UserError(f"config.data.labels={data.labels}: FER+ labels fer2013 only")
        own, targets, nothing = processes.once_per_host(
            lambda: ferplus.relabel(own, data.labels, data.ferplus_source, data.data_dir)
        )
        train = replace(train, labels=np.append(own.labels, train.labels[len(own) :]))
        class_names = ferplus.class_names(data.labels)
        known = np.concatenate([*dropped.values(), np.zeros(0, np.int32)])
        dropped = {**dropped, "no_label": np.setdiff1d(nothing, known)}
    subsets = splits.make(data, train.labels, train.rows, dropped)
    _say_dropped(data, subsets.dropped, len(train))
    shares = targets[subsets.labeled].sum(0)
    if not shares.all():
        without = ", ".join(np.array(class_names)[shares == 0])
        log.warning("warning: no labelled image of %s: the network will not know it", without)
    corrected = {
        name: replace(split, images=illumination.apply(split.images, data.illumination))
        for name, split in {**dataset.splits, "train": train}.items()
    }
    return TrainingData(
        dataset=replace(dataset, splits=corrected),
        targets=np.pad(targets, ((0, len(train) - len(own)), (0, 0))),
        class_names=class_names,
        subsets=subsets,
        unlabeled_digest=unlabeled_digest,
        streamed=streamed,
    )


def _read(
    data: Any, tests: Sequence[str], room: float
) -> tuple[arrays.Dataset, dict[str, arrays.Split], str]:
    """The data set, the images that have no label by where they are from, and those' digest."""
    dataset = processes.once_per_host(
        lambda: arrays.load(
            data.name,
            source=data.source,
            data_dir=data.data_dir,
            splits=("train", SELECTION_SPLIT),
            optional=(*tests[1:], "unlabeled"),
            room=room,
        )
    )
    train, digest = dataset.splits["train"], ""
    found = {}
    if "unlabeled" in dataset.splits:
        found[data.source or data.name] = dataset.splits.pop("unlabeled")
    if data.unlabeled_source:
        shape = train.images.shape[1:]
        left = room - sum(int(np.prod(s.images.shape)) for s in (train, *found.values()))
        other = processes.once_per_host(
            lambda: arrays.load_unlabeled(
                data.unlabeled_source, shape, data_dir=data.data_dir, room=left
            )
        )
        digest = other.digest
        found[data.unlabeled_source] = other.splits["unlabeled"]
    return dataset, found, digest


def _say_dropped(data: Any, counts: dict[str, int], total: int) -> None:
    if counts:
        log.info(
            "clean=%s, labels=%s: %s of %s training images left out (%s)",
            *(data.clean, data.labels, f"{sum(counts.values()):,}", f"{total:,}"),
            ", ".join(f"{reason} {count:,}" for reason, count in counts.items()),
        )
