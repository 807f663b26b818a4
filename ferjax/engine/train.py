"""The loop: build, restore, step, evaluate, save."""

import collections
import json
import logging
import math
import signal
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import tqdm
from ml_collections import FrozenConfigDict

from ferjax import config as configs
from ferjax.analysis import scores
from ferjax.augment import policies
from ferjax.config import EXIT_OK, EXIT_PREEMPTED, UserError
from ferjax.data import arrays, batches, splits
from ferjax.engine.checkpoint import Checkpoints
from ferjax.engine.evaluation import make_predict
from ferjax.engine.metrics import Accumulator, Writer, count_parameters, parameter_table
from ferjax.engine.optim import make_optimizer, make_schedule
from ferjax.engine.parallel import Layout, host
from ferjax.engine.state import TrainState, build, build_view, init_state
from ferjax.engine.step import make_call, make_step

log = logging.getLogger("ferjax")

SELECTION_SPLIT = "public_test"  # every choice is made on this split, never on private_test
CALLS_IN_FLIGHT = 2  # how far the host may run ahead of the metrics that it has read


class NotFiniteError(Exception):
    """The loss or the gradient is NaN or infinite."""


class Trainer:
    """One run: what a config and a workdir become.

    Args:
      config: finalized.
      workdir: of this run alone; a run that was started there goes on.

    Raises:
      UserError: the config does not fit the devices, the data, or the run in the workdir. This
        comes before anything is compiled.
    """

    def __init__(self, config: FrozenConfigDict, workdir: Path) -> None:
        self.config, self.workdir = config, workdir
        self.layout = Layout(config.parallel)
        self.layout.check_batch(config.batch_size)
        data = config.data
        self.dataset = arrays.load(
            data.name, source=data.source, data_dir=data.data_dir, splits=("train", SELECTION_SPLIT)
        )
        train = self.dataset.splits["train"]
        self.subsets = splits.make(data, train.labels, train.rows)
        self.algorithm, self.model = build(config, len(self.dataset.class_names))
        for view in {*self.algorithm.labeled_views, *self.algorithm.unlabeled_views}:
            if view.split(":")[0] not in config.views:
                raise UserError(f"config.views.{view} is missing: {config.algorithm.name} needs it")
        mu = self.algorithm.mu
        if mu and not len(self.subsets.unlabeled):
            raise UserError(
                f"config.data.labeled={data.labeled} leaves no unlabelled image for "
                f"{config.algorithm.name}: label fewer, or set config.data.unlabeled=all"
            )
        self.per_epoch = batches.steps_per_epoch(
            len(self.subsets.labeled), len(self.subsets.unlabeled), config.batch_size, mu
        )
        self.steps = config.epochs * self.per_epoch
        self._claim_workdir()

        size = config.batch_size
        self.batches = {
            "labeled": batches.Batches(self.subsets.labeled, size, config.seed, "labeled")
        }
        if mu:
            self.batches["unlabeled"] = batches.Batches(
                self.subsets.unlabeled, mu * size, config.seed, "unlabeled"
            )
        schedule = make_schedule(config.optimizer, self.steps, self.per_epoch)
        self.optimizer = make_optimizer(config.optimizer, schedule)
        dtype = jnp.dtype(config.dtype)
        views = {
            name: build_view(config, policies.Policy(**configs.section(config.views, name)))
            for name in config.views
        }
        self.step_function = make_step(
            self.model,
            self.algorithm,
            self.optimizer,
            schedule,
            views,
            steps=self.steps,
            ema_decay=config.ema_decay,
            dtype=dtype,
        )
        self.predict = make_predict(
            self.model,
            build_view(config, policies.NONE),
            self.layout,
            batch_size=config.evaluate.batch_size,
            dtype=dtype,
        )
        self._calls: dict[int, Any] = {}

    def _claim_workdir(self) -> None:
        """Writes config.json and split.json, or checks that they are this run's.

        Raises:
          UserError: the workdir holds another run, or can't be written.
        """
        path = self.workdir / "config.json"
        if path.exists():
            old = configs.load(path)
            if changed := configs.differences(old, self.config):
                raise UserError(
                    f"{self.workdir} holds a run with another config ({'; '.join(changed)}): "
                    "give another --workdir, or the same config"
                )
            recorded = splits.digest_of(self.workdir / "split.json")
            if recorded and recorded != self.subsets.digest:
                raise UserError(
                    f"{self.workdir}/split.json has other labelled images than this data gives: "
                    "give the data that the run was started with, or another --workdir"
                )
        if self.layout.process:
            return
        train = self.dataset.splits["train"]
        try:
            self.workdir.mkdir(parents=True, exist_ok=True)
            splits.save(
                self.subsets,
                self.workdir / "split.json",
                train.labels,
                train.rows,
                self.dataset.digest,
            )
            configs.save(self.config, path)
        except OSError as error:
            raise UserError(f"{self.workdir} can't be written: {error.strerror}") from None

    def init_state(self) -> TrainState:
        """The state before step 0, as host arrays."""
        images = self.dataset.splits["train"].images
        size = self.config.data.image_size
        height, width = (size, size) if size else images.shape[1:3]
        state = init_state(
            self.model,
            self.algorithm,
            self.optimizer,
            seed=self.config.seed,
            image_shape=(height, width, self.config.data.channels),
            num_classes=len(self.dataset.class_names),
            num_images=len(images),
            dtype=jnp.promote_types(self.config.dtype, jnp.float32),
        )
        return host(state)

    def device_data(self) -> Any:
        """The training arrays, on every device."""
        train = self.dataset.splits["train"]
        targets = np.eye(len(self.dataset.class_names), dtype=np.float32)[train.labels]
        return self.layout.replicate({"images": train.images, "targets": targets})

    def call(self, state: Any, first: int, end: int, data: Any) -> tuple[Any, Any]:
        """Runs the steps first ... end - 1; the given state's memory is used up."""
        count = end - first
        if count not in self._calls:
            self._calls[count] = self.layout.wrap(make_call(self.step_function, count), donate=True)
        index = {
            name: np.stack([b(s) for s in range(first, end)]) for name, b in self.batches.items()
        }
        return self._calls[count](state, self.layout.shard(index, axis=1), data)

    def next_stop(self, step: int) -> int:
        """Where the call that starts at `step` ends: a multiple of K, an epoch's end, a stop."""
        on_accelerator = self.layout.platform != "cpu"
        per_call = self.config.steps_per_call or (16 if on_accelerator else 1)
        ends = [step - step % per_call + per_call, step - step % self.per_epoch + self.per_epoch]
        if self.config.stop_after_steps > step:
            ends.append(self.config.stop_after_steps)
        return min(*ends, self.steps)

    def evaluate(self, state: Any) -> dict[str, np.ndarray]:
        """Logits of the EMA and of the raw weights on all of public_test."""
        images = self.dataset.splits[SELECTION_SPLIT].images
        raw = {"params": state.params, "batch_stats": state.batch_stats}
        return {"ema": self.predict(state.ema, images), "raw": self.predict(raw, images)}


def train(config: FrozenConfigDict, workdir: Path) -> int:
    """Trains to the end of the schedule, or until told to stop.

    Returns:
      The exit status: 0 done, 75 stopped early after saving.

    Raises:
      UserError: see `Trainer`.
      NotFiniteError: training has diverged; nothing was saved after it.
    """
    trainer = Trainer(config, workdir)
    layout, per_epoch = trainer.layout, trainer.per_epoch
    labels = trainer.dataset.splits[SELECTION_SPLIT].labels
    checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoint.keep)
    state = trainer.init_state()
    log.info("%s", parameter_table(state.params))
    log.info("devices: %s", layout.describe())
    log.info(
        "data: %s, %d labelled and %d unlabelled images; split %s",
        config.data.name,
        len(trainer.subsets.labeled),
        len(trainer.subsets.unlabeled) if trainer.algorithm.mu else 0,
        trainer.subsets.digest[:12],
    )
    log.info(
        "training: %s, %s with %s parameters, %d epochs of %d steps",
        config.algorithm.name,
        config.model.name,
        f"{count_parameters(state.params):,}",
        config.epochs,
        per_epoch,
    )
    meta: dict[str, Any] = {"row": {}, "best": None}
    if restored := checkpoints.restore_latest(state):
        state, meta = restored
        log.info("resumed at step %d of %d", int(state.step), trainer.steps)
    step = int(state.step)
    writer = Writer(workdir, step, active=layout.process == 0)
    row = Accumulator(meta["row"])
    best = meta["best"]
    state, data = layout.replicate(state), trainer.device_data()
    pending: collections.deque = collections.deque()
    stopped = _StopSignal()
    started = saved_at = row_at = time.monotonic()
    images_a_step = sum(b.size for b in trainer.batches.values())
    logits: dict[str, np.ndarray] = {}
    bar = tqdm.tqdm(
        total=trainer.steps, initial=step, unit="step", disable=layout.process > 0, smoothing=0.05
    )

    def collect(limit: int) -> None:
        """Reads metrics until at most `limit` calls are unread; writes the rows that are full."""
        nonlocal row_at
        while len(pending) > limit:
            first, metrics = pending.popleft()
            metrics = host(metrics)
            for i in range(len(metrics["loss"][0])):
                done = first + i + 1
                row.add({name: (s[i], w[i]) for name, (s, w) in metrics.items()})
                for name in ("loss", "grad_norm"):
                    if not math.isfinite(metrics[name][0][i]):
                        last = checkpoints.latest_step()
                        where = f"the last good checkpoint is step {last}" if last else "none saved"
                        raise NotFiniteError(
                            f"{name} is {metrics[name][0][i]} at step {done - 1}; {where} in "
                            f"{workdir}: lower config.optimizer.learning_rate, or clip with "
                            "config.optimizer.clip_norm"
                        )
                if done % config.log_every == 0 or done == trainer.steps:
                    now = time.monotonic()
                    means = row.take()
                    rate = config.log_every * images_a_step / (now - row_at)
                    clock = {"seconds": now - started, "images_per_second": rate}
                    row_at = now
                    epoch = done / per_epoch
                    writer.write({"kind": "train", "step": done, "epoch": epoch, **means, **clock})
                    shown = {k: means[k] for k in ("loss", "mask_rate") if means.get(k) is not None}
                    bar.set_postfix({k: f"{v:.3f}" for k, v in shown.items()}, refresh=False)

    try:
        while step < trainer.steps:
            end = trainer.next_stop(step)
            state, metrics = trainer.call(state, step, end, data)
            pending.append((step, metrics))
            collect(CALLS_IN_FLIGHT)
            bar.update(end - step)
            if step == 0 and layout.platform == "cpu":
                _warn_if_slow(trainer)
            step = end
            minutes = (time.monotonic() - started) / 60
            stop = bool(stopped) or step == config.stop_after_steps
            stop = stop or 0 < config.stop_after_minutes <= minutes
            at_end = step == trainer.steps
            accuracy = None
            if at_end or step % (per_epoch * config.evaluate.every_epochs) == 0:
                collect(0)
                logits = trainer.evaluate(state)
                result = {
                    f"{name}_{key}": value
                    for name, x in logits.items()
                    for key, value in scores.brief(x, labels).items()
                }
                accuracy = result["ema_accuracy"]
                if best is None or accuracy >= best["accuracy"]:
                    best = {"accuracy": accuracy, "step": step}
                clock = {"seconds": time.monotonic() - started}
                row_at = time.monotonic()
                epoch = step // per_epoch
                writer.write({"kind": "eval", "step": step, "epoch": epoch, **result, **clock})
                bar.write(
                    f"epoch {epoch:3d}/{config.epochs}  public_test: EMA {100 * accuracy:.2f} %, "
                    f"raw {100 * result['raw_accuracy']:.2f} %, best {100 * best['accuracy']:.2f} %"
                )
            due = time.monotonic() - saved_at > 60 * config.checkpoint.every_minutes
            if accuracy is not None or stop or due:
                collect(0)
                checkpoints.save(host(state), {"row": row.to_json(), "best": best}, accuracy)
                saved_at = time.monotonic()
            if stop and not at_end:
                log.info(
                    "stopped at step %d of %d, saved: start again to go on", step, trainer.steps
                )
                return EXIT_PREEMPTED
        bar.close()
        _finish(trainer, state, logits, best)
        return EXIT_OK
    finally:
        bar.close()
        checkpoints.close()
        writer.close()
        stopped.restore()


def _finish(trainer: Trainer, state: Any, logits: dict[str, np.ndarray], best: Any) -> None:
    """Prints the table of the final EMA weights and where everything is."""
    config, workdir = trainer.config, trainer.workdir
    logits = logits or trainer.evaluate(state)
    labels = trainer.dataset.splits[SELECTION_SPLIT].labels
    summary = scores.summarize(logits["ema"], labels, trainer.dataset.class_names)
    if trainer.layout.process:
        return
    (workdir / "eval").mkdir(exist_ok=True)
    record = {"split": SELECTION_SPLIT, "step": trainer.steps, "weights": "ema", **summary}
    (workdir / "eval" / "final.json").write_text(json.dumps(record, indent=2) + "\n")
    log.info("\n%s, final EMA weights\n%s", SELECTION_SPLIT, scores.table(summary))
    log.info(
        "\nbest on %s: %.2f %% at epoch %d",
        SELECTION_SPLIT,
        100 * best["accuracy"],
        best["step"] // trainer.per_epoch,
    )
    log.info("written to %s: config, split, metrics.jsonl, checkpoints, eval, logs", workdir)
    following = config.next_command or (
        f"python -m ferjax.evaluate --workdir={workdir} --split=private_test"
    )
    log.info("next: %s", following)


def _warn_if_slow(trainer: Trainer) -> None:
    """On a CPU, says what the whole run will take once one compiled step has been timed."""
    if not trainer.config.cpu_config:
        return
    log.info(
        "this config is sized for a GPU or TPU: on this CPU look at the time left below, and try "
        "--config=%s instead",
        trainer.config.cpu_config,
    )


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
