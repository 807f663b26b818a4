"""One trainer a workdir where the workdir is in a bucket."""

import contextlib
import json
import logging
import os
import socket
import threading
import time
from pathlib import Path

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
        self._thread = threading.Thread(target=self._run, name="lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Gives the lock back."""
        if self._thread is None:
            return
        self._done.set()
        self._thread.join()
        with contextlib.suppress(*self._errors):
            if self._holder().get("id") == self._me["id"]:
                self._object.delete()

    def _outwait(self, holder: dict) -> None:
        """Returns once a holder elsewhere is dead by its heartbeat."""
        seen, last = self._object.version, self._object.updated
        waits = self._stale - (self._now() - last.timestamp() if last else 0)
        if waits > 0:
            log.info("waiting %.0f s to see whether %s still trains here", waits, name_of(holder))
            deadline = time.monotonic() + waits
            while time.monotonic() < deadline:
                time.sleep(min(1.0, self._beat / 2))
                new = self._holder()
                if not new:
                    return  # given back meanwhile
                if self._object.version != seen:
                    raise self.refusal(new)
        log.warning(
            "%s gave no sign of life for %.0f s: its lock on %s is taken over",
            *(name_of(holder), self._stale, self._workdir),
        )

    def _now(self) -> float:
        """The bucket's clock."""
        probe = OwnedObject(self._workdir / f"lock.{self._me['id']}")
        probe.write("")
        now = probe.updated
        probe.delete()
        return now.timestamp() if now else time.time()

    def _run(self) -> None:
        while not self._done.wait(self._beat):
            try:
                self._write()
            except OvertakenError:
                self.lost = name_of(self._holder())
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

    def _holder(self) -> dict:
        """Who the object names; {} if nobody."""
        try:
            content = json.loads(self._object.read() or "{}")
        except ValueError:
            return {}
        return content if isinstance(content, dict) else {}

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
