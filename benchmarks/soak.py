"""SIGKILL at random moments: does a run that is killed again and again lose anything?

    python benchmarks/soak.py [--kills=50] [--seed=0] [--signal=KILL|TERM] [--table]

Trains a small network on synthetic faces twice: undisturbed, and killed `--kills` times at moments
drawn from 0 to a few seconds after its first step of a start, so that imports, data, restoring,
compilation, steps, evaluations and saves are all hit. After each kill every finished checkpoint is
read and its checksums verified, and metrics.jsonl is read. At the end parameters, EMA, statistics,
optimizer state and metrics rows (clock fields aside) must equal the undisturbed run's bit for bit.
About 10 s a kill on two CPU cores. Exit status 1 if anything was lost, doubled or changed.

--signal=TERM asks the run to stop instead, as a preemption does: once it has taken the workdir it
must save and exit with 75; `stop_s` are the seconds that this took (median and longest) by what it
was doing. Before its handlers are there ("importing") a SIGTERM ends it at once.
"""

import argparse
import collections
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import emit, machine

from ferjax.config import EXIT_PREEMPTED
from ferjax.engine import checkpoint
from ferjax.engine.metrics import CLOCK_FIELDS, read_rows

ROOT = Path(__file__).parent.parent
RUN = (
    f"--config={ROOT}/configs/quickstart.py",
    "--config.data.name=synthetic_faces/tiny",
    "--config.data.labeled=4/class",
    "--config.model.layers=('conv 8 3 nobias','bn','relu','maxpool 4','gap','dropout 0.2')",
    "--config.views.strong.policy=weak",
    "--config.batch_size=8",
    "--config.algorithm.mu=1",
    "--config.log_every=7",
    "--config.evaluate.every_epochs=3",
    "--config.checkpoint.every_minutes=0.01",
)

DEVICES = b"ferjax: devices: "


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--epochs", type=int, default=0, help="0: 30 for each kill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signal", choices=["KILL", "TERM"], default="KILL")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    run = (*RUN, f"--config.epochs={args.epochs or 30 * args.kills}")
    with tempfile.TemporaryDirectory() as work:
        whole, killed = Path(work, "whole"), Path(work, "killed")
        began = time.monotonic()
        status = start(run, whole).wait()
        undisturbed = time.monotonic() - began
        if status:
            raise SystemExit(f"the undisturbed run ended with status {status}")
        number = signal.Signals[f"SIG{args.signal}"]
        times, problems = soak(run, killed, args.kills, number, random.Random(args.seed))
        problems += differences(whole, killed)
        steps = read_rows(whole / "metrics.jsonl")[-1]["step"]
    record = {
        "benchmark": "soak",
        "signal": args.signal,
        "kills": sum(map(len, times.values())),
        "hit": {where: len(found) for where, found in times.items()},
        "stop_s": {
            where: {"median": round(statistics.median(found), 2), "longest": round(max(found), 2)}
            for where, found in times.items()
        },
        "steps": steps,
        "undisturbed_s": round(undisturbed, 1),
        "problems": problems,
        **machine(),
    }
    emit(record, args.table)
    return 1 if problems else 0


def start(run: tuple[str, ...], workdir: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "ferjax.main", *run, f"--workdir={workdir}"],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def soak(
    run: tuple[str, ...], workdir: Path, kills: int, number: signal.Signals, draw: random.Random
) -> tuple[dict[str, list[float]], list[str]]:
    """Sends `kills` signals, then lets the run end; (seconds to the end by place, problems)."""
    times: dict[str, list[float]] = collections.defaultdict(list)
    problems: list[str] = []
    startup = 10.0  # seconds to the first new row; measured at each start that got so far
    while sum(map(len, times.values())) < kills:
        process, began = start(run, workdir), time.monotonic()
        before, known = newest(workdir), len(lines(workdir))
        after = draw.uniform(0, startup) if draw.random() < 0.4 else None
        deadline = began + after if after else None
        while process.poll() is None and (deadline is None or time.monotonic() < deadline):
            if deadline is None and newest(workdir) > before:
                startup = time.monotonic() - began
                deadline = time.monotonic() + draw.uniform(0, 3)
            time.sleep(0.005)
        if (status := process.poll()) is not None:
            problems.append(f"a start ended with status {status} before its signal: more --epochs?")
            return times, problems
        where, sent = phase(workdir, before), time.monotonic()
        handled = DEVICES in lines(workdir)[known:]  # a line that comes after the handlers
        process.send_signal(number)
        status = process.wait()
        allowed = {-number} if number == signal.SIGKILL else {EXIT_PREEMPTED}
        if not handled and status == -number:
            where, allowed = "importing", {-number}
        times[where].append(time.monotonic() - sent)
        if status not in allowed:
            problems.append(f"status {status} after {number.name} while {where}")
        for path in checkpoint.saved(workdir):
            try:
                checkpoint.read(path)
            except checkpoint.DamagedError as error:
                problems.append(str(error))
    if status := start(run, workdir).wait():
        problems.append(f"the last start ended with status {status}")
    if (workdir / "damaged").exists():
        problems.append("a checkpoint was found damaged")
    return times, problems


def newest(workdir: Path) -> int:
    """The newest saved step."""
    return max((int(path.name) for path in checkpoint.saved(workdir)), default=0)


def lines(workdir: Path) -> bytes:
    """The log of the run so far."""
    log = workdir / "logs" / "process_0.log"
    return log.read_bytes() if log.exists() else b""


def phase(workdir: Path, before: int) -> str:
    """What a running trainer is doing, as far as its files tell."""
    if list(workdir.glob("checkpoints/*.orbax-checkpoint-tmp*")):
        return "saving"
    return "training or evaluating" if newest(workdir) > before else "starting"


def differences(whole: Path, killed: Path) -> list[str]:
    """How the killed run differs from the undisturbed one."""
    found = []
    sums = [
        checkpoint.checksums(checkpoint.read(checkpoint.choose(w, "latest"))[0])
        for w in (whole, killed)
    ]
    found += [f"{name} differs" for name in sums[0] if sums[0][name] != sums[1].get(name)]
    rows = [
        [
            json.dumps({k: v for k, v in row.items() if k not in CLOCK_FIELDS})
            for row in read_rows(w / "metrics.jsonl")
        ]
        for w in (whole, killed)
    ]
    if rows[0] != rows[1]:
        missing, extra = set(rows[0]) - set(rows[1]), set(rows[1]) - set(rows[0])
        found.append(
            f"metrics rows: {len(missing)} lost, {len(extra)} changed, {len(rows[1])} of "
            f"{len(rows[0])}"
        )
    return found


if __name__ == "__main__":
    sys.exit(main())
