"""A network's probabilities for images of a split, as a file that another run can learn from."""

import io
import zipfile
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath

from ferjax.config import UserError, write_whole

# What NumPy and zipfile raise for a file that is none of theirs, or damaged.
_BROKEN = (
    *(KeyError, ValueError, TypeError, EOFError, AttributeError, MemoryError),
    *(RuntimeError, zipfile.BadZipFile, zlib.error),
)


@dataclass(frozen=True)
class SoftLabels:
    """What one network, or several, said of N images.

    Attributes:
      rows: int32 [N], the images' official rows, ascending.
      probabilities: float32 [N, C]; each row adds up to 1.
      class_names: of the C columns.
      digest: of the data set.
      labeled_rows: int32 [n], the training images whose labels the network has learnt from.
    """

    rows: np.ndarray
    probabilities: np.ndarray
    class_names: tuple[str, ...]
    digest: str
    labeled_rows: np.ndarray


def save(labels: SoftLabels, path: epath.Path) -> None:
    """Writes an .npz file that needs no pickle to be read."""
    file = io.BytesIO()
    np.savez(
        file,
        rows=np.asarray(labels.rows, np.int32),
        probabilities=np.asarray(labels.probabilities, np.float32),
        class_names=np.asarray(labels.class_names, np.str_),
        digest=np.asarray(labels.digest, np.str_),
        labeled_rows=np.asarray(labels.labeled_rows, np.int32),
    )
    write_whole(path, file.getvalue())


def read(path: epath.Path) -> SoftLabels:
    """Reads and checks what `save` wrote; nothing of the file is run.

    Raises:
      FileNotFoundError: it is not there.
      UserError: it is not such a file.
    """
    found: dict[str, Any] = {}
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in SoftLabels.__dataclass_fields__}
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror or error}") from None
    except _BROKEN:
        raise UserError(f"{path} is not what ferjax.evaluate --keep_predictions writes") from None
    labels = SoftLabels(
        **{name: found[name] for name in ("rows", "probabilities", "labeled_rows")},
        class_names=tuple(map(str, np.atleast_1d(found["class_names"]))),
        digest=str(found["digest"]),
    )
    p, rows = labels.probabilities, labels.rows
    whole = all(x.dtype == np.int32 and x.ndim == 1 for x in (rows, labels.labeled_rows))
    whole = whole and p.dtype == np.float32 and p.shape == (len(rows), len(labels.class_names))
    if not whole or not (np.diff(rows) > 0).all():
        raise UserError(f"{path}: its arrays have other types or shapes than ferjax.evaluate's")
    if not ((p >= 0).all() and (np.abs(p.sum(-1) - 1) < 1e-3).all()):  # a NaN fails, too
        raise UserError(f"{path}: its probabilities do not add up to 1")
    return labels
