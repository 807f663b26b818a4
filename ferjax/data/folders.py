"""Which picture is of which split and class, in a user's folder or CSV; no picture is opened.

A folder holds `train/<class>/`, and if there are any `validation/<class>/`, `test/<class>/` and
`unlabeled/`; below these, pictures may lie at any depth. A CSV has the columns `path,label` and, if
wanted, `split`. Its paths start from the CSV's own folder or are absolute, and may lead anywhere:
the file is the user's own, and so are the pictures that it names. Nothing is written beside them.
"""

import csv
import errno
import hashlib
import os
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ferjax.config import UserError
from ferjax.data.pictures import SUFFIXES

SPLITS = {  # a folder's name, or a word in a CSV's column split -> the split's name in ferjax
    "train": "train",
    "validation": "public_test",
    "test": "private_test",
    "unlabeled": "unlabeled",
}
UNKNOWN = -1  # the label of a picture without one; TFDS's ClassLabel takes it, too
_MEANT = {
    **{"training": "train", "testing": "test", "unlabelled": "unlabeled"},
    **dict.fromkeys(("val", "valid", "dev", "eval", "public_test"), "validation"),
    "private_test": "test",
}
_LAYOUT = "train/<class>/, and if there are any validation/<class>/, test/<class>/, unlabeled/"


class Picture(NamedTuple):
    """A file that should be a picture.

    Attributes:
      path: to open it.
      name: what messages call it: relative to the folder, or as the CSV writes it.
      split: `train`, `public_test`, `private_test` or `unlabeled`.
      label: index into the class names, `UNKNOWN` in `unlabeled`.
    """

    path: str
    name: str
    split: str
    label: int


@dataclass(frozen=True)
class Listing:
    """A user's pictures.

    Attributes:
      class_names: sorted.
      pictures: by split, in the order of `SPLITS`, then by name.
      skipped: files and folders that are none of them -> why.
      key: 12 hex digits over names, classes, sizes and times of change; what is prepared from the
        pictures is kept under it.
    """

    class_names: tuple[str, ...]
    pictures: tuple[Picture, ...]
    skipped: dict[str, str]
    key: str


@dataclass
class _Found:
    """What is known while a source is read: pictures as (path, name, split, class or "", stat)."""

    source: str
    pictures: list[tuple[str, str, str, str, str]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def add(self, path: str, name: str, split: str, of_class: str) -> None:
        try:
            info = os.stat(path)
            mark = f"{info.st_size} {info.st_mtime_ns}"
        except OSError:
            mark = "missing"  # reading it will say why
        self.pictures.append((path, name, split, of_class, mark))


def read(source: str, unlabeled: bool = False) -> Listing:
    """Lists a folder or a CSV.

    Args:
      source: its path.
      unlabeled: take every picture in it, at any depth, as one without label.

    Raises:
      UserError: it can't be read, or classes and splits don't fit together.
    """
    path = Path(os.path.expanduser(source))
    found = _Found(source)
    try:
        if path.is_dir():
            _read_folder(path, found, unlabeled)
        elif path.suffix.lower() == ".csv":
            _read_csv(path, found, unlabeled)
        else:
            what = "is no folder and no .csv" if path.exists() else "does not exist"
            raise UserError(f"{source} {what}: give a folder with {_LAYOUT}, or a CSV path,label")
    except OSError as error:
        raise UserError(f"{error.filename or source}: {error.strerror or error}") from None
    return _listing(found, unlabeled)


def _listing(found: _Found, unlabeled: bool) -> Listing:
    names = _class_names(found, unlabeled)
    order = {split: place for place, split in enumerate(SPLITS.values())}
    ordered = sorted(found.pictures, key=lambda p: (order[p[2]], os.fsencode(p[1])))
    if unlabeled and not ordered:
        raise UserError(f"{found.source} holds no picture ({', '.join(sorted(SUFFIXES))})")
    digest = hashlib.sha256()
    for _, name, split, of_class, mark in ordered:
        digest.update(os.fsencode("\0".join((name, split, of_class, mark)) + "\n"))
    labels = {"": UNKNOWN, **{name: place for place, name in enumerate(names)}}
    pictures = tuple(Picture(p, n, split, labels[c]) for p, n, split, c, _ in ordered)
    return Listing(names, pictures, found.skipped, digest.hexdigest()[:12])


def _class_names(found: _Found, unlabeled: bool) -> tuple[str, ...]:
    """The classes of train, sorted, after comparing those of all splits."""
    if unlabeled:
        return ("unknown",)  # TFDS wants one
    source = found.source
    of_train = {of_class for _, _, split, of_class, _ in found.pictures if split == "train"}
    every = {of_class for _, _, _, of_class, _ in found.pictures} - {""}
    by_folded: dict[str, str] = {}
    for name in sorted(every):
        if name != name.strip() or not name.isprintable():
            what = "blanks around it" if name.isprintable() else "characters that can't be printed"
            raise UserError(f"{source}: the class name {name!r} has {what}: rename it")
        other = by_folded.setdefault(name.casefold(), name)
        if other != name:
            raise UserError(
                f"{source}: the classes {other} and {name} differ only in case: is it one class? "
                "Rename one of them"
            )
    if strange := sorted(every - of_train):
        raise UserError(
            f"{source}: class {strange[0]} has no picture in train (there are "
            f"{', '.join(sorted(of_train)) or 'none'}): add some, or remove it elsewhere"
        )
    if len(of_train) < 2:
        raise UserError(
            f"{source}: train has pictures of {len(of_train)} class{'es' * (not of_train)}: "
            "at least two are needed"
        )
    return tuple(sorted(of_train))


def _read_folder(top: Path, found: _Found, unlabeled: bool) -> None:
    if unlabeled:
        for path, name in _files(top, "", found.skipped):
            found.add(path, name, "unlabeled", "")
        return
    folders = {e.name: e.path for e in os.scandir(top) if _is_folder(e) and not _hidden(e.name)}
    for name in sorted(set(folders) - set(SPLITS)):
        meant = name.casefold() if name.casefold() in SPLITS else _MEANT.get(name.casefold())
        if meant:
            raise UserError(f"{top / name}: rename it to {meant}, or move it elsewhere")
        found.skipped[f"{name}/"] = "none of the folders train, validation, test, unlabeled"
    if "train" not in folders:
        deeper = next(
            (n for n, path in sorted(folders.items()) if (Path(path) / "train").is_dir()), ""
        )
        hint = f"give {top / deeper}" if deeper else f"put the pictures into {_LAYOUT}"
        raise UserError(f"{top} has no folder train: {hint}")
    for folder in sorted(set(SPLITS) & set(folders)):
        if folder == "unlabeled":
            for path, name in _files(Path(folders[folder]), folder, found.skipped):
                found.add(path, name, "unlabeled", "")
        else:
            _read_classes(Path(folders[folder]), folder, found)


def _read_classes(top: Path, folder: str, found: _Found) -> None:
    """The class folders of one split."""
    seen: dict[str, str] = {}
    above = frozenset(map(_identity, (top, top.parent)))
    for entry in sorted(os.scandir(top), key=lambda e: os.fsencode(e.name)):
        if _hidden(entry.name):
            continue
        if not _is_folder(entry):
            found.skipped[f"{folder}/{entry.name}"] = "not in the folder of a class"
            continue
        # File systems write é in one of two ways; it is one class all the same.
        of_class = unicodedata.normalize("NFC", entry.name)
        other = seen.setdefault(of_class.casefold(), entry.name)
        if other != entry.name:
            raise UserError(
                f"{top}: the classes {other} and {entry.name} differ only in case (or in how "
                "letters are encoded): is it one class? Rename one of them"
            )
        before = len(found.pictures)
        below = f"{folder}/{entry.name}"
        for path, name in _files(Path(entry.path), below, found.skipped, above):
            found.add(path, name, SPLITS[folder], of_class)
        if len(found.pictures) == before and folder == "train":
            raise UserError(
                f"{entry.path} holds no picture ({', '.join(sorted(SUFFIXES))}): add some, or "
                "remove the folder"
            )


def _files(
    folder: Path,
    name: str,
    skipped: dict[str, str],
    above: frozenset[tuple[int, int]] = frozenset(),
) -> Iterator[tuple[str, str]]:
    """(path, name) of the picture files in a folder and below; links are followed, but no loop."""
    here = _identity(folder)
    if here in above:
        skipped[f"{name}/"] = "a link to a folder that it lies in"
        return
    for entry in sorted(os.scandir(folder), key=lambda e: os.fsencode(e.name)):
        below = f"{name}/{entry.name}" if name else entry.name
        if _hidden(entry.name):
            continue
        if _is_folder(entry):
            yield from _files(Path(entry.path), below, skipped, above | {here})
        elif os.path.splitext(entry.name)[1].lower() not in SUFFIXES:
            skipped[below] = "not named like a picture"
        elif entry.is_symlink() or entry.is_file():  # a link that leads nowhere counts as broken
            yield entry.path, below
        else:
            skipped[below] = "not a file"


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """False, too, for a link that leads to itself."""
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return False


def _identity(folder: Path) -> tuple[int, int]:
    info = folder.stat()
    return info.st_dev, info.st_ino


def _hidden(name: str) -> bool:
    return name.startswith(".") or name in ("Thumbs.db", "desktop.ini", "__MACOSX")


def _read_csv(path: Path, found: _Found, unlabeled: bool) -> None:
    words = {**SPLITS, **{split: split for split in SPLITS.values()}}
    lines: dict[str, int] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True, restval="")
            header = [name.strip() for name in reader.fieldnames or []]
            reader.fieldnames = header
            for column in ["path"] if unlabeled else ["path", "label"]:
                if column not in header:
                    raise UserError(
                        f"{path}: no column {column!r} in its header ({', '.join(header)[:80]}): "
                        "expected path,label and, if wanted, split"
                    )
            for cells in reader:
                where = f"{path}: line {reader.line_num}"
                name = cells["path"].strip()
                of_class = unicodedata.normalize("NFC", cells.get("label", "").strip())
                word = cells.get("split", "").strip() or ("train" if of_class else "unlabeled")
                if not name or "\0" in name:
                    raise UserError(f"{where}: the path is empty, or not one")
                if name in lines:
                    raise UserError(f"{where}: {name} is on line {lines[name]} already")
                lines[name] = reader.line_num
                split = "unlabeled" if unlabeled else words.get(word)
                if split is None:
                    raise UserError(f"{where}: split {word!r} is none of {', '.join(SPLITS)}")
                if split == "unlabeled":
                    of_class = ""
                elif not of_class:
                    raise UserError(f"{where}: {name} is in split {word} and has no label")
                found.add(str(path.parent / name), name, split, of_class)
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not CSV text in UTF-8 ({error})") from None
