"""Where a run's files are: a folder, or `gs://BUCKET/PATH`.

Both are an `epath.Path`. What a bucket can't do stands here: append (an object is written whole or
not at all), lock, rename a folder, and take the files of libraries that write to disks alone.
"""

import base64
import contextlib
import datetime
import functools
import hashlib
import importlib.util
import json
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from etils import epath

from ferjax.config import UnreachableError, UserError

# Else epath would take gs:// through TensorFlow wherever that is installed. It reads this once,
# when a path is first used.
os.environ.setdefault("EPATH_USE_TF", "false")

REMOTE = "gs://"
UPLOAD_SECONDS = 30.0  # how old what a bucket shows of logs and metrics may be
COMMITTED = "commit_success.txt"  # Orbax writes it into a finished checkpoint in a bucket, last


class OvertakenError(OSError):
    """Another process has changed an object that this one thought its own."""


def workdir_path(text: str | os.PathLike[str]) -> epath.Path:
    """The path of a workdir that a user named.

    Args:
      text: a folder, or `gs://BUCKET/PATH`.

    Raises:
      UserError: a bucket that can't be used; says whether a package, credentials, the bucket or a
        role is missing.
    """
    if not is_remote(text):
        return epath.Path(os.path.expanduser(text))
    bucket, _, name = os.fspath(text).removeprefix(REMOTE).partition("/")
    if not bucket or not name.strip("/"):
        raise UserError(f"{os.fspath(text)} names no folder in a bucket: give gs://BUCKET/PATH")
    if not all(map(_installed, ("gcsfs", "google.cloud.storage"))):
        raise UserError(f"{os.fspath(text)} needs the extra gcs: pip install '.[gcs]'")
    _connect(bucket)
    return epath.Path(os.fspath(text).rstrip("/"))


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is in a bucket."""
    return os.fspath(path).startswith(REMOTE)


def absolute(path: epath.Path) -> epath.Path:
    """The same path from the root; `epath` would put the current folder before gs://."""
    return path if is_remote(path) else path.absolute()


def write_errors(path: epath.Path) -> tuple[type[Exception], ...]:
    """What a write to `path` raises when the disk or the bucket does not take it."""
    if not is_remote(path):
        return (OSError,)
    import aiohttp
    import gcsfs.retry
    from google.api_core.exceptions import GoogleAPIError
    from google.auth.exceptions import GoogleAuthError

    return (OSError, gcsfs.retry.HttpError, aiohttp.ClientError, GoogleAPIError, GoogleAuthError)


def reason(error: BaseException) -> str:
    """An error of a write in one line."""
    return getattr(error, "strerror", None) or " ".join(str(error).split())[:200]


def json_or_nothing(path: epath.Path) -> dict[str, Any]:
    """What a JSON file holds; {} if it is not there, or can't be read."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, TypeError, ValueError):
        return {}


def append_text(path: epath.Path, text: str) -> None:
    """Adds to the end of a file; of several processes that do so, each one's text is kept."""
    if not is_remote(path):
        with path.open("a") as file:
            file.write(text)
        return
    while True:
        owned = OwnedObject(path)
        with contextlib.suppress(OvertakenError):
            owned.write((owned.read() or "") + text)
            return


def move(source: epath.Path, target: epath.Path) -> None:
    """Moves a folder; in a bucket a kill in between leaves the source, whole or not finished."""
    if not is_remote(source):
        source.rename(target)
        return
    bucket, name = _locate(source)
    _, new = _locate(target)
    blobs = list(bucket.list_blobs(prefix=f"{name}/"))
    for blob in blobs:
        bucket.copy_blob(blob, bucket, new + blob.name.removeprefix(name))
    for blob in sorted(blobs, key=lambda b: not b.name.endswith(COMMITTED)):
        blob.delete()


class OwnedObject:
    """One object of a bucket that one process at a time may change.

    Each write names the version that it replaces, and is refused if that is not the newest.

    Attributes:
      updated: when the object was last written, by the bucket's clock; None if there is none.
      version: of the object as last read or written; 0 if there is none.
    """

    def __init__(self, path: epath.Path) -> None:
        self._bucket, self._name = _locate(path)
        self.version: int = 0
        self.updated: datetime.datetime | None = None

    def read(self) -> str | None:
        """The newest content, None if there is no such object."""
        from google.api_core.exceptions import NotFound

        while True:
            blob = self._bucket.get_blob(self._name)
            self._note(blob)
            if blob is None:
                return None
            try:
                return blob.download_as_bytes(if_generation_match=blob.generation).decode()
            except NotFound:
                continue  # replaced between the two requests; a newer one may be there

    def write(self, text: str) -> None:
        """Replaces the version last read or written.

        Raises:
          OvertakenError: it is no longer the newest.
        """
        from google.api_core.exceptions import PreconditionFailed

        blob = self._bucket.blob(self._name)
        try:
            blob.upload_from_string(text, if_generation_match=self.version)
        except PreconditionFailed:
            # It may be our own write: its answer was lost on the way, and it was repeated.
            mine = base64.b64encode(hashlib.md5(text.encode()).digest()).decode()
            blob = self._bucket.get_blob(self._name)
            if blob is None or blob.md5_hash != mine:
                raise OvertakenError(
                    f"another process has written gs://{self._bucket.name}/{self._name}"
                ) from None
        self._note(blob)

    def delete(self) -> None:
        """Removes the version last read or written; nothing happens if it is no longer there."""
        from google.api_core.exceptions import NotFound, PreconditionFailed

        with contextlib.suppress(NotFound, PreconditionFailed):
            self._bucket.blob(self._name).delete(if_generation_match=self.version)

    def _note(self, blob: Any) -> None:
        self.version = blob.generation if blob else 0
        self.updated = blob.updated if blob else None


class Mirror:
    """A folder on this machine's disk, and its copy in a bucket.

    Args:
      target: the folder in the bucket.

    Attributes:
      local: the folder on the disk; removed by `close`.
    """

    def __init__(self, target: epath.Path) -> None:
        self._bucket, self._name = _locate(target)
        # Not a TemporaryDirectory: at the interpreter's end that goes before a log is closed.
        self.local = Path(tempfile.mkdtemp(prefix="ferjax-"))
        self._copied: dict[Path, tuple[int, int]] = {}

    def upload(self) -> None:
        """Copies the files that have changed."""
        # Not through epath: that is no longer at work when the interpreter ends.
        for file in sorted(path for path in self.local.rglob("*") if path.is_file()):
            status = file.stat()
            stamp = (status.st_size, status.st_mtime_ns)
            if self._copied.get(file) != stamp:
                name = f"{self._name}/{file.relative_to(self.local).as_posix()}"
                self._bucket.blob(name).upload_from_string(file.read_bytes())
                self._copied[file] = stamp

    def close(self) -> None:
        """Copies what has changed, and removes the folder on the disk."""
        try:
            self.upload()
        finally:
            shutil.rmtree(self.local, ignore_errors=True)


def log_handler(path: epath.Path) -> logging.Handler:
    """A handler that appends to a log file, which in a bucket is some seconds behind.

    Raises:
      one of `write_errors`: it can't be written.
    """
    return _BucketLog(path) if is_remote(path) else logging.FileHandler(path)


class _BucketLog(logging.FileHandler):
    """A log on the disk that is copied to a bucket every UPLOAD_SECONDS, and at the end."""

    def __init__(self, path: epath.Path) -> None:
        self._errors = write_errors(path)
        self._mirror: Mirror | None = Mirror(path.parent)
        file = self._mirror.local / path.name
        file.write_text(OwnedObject(path).read() or "")
        self._mirror.upload()  # to see whether it can be written
        super().__init__(file)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._done.wait(UPLOAD_SECONDS):
            with contextlib.suppress(*self._errors):  # the next one may succeed
                if self._mirror:
                    self._mirror.upload()

    def close(self) -> None:
        """Closes the file; logging does so when the interpreter ends."""
        super().close()
        self._done.set()
        self._thread.join()
        mirror, self._mirror = self._mirror, None
        if mirror:
            with contextlib.suppress(*self._errors):
                mirror.close()


class Throttle:
    """Lets something happen at most every `seconds`.

    Args:
      seconds: between two times.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds, self._clock = seconds, clock
        self._last = clock()

    def __call__(self) -> bool:
        """Whether it is time; counts as done if so."""
        if self._clock() - self._last < self._seconds:
            return False
        self._last = self._clock()
        return True


def _locate(path: epath.Path) -> tuple[Any, str]:
    """The bucket of a path, and the name that it has there."""
    bucket, _, name = os.fspath(path).removeprefix(REMOTE).partition("/")
    return _connect(bucket), name


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


@functools.cache
def _connect(name: str) -> Any:
    """A bucket, after looking whether it is there.

    Raises:
      UserError: it can't be used.
      UnreachableError: Google Cloud Storage does not answer.
    """
    import fsspec
    from google.api_core import exceptions
    from google.auth.exceptions import GoogleAuthError
    from google.cloud import storage

    # Other processes write there, too: what was listed once may have changed.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    where = f"{REMOTE}{name}"
    try:
        # The request that Orbax makes.
        return storage.Client().get_bucket(name, timeout=30)
    except exceptions.NotFound:
        raise UserError(f"{where} does not exist: create it, or correct its name") from None
    except (exceptions.Forbidden, exceptions.Unauthorized):
        raise UserError(
            f"{where}: no access; give this account the roles storage.objectUser and "
            "storage.legacyBucketReader on it"
        ) from None
    except GoogleAuthError:
        raise UserError(
            f"{where}: no valid Google credentials: run gcloud auth application-default login, or "
            "set GOOGLE_APPLICATION_CREDENTIALS"
        ) from None
    except (exceptions.GoogleAPIError, OSError) as error:
        raise UnreachableError(f"{where} can't be reached: {reason(error)}") from None
