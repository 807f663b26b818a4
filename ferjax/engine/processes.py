"""How the processes of one run come to agree; with a single process everything is immediate.

A process that raises anything else than the errors named here ends, and JAX's coordinator ends the
others.
"""

import hashlib
import json
import socket
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from etils import epath

from ferjax.config import UnreachableError, UserError

T = TypeVar("T")
_DIGEST, _MESSAGE = 32, 4096  # bytes


def require_same(facts: Mapping[str, str]) -> None:
    """Checks that all processes hold the same facts.

    Args:
      facts: name -> text, such as the config as JSON; the same names everywhere.

    Raises:
      UserError: in every process; names the first process that differs from process 0, and how.
    """
    digests = {name: hashlib.sha256(text.encode()).digest() for name, text in facts.items()}
    own = np.frombuffer(b"".join(digests.values()), np.uint8).reshape(len(facts), _DIGEST)
    everyone = _gather(own)
    for process, theirs in enumerate(everyone):
        for name, a, b in zip(facts, everyone[0], theirs, strict=True):
            if not np.array_equal(a, b):
                host = hosts()[process]
                raise UserError(
                    f"process {process} on {host} has another {name} than process 0: start all "
                    "processes with the same command, code and data"
                )


def first(
    action: Callable[[], T],
    errors: tuple[type[Exception], ...] = (UserError, UnreachableError),
) -> T:
    """Runs `action` in process 0 while the others wait, and gives them what it returned.

    Args:
      action: returns what JSON keeps.
      errors: those that are raised in every process if process 0 raised one; made of one message.
    """
    if jax.process_count() == 1:
        return action()
    outcome: dict[str, Any] = {}
    if jax.process_index() == 0:
        try:
            outcome = {"value": action()}
        except errors as error:
            # JSON's escapes take up to 6 bytes a character, and what is sent is cut at _MESSAGE.
            short = str(error)[: _MESSAGE // 8]
            outcome = {"error": errors.index(type(error)), "message": short}
    outcome = json.loads(_gather_text(json.dumps(outcome))[0])
    if "error" in outcome:
        raise errors[outcome["error"]](outcome["message"])
    return outcome["value"]


def once_per_host(action: Callable[[], T]) -> T:
    """Runs `action` in one process of each host, then in the others, which find its work done.

    Raises:
      UserError: in every process, if it was raised in one.
    """
    if jax.process_count() == 1:
        return action()
    names = hosts()
    leads = names.index(names[jax.process_index()]) == jax.process_index()
    result: T | None = None
    for turn in (True, False):
        message = ""
        if leads == turn:
            try:
                result = action()
            except UserError as error:
                message = f"{error.status} {error}"
        for text in _gather_text(message):
            if text:
                status, _, said = text.partition(" ")
                raise (UserError if int(status) == UserError.status else UnreachableError)(said)
    assert result is not None
    return result


def hosts() -> list[str]:
    """The host of each process."""
    return _gather_text(socket.gethostname())


def neighbours() -> int:
    """How many of the processes are on this host."""
    names = hosts()
    return names.count(names[jax.process_index()])


def least(value: float) -> float:
    """The smallest of the processes' values, in all of them."""
    return float(_gather(np.asarray(value, np.float32)).min())


def require_shared(directory: epath.Path) -> None:
    """Checks that all processes see one and the same directory.

    Raises:
      UserError: in every process; names a host that sees another one.
    """
    if jax.process_count() == 1:
        return

    def write() -> str:
        token = f"{socket.gethostname()}-{np.random.SeedSequence().entropy}"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / ".shared").write_text(token)
        return token

    token = first(write)
    try:
        seen = (directory / ".shared").read_text() == token
    except OSError:
        seen = False
    for process, text in enumerate(_gather_text("" if seen else socket.gethostname())):
        if text:
            raise UserError(
                f"--workdir={directory} is not the same directory for process {process} on {text} "
                "as for process 0: give one that all hosts share, or gs://BUCKET/DIR"
            )
    first(lambda: (directory / ".shared").unlink(missing_ok=True))


def _gather(own: np.ndarray) -> np.ndarray:
    """[...] of each process -> [processes, ...]."""
    if jax.process_count() == 1:
        return own[None]
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(own))


def _gather_text(text: str) -> list[str]:
    """The text of each process; what is longer than 4 KiB is cut off."""
    data = text.encode()[:_MESSAGE].ljust(_MESSAGE, b"\0")
    rows = _gather(np.frombuffer(data, np.uint8))
    return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in rows]
