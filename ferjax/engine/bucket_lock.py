"""One trainer a workdir where the workdir is in a bucket."""

import contextlib
import json
import logging
import os
import socket
import time
from pathlib import Path
from typing import Any

from etils import epath

from ferjax.engine.lock import Lock, WorkdirLock, name_of
from ferjax.workdir import OvertakenError, OwnedObject, is_remote, write_errors

log = logging.getLogger("ferjax")


class BucketLock(Lock):
    """Holds the object `<workdir>/lock`: made by one only, and written anew as a heartbeat.

    Each write names the version that it replaces, so of two that take it one is refused, and one
    that was thought dead finds out with its next beat. A holder on this machine whose process has
    ended loses it at once; one elsewhere when the object has not changed for `stale` seconds by the
    bucket's clock.

    Args:
      workdir: in a bucket.
      beat: seconds between heartbeats.
      stale: seconds without one after which the holder counts as dead.
    """

    def __init__(self, workdir: epath.Path, *, beat: float = 10.0, stale: float = 60.0) -> None:
        super().__init__(workdir, beat, stale)
        self._object = OwnedObject(workdir / "lock")
        self._me = {
            "host": socket.gethostname(),
            "process": os.getpid(),
            "machine": _machine(),
            "id": os.urandom(8).hex(),
        }
        self._errors = write_errors(workdir)

    def acquire(self) -> None:
        """Takes the lock; waits up to `stale` seconds for a holder elsewhere to be dead.

        Raises:
          UserError: another trainer is alive there.
        """
        holder = self._holder()
        if holder and not self._has_ended(holder):
            self._outwait(holder)
        try:
            self._write()
        except OvertakenError:  # somebody was faster
            raise self.refusal(self._holder()) from None
        self._start_beating()

    def release(self) -> None:
        """Gives the lock back."""
        if not self._stop_beating():
            return
        with contextlib.suppress(*self._errors):
            if self._holder().get("id") == self._me["id"]:
                self._object.delete()

    def _text(self) -> str:
        return self._object.read() or ""

    def _look(self) -> str:
        # Its own object: the one that beats must not learn of another's version.
        return OwnedObject(self._workdir / "lock").read() or ""

    def _last_beat(self) -> Any:
        return self._object.version  # as of the last `_text`

    def _silence(self) -> float:
        """By the bucket's clock."""
        last = self._object.updated
        if not last:
            return 0.0
        probe = OwnedObject(self._workdir / f"lock.{self._me['id']}")
        probe.write("")
        now = probe.updated
        probe.delete()
        return (now.timestamp() if now else time.time()) - last.timestamp()

    def _run(self) -> None:
        while self._waits():
            try:
                self._write()
                self._awake = time.time()
            except OvertakenError:
                who = "another process"
                with contextlib.suppress(*self._errors):
                    who = name_of(self._holder())
                self.lost = who
                return
            except self._errors as error:  # no way there; the next beat may succeed
                log.debug("lock: %s", error)

    def _has_ended(self, holder: dict) -> bool:
        if holder.get("machine") != self._me["machine"]:
            return False
        try:
            os.kill(int(holder["process"]), 0)
        except ProcessLookupError:
            return True
        except (PermissionError, KeyError, ValueError):
            return False
        return False

    def _write(self) -> None:
        self._object.write(json.dumps({**self._me, "beat": time.time()}))


def _machine() -> str:
    """This machine since its start, and its view of processes: where their numbers are the same."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return os.urandom(8).hex()


def make_lock(workdir: epath.Path) -> Lock:
    """The lock of a workdir on a disk or in a bucket."""
    return BucketLock(workdir) if is_remote(workdir) else WorkdirLock(workdir)
