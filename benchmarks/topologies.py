"""One training on several arrangements of processes and devices: the same losses?

    python benchmarks/topologies.py --config=configs/quickstart.py [--steps=54]
        [--layouts=1x1,1x4,2x2,4x1,1x4+1x1+2x2] [--table] [--config.a.b=value]

PxD is P processes of D virtual CPU devices each; with + a run that is stopped (saved, exit 75) and
goes on from its checkpoint in the next arrangement, in equal parts. Prints one JSON line: for each
layout the loss of the last step, the largest relative difference of any step's loss from the first
layout's, the scores after the last step (public_test, EMA), and the seconds, which say nothing
about speed: all share this machine's cores. With --config.dtype=float64 the losses differ by
rounding alone, and stay within 1e-9; in float32 rounding grows from step to step.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common

from ferjax.config import EXIT_OK, EXIT_PREEMPTED, UserError
from ferjax.engine.metrics import read_rows

ROOT = Path(__file__).parent.parent


def main(argv: Sequence[str] | None = None) -> int:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--config", required=True, help="a config file, or FILE:VARIANT")
    made.add_argument("--steps", type=int, default=54)
    made.add_argument("--layouts", default="1x1,1x4,2x2,4x1,1x4+1x1+2x2")
    made.add_argument("--table", action="store_true", help="print a table before the JSON line")
    args, changes = made.parse_known_args(argv)
    layouts = [(text, [_parse(part) for part in text.split("+")]) for text in _texts(args.layouts)]
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as work:
        for number, (name, parts) in enumerate(layouts):
            workdir = Path(work, str(number))
            began = time.monotonic()
            for place, (processes, devices) in enumerate(parts, 1):
                end = args.steps * place // len(parts)
                train(args.config, changes, workdir, processes, devices, end)
            found[name] = {**figures(workdir), "seconds": round(time.monotonic() - began, 1)}
    first = next(iter(found.values()))["losses"]
    for record in found.values():
        losses = record.pop("losses")
        if len(losses) != len(first):
            raise RuntimeError(f"{len(losses)} losses instead of {len(first)}")
        record["largest_difference"] = max(
            abs(a - b) / abs(b) for a, b in zip(losses, first, strict=True)
        )
    record = {"benchmark": "topologies", "config": args.config, "steps": args.steps}
    common.emit({**record, "changes": changes, "layouts": found}, args.table)
    return EXIT_OK


def _texts(flag: str) -> list[str]:
    return [text for text in flag.split(",") if text]


def _parse(text: str) -> tuple[int, int]:
    processes, _, devices = text.partition("x")
    if not (processes.isdigit() and devices.isdigit() and int(processes) and int(devices)):
        raise UserError(f"--layouts: {text!r} is not PROCESSESxDEVICES, such as 2x2")
    return int(processes), int(devices)


def train(
    config: str, changes: Sequence[str], workdir: Path, processes: int, devices: int, end: int
) -> None:
    """Trains up to the step `end` and saves there.

    Raises:
      RuntimeError: the training failed; holds the end of what it said.
    """
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [
            *(sys.executable, str(ROOT / "launch" / "local.py")),
            *(f"-n={processes}", f"--devices-per-process={devices}", "--"),
            *("-m", "ferjax.main", f"--config={config}", f"--workdir={workdir}", *changes),
            *("--config.log_every=1", f"--config.stop_after_steps={end}"),
        ],
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode not in (EXIT_OK, EXIT_PREEMPTED):
        raise RuntimeError(f"{processes}x{devices}: {done.stdout[-2000:]}{done.stderr[-2000:]}")


def figures(workdir: Path) -> dict[str, Any]:
    """The losses of all steps, the last one, and the last scores on public_test."""
    rows = read_rows(workdir / "metrics.jsonl")
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    scored = [row["ema_accuracy"] for row in rows if row["kind"] == "eval"]
    return {
        "losses": losses,
        "last_loss": losses[-1],
        "ema_accuracy": scored[-1] if scored else None,
    }


if __name__ == "__main__":
    common.run(main)
