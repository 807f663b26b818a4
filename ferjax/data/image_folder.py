"""`image_folder`: the user's own faces, from a folder or a CSV (see `folders.py`).

The splits are `train`; `public_test`, on which every choice is made, from `validation/`, or 10 % of
each class of train if there is none; `private_test` from `test/`; and `unlabeled`, whose labels are
-1. The form of the prepared pictures is the config's name, `image_folder/96_rgb_detect`:

    48        the side in pixels (default 48)
    grey rgb  the channels (default grey)
    detect    cut out the largest face that is found; where none is found the whole picture is taken
    unlabeled all pictures of the source, at any depth, without label: one split `unlabeled`

A picture is brought to this form by `faces.fit`, as the predictor does it: its middle square,
resized. What can't be read is left out and listed in `skipped.json` beside the prepared data; more
than 1 % is an error. The prepared data lies under a name that ends in a key of the files' names,
sizes and times of change, so that a folder that has changed is prepared anew.
"""

import contextlib
import itertools
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from ferjax.config import UserError, write_json
from ferjax.data import folders, spool
from ferjax.data.builder import SIDE, ArrayBuilder, Face, data_folder

log = logging.getLogger("ferjax")

BROKEN_SHARE = 0.01  # of all pictures; more is an error
HELD_OUT_SHARE = 0.1  # of each class, where there is no validation/
SKIPPED = "skipped.json"
_SHOWN = 20  # broken pictures that the log names
_GIVE = (
    "--config.data.source=DIR with train/<class>/ (in ferjax.data.prepare: "
    "--dataset=image_folder:DIR)"
)


@dataclass(eq=False)
class FolderConfig(tfds.core.BuilderConfig):
    """The form of the prepared pictures; `key` is that of the source, "" as long as unknown.

    `source` serves `tfds build --config='{"name": "x", "source": "DIR"}'`, which has no other way.
    """

    size: int = SIDE
    channels: int = 1
    detect: bool = False
    unlabeled: bool = False
    key: str = ""
    source: str = ""

    @property
    def form(self) -> str:
        """The name without the key."""
        words = [str(self.size), "grey" if self.channels == 1 else "rgb"]
        words += ["detect"] * self.detect + ["unlabeled"] * self.unlabeled
        return "_".join(words)


def parse(name: str) -> FolderConfig:
    """The config that a name such as `96_rgb`, `detect` or `48_grey-0123456789ab` stands for.

    Raises:
      UserError: it has another word in it, or a size that is not from 8 to 1024.
    """
    text, key = name, ""
    if match := re.fullmatch(r"(.*)-([0-9a-f]{12})", name):
        text, key = match.groups()
    values: dict[str, Any] = {}
    for word in text.split("_") if text else []:
        if word.isascii() and word.isdigit() and 8 <= int(word) <= 1024:
            values["size"] = int(word)
        elif word in ("grey", "rgb"):
            values["channels"] = 1 if word == "grey" else 3
        elif word in ("detect", "unlabeled"):
            values[word] = True
        else:
            raise UserError(
                f"image_folder/{name}: {word!r} is no size from 8 to 1024 and none of grey, rgb, "
                "detect, unlabeled"
            )
    return FolderConfig(name=name, key=key, **values)


class ImageFolder(ArrayBuilder):
    """TFDS builder `image_folder`."""

    VERSION = tfds.core.Version("1.0.2")
    RELEASE_NOTES = {  # noqa: RUF012 (TFDS's own attribute)
        "1.0.2": "The pictures set aside are chosen by their files, the same in every form.",
        "1.0.1": "Copies with another label are set aside together.",
        "1.0.0": "First version.",
    }
    # TFDS's tools ask these for their type; any other form can be asked for as well.
    BUILDER_CONFIGS = [FolderConfig(name="48_grey")]  # noqa: RUF012
    builder_config: FolderConfig

    def __init__(
        self,
        *,
        source: str | os.PathLike[str] = "",
        config: str | FolderConfig | None = None,
        data_dir: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Lists the source; no picture is opened yet.

        Args:
          source: a folder or a CSV; empty: the one that is prepared in this form.
          config: see the module's docstring.
          data_dir: TFDS's data directory.
          **kwargs: what else TFDS takes.

        Raises:
          UserError: see `folders.read`; or there is no source, and not one prepared set.
        """
        wanted = parse(config or "") if not isinstance(config, FolderConfig) else config
        self._source = os.fspath(source) or wanted.source
        self._listing: folders.Listing | None = None
        if self._source:
            self._listing = folders.read(self._source, wanted.unlabeled)
            key, self._class_names = self._listing.key, self._listing.class_names
            if wanted.key not in ("", key):
                raise UserError(
                    f"{self._source} is not what image_folder/{wanted.name} was prepared from "
                    f"(its key is {key}): leave the key out"
                )
        else:
            key, self._class_names = _prepared(data_folder(data_dir) / self.name, wanted)
        super().__init__(
            config=FolderConfig(
                name=f"{wanted.form}-{key}",
                description=f"Pictures as {wanted.form}.",
                size=wanted.size,
                channels=wanted.channels,
                detect=wanted.detect,
                unlabeled=wanted.unlabeled,
                key=key,
            ),
            data_dir=data_dir,
            **kwargs,
        )
        self._report: dict[str, Any] = {}

    @classmethod
    def named_config(cls, name: str) -> FolderConfig:
        """See `parse`."""
        return parse(name)

    def _info(self) -> tfds.core.DatasetInfo:
        size = self.builder_config.size
        return self._array_info(
            "The user's own pictures of faces, cut to squares and brought to one size.",
            self._class_names,
            (size, size, self.builder_config.channels),
            "png",
            license="The pictures are the user's own: no licence is known.",
            citation="The pictures are the user's own: there is nothing to cite.",
        )

    def download_and_prepare(self, **kwargs: Any) -> None:
        """See `ArrayBuilder`; a set that was prepared before says again what it left out."""
        known = self.is_prepared()
        super().download_and_prepare(**kwargs)
        path = Path(self.data_path) / SKIPPED
        if known:
            # The list is there to be looked at: a damaged one stops nobody.
            with contextlib.suppress(OSError, ValueError, LookupError):
                if broken := json.loads(path.read_text())["broken"]:
                    log.info("%s pictures can't be read: see %s", f"{len(broken):,}", path)

    def collect(self) -> Mapping[str, Sequence[Face]]:
        """Reads every picture once, into a nameless file beside the data, and sorts out splits."""
        if self._listing is None:
            raise UserError(
                f"image_folder/{self.builder_config.name} is not prepared: give {_GIVE}"
            )
        files, config = self._listing.pictures, self.builder_config
        shape = (config.size, config.size, config.channels)
        read = spool.read(
            files,
            shape,
            detect=config.detect,
            folder=Path(self.data_path).parents[2],
            title=f"reading {Path(self._source).name}",
        )
        self._report = {
            "source": self._source,
            "pictures": len(files),
            "broken": read.broken,
            "skipped": self._listing.skipped,
            "no_face": read.without_face,
        }
        self._tell()
        return self._splits(read, shape)

    def _tell(self) -> None:
        """Logs what was left out.

        Raises:
          UserError: too many pictures can't be read.
        """
        report = self._report
        broken, total = report["broken"], report["pictures"]
        for name, why in itertools.islice(broken.items(), _SHOWN):
            log.warning("left out: %s: %s", name, why)
        if len(broken) > BROKEN_SHARE * total:
            name, why = next(iter(broken.items()))
            raise UserError(
                f"{self._source}: {len(broken):,} of {total:,} pictures can't be read, more than "
                f"{100 * BROKEN_SHARE:g} % (the first: {name}: {why}): mend or remove them"
            )
        place = Path(self.data_path) / SKIPPED
        if broken:
            log.warning("%s of %s pictures left out: see %s", len(broken), f"{total:,}", place)
        if skipped := report["skipped"]:
            name, why = next(iter(skipped.items()))
            count = f"{len(skipped):,}"
            log.info("not used: %s files or folders (%s: %s): see %s", count, name, why, place)
        if without := report["no_face"]:
            log.info(
                "no face found in %s of %s pictures: these are taken whole; see %s",
                *(f"{len(without):,}", f"{total:,}", place),
            )

    def _splits(self, read: spool.Read, shape: spool.Shape) -> Mapping[str, Sequence[Face]]:
        names = np.array([picture.split for picture in read.kept], object)
        labels = np.array([picture.label for picture in read.kept], np.int32)
        train = names == "train"
        if not self.builder_config.unlabeled:
            if not (names == "public_test").any():
                aside = _held_out(np.flatnonzero(train), labels, read)
                names[aside] = "public_test"
                log.info(
                    "no validation/: %s of %s training pictures (%g %% of each class, chosen by "
                    "their content) are set aside as public_test",
                    *(f"{len(aside):,}", f"{train.sum():,}", 100 * HELD_OUT_SHARE),
                )
            missing = set(range(len(self._class_names))) - set(labels[names == "train"].tolist())
            if missing or not (names == "public_test").any():
                what = f"class {self._class_names[min(missing)]}" if missing else "each class"
                raise UserError(f"{self._source}: {what} has too few different pictures: add some")
        splits, start = {}, 0
        for name in folders.SPLITS.values():
            places = np.flatnonzero(names == name)
            if len(places):
                splits[name] = spool.Spooled(read.file, shape, start, places, labels[places])
                start += len(places)
        return splits

    def _digest(self, faces: Any) -> str:
        return faces.digest()

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        # TFDS's folder has its temporary name here: the list appears with the data, or not at all.
        write_json(Path(self.data_path) / SKIPPED, self._report, indent=1)
        return super()._split_generators(dl_manager)


Builder = ImageFolder


def _held_out(train: np.ndarray, labels: np.ndarray, read: spool.Read) -> np.ndarray:
    """Positions of the share of each class whose files' hashes are smallest; copies stay together.

    So the same pictures are held out in every size and colour.
    """
    hashes = read.hashes
    first: dict[bytes, bytes] = {}  # of the files with equal pixels, the smallest hash
    for pixels, of_file in zip(hashes, read.file_hashes, strict=True):
        first[pixels] = min(first.get(pixels, of_file), of_file)
    of_files = [first[pixels] for pixels in hashes]
    chosen: list[int] = []
    for label in np.unique(labels[train]):
        members = [int(i) for i in train if labels[i] == label]
        count = max(1, round(HELD_OUT_SHARE * len(members)))
        last = sorted(of_files[i] for i in members)[count - 1]
        smallest = [i for i in members if of_files[i] <= last]
        chosen += smallest if len(smallest) < len(members) else []
    # Copies with another label go with them: the network would be judged on what it has seen.
    aside = {hashes[i] for i in chosen}
    return np.array([int(i) for i in train if hashes[i] in aside], int)


def _prepared(folder: Path, wanted: FolderConfig) -> tuple[str, tuple[str, ...]]:
    """The key and the classes of the one prepared set of this form.

    Raises:
      UserError: there is none, or more than one.
    """
    pattern = f"{wanted.form}-{wanted.key or '*'}/{ImageFolder.VERSION}/label.labels.txt"
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        there = ", ".join(f"image_folder/{path.parents[1].name}" for path in found[:3])
        what = f"there are several prepared ({there})" if found else "none is prepared"
        raise UserError(f"image_folder/{wanted.form} has no source, and {what}: give {_GIVE}")
    names = tuple(found[0].read_text(encoding="utf-8").split("\n"))
    return found[0].parents[1].name.rpartition("-")[2], tuple(filter(None, names))
