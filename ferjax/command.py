"""What all commands share: flags, ferjax's own log lines, and the exit status."""

import errno
import logging
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path

import ml_collections
from absl import app, flags
from absl import logging as absl_logging

from ferjax.config import EXIT_OK, EXIT_USER_ERROR, UserError

log = logging.getLogger("ferjax")

# What a mistake in a file of the user's code, or in a key that is looked up in it, is raised as.
MISTAKES = (
    *(ArithmeticError, AttributeError, ImportError, LookupError, NameError, SyntaxError),
    *(TypeError, ValueError),
)
# What the system says of a path that the user has to choose otherwise, or to open.
_REFUSED = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR, errno.ELOOP),
    errno.ENAMETOOLONG,
)
# Where frames of a traceback come from that are not the config's file.
_LIBRARIES = (
    *(str(Path(module.__file__ or "").parent) for module in (ml_collections, app)),
    *(str(Path(__file__).parent), sysconfig.get_path("stdlib"), "<"),
)


def run(main: Callable[[], int | None]) -> None:
    """Runs a command: parses the flags, calls `main`, and exits with the right status.

    0: done; 2: what the user gave is wrong (one line on stderr, no traceback); 75: preempted after
    saving; 1: anything else (one line, too, if something outside did not answer).
    """

    # A file's name may hold bytes that are no text.
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    # ferjax's own lines; those of other libraries go nowhere unless a command adds a log file.
    console = _Console(sys.stdout)
    console.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(console)
    log.setLevel(logging.INFO)
    log.propagate = False

    def parse(argv: list[str]) -> list[str]:
        # Help names the flags of all of ferjax's modules that the command uses.
        for module, found in flags.FLAGS.flags_by_module_dict().items():
            if module.startswith("ferjax"):
                for flag in found:
                    flags.FLAGS.register_key_flag_for_module(argv[0], flag)
        if {"--help", "-help", "-h"} & set(argv[1:]):
            app.usage(shorthelp=True, writeto_stdout=True, exitcode=EXIT_OK)
        try:
            rest = flags.FLAGS(argv)
            if flags.FLAGS["verbosity"].using_default_value:
                absl_logging.set_verbosity(absl_logging.ERROR)  # Orbax and TFDS talk a lot
        except UserError as error:
            _exit_with(str(error))
        except (flags.Error, OSError) as error:  # the latter: the config's file, with other keys
            _exit_with(_one_line(str(error)))
        except MISTAKES as error:
            _exit_with(blame(error))
        if len(rest) > 1:
            _exit_with(f"unexpected argument {rest[1]!r}: flags are written --name=value")
        return rest

    def guarded(_: list[str]) -> None:
        try:
            status = main()
        except UserError as error:
            _exit_with(str(error), error.status)
        except OSError as error:
            if not error.filename or error.errno not in _REFUSED:
                raise
            _exit_with(f"{error.filename}: {error.strerror}")
        except RuntimeError as error:  # JAX's are such; not every command imports it
            mend = (
                "lower evaluate.batch_size in the workdir's config.json, or set JAX_PLATFORMS=cpu"
            )
            _exit_with(out_of_memory(error, mend))
        sys.exit(status or EXIT_OK)

    app.run(guarded, flags_parser=parse)


class _Console(logging.StreamHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """Silence where nobody reads any more: `... | head`."""
        if not isinstance(sys.exc_info()[1], BrokenPipeError):
            super().handleError(record)


def out_of_memory(error: RuntimeError, mend: str) -> str:
    """One line for what the devices' memory does not hold; any other error is raised again."""
    if "RESOURCE_EXHAUSTED" not in str(error):
        raise error
    head = str(error).splitlines()[0][:200]
    return f"the memory of the devices does not hold this: {mend} ({head})"


def _one_line(text: str) -> str:
    """An error's text; of a traceback, which ml_collections puts into it, its last line alone."""
    head, _, trace = text.partition("Traceback (most recent call last):")
    if not trace:
        return " ".join(text.split())
    what = trace.strip().splitlines()[-1]
    if what.endswith("get_config() takes 0 positional arguments but 1 was given"):
        return f"{' '.join(head.split()[:2])} this config has no variants, give FILE.py alone"
    places = re.findall(r'File "(.+)", line (\d+)', trace)
    file, line = next((p for p in reversed(places) if not p[0].startswith(_LIBRARIES)), places[-1])
    return f"{' '.join(head.split())} {what} ({file}, line {line})"


def blame(error: Exception) -> str:
    """What one of `MISTAKES` says is wrong with a config's or sweep's file, or a key, and where."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}: {type(error).__name__}: {error.msg}"
    said = f"{type(error).__name__}: {_one_line(str(error))}"
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(_LIBRARIES):
            return f"{frame.filename}, line {frame.lineno}: {said}"
    return f"the file, or a --config.KEY=VALUE that it does not fit: {said}"


def _exit_with(message: str, status: int = EXIT_USER_ERROR) -> None:
    print(f"ferjax: {message}", file=sys.stderr, flush=True)
    sys.exit(status)
