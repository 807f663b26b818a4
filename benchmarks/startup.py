"""Seconds from the command to the first step, cold and warm; data preparation; checkpoints.

    python benchmarks/startup.py [--config=FILE[:VARIANT]] [--rounds=3] [--data-dir=DIR] [--table]
        [--config.a.b=value]

Prints one JSON line. Every start is `python -m ferjax.main` in a process of its own, with temporary
directories for the run, the data and JAX's persistent compilation cache; after its first step it
gets a SIGTERM, saves and ends. Without --data-dir the data set is prepared first (and timed);
FER2013 needs its source (FER2013_SOURCE) or a download. What is counted, in seconds, median and
extremes of --rounds rounds:

    prepare       `python -m ferjax.data.prepare` into an empty directory, and again where all is
                  there: read and verified
    imports       a Python that imports ferjax.main and ends
    cold          a new workdir, an empty compilation cache
    warm          a new workdir, the cache that the cold start filled
    restart       the warm start's workdir once more: restored from its checkpoint, the same cache
    *.first_step  from the command to the row of the first call's metrics in metrics.jsonl
    *.ready       from the command to ferjax's log line that names the devices: the interpreter,
                  imports, config, data, initial weights
    *.first_call  between the two: a checkpoint's restoration, tracing, compilation or a look into
                  the cache, the data to the devices, one call of K steps
    *.stop        from the SIGTERM to the end: the calls in flight, saving a checkpoint
    warm_ratio, restart_ratio   of first_step, against the cold start of the same round
    cache_mb      what the cache holds after a cold start
    checkpoint    in this process, of the config's state on its devices: `blocked`, what training
                  waits for (the copy to the host, the check for NaN, checksums, Orbax's own part);
                  `on_disk`, from the same moment until it is finished; `restore`, read and
                  verified; `mb` on disk

Both ends are read by the same clock. The row is looked for every 5 ms, which is the error.
"""

import argparse
import datetime
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import common
import jax
import numpy as np
from ml_collections import FrozenConfigDict
from scaling import Step

from ferjax.config import EXIT_OK, EXIT_PREEMPTED, EXIT_USER_ERROR, UserError
from ferjax.engine.checkpoint import Checkpoints, restore_latest
from ferjax.engine.metrics import Recorder
from ferjax.engine.parallel import host

ROOT = Path(__file__).parent.parent
POLL = 0.005  # seconds


def environment(data: Path, cache: Path) -> dict[str, str]:
    """This process's environment with these directories; nothing else says what is kept."""
    mine = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("JAX_COMPILATION_CACHE", "JAX_PERSISTENT_CACHE"))
        and name not in ("JAX_ENABLE_COMPILATION_CACHE", "PYTHONDONTWRITEBYTECODE")
    }
    return {**mine, "TFDS_DATA_DIR": str(data), "XDG_CACHE_HOME": str(cache)}


def finish(process: subprocess.Popen, errors: Path, allowed: Sequence[int] = (EXIT_OK,)) -> None:
    """Waits for a command.

    Raises:
      UserError: it says that what it was given is wrong.
      RuntimeError: it failed; with the end of what it wrote to stderr.
    """
    status = process.wait()
    if status in allowed:
        return
    text = errors.read_text()
    if status == EXIT_USER_ERROR:
        raise UserError(text.strip().splitlines()[-1].removeprefix("ferjax: "))
    raise RuntimeError(f"{process.args} ended with {status}:\n{text[-3000:]}")


def command(arguments: Sequence[str], work: Path, env: dict[str, str]) -> float:
    """Seconds that `python ARGUMENTS` takes."""
    errors = work / "stderr"
    began = time.perf_counter()
    with errors.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=file
        )
        finish(process, errors)
    return time.perf_counter() - began


def start(arguments: Sequence[str], workdir: Path, env: dict[str, str]) -> dict[str, float]:
    """Starts `python -m ferjax.main ARGUMENTS` in a workdir and times it: see the docstring."""
    metrics, log = workdir / "metrics.jsonl", workdir / "logs" / "process_0.log"
    errors = workdir.with_suffix(".stderr")
    rows = _lines(metrics)
    logged = _lines(log)
    full = [sys.executable, "-m", "ferjax.main", *arguments, f"--workdir={workdir}"]
    with errors.open("w") as file:
        began = time.time()
        process = subprocess.Popen(full, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=file)
        try:
            while _lines(metrics) <= rows and process.poll() is None:
                time.sleep(POLL)
            first = time.time()
            process.terminate()
            finish(process, errors, (EXIT_OK, EXIT_PREEMPTED))
        finally:
            process.kill()
            process.wait()
    ended = time.time()
    if _lines(metrics) <= rows:
        raise UserError(f"{workdir.name}: the run ended without a step: set more config.epochs")
    ready = first_moment(log.read_text().splitlines()[logged:], "devices: ")
    return {
        "first_step": first - began,
        "ready": ready - began,
        "first_call": first - ready,
        "stop": ended - first,
    }


def first_moment(lines: Sequence[str], message: str) -> float:
    """When, in seconds since the epoch, the first log line whose message begins so was written.

    Raises:
      RuntimeError: there is none.
    """
    pattern = rf"(\d+-\d+-\d+ \d+:\d+:\d+),(\d+) \w+ ferjax: {re.escape(message)}"
    for line in lines:
        if found := re.match(pattern, line):
            moment = datetime.datetime.strptime(found[1], "%Y-%m-%d %H:%M:%S")
            return moment.timestamp() + int(found[2]) / 1000
    raise RuntimeError(f"no log line {message!r}")


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def starts(arguments: Sequence[str], data: Path, work: Path, rounds: int) -> common.Record:
    """Cold, warm and restart, in every round, and their ratios."""
    found: dict[str, list[dict[str, float]]] = {"cold": [], "warm": [], "restart": []}
    imports, sizes = [], []
    # Python's own files of compiled modules are no part of it.
    command(["-c", "import ferjax.main"], work, environment(data, work))
    for number in range(rounds):
        cache = work / f"cache{number}"
        env = environment(data, cache)
        for kind in found:
            # The restart goes on in the warm start's workdir.
            workdir = work / f"{'cold' if kind == 'cold' else 'warm'}{number}"
            found[kind].append(start([*arguments, "--config.log_every=1"], workdir, env))
            if kind == "cold":
                sizes.append(_megabytes(cache))
        imports.append(command(["-c", "import ferjax.main"], work, env))

    def ratio(kind: str) -> common.Record:
        return common.ratios(*([x["first_step"] for x in found[k]] for k in (kind, "cold")))

    return {
        "imports": common.median_spread(imports),
        **{
            kind: {key: common.median_spread([x[key] for x in each]) for key in each[0]}
            for kind, each in found.items()
        },
        "warm_ratio": ratio("warm"),
        "restart_ratio": ratio("restart"),
        "cache_mb": common.median_spread(sizes),
    }


def prepare(config: FrozenConfigDict, data: Path, work: Path) -> common.Record:
    """Prepares the config's data set into an empty directory, then finds it prepared."""
    arguments = ["-m", "ferjax.data.prepare", f"--dataset={config.data.name}"]
    if config.data.source:
        arguments.append(f"--data.source={os.path.abspath(config.data.source)}")
    env = environment(data, work / "unused")
    names = ("prepare", "prepared_before")
    return {f"{name}_seconds": command(arguments, work, env) for name in names}


def checkpoint(config: FrozenConfigDict, work: Path, rounds: int) -> common.Record:
    """Times saving and restoring of the state that the config's training has."""
    setup = Step(config, images=512)
    template = setup.init_state()
    on_devices = setup.layout.replicate(template)
    recorder = Recorder(setup, None, {}, lambda: None)  # type: ignore[arg-type]
    saving = Checkpoints(work / "run" / "checkpoints", config.checkpoint.keep)
    blocked, on_disk, restore = [], [], []
    for number in range(rounds + 1):
        began = time.perf_counter()
        state = host(on_devices)
        recorder.check_state(state)
        state = state.replace(step=np.int32(number + 1))
        saving.save(state, {"row": {}, "best": None}, accuracy=None)
        blocked.append(time.perf_counter() - began)
        saving.wait()
        on_disk.append(time.perf_counter() - began)
    saving.close()
    for _ in range(rounds):
        began = time.perf_counter()
        if restore_latest(work / "run", template) is None:
            raise RuntimeError("what was saved is not there")
        restore.append(time.perf_counter() - began)
    kept = max((work / "run" / "checkpoints").iterdir(), key=lambda path: int(path.name))
    # The first save starts Orbax's threads.
    return {
        "numbers": sum(x.size for x in jax.tree.leaves(template)),
        "mb": _megabytes(kept),
        "first_blocked_seconds": blocked[0],
        "blocked_seconds": common.median_spread(blocked[1:]),
        "on_disk_seconds": common.median_spread(on_disk[1:]),
        "restore_seconds": common.median_spread(restore),
    }


def _megabytes(directory: Path) -> float:
    return sum(p.stat().st_size for p in directory.rglob("*") if p.is_file()) / 1e6


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", default=str(ROOT / "configs" / "quickstart.py"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--data-dir", help="where the data set is prepared already")
    parser.add_argument("--table", action="store_true", help="print a table before the JSON line")
    args, config = common.parse(parser, argv)
    path, *variant = args.config.split(":", 1)
    overrides = [text for text in argv if text.startswith("--config.")]
    arguments = [f"--config={':'.join([os.path.abspath(path), *variant])}", *overrides]
    record: common.Record = {"benchmark": "startup", "config": args.config, "rounds": args.rounds}
    with tempfile.TemporaryDirectory(prefix="ferjax_startup_") as directory:
        work = Path(directory)
        data = Path(args.data_dir).absolute() if args.data_dir else work / "tfds"
        if not args.data_dir:
            record["data"] = prepare(config, data, work)
        record |= starts(arguments, data, work, args.rounds)
        # Last: from here on this process has the device.
        record["machine"] = common.machine()
        record["checkpoint"] = checkpoint(config, work, args.rounds)
    common.emit(record, args.table)


if __name__ == "__main__":
    common.run(main)
