"""Pictures brought to one form by threads, and kept in a file until they are written.

So what a set holds is known before any of it is written, and it need not fit in memory.
"""

import collections
import contextlib
import hashlib
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import cv2
import numpy as np
from tqdm import tqdm

from ferjax.config import UserError
from ferjax.data import pictures
from ferjax.data.builder import Face, encode_png, streamed_digest
from ferjax.data.faces import faces, fit, make_cascade
from ferjax.data.folders import Picture

_CHUNK = 16  # pictures that a thread works off at a time
_MOST_THREADS = 16  # what waits for its turn takes memory
_LARGE = 2**25  # pixels; of pictures with more, one is in memory at a time

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Read:
    """What came of some pictures.

    Attributes:
      kept: those that could be read, in their order.
      hashes: sha256 of each one's pixels.
      file_hashes: sha256 of each one's file, the same in whatever form the pixels are wanted.
      file: the pixels, uint8 [len(kept), H, W, C]; it has no name and is gone with this process.
      broken: the others' names -> what is wrong.
      without_face: names of those in which a face was looked for and none found.
    """

    kept: list[Picture]
    hashes: list[bytes]
    file_hashes: list[bytes]
    file: IO[bytes]
    broken: dict[str, str]
    without_face: list[str]


def read(files: Sequence[Picture], shape: Shape, *, detect: bool, folder: Path, title: str) -> Read:
    """Reads pictures with all cores, in bounded memory, with a progress bar.

    Args:
      files: what to read.
      shape: (H, W, C) to bring them to, by `faces.fit`.
      detect: cut out the largest face first.
      folder: has room for the pixels; is made if it is not there.
      title: of the progress bar.

    Raises:
      UserError: the folder can't be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        pixels_file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (handed on)
        done = Read([], [], [], pixels_file, {}, [])
        work = Reader(shape, detect)
        with _silent_opencv(), tqdm(total=len(files), desc=title, unit="img", disable=None) as bar:
            for picture, result in zip(files, in_order(work, files), strict=True):
                bar.update()
                if isinstance(result, str):
                    done.broken[picture.name] = result
                    continue
                pixels, file_hash, found = result
                done.file.write(pixels.data)
                done.file_hashes.append(file_hash)
                done.hashes.append(hashlib.sha256(pixels.data).digest())
                done.kept.append(picture)
                if not found:
                    done.without_face.append(picture.name)
        done.file.flush()
    except OSError as error:
        raise UserError(
            f"cannot write {folder} ({error.strerror or error}): give another folder with "
            "--config.data.data_dir= or TFDS_DATA_DIR"
        ) from None
    return done


@dataclass(frozen=True)
class Spooled(Sequence[Face]):
    """The faces of one split, whose pixels lie in a file."""

    file: IO[bytes]
    shape: Shape
    first: int  # row
    places: np.ndarray  # int [N], in the file, in units of images
    labels: np.ndarray  # int32 [N]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any) -> Any:
        pixels = self._pixels(int(self.places[index]))
        bgr = pixels if self.shape[-1] == 1 else cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
        return Face(self.first + index, int(self.labels[index]), encode_png(bgr), pixels)

    def __iter__(self) -> Iterator[Face]:
        return in_order(self.__getitem__, range(len(self)))

    def digest(self) -> str:
        """See `builder.split_digest`."""
        rows = np.arange(self.first, self.first + len(self))
        images = (self._pixels(int(place)) for place in self.places)
        return streamed_digest((len(self), *self.shape), rows, self.labels, images)

    def _pixels(self, place: int) -> np.ndarray:
        size = int(np.prod(self.shape))
        data = os.pread(self.file.fileno(), size, place * size)
        return np.frombuffer(data, np.uint8).reshape(self.shape)


@dataclass
class Reader:
    """Brings a picture file to the wanted form, in any thread."""

    shape: Shape
    detect: bool
    _local: threading.local = field(default_factory=threading.local)
    _large: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, picture: Picture) -> tuple[np.ndarray, bytes, bool] | str:
        """Pixels, the file's sha256 and whether a face was found, if one was wanted; or why not."""
        content = pictures.read_file(picture.path)
        if isinstance(content, str):
            return content
        if not content:
            return "an empty file"
        # Some versions of OpenCV fill up a JPEG that ends early.
        if content.startswith(b"\xff\xd8") and content.find(b"\xff\xd9", _scan(content)) < 0:
            return "a JPEG that ends early"
        size = pictures.declared_size(content)
        if isinstance(size, str):
            return size
        with self._large if size > _LARGE else contextlib.nullcontext():
            made = self._fitted(content, picture.name)
        if isinstance(made, str):
            return made
        pixels, found = made
        return pixels, hashlib.sha256(content).digest(), found

    def _fitted(self, content: bytes, name: str) -> tuple[np.ndarray, bool] | str:
        whole = pictures.decode(content)
        if isinstance(whole, str):
            return whole
        found = True
        if self.detect:
            if not hasattr(self._local, "cascade"):
                self._local.cascade = make_cascade()
            boxes = faces(whole, self._local.cascade)
            found = bool(boxes)
            if found:
                x, y, w, h = boxes[0]
                whole = whole[y : y + h, x : x + w]
        return fit(whole, self.shape, name), found


def _scan(jpeg: bytes) -> int:
    """Where a JPEG's first scan begins, or where its segments stop being a JPEG's.

    The end mark can't be inside a scan; in what stands before it (a thumbnail) it can, and behind
    its end anything may follow (the film of a phone's "motion photo").
    """
    place = 2
    while place + 4 <= len(jpeg) and jpeg[place] == 0xFF and jpeg[place + 1] != 0xDA:
        length = int.from_bytes(jpeg[place + 2 : place + 4], "big")
        # 0xFF may be repeated before a marker; those from 0xD0 to 0xD7 and 1 have no length.
        marker = jpeg[place + 1]
        if marker == 0xFF:
            place += 1
        else:
            place += 2 if marker == 0x01 or 0xD0 <= marker <= 0xD7 else 2 + length
    return place


def in_order(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """`map(function, items)` by threads that are never more than some chunks ahead."""
    workers = min(os.cpu_count() or 1, _MOST_THREADS)

    def work(start: int) -> list[Any]:
        return [function(items[i]) for i in range(start, min(start + _CHUNK, len(items)))]

    with ThreadPoolExecutor(workers) as pool:
        ahead: collections.deque[Any] = collections.deque()
        try:
            for start in range(0, len(items), _CHUNK):
                ahead.append(pool.submit(work, start))
                if len(ahead) > 2 * workers:
                    yield from ahead.popleft().result()
            while ahead:
                yield from ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


@contextlib.contextmanager
def _silent_opencv() -> Iterator[None]:
    """OpenCV prints what it can't decode; the list says it better."""
    level = cv2.utils.logging.getLogLevel()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        yield
    finally:
        cv2.utils.logging.setLogLevel(level)
