"""Waiting for what other processes do."""

import subprocess
import time
from collections.abc import Callable


def wait_until(ready: Callable[[], object], *processes: subprocess.Popen) -> None:
    """Waits until `ready()`; kills the processes if one ends before, or after four minutes."""
    deadline = time.monotonic() + 240
    try:
        while not ready():
            assert all(p.poll() is None for p in processes), "a process ended before"
            assert time.monotonic() < deadline, "nothing came of it in four minutes"
            time.sleep(0.01)
    except BaseException:
        for process in processes:
            process.kill()
            process.wait()
        raise
