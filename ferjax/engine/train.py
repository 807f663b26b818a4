"""The loop: build, restore, step, evaluate, save."""

import json
import logging
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import tqdm
from ml_collections import FrozenConfigDict

from ferjax.analysis import scores
from ferjax.config import EXIT_OK, EXIT_PREEMPTED
from ferjax.engine.checkpoint import Checkpoints
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
    first_process = run.layout.process == 0
    checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoint.keep)
    state = run.init_state()
    _introduce(run, state)
    meta: dict[str, Any] = {"row": {}, "best": None}
    if restored := checkpoints.restore_latest(state):
        state, meta = restored
        log.info("resumed at step %d of %d", int(state.step), run.steps)
    step, best = int(state.step), meta["best"]
    writer = Writer(workdir, step, active=first_process)
    recorder = Recorder(run, writer, meta["row"], checkpoints.latest_step)
    state, data = run.layout.replicate(state), run.device_data()
    logits: dict[str, np.ndarray] = {}
    stop_signal = _StopSignal()
    started = saved_at = time.monotonic()
    bar = tqdm.tqdm(
        total=run.steps, initial=step, unit="step", disable=not first_process, smoothing=0.05
    )
    try:
        while step < run.steps:
            end = run.next_stop(step)
            state, metrics = run.call(state, step, end, data)
            recorder.add(step, metrics)
            recorder.read(CALLS_IN_FLIGHT)
            bar.update(end - step)
            bar.set_postfix(recorder.shown, refresh=False)
            step = end
            minutes = (time.monotonic() - started) / 60
            stop = bool(stop_signal) or step == config.stop_after_steps
            stop = stop or 0 < config.stop_after_minutes <= minutes
            accuracy = None
            if step == run.steps or step % (run.per_epoch * config.evaluate.every_epochs) == 0:
                recorder.read(0)
                logits = run.evaluate(state)
                accuracy, best = _score(run, writer, logits, step, best, started)
                bar.write(_epoch_line(run, step, logits, best))
                recorder.restart_clock()
            due = time.monotonic() - saved_at > 60 * config.checkpoint.every_minutes
            if accuracy is not None or stop or due:
                recorder.read(0)
                meta = {"row": recorder.to_json(), "best": best}
                checkpoints.save(host(state), meta, accuracy)
                saved_at = time.monotonic()
            if stop and step < run.steps:
                log.info("stopped at step %d of %d, saved: start again to go on", step, run.steps)
                return EXIT_PREEMPTED
        bar.close()
        _finish(run, logits or run.evaluate(state), best)
        return EXIT_OK
    finally:
        bar.close()
        checkpoints.close()
        writer.close()
        stop_signal.restore()


def _introduce(run: Experiment, state: Any) -> None:
    """Prints the parameters, the devices, the data and the length of the run."""
    config = run.config
    unlabeled = len(run.subsets.unlabeled) if run.algorithm.mu else 0
    log.info("%s", parameter_table(state.params))
    log.info("devices: %s", run.layout.describe())
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
    if config.cpu_config and run.layout.platform == "cpu":
        log.info(
            "this config is sized for a GPU or TPU: on this CPU see the time left below, and try "
            "--config=%s instead",
            config.cpu_config,
        )


def _score(
    run: Experiment,
    writer: Writer,
    logits: dict[str, np.ndarray],
    step: int,
    best: dict[str, Any] | None,
    started: float,
) -> tuple[float, dict[str, Any]]:
    """Writes the row of an evaluation; the EMA's accuracy and the best so far."""
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
    return accuracy, best


def _epoch_line(
    run: Experiment, step: int, logits: dict[str, np.ndarray], best: dict[str, Any]
) -> str:
    labels = run.dataset.splits[SELECTION_SPLIT].labels
    ema, raw = (100 * scores.accuracy(logits[name], labels) for name in ("ema", "raw"))
    return (
        f"epoch {step // run.per_epoch:3d}/{run.config.epochs}  {SELECTION_SPLIT}: "
        f"EMA {ema:.2f} %, raw {raw:.2f} %, best EMA {100 * best['accuracy']:.2f} %"
    )


def _finish(run: Experiment, logits: dict[str, np.ndarray], best: dict[str, Any]) -> None:
    """Prints the table of the final EMA weights and where everything is."""
    if run.layout.process:
        return
    config, workdir = run.config, run.workdir
    labels = run.dataset.splits[SELECTION_SPLIT].labels
    summary = scores.summarize(logits["ema"], labels, run.dataset.class_names)
    (workdir / "eval").mkdir(exist_ok=True)
    record = {"split": SELECTION_SPLIT, "step": run.steps, "weights": "ema", **summary}
    (workdir / "eval" / "final.json").write_text(json.dumps(record, indent=2) + "\n")
    log.info("\n%s, final EMA weights\n%s", SELECTION_SPLIT, scores.table(summary))
    log.info(
        "\nbest EMA on %s: %.2f %% at epoch %d",
        *(SELECTION_SPLIT, 100 * best["accuracy"], best["step"] // run.per_epoch),
    )
    log.info("written to %s: config, split, metrics.jsonl, checkpoints, eval, logs", workdir)
    evaluate = f"python -m ferjax.evaluate --workdir={workdir} --split=private_test"
    log.info("next: %s", config.next_command or evaluate)


class _StopSignal:
    """True once SIGTERM, SIGUSR1 or SIGINT has arrived; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self._seen = False
        self._old: dict[int, Any] = {}
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            self._old[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        del frame
        self._seen = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __bool__(self) -> bool:
        return self._seen

    def restore(self) -> None:
        """Puts the former handlers back."""
        for number, handler in self._old.items():
            signal.signal(number, handler)
