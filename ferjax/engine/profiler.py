"""A trace of some training steps, for TensorBoard's profiler or ui.perfetto.dev."""

import logging

import jax
from etils import epath

from ferjax.config import UserError
from ferjax.workdir import Mirror, is_remote, reason, write_errors

log = logging.getLogger("ferjax")


class Profiler:
    """Traces the calls that hold the steps of `--config.profile=START:STEPS`.

    Args:
      wanted: "START:STEPS", or "" for no trace.
      directory: where the trace is written.

    Raises:
      UserError: `wanted` is something else.
    """

    def __init__(self, wanted: str, directory: epath.Path) -> None:
        self._directory, self._running = directory, False
        self._mirror: Mirror | None = None
        start, _, count = wanted.partition(":")
        if wanted and not (start.isdecimal() and count.isdecimal() and int(count)):
            raise UserError(f"config.profile={wanted}: it is START:STEPS, such as 100:20")
        self._steps = range(int(start), int(start) + int(count)) if wanted else range(0)

    def before(self, step: int, end: int) -> None:
        """To be called before the call of the steps `step` ... `end` - 1."""
        wanted = max(step, self._steps.start) < min(end, self._steps.stop)
        if wanted and not self._running:
            options = jax.profiler.ProfileOptions()
            # Without every Python call: that slows the host, and the trace shows waits of its own.
            options.python_tracer_level = 0
            if is_remote(self._directory):  # XLA writes to disks alone
                self._mirror = Mirror(self._directory)
            place = self._mirror.local if self._mirror else self._directory
            jax.profiler.start_trace(str(place), profiler_options=options)
            self._running = True

    def ends(self, end: int) -> bool:
        """Whether the trace is to be closed now; the steps before `end` must be done by then."""
        return self._running and end >= self._steps.stop

    def close(self) -> None:
        """Writes the trace, if one is running."""
        if self._running:
            self._running = False
            # A full disk is a RuntimeError to XLA.
            refused: tuple[type[BaseException], ...] = (
                RuntimeError,
                *write_errors(self._directory),
            )
            try:
                jax.profiler.stop_trace()
                if self._mirror:
                    self._mirror.close()
            except refused as error:
                log.warning("the profile is not in %s: %s", self._directory, reason(error))
                return
            log.info(
                "profile written to %s: tensorboard --logdir, or ui.perfetto.dev", self._directory
            )
