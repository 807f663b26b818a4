"""A prepared data set as arrays in host memory: 83 MB of uint8 for the whole of FER2013.

The records are read in bulk through TFDS's `as_data_source` and decoded with OpenCV, without
TensorFlow. A set that is not prepared yet is prepared first.
"""

import contextlib
import json
import logging
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from ferjax.config import UserError, find
from ferjax.data.builder import ArrayBuilder, data_folder, split_digest, unreadable
from ferjax.data.stream import Joined, Records

log = logging.getLogger("ferjax")

OTHER_ROWS = 2**30  # the first row of pictures from elsewhere
_CHUNK = 512  # records read and decoded by a thread at a time


@dataclass(frozen=True)
class Split:
    """One split, in official row order.

    Attributes:
        images: uint8 [N, H, W, C], 0-255; or `stream.Records`, which has a `shape` and gives such
            arrays when it is indexed with positions.
        labels: int32 [N], indices into the data set's class names; -1 where it is not known.
        rows: int32 [N], the official row of each image, ascending.
    """

    images: Any
    labels: np.ndarray
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Dataset:
    """Some splits of a data set.

    Attributes:
        name: as given to `load`.
        class_names: in label order.
        splits: the splits that were asked for.
        digest: sha256 (hex) over rows, labels and decoded pixels of all the set's splits, also of
            those not loaded. Two runs with equal digests saw the same data.
    """

    name: str
    class_names: tuple[str, ...]
    splits: dict[str, Split]
    digest: str


def builder(
    name: str, *, source: str = "", data_dir: str = "", **builder_kwargs: Any
) -> ArrayBuilder:
    """The TFDS builder of a data set; nothing is read or written yet.

    Args:
        name: a module of `ferjax.data`, or `module/config` as in TFDS: `fer2013`, `fer2013/csv`,
            `synthetic_faces/tiny`. `name:source` also gives the source: `image_folder:DIR`.
        source: what the set is made from, for those that have a source; empty: its default.
        data_dir: TFDS's data directory; empty: `TFDS_DATA_DIR`, else `~/tensorflow_datasets`.
        **builder_kwargs: handed to the builder.

    Raises:
        UserError: no such data set or config, or a source that does not exist.
    """
    name, _, given = name.partition(":")
    if given and source:
        raise UserError(f"two sources are given, {given} and {source}: leave one out")
    module_name, _, config = name.partition("/")
    builder_class = find("data", module_name)
    if config:
        builder_kwargs["config"] = builder_class.named_config(config)
    return builder_class(source=source or given, data_dir=data_dir, **builder_kwargs)


def prepared_as(name: str, digest: str, class_names: Sequence[str] = (), data_dir: str = "") -> str:
    """The full name of the prepared set with this content; "" if there is none.

    A folder of pictures that changes becomes another set, and the one before stays.

    Args:
        name: see `builder`; its module counts.
        digest: of all the set's splits; it holds labels as numbers.
        class_names: of several such sets the one with these is taken, if there is one.
        data_dir: see `builder`.
    """
    module = name.partition(":")[0].partition("/")[0]
    version = find("data", module).VERSION
    found: dict[tuple[str, ...], str] = {}
    for path in sorted((data_folder(data_dir) / module).glob(f"*/{version}/metadata.json")):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            if json.loads(path.read_text()).get("digest") == digest:
                names = path.with_name("label.labels.txt").read_text(encoding="utf-8").split("\n")
                found.setdefault(tuple(filter(None, names)), f"{module}/{path.parents[1].name}")
    return found.get(tuple(class_names)) or next(iter(found.values()), "")


def load(
    name: str,
    *,
    source: str = "",
    data_dir: str = "",
    splits: Sequence[str] = ("train", "public_test"),
    optional: Sequence[str] = (),
    room: float = math.inf,
    **builder_kwargs: Any,
) -> Dataset:
    """Reads splits of a data set, preparing the set first where it is not.

    Args:
        name: see `builder`.
        source: see `builder`.
        data_dir: see `builder`.
        splits: the splits to read.
        optional: more of them, as far as the set has them.
        room: bytes of memory for the images of "train" and "unlabeled"; if they need more, they
            stay on disk.
        **builder_kwargs: handed to the builder.

    Raises:
        UserError: an unknown name or split, a wrong source, or records that changed on disk.
    """
    made = builder(name, source=source, data_dir=data_dir, **builder_kwargs)
    if not made.is_prepared():
        log.info("preparing %s in %s", name, made.data_path)
    made.download_and_prepare()
    there = [split for split in optional if split in made.info.splits]
    known = made.info.splits  # `read` names one that is not among them
    large = [s for s in (*splits, *there) if s in ("train", "unlabeled") and s in known]
    shape = made.info.features["image"].shape
    size = sum(made.info.splits[split].num_examples for split in large) * math.prod(shape)
    return read(made, (*splits, *there), name, on_disk=large if size > room else ())


def load_unlabeled(
    source: str, shape: Sequence[int], *, data_dir: str = "", room: float = math.inf
) -> Dataset:
    """All pictures of a folder or CSV as one split `unlabeled`, in the form of other images.

    Args:
        source: `image_folder:DIR`, or `image_folder/detect:DIR` to cut faces out first.
        shape: (H, W, C) of the images wanted.
        data_dir: see `builder`.
        room: see `load`.

    Returns:
        A set whose rows start at `OTHER_ROWS`, so that no other set has them.

    Raises:
        UserError: another kind of source, or an H that is not W.
    """
    name, _, folder = source.partition(":")
    module, _, words = name.partition("/")
    if module != "image_folder" or not folder or words not in ("", "detect"):
        raise UserError(
            f"config.data.unlabeled_source={source}: give image_folder:DIR, or "
            "image_folder/detect:DIR to cut out faces"
        )
    height, width, channels = shape
    if height != width:
        raise UserError(f"config.data.unlabeled_source: {height} x {width} is no square")
    form = f"{height}_{'grey' if channels == 1 else 'rgb'}" + f"_{words}" * bool(words)
    name = f"{module}/{form}_unlabeled"
    loaded = load(name, source=folder, data_dir=data_dir, splits=("unlabeled",), room=room)
    split = loaded.splits["unlabeled"]
    moved = replace(split, rows=split.rows + np.int32(OTHER_ROWS))
    return replace(loaded, splits={"unlabeled": moved})


def join(labeled: Split, *unlabeled: Split) -> Split:
    """The images of all, in this order; the labels of the others become -1."""
    if not unlabeled:
        return labeled
    every = (labeled, *unlabeled)
    hidden = [np.full(len(split), -1, np.int32) for split in unlabeled]
    images = [split.images for split in every]
    resident = all(isinstance(some, np.ndarray) for some in images)
    return Split(
        np.concatenate(images) if resident else Joined(images),
        np.concatenate([labeled.labels, *hidden]),
        np.concatenate([split.rows for split in every]),
    )


def read(
    made: ArrayBuilder, splits: Sequence[str], name: str = "", *, on_disk: Sequence[str] = ()
) -> Dataset:
    """Reads splits of a prepared data set.

    Args:
        made: its builder.
        splits: the splits to read.
        name: what the data set is called; empty: the builder's name.
        on_disk: those of `splits` whose images are not read yet: `stream.Records`.

    Raises:
        UserError: an unknown split, or records that changed on disk.
    """
    name = name or made.name
    unknown = [split for split in splits if split not in made.info.splits]
    if unknown:
        raise UserError(f"{name} has no split {unknown[0]!r}: it has {', '.join(made.info.splits)}")
    try:
        return Dataset(
            name=name,
            class_names=tuple(made.info.features["label"].names),
            splits={
                split: _on_disk(made, split) if split in on_disk else _read(made, split)
                for split in splits
            },
            digest=made.info.metadata["digest"],
        )
    except (OSError, RuntimeError, ValueError, KeyError) as error:  # ArrayRecord, TFDS, NumPy
        raise unreadable(made.data_path, error) from error


def _on_disk(made: ArrayBuilder, name: str) -> Split:
    """One split of which only labels and rows are read."""
    paths = [str(path) for path in made.info.splits[name].filepaths]
    records = Records(paths, made.info.features["image"].shape)
    return Split(records, records.labels, records.rows)


def _read(made: ArrayBuilder, name: str) -> Split:
    """Reads one split and compares it with the digest that was recorded at preparation."""
    # Parsing the records here takes half the time of TFDS's own deserialisation.
    source = made.as_data_source(name, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
    shape = made.info.features["image"].shape
    flag = cv2.IMREAD_GRAYSCALE if shape[-1] == 1 else cv2.IMREAD_COLOR_RGB
    count = len(source)
    images = np.empty((count, *shape), np.uint8)
    labels = np.empty(count, np.int32)
    rows = np.empty(count, np.int32)

    def read_chunk(start: int) -> None:
        places = range(start, min(start + _CHUNK, count))
        for place, record in zip(places, source.__getitems__(places), strict=True):
            feature = tf_example_pb2.Example.FromString(record).features.feature
            encoded = np.frombuffer(feature["image"].bytes_list.value[0], np.uint8)
            images[place] = np.asarray(cv2.imdecode(encoded, flag)).reshape(shape)
            labels[place] = feature["label"].int64_list.value[0]
            rows[place] = feature["row"].int64_list.value[0]

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # OpenCV decodes without Python's lock
        list(pool.map(read_chunk, range(0, count, _CHUNK)))
    order = np.argsort(rows, kind="stable")
    if not np.array_equal(order, np.arange(count)):
        images, labels, rows = images[order], labels[order], rows[order]
    if split_digest(rows, labels, images) != made.info.metadata["split_digests"][name]:
        raise ValueError(f"{name} decodes to other images than at preparation")
    return Split(images, labels, rows)
