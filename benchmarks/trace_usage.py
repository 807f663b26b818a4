"""How busy the devices were in a profiler trace of a training run, and what they waited for.

    python -m ferjax.main --config=FILE --workdir=DIR --config.profile=100:50
    python benchmarks/trace_usage.py DIR [--table]

Prints one JSON line. Reads the newest trace under DIR/profile (Chrome's format, which JAX writes
beside TensorBoard's). A device is busy while a program runs on it: on a GPU while any of its
streams does, on a TPU by its line of operations. The devices of a CPU count as one, busy while any
of XLA's threads computes: their lines can't be told apart. Only what lies between the first
program's start and the last one's end counts, in milliseconds:

    window        that time
    busy          share of it in which the device computes
    idle          the rest: the device waits for the host
    longest_gap   the longest time without a program
    gaps          how many gaps are longer than 1 ms
"""

import argparse
import collections
import gzip
import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import common

from ferjax.config import UserError

CPU_THREADS, CPU_WORK = "tf_XLA", "ThunkExecutor::Execute"
Span = tuple[float, float]


def main(argv: Sequence[str] | None = None) -> int:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("workdir", type=Path)
    made.add_argument("--table", action="store_true", help="print a table before the JSON line")
    args = made.parse_args(argv)
    file = newest(args.workdir)
    record = {"benchmark": "trace", "devices": utilization(read(file))}
    common.emit(record, args.table)
    return 0


def newest(workdir: Path) -> Path:
    """The newest trace of a run.

    Raises:
      UserError: there is none.
    """
    files = sorted((workdir / "profile").rglob("*.trace.json.gz"))
    if not files:
        raise UserError(f"{workdir}/profile holds no trace: train with --config.profile=100:50")
    return files[-1]


def read(file: Path) -> list[dict[str, Any]]:
    """The events of a trace in Chrome's format."""
    with gzip.open(file, "rt") as text:
        return json.load(text)["traceEvents"]


def utilization(events: Iterable[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The docstring's figures of each device.

    Raises:
      UserError: the trace shows no program on any device.
    """
    events = [event for event in events if "ph" in event]
    names = {"process_name": {}, "thread_name": {}}  # type: dict[str, dict[Any, str]]
    for event in events:
        if event["ph"] == "M" and event["name"] in names:
            names[event["name"]][event["pid"], event.get("tid")] = event["args"]["name"]
    processes = {pid: name for (pid, _), name in names["process_name"].items()}
    spans = collections.defaultdict(list)
    for event in events:
        if event["ph"] != "X":
            continue
        process = processes.get(event["pid"], "")
        thread = names["thread_name"].get((event["pid"], event["tid"]), "")
        if process.startswith("/device:"):
            device = process if thread.startswith(("Stream", "XLA Ops")) else ""
        else:
            works = thread.startswith(CPU_THREADS) and event["name"].startswith(CPU_WORK)
            device = "cpu" if works else ""
        if device:
            spans[device].append((event["ts"], event["ts"] + event["dur"]))
    if not spans:
        raise UserError("the trace shows no program on a device: trace more steps")
    return {device: _figures(merged(found)) for device, found in sorted(spans.items())}


def merged(spans: Iterable[Span]) -> list[Span]:
    """Spans without overlaps, in order."""
    result: list[Span] = []
    for start, end in sorted(spans):
        if result and start <= result[-1][1]:
            result[-1] = result[-1][0], max(end, result[-1][1])
        else:
            result.append((start, end))
    return result


def _figures(spans: list[Span]) -> dict[str, float]:
    """Of spans in microseconds that do not overlap."""
    window = spans[-1][1] - spans[0][0]
    busy = sum(end - start for start, end in spans) / window
    gaps = [after[0] - before[1] for before, after in itertools.pairwise(spans)]
    return {
        "window": window / 1e3,
        "busy": busy,
        "idle": 1 - busy,
        "longest_gap": max(gaps, default=0.0) / 1e3,
        "gaps": sum(gap > 1e3 for gap in gaps),
    }


if __name__ == "__main__":
    common.run(main)
