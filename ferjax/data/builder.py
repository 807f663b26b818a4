"""What every ferjax data set shares: its features on disk, its digest, and a safe preparation.

A data set is one module with a subclass of `ArrayBuilder` named `Builder`. The subclass says where
its faces come from (`collect`); this class writes them through TFDS as ArrayRecord, which needs no
TensorFlow as long as images are handed over already encoded.
"""

import abc
import contextlib
import errno
import fcntl
import hashlib
import io
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from google.protobuf.json_format import ParseError

from ferjax.config import UnreachableError, UserError

EMOTIONS = ("angry", "disgust", "fear", "happy", "sad", "surprise", "neutral")
SIDE = 48  # pixels

_STALE_AFTER = 3600.0  # seconds without a write


class Face(NamedTuple):
    """One image on its way to disk.

    Attributes:
        row: its place in the data set's official order, unique over all splits.
        label: its class, an index into the class names; -1 if it is not known.
        encoded: the PNG or JPEG file as it will be stored.
        pixels: the same image decoded, uint8 [H, W] or [H, W, C], 0-255.
    """

    row: int
    label: int
    encoded: bytes
    pixels: np.ndarray


def data_folder(data_dir: str | os.PathLike[str] | None) -> Path:
    """TFDS's data directory: the one given, else `TFDS_DATA_DIR`, else `~/tensorflow_datasets`.

    TFDS itself reads the variable only once, when it is imported.
    """
    chosen = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    if os.fspath(chosen).startswith("gs://"):
        raise UserError(
            f"config.data.data_dir={chosen}: prepared data is read from a disk, give a folder"
        )
    return Path(os.path.expanduser(chosen))


def split_digest(rows: np.ndarray, labels: np.ndarray, images: np.ndarray) -> str:
    """sha256 (hex) of one split's decoded content.

    Args:
        rows: [N] official rows, ascending.
        labels: [N] class indices.
        images: uint8 [N, H, W, C].
    """
    return streamed_digest(images.shape, rows, labels, [images])


def streamed_digest(
    shape: Sequence[int], rows: np.ndarray, labels: np.ndarray, parts: Iterable[np.ndarray]
) -> str:
    """`split_digest` of images of this shape [N, H, W, C] that come in parts."""
    digest = hashlib.sha256(repr(tuple(map(int, shape))).encode())
    digest.update(np.ascontiguousarray(rows, "<i4").data)
    digest.update(np.ascontiguousarray(labels, "<i4").data)
    for part in parts:
        digest.update(np.ascontiguousarray(part, np.uint8).data)
    return digest.hexdigest()


def dataset_digest(split_digests: Mapping[str, str]) -> str:
    """sha256 (hex) over the splits' digests, in the splits' order."""
    lines = "".join(f"{name} {value}\n" for name, value in split_digests.items())
    return hashlib.sha256(lines.encode()).hexdigest()


def unreadable(path: str | os.PathLike[str], error: Exception) -> UserError:
    """What to raise when the prepared data in a folder cannot be read as it was written.

    They are called damaged, and to be made anew, only if the system lets all their files be read.
    """
    if refused := _refused(Path(path), error):
        where, why = refused.filename or os.fspath(path), refused.strerror
        if isinstance(refused, PermissionError):
            return UserError(
                f"{where}: {why}: prepared data are to be readable, give yourself that right or "
                "another folder with --config.data.data_dir= or TFDS_DATA_DIR"
            )
        return UnreachableError(f"the prepared data can't be read ({where}: {why})")
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    if "File format is already set" in reason:
        return UserError(
            f"the prepared data in {os.fspath(path)} are of another file format than is wanted "
            f"({reason[:160]}): give another data_dir"
        )
    return UserError(
        f"the prepared data in {os.fspath(path)} is damaged ({reason[:160]}): delete this folder "
        "and prepare again (python -m ferjax.data.prepare --dataset=NAME, or the same command)"
    )


def _refused(folder: Path, error: Exception) -> OSError | None:
    """What the system says against reading the files; None: a file is missing or changed."""
    if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT):
        return error
    file = folder  # ArrayRecord's own errors don't say what the system said
    try:
        for file in filter(Path.is_file, folder.iterdir()):
            with file.open("rb") as stream:
                while stream.read(2**20):
                    pass
    except OSError as refused:
        refused.filename = os.fspath(file)  # a failed read has none
        return refused
    return None


@contextlib.contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Lets one process of this machine prepare `path`; the others wait, then find it done.

    The lock file lies outside the data directory: nothing is written there before the source has
    been checked. The system drops the lock when its holder dies.
    """
    name = hashlib.sha256(os.fspath(path).encode()).hexdigest()[:16]
    try:
        lock = os.path.join(tempfile.gettempdir(), f"ferjax-prepare-{os.getuid()}-{name}.lock")
        # The folder is everybody's: a link that someone else put there is not followed.
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise UserError(
            f"no lock can be made in the folder for temporary files ({error}): set TMPDIR to "
            "another one"
        ) from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps TFDS's own progress bars and running commentary away from the user."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(min(verbosity, logging.WARNING))
    tfds.disable_progress_bar()
    try:
        yield
    finally:
        tfds.enable_progress_bar()
        logging.set_verbosity(verbosity)


class ArrayBuilder(
    tfds.core.GeneratorBasedBuilder,
    skip_registration=True,  # type: ignore[call-arg]
):
    """A TFDS builder of small images that is stored as ArrayRecord and read as arrays.

    Features: `image` uint8 [H, W, C], `label` ClassLabel, `row` int32. Records lie in row order.
    `info.metadata` holds `digest` (all splits) and `split_digests`.

    `tfds.data_source(NAME)` reads it. TFDS makes no `tf.data` of ArrayRecord: with TensorFlow,
    `tfds.load(NAME, data_dir=ANOTHER, builder_kwargs={"file_format": "tfrecord"})`.
    """

    VERSION = tfds.core.Version("1.0.0")
    # TFDS looks beside the code for checksums of its downloads. There are none here, and the search
    # needs the package importlib_resources, which TFDS does not declare.
    code_path = None

    def __init__(self, *, data_dir: str | os.PathLike[str] | None = None, **kwargs: Any) -> None:
        kwargs["file_format"] = kwargs.get("file_format") or "array_record"
        try:
            with _quiet():
                super().__init__(data_dir=data_folder(data_dir), **kwargs)
        except (OSError, ValueError, ParseError) as error:
            # TFDS reads what lies in the version's folder last; before that nothing is damaged.
            path = getattr(self, "_data_dir", None)
            if path and os.path.exists(path):
                raise unreadable(path, error) from error
            raise
        self._faces: Mapping[str, Sequence[Face]] = {}

    @classmethod
    def named_config(cls, name: str) -> Any:
        """What TFDS gets as `config` for the part of a data set's name after the slash.

        Raises:
            UserError: there is no such config.
        """
        known = [each.name for each in cls.BUILDER_CONFIGS]
        if name not in known:
            raise UserError(
                f"data set {cls.name} has no config {name!r}: it has {', '.join(known) or 'none'}"
            )
        return name

    @abc.abstractmethod
    def collect(self) -> Mapping[str, Sequence[Face]]:
        """Reads and checks everything: split name -> its faces in row order.

        Raises:
            UserError: what the user gave is wrong.
        """

    def is_prepared(self) -> bool:
        """Whether the records lie under the data directory."""
        return os.path.exists(self.data_path)  # False where a folder above it can't be read

    def download_and_prepare(self, **kwargs: Any) -> None:
        """TFDS's method; the whole source is read and checked before anything is written.

        Raises:
            UserError: the source is wrong, or the data directory cannot be written.
        """
        if self.is_prepared() and self.info.splits:
            self._remove_stale()
            return
        with _one_at_a_time(self.data_path.absolute()):
            if not self.is_prepared():
                self._faces = self.collect()
                self._record_digests()
                self._remove_stale()
                try:
                    with _quiet():
                        super().download_and_prepare(**kwargs)
                except (OSError, RuntimeError) as error:
                    # ArrayRecord tells of a full disk by a RuntimeError.
                    if isinstance(error, RuntimeError) and "writ" not in str(error):
                        raise
                    # A process on another machine that shares the directory may have been first.
                    if not self.is_prepared():
                        cause = getattr(error, "strerror", None) or error
                        raise UserError(
                            f"cannot write {self.data_path} ({cause}): give "
                            "another folder with --config.data.data_dir= or TFDS_DATA_DIR"
                        ) from error
                finally:
                    self._faces = {}
            try:
                with _quiet():
                    self.info.read_from_directory(self.data_path)
            except (OSError, ValueError, ParseError) as error:
                raise unreadable(self.data_path, error) from error

    def _log_download_bytes(self) -> None:
        """Nothing is printed: whoever called says what happens, and TFDS would use stdout."""

    def _log_download_done(self) -> None:
        """As above."""

    def _record_digests(self) -> None:
        digests = {name: self._digest(faces) for name, faces in self._faces.items()}
        self.info.metadata.update(digest=dataset_digest(digests), split_digests=digests)

    def _digest(self, faces: Sequence[Face]) -> str:
        """`split_digest` of grey faces; to be overridden where they don't all fit in memory."""
        return split_digest(
            np.array([face.row for face in faces]),
            np.array([face.label for face in faces]),
            np.stack([face.pixels for face in faces])[..., None],
        )

    def _remove_stale(self) -> None:
        """Removes what a killed preparation left beside this version's folder."""
        path = Path(self.data_path)
        for left in path.parent.glob(f"incomplete.*_{path.name}"):
            # Another machine that shares the folder may finish, and rename, one at this moment.
            with contextlib.suppress(OSError):
                # A file that grows does not change its folder's time.
                written = max(p.stat().st_mtime for p in (left, *left.iterdir()))
                if time.time() - written > _STALE_AFTER:
                    shutil.rmtree(left, ignore_errors=True)

    def _array_info(
        self,
        description: str,
        class_names: Sequence[str],
        shape: tuple[int, int, int],
        encoding: str,
        **kwargs: Any,
    ) -> tfds.core.DatasetInfo:
        """The info of a data set with these features; `encoding` is `png` or `jpeg`."""
        return tfds.core.DatasetInfo(
            builder=self,
            description=description,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=shape, encoding_format=encoding),
                    "label": tfds.features.ClassLabel(names=list(class_names)),
                    "row": np.int32,
                }
            ),
            supervised_keys=("image", "label"),
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(),
            **kwargs,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager  # `collect` has already fetched what there is to fetch
        return {name: self._generate_examples(faces) for name, faces in self._faces.items()}

    def _generate_examples(self, faces: Iterable[Face]) -> Iterator[tuple[int, dict[str, Any]]]:
        for face in faces:
            # A file object makes TFDS store the bytes as they are; an array would need TensorFlow.
            yield (
                face.row,
                {"image": io.BytesIO(face.encoded), "label": face.label, "row": face.row},
            )


def encode_png(pixels: np.ndarray) -> bytes:
    """A uint8 image, grey [H, W] or [H, W, 1] or BGR [H, W, 3], as a PNG file."""
    return cv2.imencode(".png", pixels)[1].tobytes()
