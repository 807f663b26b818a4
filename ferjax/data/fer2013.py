"""`fer2013`: the 35,887 grey 48x48 faces of the 2013 facial expression challenge.

The splits are the official ones, by row: `train` 0-28708, `public_test` 28709-32297, `private_test`
32298-35886. There are two configs, for the pixels of the two published forms differ by about one
grey level: `jpeg` (the default; the archive on GitHub, its files stored as they are) and `csv`
(Kaggle's file, stored as PNG). Everything is read and checked before anything is written.
"""

import hashlib
import http.client
import logging
import os
import shutil
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from ferjax.config import UnreachableError, UserError
from ferjax.data import sources
from ferjax.data.builder import EMOTIONS, SIDE, ArrayBuilder, Face, data_folder

log = logging.getLogger("ferjax")

URL = (
    "https://github.com/parth1620/Facial-Expression-Dataset/archive/"
    "361800d03c23a238508886b6cbd03888c07f330b.zip"
)
# sha256 over the bytes of all JPEG files in row order. GitHub may pack its zip differently one day:
# the content is what counts.
JPEG_SHA256 = "543dcca18f0543f822234bc6712482d8fc20037123fe7199645b063ff84c2ff4"
# Images of each class, in the order of EMOTIONS; the splits lie one after the other in row order.
CLASS_TABLE = {
    "train": (3995, 436, 4097, 7215, 4830, 3171, 4965),
    "public_test": (467, 56, 496, 895, 653, 415, 607),
    "private_test": (491, 55, 528, 879, 594, 416, 626),
}
_BUSY = (408, 425, 429)  # statuses of a server that wants to be asked again
_TIMEOUT = 60.0  # seconds without a byte
_INSTEAD = f"a copy (folder, zip, fer2013.csv or icml_face_data.csv) with {sources.GIVE}"

_DESCRIPTION = """\
FER2013: faces found by web search for emotion keywords, cropped by a face detector to 48x48 grey
pixels and labelled with one of seven emotions. Labels are noisy: people reach about 65 %. About 8 %
of each test split has an exact copy in train."""
_CITATION = """\
@inproceedings{goodfellow2013challenges,
  title={Challenges in Representation Learning: A Report on Three Machine Learning Contests},
  author={Goodfellow, Ian J. and Erhan, Dumitru and Carrier, Pierre Luc and Courville, Aaron and
    Mirza, Mehdi and Hamner, Ben and others},
  booktitle={International Conference on Neural Information Processing (ICONIP)},
  year={2013}
}"""
_LICENSE = "Kaggle's competition terms: research and education; the images belong to their owners."


class Fer2013(ArrayBuilder):
    """TFDS builder `fer2013`, with the configs `jpeg` and `csv`."""

    RELEASE_NOTES = {"1.0.0": "First version."}  # noqa: RUF012 (TFDS's own attribute)
    BUILDER_CONFIGS = [  # noqa: RUF012
        tfds.core.BuilderConfig(name="jpeg", description="The JPEG files on GitHub."),
        tfds.core.BuilderConfig(name="csv", description="fer2013.csv or icml_face_data.csv."),
    ]

    def __init__(
        self, *, source: str = "", url: str = "", config: Any = None, **kwargs: Any
    ) -> None:
        """Chooses the config by the source; nothing is read yet.

        Args:
            source: a folder, zip or CSV (see `sources.py`); empty: `FER2013_SOURCE`; if that is
                not set either, the archive is downloaded when the set has to be prepared.
            url: where to download instead of `URL`; empty: `FER2013_URL`, else `URL`.
            config: `jpeg` or `csv`; None: that of the source; without a source the one that is
                prepared, `jpeg` first.
            **kwargs: `data_dir` and what else TFDS takes.

        Raises:
            UserError: the source does not exist, or is of another kind than the config.
        """
        source = os.fspath(source) if source else ""
        self._source = source or os.environ.get("FER2013_SOURCE", "")
        self._url = url or os.environ.get("FER2013_URL", "") or URL
        kind = sources.kind(self._source) if self._source else ""
        config = config or kind or self._prepared_config(kwargs.get("data_dir"))
        super().__init__(config=config, **kwargs)
        if kind and kind != self.builder_config.name:
            raise UserError(
                f"{self._source} is a {kind} source, but fer2013/{self.builder_config.name} was "
                f"asked for: ask for fer2013/{kind}, or give another source"
            )

    @classmethod
    def _prepared_config(cls, data_dir: str | os.PathLike[str] | None) -> str:
        """The first config that lies prepared in the data directory, else the default."""
        names = [config.name for config in cls.BUILDER_CONFIGS]
        folder = data_folder(data_dir) / cls.name
        prepared = [name for name in names if os.path.exists(folder / name / str(cls.VERSION))]
        return (prepared or names)[0]

    def _info(self) -> tfds.core.DatasetInfo:
        return self._array_info(
            _DESCRIPTION,
            EMOTIONS,
            (SIDE, SIDE, 1),
            "jpeg" if self.builder_config.name == "jpeg" else "png",
            homepage="https://www.kaggle.com/c/challenges-in-representation-learning-facial-"
            "expression-recognition-challenge",
            citation=_CITATION,
            license=_LICENSE,
        )

    def collect(self) -> dict[str, list[Face]]:
        """Reads the source, or downloads it, and checks it against the published facts."""
        if self._source:
            log.info("reading FER2013 from %s", self._source)
            return self._checked(sources.read(self._source), self._source)
        if self.builder_config.name == "csv":
            raise UserError(f"fer2013/csv cannot be downloaded: give the file with {sources.GIVE}")
        with tempfile.TemporaryDirectory(prefix="ferjax-") as folder:
            path = Path(folder) / "fer2013.zip"
            log.info("downloading FER2013 from %s", self._url)
            download(self._url, path, _INSTEAD, "FER2013")
            return self._checked(sources.read(os.fspath(path), self._url), self._url)

    def _checked(self, faces: list[Face], where: str) -> dict[str, list[Face]]:
        """Splits faces by row, after comparing class counts and (JPEG) the files' digest."""
        splits, start = {}, 0
        for name, expected in CLASS_TABLE.items():
            end = start + sum(expected)
            splits[name] = faces[start:end]
            start = end
            counts = np.bincount([face.label for face in splits[name]], minlength=len(EMOTIONS))
            for emotion, count, wanted in zip(EMOTIONS, counts.tolist(), expected, strict=True):
                if count != wanted:
                    raise UserError(
                        f"{where}: {name} has {count:,} images of class {emotion} where FER2013 "
                        f"has {wanted:,}: labels were changed; get the original"
                    )
        if self.builder_config.name == "jpeg":
            digest = hashlib.sha256()
            for face in faces:
                digest.update(face.encoded)
            if digest.hexdigest() != JPEG_SHA256:
                raise UserError(
                    f"{where}: the images are not the published files (sha256 in row order "
                    f"{digest.hexdigest()[:12]}..., expected {JPEG_SHA256[:12]}...): some were "
                    "changed or saved again; get the original"
                )
        return splits


Builder = Fer2013


def download(url: str, path: Path, instead: str, title: str) -> None:
    """Fetches `url` into the file `path`, showing progress.

    Args:
        url: what to fetch.
        path: where to.
        instead: what else can be given, for the error's line.
        title: what it is, for the progress bar.

    Raises:
        UserError: there is nothing at `url`, or it is none.
        UnreachableError: it cannot be fetched whole.
    """
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as reply, path.open("wb") as file:
            size = int(reply.headers.get("Content-Length") or 0)
            received = _copy(reply, file, size, f"downloading {title}")
        if size and received != size:
            raise OSError(f"the connection ended after {received:,} of {size:,} bytes")
    except (OSError, http.client.HTTPException, ValueError) as error:
        # An HTTPError shows its number only as a whole; a URLError wraps what happened.
        wrapped = getattr(error, "reason", error)
        reason = error if isinstance(error, urllib.error.HTTPError) else wrapped
        code = error.code if isinstance(error, urllib.error.HTTPError) else 0
        missing = 400 <= code < 500 and code not in _BUSY
        wrong = missing or "unknown url type" in str(reason)
        raise (UserError if wrong else UnreachableError)(
            f"cannot download {url} ({reason}): give {instead}"
        ) from error


def _copy(reply: BinaryIO, file: BinaryIO, size: int, title: str) -> int:
    """Copies until the end; returns the number of bytes."""
    settings = {"unit": "B", "unit_scale": True, "desc": title, "disable": None}
    with tqdm.wrapattr(file, "write", total=size or None, **settings) as target:
        shutil.copyfileobj(reply, target, 1 << 18)
    return file.tell()
