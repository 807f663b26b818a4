"""Runs N processes of one command on this machine: a small cluster for trials and tests.

    python launch/local.py -n 4 [--devices-per-process=2] [--grace=30] -- ARGS

ARGS is what follows `python`, for example `-m ferjax.main --config=configs/quickstart.py`. Process
I gets `--coordinator=127.0.0.1:PORT --num_processes=N --process_id=I` after it, and runs on the CPU
(JAX_PLATFORMS=cpu) with as many virtual devices as asked for. Its lines are printed whole, as
`[I] ...`; of a progress bar (text that ends in a carriage return) one state every ten seconds and
the last.

SIGINT, SIGTERM and SIGUSR1 are passed on to every process, without a time limit: they may be
saving. When one fails, the others get SIGTERM at once and SIGKILL after --grace seconds. When one
stops with 75 (saved, start again), the others are doing the same and have --grace seconds before
that begins. Nothing outlives the launcher: what a process leaves behind in its group is killed with
it, and the processes get SIGTERM if the launcher itself is killed (on Linux).

Exit status, by the first rule that fits. What a process says after the launcher ended it does not
count, and death by signal n is 128 + n.
    0    all processes ended with 0
    S    the first status to occur that is neither 0 nor 75 (2: what the user gave is wrong, and
         also what the launcher says of its own arguments)
    75   the rest: some or all have stopped after saving, so the run is not finished
"""

import argparse
import contextlib
import ctypes
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import IO, BinaryIO

EXIT_AGAIN = 75
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Cluster:
    """Processes of one command that know of each other; see the module's docstring.

    Args:
      args: what follows `python`.
      processes: how many, >= 1.
      devices: virtual CPU devices of each, >= 1.
      grace: seconds between SIGTERM and SIGKILL for those that have to end.
      out: where the lines go, as bytes; standard output if not given.
      bar_seconds: the least time between two states of a progress bar; the last is always printed.
    """

    def __init__(
        self,
        args: Sequence[str],
        processes: int,
        devices: int = 1,
        grace: float = 30.0,
        out: BinaryIO | IO[bytes] | None = None,
        bar_seconds: float = 10.0,
    ) -> None:
        self.args, self.count, self.devices = list(args), processes, devices
        self.grace, self.bar_seconds = grace, bar_seconds
        self.out = out or sys.stdout.buffer
        self.print_lock = threading.Lock()
        # Held while a process is reaped or signalled: a number that was reaped may be another's.
        # Reentrant, because a signal's handler may interrupt `send`.
        self.lock = threading.RLock()
        self.reaped: set[int] = set()
        self.processes: list[subprocess.Popen[bytes]] = []
        self.ended: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
        self.received: list[int] = []

    def run(self) -> int:
        """Starts all, waits for all, and returns the one exit status (see above)."""
        previous = {number: signal.signal(number, self._forward) for number in FORWARDED}
        try:
            with reserved_port() as port:
                # All before the first thread starts: `_follow_parent` runs between fork and exec.
                for index in range(self.count):
                    self.processes.append(self._start(index, port))
                for number in [*self.received]:  # came before there was anyone to pass it on to
                    self.send(number)
                readers = [self._thread(self._read, i) for i in range(self.count)]
                for index in range(self.count):
                    self._thread(self._wait, index)
                status = self._supervise()
            for reader in readers:
                reader.join(timeout=5)  # a daemon that left the group may hold the pipe for ever
            return status
        finally:
            for process in self.processes:
                if process.pid not in self.reaped:
                    _kill_group(process.pid)
            for number, handler in previous.items():
                signal.signal(number, handler)

    def send(self, number: int) -> None:
        """Sends a signal to each process that runs; its own children are its business."""
        with self.lock:
            for process in self.processes:
                # Not Popen.send_signal: it reaps, and `_wait` would wait for nobody.
                if process.pid not in self.reaped:
                    os.kill(process.pid, number)

    def _start(self, index: int, port: int) -> subprocess.Popen[bytes]:
        command = [
            sys.executable,
            *self.args,
            f"--coordinator=127.0.0.1:{port}",
            f"--num_processes={self.count}",
            f"--process_id={index}",
        ]
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment(os.environ, self.devices),
            start_new_session=True,  # Ctrl-C reaches them through us alone; one group each
            preexec_fn=_follow_parent if sys.platform == "linux" else None,
        )

    def _supervise(self) -> int:
        """Collects the exits in the order in which they occur; ends the others when it must."""
        statuses: list[int] = []  # of those that ended by themselves
        running, ending, kill_at = set(range(self.count)), False, None
        terminate_at: float | None = None
        while running:
            deadlines = [t for t in (terminate_at, kill_at) if t is not None]
            wait = max(0.0, min(deadlines) - time.monotonic()) if deadlines else None
            try:
                index, code = self.ended.get(timeout=wait)
            except queue.Empty:
                if kill_at is not None:
                    self._say(f"still running: {_names(running)}; killing them")
                    self.send(signal.SIGKILL)
                    kill_at = None
                else:
                    self._say(f"not stopped after one was: {_names(running)}; ending them")
                    self.send(signal.SIGTERM)
                    ending, terminate_at, kill_at = True, None, time.monotonic() + self.grace
                continue
            running.discard(index)
            status = 128 - code if code < 0 else code
            if ending:
                continue
            statuses.append(status)
            if status == 0 or not running:
                continue
            if status == EXIT_AGAIN:
                terminate_at = terminate_at or time.monotonic() + self.grace
                continue
            self._say(f"process {index} ended with status {status}; ending {_names(running)}")
            self.send(signal.SIGTERM)
            ending, terminate_at, kill_at = True, None, time.monotonic() + self.grace
        failed = [s for s in statuses if s not in (0, EXIT_AGAIN)]
        if failed:
            return failed[0]
        return 0 if len(statuses) == self.count and not any(statuses) else EXIT_AGAIN

    def _wait(self, index: int) -> None:
        process = self.processes[index]
        # The group is swept while its leader is still a zombie, so the number can't be another's.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        with self.lock:
            _kill_group(process.pid)
            code = process.wait()
            self.reaped.add(process.pid)
        self.ended.put((index, code))

    def _read(self, index: int) -> None:
        stream = self.processes[index].stdout
        assert stream is not None
        lines = Lines(lambda line: self._print(f"[{index}] ".encode() + line), self.bar_seconds)
        while chunk := os.read(stream.fileno(), 1 << 16):
            lines.feed(chunk)
        lines.close()

    def _say(self, text: str) -> None:
        self._print(f"[local] {text}".encode())

    def _print(self, line: bytes) -> None:
        with self.print_lock, contextlib.suppress(BrokenPipeError):
            self.out.write(line + b"\n")
            self.out.flush()

    def _forward(self, number: int, _: FrameType | None) -> None:
        self.received.append(number)
        self.send(number)

    def _thread(self, target: Callable[[int], None], index: int) -> threading.Thread:
        thread = threading.Thread(target=target, args=(index,), daemon=True)
        thread.start()
        return thread


class Lines:
    """Cuts a stream of bytes into whole lines; thins out progress bars.

    Text that ends in a carriage return is a state of a bar, which the next text overwrites: it is
    given on at most every `bar_seconds`, and the last one when the line ends.
    """

    def __init__(self, give: Callable[[bytes], None], bar_seconds: float) -> None:
        self.give, self.bar_seconds = give, bar_seconds
        self.rest: list[bytes] = []  # of the current state, in pieces: a line may be long
        self.overwritten = b""  # the state before it, if it was not given on
        self.shown = time.monotonic()
        self.returned = False  # a carriage return came last: half of \r\n, or the end of a state

    def feed(self, chunk: bytes) -> None:
        """Takes the next bytes, cut anywhere."""
        for piece in chunk.splitlines(keepends=True):
            # bytes.splitlines cuts at \n, \r and \r\n only, unlike str.splitlines.
            if self.returned and piece != b"\n":
                self._state()
            self.returned = False
            if piece.endswith(b"\n"):
                self.rest.append(piece.rstrip(b"\r\n"))
                self._line()
            elif piece.endswith(b"\r"):
                self.rest.append(piece[:-1])
                self.returned = True
            else:
                self.rest.append(piece)

    def close(self) -> None:
        """Gives on what has no line end."""
        if self.rest or self.overwritten:
            self._line()

    def _state(self) -> None:
        state, self.rest = b"".join(self.rest), []
        if not state.strip():
            return
        if time.monotonic() - self.shown >= self.bar_seconds:
            self.shown, self.overwritten = time.monotonic(), b""
            self.give(state)
        else:
            self.overwritten = state

    def _line(self) -> None:
        text, self.rest = b"".join(self.rest), []
        if text.strip() or not self.overwritten:
            self.give(text)
        else:
            self.give(self.overwritten)
        self.overwritten = b""


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """A free port of 127.0.0.1 that stays reserved for this user's processes.

    The socket stays bound, but does not listen, with SO_REUSEPORT: JAX's coordinator, a gRPC server
    of the same user, sets that option too and may bind the port; a program without it, and another
    user's, may not, and the system gives the port to nobody who asks for any.
    """
    with socket.socket() as holder:
        if hasattr(socket, "SO_REUSEPORT"):
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


def environment(base: Mapping[str, str], devices: int) -> dict[str, str]:
    """The environment of a process with `devices` virtual CPU devices."""
    env = dict(base)
    env["JAX_PLATFORMS"] = "cpu"
    count = f"--xla_force_host_platform_device_count={devices}"
    env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} {count}".strip()  # the last of two wins
    env["PYTHONUNBUFFERED"] = "1"
    return env


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="local.py", description="Runs N processes of one command on this machine's CPU."
    )
    parser.add_argument("-n", "--processes", type=_positive, required=True)
    parser.add_argument("--devices-per-process", type=_positive, default=1)
    parser.add_argument("--grace", type=float, default=30.0, help="seconds from SIGTERM to SIGKILL")
    given = list(sys.argv[1:] if argv is None else argv)
    split = given.index("--") if "--" in given else len(given)
    options, args = parser.parse_args(given[:split]), given[split + 1 :]
    if not args:
        parser.error("nothing to run: give -- and what follows `python`, e.g. -- -m ferjax.main")
    return Cluster(args, options.processes, options.devices_per_process, options.grace).run()


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return value


def _names(indices: set[int]) -> str:
    return ", ".join(map(str, sorted(indices))) or "none"


def _kill_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def _follow_parent() -> None:
    """Between fork and exec: SIGTERM for this process when the launcher dies."""
    assert _LIBC is not None
    _LIBC.prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))


if __name__ == "__main__":
    sys.exit(main())
