"""FER2013 in miniature: 70 rows with the same structure, in every form it comes in."""

import hashlib
import shutil
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest

from ferjax.data import fer2013, sources

EMOTIONS = ("angry", "disgust", "fear", "happy", "sad", "surprise", "neutral")
SIZES = {"train": 42, "public_test": 14, "private_test": 14}
USAGES = ("Training", "PublicTest", "PrivateTest")


class Miniature:
    """Labels, pixels and JPEG files of 70 rows, and writers of their published forms."""

    def __init__(self) -> None:
        rng = np.random.default_rng(5)
        self.labels = np.concatenate(
            [rng.permutation(np.arange(size) % 7) for size in SIZES.values()]
        )
        self.usages = np.repeat(USAGES, list(SIZES.values()))
        coarse = rng.integers(0, 256, (70, 6, 6), np.uint8)
        self.pixels = np.stack([cv2.resize(image, (48, 48)) for image in coarse])
        self.jpegs = [cv2.imencode(".jpg", image)[1].tobytes() for image in self.pixels]
        # The two top folders do not follow the official splits.
        folders = np.where(rng.random(70) < 0.7, "train", "validation")
        self.names = [
            f"{folder}/{EMOTIONS[label]}/{row}.jpg"
            for row, (folder, label) in enumerate(zip(folders, self.labels, strict=True))
        ]

    def folder(self, path: Path, wrapper: str = "") -> Path:
        for name, jpeg in zip(self.names, self.jpegs, strict=True):
            file = path / wrapper / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(jpeg)
        return path

    def zip(self, path: Path, wrapper: str = "") -> Path:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"{wrapper}README.md", "faces")
            for name, jpeg in zip(self.names, self.jpegs, strict=True):
                archive.writestr(wrapper + name, jpeg)
        return path

    def csv_lines(self) -> list[list[str]]:
        """Cells emotion, pixels, Usage of every row."""
        return [
            [str(label), " ".join(map(str, image.ravel())), str(usage)]
            for label, image, usage in zip(self.labels, self.pixels, self.usages, strict=True)
        ]

    def csv(self, path: Path, *, icml: bool = False) -> Path:
        if icml:
            lines = ["emotion, Usage, pixels"]
            lines += [f"{label},{usage},{pixels}" for label, pixels, usage in self.csv_lines()]
        else:
            lines = ["emotion,pixels,Usage"] + [",".join(cells) for cells in self.csv_lines()]
        path.write_text("\n".join(lines) + "\n")
        return path


@pytest.fixture(scope="session")
def miniature() -> Miniature:
    return Miniature()


@pytest.fixture
def small_fer2013(monkeypatch, miniature):
    """Makes the published facts those of the miniature."""
    ends = np.cumsum(list(SIZES.values())).tolist()
    table = {name: (size // 7,) * 7 for name, size in SIZES.items()}
    monkeypatch.setattr(sources, "ROWS", ends[-1])
    monkeypatch.setattr(sources, "USAGES", tuple(zip(USAGES, ends, strict=True)))
    monkeypatch.setattr(fer2013, "CLASS_TABLE", table)
    digest = hashlib.sha256(b"".join(miniature.jpegs)).hexdigest()
    monkeypatch.setattr(fer2013, "JPEG_SHA256", digest)
    monkeypatch.delenv("FER2013_SOURCE", raising=False)
    monkeypatch.delenv("FER2013_URL", raising=False)
    return miniature


@pytest.fixture(scope="session")
def prepared_tiny(tmp_path_factory):
    """A data directory with `synthetic_faces/tiny`; copy it before changing it."""
    from ferjax.data import arrays

    path = tmp_path_factory.mktemp("tfds")
    arrays.builder("synthetic_faces/tiny", data_dir=str(path)).download_and_prepare()
    return path


@pytest.fixture
def tiny_copy(prepared_tiny, tmp_path):
    return Path(shutil.copytree(prepared_tiny, tmp_path / "copy"))
