"""What asks a run to save and stop."""

import signal
from typing import Any, Self


class StopSignal:
    """While it is entered, SIGTERM, SIGUSR1 and SIGINT call `handle`, which sets `seen`."""

    def __init__(self) -> None:
        self.seen = False
        self._old: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            self._old[number] = signal.signal(number, self.handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame: Any) -> None:
        """Notes the signal."""
        del number, frame
        self.seen = True
