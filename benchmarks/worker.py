"""Engines in processes of their own, so that their thread pools sleep while another is measured."""

import multiprocessing
import os
import traceback
from collections.abc import Callable
from typing import Any

from ferjax.config import UserError
from ferjax.runtime import recycle_memory


class Worker:
    """An object in a process of its own, whose methods are called over a pipe."""

    def __init__(self, factory: Callable[..., Any], *args: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, factory, args))
        self._process.start()
        theirs.close()
        self._receive()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            self._pipe.send((name, args))
            return self._receive()

        return call

    def _receive(self) -> Any:
        try:
            kind, value = self._pipe.recv()
        except EOFError:
            raise RuntimeError("an engine's process has died") from None
        if kind == "user":
            raise UserError(value)
        if kind == "error":
            raise RuntimeError(value)
        return value

    def close(self) -> None:
        """Ends the process."""
        self._pipe.close()
        self._process.join(30)
        if self._process.is_alive():
            self._process.kill()


def _serve(pipe: Any, factory: Callable[..., Any], args: tuple[Any, ...]) -> None:
    recycle_memory(os.environ)  # PyTorch's steps gain by it, too
    try:
        made = factory(*args)
        pipe.send(("done", None))
        while True:
            name, given = pipe.recv()
            pipe.send(("done", getattr(made, name)(*given)))
    except EOFError:
        pass
    except UserError as error:
        pipe.send(("user", str(error)))
    except Exception:
        pipe.send(("error", traceback.format_exc()))
