"""The loop: build, restore, step, evaluate, save."""

import contextlib
import logging
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import tqdm
from etils import epath
from ml_collections import FrozenConfigDict
from tqdm.contrib.logging import logging_redirect_tqdm

from ferjax.analysis import scores
from ferjax.config import EXIT_FAILED, EXIT_OK, EXIT_PREEMPTED, write_json
from ferjax.engine import starts
from ferjax.engine.checkpoint import Checkpoints, restore_latest
from ferjax.engine.evaluation import Interrupted
from ferjax.engine.experiment import Experiment
from ferjax.engine.metrics import Recorder, Writer, count_parameters, parameter_table
from ferjax.engine.parallel import Polls, host
from ferjax.engine.profiler import Profiler
from ferjax.engine.stop_signal import StopSignal
from ferjax.engine.training_data import SELECTION_SPLIT
from ferjax.workdir import reason, write_errors

log = logging.getLogger("ferjax")

_NOTHING = contextlib.nullcontext()
CALLS_IN_FLIGHT = 2  # how far the host may run ahead of the metrics that it has read


def train(config: FrozenConfigDict, workdir: epath.Path) -> int:
    """Trains to the end of the schedule, or until told to stop.

    Returns:
      The exit status: 0 done, 75 stopped early after saving, 1 at the end of a full disk.

    Raises:
      UserError: see `Experiment`.
      NotFiniteError: training has diverged; nothing was saved after it.
      DamagedError: there are checkpoints, but none is whole.
      LostLockError: another trainer has taken the workdir over.
    """
    with contextlib.ExitStack() as stack:
        stop_signal = stack.enter_context(_StopSignal())
        run = Experiment(config, workdir)
        stack.callback(run.close)
        trainer = _Trainer(run, stop_signal, stack)
        going = True
        if trainer.unscored:  # its evaluation was cut off
            going = trainer.save(evaluate=True)
        while going and trainer.step < run.steps:
            stop, due = trainer.advance()
            evaluate = run.evaluates_at(trainer.step)
            if evaluate or due or stop:
                going = trainer.save(evaluate=evaluate) and not stop
        trainer.checkpoints.wait()
        if trainer.step < run.steps or trainer.unscored:
            if trainer.checkpoints.failed:
                log.error("stopped at step %d of %d, not saved", *trainer.progress)
                return EXIT_FAILED
            log.info("stopped at step %d of %d, saved: start again to go on", *trainer.progress)
            return EXIT_PREEMPTED
        whole = trainer.finish()
        if trainer.checkpoints.failed or not whole:
            log.error("not all of the end is saved: free some room, and start again")
            return EXIT_FAILED
    return EXIT_OK


class _Trainer:
    """The state on its way through the steps, and everything that is kept of it."""

    def __init__(self, run: Experiment, stop_signal: "_StopSignal", stack: Any) -> None:
        config, workdir = run.config, run.workdir
        self._run, self._stop_signal = run, stop_signal
        self._profiler = Profiler(config.profile, workdir / "profile")
        stack.callback(self._profiler.close)
        state = run.init_state()
        stack.callback(run.lock.release)  # does nothing without the lock
        run.claim_workdir()
        _introduce(run, state)
        meta: dict[str, Any] = {"row": {}, "best": None}
        if restored := restore_latest(workdir, state):
            state, meta = restored
            log.info("resumed at step %d of %d", int(state.step), run.steps)
        elif isinstance(state.step, jax.ShapeDtypeStruct):  # another trainer's was there, and went
            state = run.init_state()
        self.step, self._best = int(state.step), meta["best"]
        self._first = self.step
        self.unscored = bool(meta.get("unscored"))
        self._logits: dict[str, np.ndarray] = {}
        self._marks: list[float] = []
        active = run.layout.process == 0
        if active:
            starts.record(workdir, run.layout, self.step)
        self._writer = Writer(workdir, self.step, active=active, unscored=self.unscored)
        stack.callback(self._writer.close)
        self.checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoint.keep)
        stack.callback(self.checkpoints.close)
        self._recorder = Recorder(run, self._writer, meta["row"], self.checkpoints.latest_step)
        # With the recorder's, so that the rows of both have one clock.
        self._started = self._saved_at = time.monotonic()
        self._bar = stack.enter_context(_progress_bar(run, self.step))
        self._state, self._data = run.layout.replicate(state), run.device_data()
        self._polls = Polls(run.layout)

    @property
    def progress(self) -> tuple[int, int]:
        """Steps done, and in all."""
        return self.step, self._run.steps

    def advance(self) -> tuple[bool, bool]:
        """Makes one call; returns whether all processes are to stop, and to save."""
        run, config = self._run, self._run.config
        run.lock.check()  # a trainer that was taken over writes no more rows
        end = run.next_stop(self.step)
        now = time.monotonic()
        timed_out = 0 < config.stop_after_minutes <= (now - self._started) / 60
        due = now - self._saved_at > 60 * config.checkpoint.every_minutes
        wishes = [bool(self._stop_signal) or timed_out, due]
        self._profiler.before(self.step, end)
        self._state, metrics, agreed = run.call(self._state, self.step, end, self._data, wishes)
        self._recorder.add(self.step, metrics)
        if self._profiler.ends(end):
            self._recorder.read(0)
            self._profiler.close()
        # The first call is waited for: whether training goes at all is seen as soon as can be.
        self._recorder.read(CALLS_IN_FLIGHT if self.step > self._first else 0)
        if config.cpu_config and run.layout.platform == "cpu" and len(self._marks) < 2:
            self._recorder.read(0)
            self._marks.append(time.monotonic())
            _advise(run, self._marks, (run.steps - end) / (end - self.step))
        self._bar.update(end - self.step)
        self._bar.set_postfix(self._recorder.shown, refresh=False)
        self.step = end
        stop, due = self._polls.agree(wishes, agreed)
        return stop or end == config.stop_after_steps, due

    def save(self, *, evaluate: bool) -> bool:
        """Scores the state if asked to, and saves it; False if a signal cut the scoring off."""
        self._recorder.read(0)
        with self._recorder.pause():
            saved_state = host(self._state)
            self._recorder.check_state(saved_state)
            self._run.lock.check()
            accuracy, self.unscored = None, False
            if evaluate:
                try:
                    accuracy = self._score()
                except Interrupted:
                    self.unscored = True
            meta = {
                "row": self._recorder.to_json(),
                "best": self._best,
                "unscored": self.unscored,
            }
            self._polls.forget(1)  # else each save would be repeated for the calls in flight
            self.checkpoints.save(saved_state, meta, accuracy, self._writer.flush)
            self._saved_at = time.monotonic()
        return not self.unscored

    def _score(self) -> float:
        """Evaluates on public_test, writes and logs the row; gives the EMA's accuracy."""
        run = self._run
        self._logits = run.evaluate(self._state, lambda: bool(self._stop_signal))
        run.lock.check()  # scoring may have taken minutes
        labels = run.dataset.splits[SELECTION_SPLIT].labels
        row = {
            f"{name}_{key}": value
            for name, values in self._logits.items()
            for key, value in scores.brief(values, labels).items()
        }
        where = {"kind": "eval", "step": self.step, "epoch": self.step / run.per_epoch}
        self._writer.write({**where, **row, "seconds": time.monotonic() - self._started})
        self._writer.write_images(self.step, self._draw)
        accuracy = row["ema_accuracy"]
        if self._best is None or accuracy >= self._best["accuracy"]:
            self._best = {"accuracy": accuracy, "step": self.step}
        log.info(
            "epoch %3d/%d  %s: EMA %.2f %%, raw %.2f %%, best EMA %.2f %%",
            *(self.step // run.per_epoch, run.config.epochs, SELECTION_SPLIT),
            *(100 * x for x in (accuracy, row["raw_accuracy"], self._best["accuracy"])),
        )
        return accuracy

    def _draw(self) -> dict[str, np.ndarray]:
        """What the EMA weights say of public_test, as pictures."""
        from ferjax.analysis import boards  # Matplotlib's start takes a while

        dataset = self._run.dataset
        split = dataset.splits[SELECTION_SPLIT]
        return boards.draw(self._logits["ema"], split.images, split.labels, dataset.class_names)

    def finish(self) -> bool:
        """Prints the table of the final EMA weights; False if a full disk did not take it."""
        self._bar.close()
        run, config, workdir = self._run, self._run.config, self._run.workdir
        logits = self._logits or run.evaluate(self._state)
        if run.layout.process:
            return True
        run.lock.check()
        labels = run.dataset.splits[SELECTION_SPLIT].labels
        summary = scores.summarize(logits["ema"], labels, run.dataset.class_names)
        record = {"split": SELECTION_SPLIT, "step": run.steps, "weights": "ema", **summary}
        whole = True
        try:
            (workdir / "eval").mkdir(exist_ok=True)
            write_json(workdir / "eval" / "final.json", record, indent=2)
        except write_errors(workdir) as error:  # the scores are still printed
            log.warning("%s/eval/final.json can't be written: %s", workdir, reason(error))
            whole = False
        log.info("\n%s, final EMA weights\n%s", SELECTION_SPLIT, scores.table(summary))
        log.info(
            "\nbest EMA on %s: %.2f %% at epoch %d",
            *(SELECTION_SPLIT, 100 * self._best["accuracy"], self._best["step"] // run.per_epoch),
        )
        log.info("written to %s: config, split, metrics.jsonl, checkpoints, eval, logs", workdir)
        report = f"python -m ferjax.report --workdir={workdir}"
        log.info("next: %s", config.next_command or report)
        return whole


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
    # Without a bar there is nothing to write above, and the redirection would add a console.
    redirection = logging_redirect_tqdm([log]) if run.layout.process == 0 else _NOTHING
    with bar, redirection:
        yield bar


def _introduce(run: Experiment, state: Any) -> None:
    """Prints the parameters, the devices, the data and the length of the run."""
    config = run.config
    unlabeled = len(run.subsets.unlabeled) if run.algorithm.mu else 0
    log.info("%s", parameter_table(state.params))
    for line in run.layout.describe():
        log.info("%s", line)
    log.info(
        "data: %s, %s labelled and %s unlabelled images, %s; split %s",
        *(config.data.name, f"{len(run.subsets.labeled):,}", f"{unlabeled:,}"),
        "streamed from disk" if run.streamed else "in the devices' memory",
        run.subsets.digest[:12],
    )
    log.info(
        "training: %s, %s with %s parameters, %d epochs of %d steps",
        *(config.algorithm.name, config.model.name, f"{count_parameters(state.params):,}"),
        *(config.epochs, run.per_epoch),
    )


def _advise(run: Experiment, marks: list[float], calls: float) -> None:
    """Once a call has been timed: what those to come take on this CPU, and what to try instead."""
    if len(marks) < 2:
        return  # the first call was compiled
    hours = (marks[1] - marks[0]) * calls / 3600
    log.info(
        "this config is sized for a GPU or TPU: on this CPU it will take about %.1f hours; try "
        "--config=%s",
        *(hours, run.config.cpu_config),
    )


class _StopSignal(StopSignal):
    """True once a signal to stop has arrived; a SIGINT after that interrupts at once."""

    def handle(self, number: int, frame: Any) -> None:
        """Notes the signal, and gives SIGINT back its own meaning."""
        super().handle(number, frame)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if number == signal.SIGINT:
            # Not through logging, whose locks the interrupted code may hold.
            with contextlib.suppress(OSError):
                os.write(2, b"\nferjax: stopping after this call; Ctrl-C again ends it unsaved\n")

    def __bool__(self) -> bool:
        return self.seen
