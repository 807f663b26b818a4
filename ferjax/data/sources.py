"""The forms FER2013 comes in, read and checked one image at a time.

Two kinds: `jpeg`, the tree `train/<class>/<row>.jpg`, `validation/<class>/<row>.jpg` in a folder or
a zip (a zip is never unpacked), and `csv`, Kaggle's `fer2013.csv` or `icml_face_data.csv`. In the
tree the file's name is the official row and the two top folders mean nothing. Every error names the
file, and the line or row, and says how to mend it.
"""

import abc
import csv
import os
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from ferjax.config import UserError
from ferjax.data.builder import EMOTIONS, SIDE, Face, encode_png

ROWS = 35887
# Kaggle's name of each split, and the first row after it.
USAGES = (("Training", 28709), ("PublicTest", 32298), ("PrivateTest", 35887))
# How a source is given, for messages.
GIVE = "--config.data.source= (in ferjax.data.prepare: --data.source=) or FER2013_SOURCE"

_MEMBER = re.compile(r"(.*/)?(?:train|validation)/([^/]+)/([^/]+)\.jpe?g", re.IGNORECASE)
_LAYOUT = "train/<class>/<row>.jpg and validation/<class>/<row>.jpg"
_LEVELS = {str(level): level for level in range(256)}
_MOST_BYTES = 2**16  # of one image's file; the largest has 2,483
_WRAPPERS = 2  # folders around train/ and validation/ that are looked through


def kind(source: str) -> str:
    """`jpeg` or `csv`: what `source` is, judged by its first bytes or its name.

    Raises:
        UserError: it does not exist, cannot be read, or is neither.
    """
    path = Path(os.path.expanduser(source))
    try:
        if path.is_dir():
            return "jpeg"
        with path.open("rb") as file:
            start = file.read(512)
    except FileNotFoundError:
        raise UserError(
            f"{source} does not exist: give a folder or zip with {_LAYOUT}, fer2013.csv or "
            f"icml_face_data.csv with {GIVE}"
        ) from None
    except OSError as error:
        raise UserError(f"cannot read {source}: {error.strerror or error}") from error
    if start.startswith(b"PK") or path.suffix.lower() == ".zip":
        return "jpeg"
    if path.suffix.lower() == ".csv" or b"emotion" in start.split(b"\n")[0]:
        return "csv"
    raise UserError(
        f"{source} is neither a folder, nor a zip, nor a CSV: give a folder or zip with {_LAYOUT}, "
        "fer2013.csv or icml_face_data.csv"
    )


def read(source: str, label: str = "") -> list[Face]:
    """All faces of a source, in row order, each one checked.

    Args:
        source: a path of one of the forms above.
        label: what messages call it, where that is not the path.

    Raises:
        UserError: anything about it is wrong; nothing has been written.
    """
    label = label or source
    path = Path(os.path.expanduser(source))
    try:
        faces = _read_csv(path, label) if kind(source) == "csv" else _read_tree(path, label)
    except OSError as error:
        where = f"{label}: {error.filename}" if error.filename else label
        raise UserError(f"cannot read {where}: {error.strerror or error}") from error
    missing = sorted(set(range(ROWS)).difference(face.row for face in faces))
    if missing:
        more = f" ({len(missing):,} rows are missing in all)" if len(missing) > 1 else ""
        raise UserError(
            f"{label}: row {missing[0]} is missing{more}: FER2013 has rows 0 to {ROWS - 1}; "
            "get a complete copy"
        )
    return faces


def _progress(label: str) -> "tqdm[None]":
    return tqdm(total=ROWS, desc=f"reading {PurePosixPath(label).name}", unit="img", disable=None)


# --- the tree of JPEGs ---------------------------------------------------------------------------


class _Tree(abc.ABC):
    """Files by name, relative to a source's top, with `/` between folders."""

    @abc.abstractmethod
    def names(self) -> list[str]:
        """The names of all files that may be images."""

    @abc.abstractmethod
    def read(self, name: str) -> bytes:
        """A file's content."""


class _Folder(_Tree):
    def __init__(self, path: Path) -> None:
        self._path = path

    def names(self) -> list[str]:
        found: list[str] = []
        tops = [self._path]
        for _ in range(_WRAPPERS + 1):
            found += [
                file.relative_to(self._path).as_posix()
                for top in tops
                for part in ("train", "validation")
                for file in top.glob(f"{part}/*/*")
            ]
            if found:
                break
            tops = [inner for top in tops for inner in top.iterdir() if inner.is_dir()]
        return found

    def read(self, name: str) -> bytes:
        with (self._path / name).open("rb") as file:
            return file.read(_MOST_BYTES + 1)


class _Zip(_Tree):
    def __init__(self, path: Path, label: str) -> None:
        self._label = label
        try:
            self._zip = zipfile.ZipFile(path)
        # NotImplementedError: made for a later version of zip; UnicodeDecodeError: a name's bytes.
        except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError) as error:
            raise UserError(
                f"{label} is a broken zip ({error}): download or pack it again"
            ) from None

    def names(self) -> list[str]:
        for member in self._zip.infolist():
            # orig_filename: before zipfile makes a name harmless.
            parts = re.split(r"[/\\]", member.orig_filename)
            if parts[0] == "" or ":" in parts[0] or ".." in parts or "\0" in member.orig_filename:
                raise UserError(
                    f"{self._label}: member {member.orig_filename!r} points outside the zip: "
                    "this is not a plain copy of the data set; pack it again"
                )
        return [member.filename for member in self._zip.infolist() if not member.is_dir()]

    def read(self, name: str) -> bytes:
        try:
            with self._zip.open(name) as file:
                return file.read(_MOST_BYTES + 1)
        # RuntimeError: encrypted; NotImplementedError: a compression unknown to zipfile.
        except (
            zipfile.BadZipFile,
            zlib.error,
            EOFError,
            RuntimeError,
            NotImplementedError,
        ) as error:
            reason = str(error) or "it ends early"
            raise UserError(
                f"{self._label}: cannot read member {name} ({reason}): "
                "download or pack the zip again"
            ) from error


def _read_tree(path: Path, label: str) -> list[Face]:
    tree = _Folder(path) if path.is_dir() else _Zip(path, label)
    files: dict[int, tuple[str, int]] = {}
    wrappers: set[str] = set()
    for name in tree.names():
        match = _MEMBER.fullmatch(name)
        if not match or PurePosixPath(name).name.startswith(".") or "__MACOSX" in name:
            continue
        wrapper, folder, stem = match.groups()
        wrappers.add(wrapper or "")
        if folder not in EMOTIONS:
            raise UserError(
                f"{label}: {name} lies in the class folder {folder!r}: it must be one of "
                + ", ".join(EMOTIONS)
            )
        digits = stem.isascii() and stem.isdigit() and len(stem) < 10
        if not (digits and int(stem) < ROWS):
            raise UserError(
                f"{label}: {name} is not named by its official row: "
                f"expected <row>.jpg with a row from 0 to {ROWS - 1}"
            )
        row = int(stem)
        if row in files:
            raise UserError(
                f"{label}: row {row} is there twice, as {files[row][0]} and {name}: "
                "remove the wrong one"
            )
        files[row] = (name, EMOTIONS.index(folder))
    if not files:
        raise UserError(
            f"{label} holds no {_LAYOUT}: give the folder (or zip) above train/, "
            "or the path of fer2013.csv or icml_face_data.csv itself"
        )
    if len(wrappers) > 1:
        first, second, *_ = sorted(wrappers)
        raise UserError(
            f"{label} holds the data in {first or './'} and again in {second}: give one of them"
        )
    faces = []
    with _progress(label) as bar:
        for row, (name, emotion) in sorted(files.items()):
            encoded = tree.read(name)
            faces.append(Face(row, emotion, encoded, _decode_jpeg(encoded, f"{label}: {name}")))
            bar.update()
    return faces


def _decode_jpeg(encoded: bytes, where: str) -> np.ndarray:
    """A JPEG as uint8 [48, 48]; a cut one is refused, which OpenCV would fill with grey."""
    if len(encoded) > _MOST_BYTES:
        raise UserError(f"{where} has more than {_MOST_BYTES:,} bytes: get a fresh copy")
    if not encoded.startswith(b"\xff\xd8"):
        raise UserError(f"{where} is not a JPEG file: get a fresh copy")
    if not encoded.endswith(b"\xff\xd9"):
        raise UserError(f"{where} is cut off ({len(encoded)} bytes): get a fresh copy")
    try:
        pixels = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        pixels = None
    if pixels is None:
        raise UserError(f"{where} is a damaged JPEG file: get a fresh copy")
    if pixels.shape != (SIDE, SIDE):
        height, width, *channels = pixels.shape
        color = ", in colour" if channels else ""
        raise UserError(
            f"{where} is {width}x{height}{color}, not a grey {SIDE}x{SIDE} image: "
            "use the original files"
        )
    return pixels


# --- Kaggle's CSV --------------------------------------------------------------------------------


def _read_csv(path: Path, label: str) -> list[Face]:
    with path.open(newline="", encoding="utf-8-sig") as file, _progress(label) as bar:
        faces = []
        lines = csv.reader(file)
        try:
            for face in _csv_faces(lines, label):
                faces.append(face)
                bar.update()
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(
                f"{label}: after line {lines.line_num} it is not CSV text ({error}): "
                "get a fresh copy"
            ) from error
    return faces


def _csv_faces(lines: Any, label: str) -> Iterator[Face]:
    header = [cell.strip() for cell in next(lines, [])]
    for column in ("emotion", "pixels", "Usage"):
        if column not in header:
            raise UserError(
                f"{label}: no column {column!r} in its header ({', '.join(header)[:80]}): "
                "expected emotion,pixels,Usage"
            )
    columns = [header.index(name) for name in ("emotion", "pixels", "Usage")]
    row = -1
    for cells in lines:
        if not cells:  # an empty line
            continue
        row += 1
        where = f"{label}: line {lines.line_num} (row {row})"
        if row >= ROWS:
            raise UserError(f"{where}: more than {ROWS:,} rows: remove those added")
        if len(cells) != len(header):
            raise UserError(
                f"{where} has {len(cells)} columns where the header has {len(header)}: "
                "get a fresh copy"
            )
        emotion, pixels, usage = (cells[column].strip() for column in columns)
        if emotion not in ("0", "1", "2", "3", "4", "5", "6"):
            raise UserError(f"{where}, column emotion: {emotion[:20]!r} is not a label from 0 to 6")
        _check_usage(usage, row, where)
        image = _parse_pixels(pixels, where)
        yield Face(row, int(emotion), encode_png(image), image)


def _check_usage(usage: str, row: int, where: str) -> None:
    names = [name for name, _ in USAGES]
    if usage not in names:
        raise UserError(f"{where}, column Usage: {usage[:20]!r} is not one of {', '.join(names)}")
    expected = next(name for name, end in USAGES if row < end)
    if usage != expected:
        raise UserError(
            f"{where}, column Usage: {usage} where the official order has {expected}: rows were "
            "reordered, added or removed; use the original file"
        )


def _parse_pixels(text: str, where: str) -> np.ndarray:
    """Space-separated grey levels as uint8 [48, 48]."""
    tokens = text.split()
    try:
        levels = bytes(map(_LEVELS.__getitem__, tokens))
    except KeyError as error:
        bad = error.args[0]
        raise UserError(
            f"{where}, column pixels: value {tokens.index(bad) + 1} is {bad[:20]!r}, "
            "not a whole number from 0 to 255"
        ) from None
    if len(levels) != SIDE * SIDE:
        raise UserError(
            f"{where}, column pixels: {len(levels):,} values where {SIDE}x{SIDE} = "
            f"{SIDE * SIDE:,} belong"
        )
    return np.frombuffer(levels, np.uint8).reshape(SIDE, SIDE)
