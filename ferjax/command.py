"""What all commands share: flags, ferjax's own log lines, and the exit status."""

import logging
import sys
from collections.abc import Callable

from absl import app, flags
from absl import logging as absl_logging

from ferjax.config import EXIT_OK, EXIT_USER_ERROR, UserError

log = logging.getLogger("ferjax")


def run(main: Callable[[], int | None]) -> None:
    """Runs a command: parses the flags, calls `main`, and exits with the right status.

    0: done; 2: what the user gave is wrong (one line on stderr, no traceback); 75: preempted after
    saving; 1: anything else.
    """

    # ferjax's own lines; those of other libraries go nowhere unless a command adds a log file.
    console = logging.StreamHandler(sys.stdout)
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
        except flags.Error as error:
            _exit_with(" ".join(str(error).split()))
        if len(rest) > 1:
            _exit_with(f"unexpected argument {rest[1]!r}: flags are written --name=value")
        return rest

    def guarded(_: list[str]) -> None:
        try:
            status = main()
        except UserError as error:
            _exit_with(str(error))
        sys.exit(status or EXIT_OK)

    app.run(guarded, flags_parser=parse)


def _exit_with(message: str) -> None:
    print(f"ferjax: {message}", file=sys.stderr, flush=True)
    sys.exit(EXIT_USER_ERROR)
