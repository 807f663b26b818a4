"""The loop: build, restore, step, evaluate, save."""

import contextlib
import logging
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tqdm
from ml_collections import FrozenConfigDict
from tqdm.contrib.logging import logging_redirect_tqdm

from ferjax.analysis import scores
from ferjax.config import EXIT_OK, EXIT_PREEMPTED, write_json
from ferjax.engine.checkpoint import Checkpoints, restore_latest
from ferjax.engine.experiment import SELECTION_SPLIT, Experiment
from ferjax.engine.metrics import Recorder, Writer, count_parameters, parameter_table
from ferjax.engine.parallel import host

log = logging.getLogger("ferjax")

CALLS_IN_FLIGHT = 2  # how far the host may run ahead of the metrics that it has read


def train(config: FrozenConfigDict, workdir: Path) -> int:
    """Trains to the end of the schedule, or until told to stop.

    Returns:
      The exit status: 0 done, 75 stopped early after saving.

    Raises:
      UserError: see `Experiment`.
      NotFiniteError: training has diverged; nothing was saved after it.
    """
    run = Experiment(config, workdir)
    state = run.init_state()
    run.claim_workdir()
    _introduce(run, state)
    meta: dict[str, Any] = {"row": {}, "best": None}
    if restored := restore_latest(workdir, state):
        state, meta = restored
        log.info("resumed at step %d of %d", int(state.step), run.steps)
    step, best = int(state.step), meta["best"]
    logits: dict[str, np.ndarray] = {}
    marks: list[float] = []
    started = saved_at = time.monotonic()
    with contextlib.ExitStack() as stack:
        stop_signal = stack.enter_context(_StopSignal())
        writer = Writer(workdir, step, active=run.layout.process == 0)
        stack.callback(writer.close)
        checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoint.keep)
        stack.callback(checkpoints.close)
        recorder = Recorder(run, writer, meta["row"], checkpoints.latest_step)
        bar = stack.enter_context(_progress_bar(run, step))
        state, data = run.layout.replicate(state), run.device_data()
        while step < run.steps:
            end = run.next_stop(step)
            state, metrics = run.call(state, step, end, data)
            recorder.add(step, metrics)
            recorder.read(CALLS_IN_FLIGHT)
            if config.cpu_config and run.layout.platform == "cpu" and len(marks) < 2:
                recorder.read(0)
                marks.append(time.monotonic())
                _advise(run, marks, end)
            bar.update(end - step)
            bar.set_postfix(recorder.shown, refresh=False)
            step = end
            minutes = (time.monotonic() - started) / 60
            stop = bool(stop_signal) or step == config.stop_after_steps
            stop = stop or 0 < config.stop_after_minutes <= minutes
            accuracy = None
            ends = step == run.steps or step % (run.per_epoch * config.evaluate.every_epochs) == 0
            due = time.monotonic() - saved_at > 60 * config.checkpoint.every_minutes
            if not (ends or due or stop):
                continue
            recorder.read(0)
            with recorder.pause():
                saved_state = host(state)
                recorder.check_state(saved_state)
                if ends:
                    logits = run.evaluate(state)
                    accuracy, best = _score(run, writer, logits, step, best, started)
                meta = {"row": recorder.to_json(), "best": best}
                checkpoints.save(saved_state, meta, accuracy)
                saved_at = time.monotonic()
            if stop and step < run.steps:
                checkpoints.wait()
                log.info("stopped at step %d of %d, saved: start again to go on", step, run.steps)
                return EXIT_PREEMPTED
        checkpoints.wait()
        bar.close()
        _finish(run, logits or run.evaluate(state), best)
    return EXIT_OK


@contextlib.contextmanager
def _progress_bar(run: Experiment, step: int) -> Iterator[tqdm.tqdm]:
    """A bar with the time left, on process 0; log lines are written above it."""
    bar = tqdm.tqdm(
        total=run.steps,
        initial=step,
        unit="step",
        disable=run.layout.process > 0,
        smoothing=0.05,
    )
    with bar, logging_redirect_tqdm([log]):
        yield bar


def _introduce(run: Experiment, state: Any) -> None:
    """Prints the parameters, the devices, the data and the length of the run."""
    config = run.config
    unlabeled = len(run.subsets.unlabeled) if run.algorithm.mu else 0
    log.info("%s", parameter_table(state.params))
    for line in run.layout.describe():
        log.info("%s", line)
    log.info(
        "data: %s, %s labelled and %s unlabelled images; split %s",
        *(config.data.name, f"{len(run.subsets.labeled):,}", f"{unlabeled:,}"),
        run.subsets.digest[:12],
    )
    log.info(
        "training: %s, %s with %s parameters, %d epochs of %d steps",
        *(config.algorithm.name, config.model.name, f"{count_parameters(state.params):,}"),
        *(config.epochs, run.per_epoch),
    )


def _advise(run: Experiment, marks: list[float], step: int) -> None:
    """Once a step has been timed: what the run will take on this CPU, and what to try instead."""
    if len(marks) < 2:
        return  # the first step was compiled
    hours = (marks[1] - marks[0]) * (run.steps - step) / 3600
    log.info(
        "this config is sized for a GPU or TPU: on this CPU it will take about %.1f hours; try "
        "--config=%s",
        *(hours, run.config.cpu_config),
    )


def _score(
    run: Experiment,
    writer: Writer,
    logits: dict[str, np.ndarray],
    step: int,
    best: dict[str, Any] | None,
    started: float,
) -> tuple[float, dict[str, Any]]:
    """Writes and logs an evaluation; gives the EMA's accuracy and the best so far."""
    labels = run.dataset.splits[SELECTION_SPLIT].labels
    row = {
        f"{name}_{key}": value
        for name, values in logits.items()
        for key, value in scores.brief(values, labels).items()
    }
    seconds = {"seconds": time.monotonic() - started}
    writer.write({"kind": "eval", "step": step, "epoch": step / run.per_epoch, **row, **seconds})
    accuracy = row["ema_accuracy"]
    if best is None or accuracy >= best["accuracy"]:
        best = {"accuracy": accuracy, "step": step}
    log.info(
        "epoch %3d/%d  %s: EMA %.2f %%, raw %.2f %%, best EMA %.2f %%",
        *(step // run.per_epoch, run.config.epochs, SELECTION_SPLIT),
        *(100 * x for x in (accuracy, row["raw_accuracy"], best["accuracy"])),
    )
    return accuracy, best


def _finish(run: Experiment, logits: dict[str, np.ndarray], best: dict[str, Any]) -> None:
    """Prints the table of the final EMA weights and where everything is."""
    if run.layout.process:
        return
    config, workdir = run.config, run.workdir
    labels = run.dataset.splits[SELECTION_SPLIT].labels
    summary = scores.summarize(logits["ema"], labels, run.dataset.class_names)
    (workdir / "eval").mkdir(exist_ok=True)
    record = {"split": SELECTION_SPLIT, "step": run.steps, "weights": "ema", **summary}
    write_json(workdir / "eval" / "final.json", record, indent=2)
    log.info("\n%s, final EMA weights\n%s", SELECTION_SPLIT, scores.table(summary))
    log.info(
        "\nbest EMA on %s: %.2f %% at epoch %d",
        *(SELECTION_SPLIT, 100 * best["accuracy"], best["step"] // run.per_epoch),
    )
    log.info("written to %s: config, split, metrics.jsonl, checkpoints, eval, logs", workdir)
    evaluate = f"python -m ferjax.evaluate --workdir={workdir} --split=private_test"
    log.info("next: %s", config.next_command or evaluate)


class _StopSignal:
    """True once SIGTERM, SIGUSR1 or SIGINT has arrived; a SIGINT after that interrupts at once."""

    def __init__(self) -> None:
        self._seen = False
        self._old: dict[int, Any] = {}

    def __enter__(self) -> "_StopSignal":
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        del frame
        self._seen = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __bool__(self) -> bool:
        return self._seen
