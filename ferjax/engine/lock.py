"""One trainer a workdir, on one host or on many that share it."""

import abc
import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
from typing import Any

from etils import epath

from ferjax.config import UserError

log = logging.getLogger("ferjax")

# What `flock` says where the file system has none: Lustre mounted without it, some of NFS.
_NO_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


class LostLockError(Exception):
    """Another trainer has taken the workdir over."""


class Lock(abc.ABC):
    """What the locks of a workdir on a disk and in a bucket share.

    Attributes:
      lost: who has taken the workdir over, because this process seemed dead; "" if nobody.
    """

    # What reading or writing it raises where it can't be reached.
    _errors: tuple[type[Exception], ...] = (OSError,)

    def __init__(self, workdir: epath.Path, beat: float, stale: float) -> None:
        self._workdir, self._beat, self._stale = workdir, beat, stale
        self._me: dict[str, Any] = {}
        self._done, self._hurry = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._awake = time.time()  # when the lock was last seen to be ours
        self._failed = 0.0  # when a look at it out of turn was last in vain
        self.lost = ""

    @abc.abstractmethod
    def acquire(self) -> None:
        """Takes the lock; waits up to `stale` seconds for a holder elsewhere to be dead.

        Raises:
          UserError: another trainer is alive there.
        """

    @abc.abstractmethod
    def release(self) -> None:
        """Gives the lock back."""

    def check(self) -> None:
        """To be called before the workdir is changed.

        Raises:
          LostLockError: another trainer has taken over, because this one seemed dead.
        """
        now = time.time()
        late = now - self._awake > self._stale - self._beat and now - self._failed > self._beat
        # After a sleep (of a laptop, of a stopped process) the next beat may come too late. Of
        # several processes only the first holds the lock, and beats.
        if late and self._thread is not None and not self.lost:
            self._failed = now
            with contextlib.suppress(*self._errors):  # the next look, or beat, may succeed
                self._note(self._look())
                self._awake, self._failed = now, 0.0
                self._hurry.set()  # others may be waiting for a beat
        if self.lost:
            raise LostLockError(
                f"{self._workdir} was taken over by {self.lost} while this process did not "
                "answer: nothing more is written"
            )

    def refusal(self, holder: dict) -> UserError:
        """The error that names who trains there."""
        return UserError(
            f"{self._workdir} is being trained by {name_of(holder)}: wait for it, or give another "
            "--workdir"
        )

    @abc.abstractmethod
    def _text(self) -> str:
        """What the lock says now; "" if nobody holds it."""

    @abc.abstractmethod
    def _last_beat(self) -> Any:
        """What every heartbeat of the holder changes."""

    @abc.abstractmethod
    def _silence(self) -> float:
        """Seconds since the holder's last heartbeat; 0 where that is not known."""

    @abc.abstractmethod
    def _run(self) -> None:
        """Beats until `_done` is set, or until another has the lock."""

    def _start_beating(self) -> None:
        self._thread = threading.Thread(target=self._run, name="lock", daemon=True)
        self._thread.start()

    def _waits(self) -> bool:
        """Returns when the next beat is due; False if there is to be none."""
        self._hurry.wait(self._beat)
        self._hurry.clear()
        return not self._done.is_set()

    def _stop_beating(self) -> bool:
        """Whether it had begun: the lock is ours, or was."""
        if self._thread is None:
            return False
        self._done.set()
        self._hurry.set()
        self._thread.join()
        return True

    def _holder(self) -> dict:
        """Who the lock names; {} if nobody."""
        return _parse(self._text())

    def _look(self) -> str:
        """`_text`, for another thread than the one that beats."""
        return self._text()

    def _note(self, text: str) -> None:
        """Sets `lost` if the lock says that another has it, or had it and has given it back."""
        holder = _parse(text)
        if not text.strip() or (holder and holder.get("id") != self._me["id"]):
            self.lost = name_of(holder)

    def _outwait(self, holder: dict) -> None:
        """Returns once a holder elsewhere is dead by its heartbeat.

        Raises:
          UserError: it is alive.
        """
        seen = self._last_beat()
        waits = self._stale - self._silence()
        if waits > 0:
            log.info("waiting %.0f s to see whether %s still trains here", waits, name_of(holder))
            deadline = time.monotonic() + waits
            while time.monotonic() < deadline:
                time.sleep(min(1.0, self._beat / 2))
                new = self._holder()
                if not new:
                    return  # given back meanwhile
                if self._last_beat() != seen:
                    raise self.refusal(new)
        log.warning(
            "%s gave no sign of life for %.0f s: its lock on %s is taken over",
            *(name_of(holder), self._stale, self._workdir),
        )


class WorkdirLock(Lock):
    """Holds `<workdir>/lock`: the system's file lock on this host, a heartbeat for the others.

    The file says who holds it and is written anew every `beat` seconds. A holder on this host that
    dies loses it at once. One on another host, or where the file system has no `flock`, has lost it
    when the file has not changed for `stale` seconds by the file system's own clock: hosts' clocks
    may differ.

    Args:
      workdir: an existing directory.
      beat: seconds between heartbeats.
      stale: seconds without one after which the holder counts as dead.
    """

    def __init__(self, workdir: epath.Path, *, beat: float = 10.0, stale: float = 60.0) -> None:
        super().__init__(workdir, beat, stale)
        self._path = workdir / "lock"
        self._me = {"host": socket.gethostname(), "process": os.getpid(), "id": os.urandom(8).hex()}
        self._file = -1

    def acquire(self) -> None:
        """Takes the lock; waits up to `stale` seconds for a holder to be dead by its heartbeat.

        Raises:
          UserError: another trainer is alive there.
        """
        mine: Any = self._me["host"]  # whose dead holders the system has dropped
        # Not truncated: the content is the present holder's.
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._file)
            raise self.refusal(self._holder()) from None
        except OSError as error:
            if error.errno not in _NO_FLOCK:
                os.close(self._file)
                raise
            log.info("%s is on a file system without flock: heartbeats alone guard it", self._path)
            mine = None
        holder = self._holder()
        if holder.get("host") not in (None, mine):
            try:
                self._outwait(holder)
            except BaseException:
                os.close(self._file)
                raise
        self._write()
        if mine is None:
            # Another one may have begun at the same moment: the last to write has it.
            time.sleep(min(2.0, self._beat))
            if self._holder().get("id") != self._me["id"]:
                os.close(self._file)
                raise self.refusal(self._holder())
        self._start_beating()

    def release(self) -> None:
        """Gives the lock back."""
        if not self._stop_beating():
            return
        with contextlib.suppress(OSError):
            self._note(self._text())  # taken over since the last beat?
        if not self.lost:
            os.ftruncate(self._file, 0)
        os.close(self._file)

    def _text(self) -> str:
        return self._path.read_text()

    def _last_beat(self) -> float:
        return os.stat(self._path).st_mtime  # an epath's has no fraction

    def _silence(self) -> float:
        """By the file system's clock."""
        last = self._last_beat()
        probe = self._path.with_name(f"lock.{self._me['id']}")
        probe.touch()
        now = os.stat(probe).st_mtime
        probe.unlink()
        return now - last

    def _run(self) -> None:
        while self._waits():
            try:
                self._note(self._text())
                if self.lost:
                    return
                self._write()
                self._awake = time.time()
            except OSError as error:  # a full or unreachable disk; the next beat may succeed
                log.debug("lock: %s", error)

    def _write(self) -> None:
        # Of one length and in one piece, so that nobody reads half of it or nothing.
        text = json.dumps({**self._me, "beat": time.time()}).ljust(256)
        os.pwrite(self._file, text.encode(), 0)
        os.fsync(self._file)


def _parse(text: str) -> dict:
    try:
        content = json.loads(text or "{}")
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def name_of(holder: dict) -> str:
    """A holder of a lock, for a person."""
    if "process" not in holder:
        return "another process"
    return f"process {holder['process']} on {holder.get('host')}"
