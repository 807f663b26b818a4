"""What a config and a workdir become: data, batches, network, step and evaluation."""

import json
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import FrozenConfigDict

from ferjax import config as configs
from ferjax.algorithms.base import TrainingSet
from ferjax.analysis import scores
from ferjax.augment import policies
from ferjax.config import UserError
from ferjax.data import batches, splits
from ferjax.data.stream import Stream
from ferjax.engine import processes, training_data
from ferjax.engine.assemble import assemble, start_state
from ferjax.engine.bucket_lock import make_lock
from ferjax.engine.checkpoint import checksums, saved
from ferjax.engine.evaluation import make_predict
from ferjax.engine.init_from import start_from
from ferjax.engine.metrics import Packed
from ferjax.engine.parallel import Layout, any_wish, host
from ferjax.engine.state import TrainState, build, build_view
from ferjax.engine.step import make_call
from ferjax.engine.training_data import SELECTION_SPLIT
from ferjax.workdir import reason, write_errors

log = logging.getLogger("ferjax")

STREAMED_BYTES = 2**26  # of images that a call takes from one process, if it is of several steps


class Experiment:
    """One run, ready to be trained.

    Args:
      config: finalized.
      workdir: of this run alone; a run that was started there goes on.

    Raises:
      UserError: the config is not every process's, or does not fit the devices or the data. This
        comes before a step is compiled and before anything is written.
    """

    def __init__(self, config: FrozenConfigDict, workdir: epath.Path) -> None:
        self.config, self.workdir = config, workdir
        # Before anything that another config would do in another order.
        processes.require_same(
            {
                "config": json.dumps(config.to_dict(), sort_keys=True),
                "version of ferjax or JAX": configs.code_version(),
            }
        )
        self.layout = Layout(config.parallel)
        self.layout.check_batch(config.batch_size, config.microbatches)
        loaded = training_data.load(config, self.layout)
        self.dataset, self.subsets = loaded.dataset, loaded.subsets
        self.targets, self.class_names = loaded.targets, loaded.class_names
        self._unlabeled_digest, self.streamed = loaded.unlabeled_digest, loaded.streamed
        data, train = config.data, self.dataset.splits["train"]
        self.algorithm, self.model = build(config, len(self.class_names))
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
        size = config.batch_size
        labeled = self.subsets.labeled
        self.batches = {"labeled": batches.Batches(labeled, size, config.seed, "labeled")}
        if data.sampling == "balanced":
            self.batches["labeled"] = batches.BalancedBatches(
                labeled, train.labels[labeled], size, config.seed, "labeled"
            )
        if mu:
            self.batches["unlabeled"] = batches.Batches(
                self.subsets.unlabeled, mu * size, config.seed, "unlabeled"
            )
        self.optimizer, self.step_function = assemble(
            config,
            self.algorithm,
            self.model,
            steps=self.steps,
            steps_per_epoch=self.per_epoch,
            class_counts=self.targets[labeled].sum(0).tolist(),
            members={name: len(b.members) for name, b in self.batches.items()},
            loops=self.layout.platform != "cpu",
        )
        self.lock = make_lock(workdir)
        self.predict = make_predict(
            self.model,
            build_view(config, policies.NONE),
            self.layout,
            batch_size=config.evaluate.batch_size,
            dtype=jnp.dtype(config.dtype),
        )
        self._calls: dict[int, Any] = {}
        self._started_from = ""
        self._stream: Stream | None = None  # from the first call, where images are streamed

    def claim_workdir(self) -> None:
        """Locks the workdir and writes config.json and split.json, or checks that they are ours.

        To be called when nothing else can be wrong: a workdir is bound to its config only once it
        holds a checkpoint.

        Raises:
          UserError: the processes differ in what they were given, another trainer is there, it
            holds another run, is not shared by all hosts, or can't be written.
        """
        processes.require_same(
            {
                "data set": self.dataset.digest,
                "unlabelled pictures": self._unlabeled_digest,
                "labelled subset": self.subsets.digest,
                "weights to start from": self._started_from,
            }
        )
        processes.require_shared(self.workdir)
        processes.first(self._claim)

    def _require_ours(self, path: epath.Path, split: epath.Path) -> None:
        """Refuses a workdir with checkpoints of another run."""
        if saved(self.workdir):
            if changed := configs.differences(configs.load(path), self.config):
                raise UserError(
                    f"{self.workdir} holds a run with another config ({'; '.join(changed)}): "
                    "give another --workdir, or the same config"
                )
            recorded = splits.recorded(split)
            for key, mine in (
                ("digest", self.subsets.digest),
                ("data_digest", self.dataset.digest),
                ("unlabeled_digest", self._unlabeled_digest),
            ):
                if recorded.get(key, "") != mine:
                    what = "other labelled images" if key == "digest" else "other pixels or labels"
                    raise UserError(
                        f"{split} was written for {what}: give the data (and split_file) that the "
                        "run was started with, or another --workdir"
                    )

    def _claim(self) -> None:
        path, split = self.workdir / "config.json", self.workdir / "split.json"
        self._require_ours(path, split)
        train = self.dataset.splits["train"]
        try:
            self.workdir.mkdir(parents=True, exist_ok=True)
            self.lock.acquire()
            self._require_ours(path, split)  # one that was waited for may have saved meanwhile
            splits.save(
                *(self.subsets, split, train.labels, train.rows, self.dataset.digest),
                class_names=self.class_names,
                image_shape=train.images.shape[1:],
                unlabeled_digest=self._unlabeled_digest,
            )
            configs.save(self.config, path)
        except write_errors(self.workdir) as error:
            raise UserError(f"{self.workdir} can't be written: {reason(error)}") from None

    def init_state(self) -> TrainState:
        """The state before step 0, as host arrays; its shapes alone if a step is saved already.

        What the config takes from other runs' files is read only if no step is saved yet.

        Raises:
          UserError: such a file is missing, or does not fit.
        """
        images = self.dataset.splits["train"].images
        resumed = processes.first(lambda: bool(saved(self.workdir)))
        state = start_state(
            self.config,
            self.algorithm,
            self.model,
            self.optimizer,
            stored_shape=images.shape[1:3],
            num_classes=len(self.class_names),
            num_images=len(images),
            abstract=resumed,
        )
        return state if resumed else processes.once_per_host(lambda: self._with_files(host(state)))

    def _with_files(self, state: TrainState) -> TrainState:
        if self.config.init_from:
            state = start_from(state, self.config, self.class_names)
        train = TrainingSet(
            rows=self.dataset.splits["train"].rows,
            labeled=self.subsets.labeled,
            unlabeled=self.subsets.unlabeled,
            class_names=self.class_names,
            digest=self.dataset.digest,
        )
        state = state.replace(extra=self.algorithm.read_extra(state.extra, train))
        self._started_from = json.dumps(checksums([state.params, state.extra]))
        return state

    def device_data(self) -> Any:
        """The training arrays, on every device; without the images where they are streamed."""
        train = self.dataset.splits["train"]
        # Images that have no label come last: a method that uses none does not pay for them.
        end = len(train) if self.algorithm.mu else 1 + int(np.flatnonzero(train.labels >= 0)[-1])
        data = {"targets": self.targets[:end]}
        if not self.streamed:
            data["images"] = train.images[:end]
        return self.layout.replicate(data)

    def call(
        self, state: Any, first: int, end: int, data: Any, wishes: Sequence[bool] = ()
    ) -> tuple[Any, Any, Any]:
        """Runs the steps first ... end - 1; the given state's memory is used up.

        Where images are streamed, each call goes on where the last one ended.

        Returns:
          The new state, the steps' metrics, and which `wishes` any process had (see `Polls`).
        """
        count = end - first
        if count not in self._calls:
            steps = make_call(self.step_function, count)

            def call(state: Any, shard: Any, data: Any) -> tuple[Any, Any, Any]:
                state, metrics = steps(state, shard["index"], data)
                return state, Packed.of(metrics), any_wish(shard["wishes"])

            self._calls[count] = self.layout.wrap(call, donate=True)
        shard = {
            "index": {
                name: np.stack([b(s) for s in range(first, end)])
                for name, b in self.batches.items()
            },
            "wishes": self.layout.wishes(wishes),
        }
        shard = self.layout.shard(shard, axis=1)
        if self.streamed:
            images = self.layout.shard_own(self._images(first, end), axis=1)
            shard["index"] = {n: (rows, images[n]) for n, rows in shard["index"].items()}
        return self._calls[count](state, shard, data)

    def _images(self, first: int, end: int) -> dict[str, np.ndarray]:
        """This process's images of some steps: uint8 [steps, n, H, W, C] by part of the batch."""
        if self._stream is None:
            self._stream = Stream(
                self.batches,
                self.dataset.splits["train"].images,
                share=self.layout.process,
                shares=self.layout.processes,
                first=first,
                end=self.steps,
                workers=self.config.data.workers,
                neighbours=processes.neighbours(),
            )
        return self._stream.take(end - first)

    def close(self) -> None:
        """Ends the processes that read images."""
        if self._stream is not None:
            log.info("training waited for images %.1f %% of the time", 100 * self._stream.waiting)
            self._stream.close()
            self._stream = None

    def rows(self, step: int) -> dict[str, list[int]]:
        """The official rows of the images of one step, by part of the batch."""
        rows = self.dataset.splits["train"].rows
        return {name: [int(row) for row in rows[b(step)]] for name, b in self.batches.items()}

    def next_stop(self, step: int) -> int:
        """Where the call that starts at `step` ends.

        Calls start on multiples of K within an epoch and end with it, so that at most two lengths
        (K and what an epoch leaves over) are compiled, and a resumed run makes the same calls.
        """
        per_call = self.config.steps_per_call or self._steps_a_call()
        inside = step % self.per_epoch
        ends = [step - inside % per_call + per_call, step - inside + self.per_epoch]
        if self.config.stop_after_steps > step:
            ends.append(self.config.stop_after_steps)
        return min(*ends, self.steps)

    def _steps_a_call(self) -> int:
        if self.layout.platform == "cpu":
            return 1
        if not self.streamed:
            return batches.steps_a_call(self.per_epoch)
        # Several calls' images are under way at a time.
        images = sum(b.size for b in self.batches.values()) // self.layout.processes
        step_bytes = images * math.prod(self.dataset.splits["train"].images.shape[1:])
        return batches.steps_a_call(self.per_epoch, max(1, STREAMED_BYTES // step_bytes))

    def evaluates_at(self, step: int) -> bool:
        """Whether the state after `step` steps is scored."""
        every = self.per_epoch * self.config.evaluate.every_epochs
        return step == self.steps or step % every == 0

    def evaluate(
        self, state: Any, stop: Callable[[], bool] = lambda: False
    ) -> dict[str, np.ndarray]:
        """Logits of the EMA and of the raw weights on all of public_test, of the data's classes.

        public_test keeps FER2013's labels whatever training used, as it does for all choices. Of a
        network that knows contempt, too, it asks which of the seven others an image shows.

        Raises:
          Interrupted: `stop()` was true in any process.
        """
        images = self.dataset.splits[SELECTION_SPLIT].images
        raw = {"params": state.params, "batch_stats": state.batch_stats}
        weights = {"ema": state.ema, "raw": raw}
        have, want = self.class_names, self.dataset.class_names
        return {
            name: scores.restrict(self.predict(w, images, stop), have, want)
            for name, w in weights.items()
        }
