"""Orbax checkpoints: what is saved, which are kept, and how they are read back.

A checkpoint holds the state as host arrays (so it fits any number of devices and processes) and
`meta`: the sums of the row being gathered, the best score so far, and a CRC-32 of every leaf and
of itself, because Orbax restores a flipped bit without a word.
"""

import contextlib
import json
import logging
import shutil
import time
import zlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax.serialization import from_state_dict, to_state_dict
from orbax.checkpoint import checkpoint_managers

from ferjax.config import UnreachableError, UserError
from ferjax.engine import processes
from ferjax.workdir import COMMITTED, absolute, is_remote, move, reason, write_errors

log = logging.getLogger("ferjax")

_OLD = "deleted"  # below the checkpoints; see `Checkpoints._empty`
_OVERHEAD = 1 << 16  # bytes of a checkpoint beside its arrays: names, shapes, meta


class Checkpoints:
    """The trainer's checkpoints: saved asynchronously, the latest few and the best kept.

    Process 0 writes them: it has all of the state. With Orbax's managers in all processes a write
    that fails in one would keep the others waiting at a barrier for 20 minutes.

    Args:
      directory: `<workdir>/checkpoints`.
      keep: how many of the latest are kept, besides the best by accuracy on public_test; 2 for 1.

    Attributes:
      failed: whether the newest save has failed.
    """

    def __init__(self, directory: epath.Path, keep: int) -> None:
        self.directory = absolute(directory)
        # TensorStore's RESOURCE_EXHAUSTED is a ValueError.
        self._write_errors: tuple[type[Exception], ...] = (*write_errors(directory), ValueError)
        policies = [
            # Two at least: the newest may have to be deleted to be saved anew, see `save`.
            checkpoint_managers.LatestN(max(keep, 2)),
            checkpoint_managers.BestN(
                get_metric_fn=lambda metrics: metrics["accuracy"],
                n=1,
                # Else every save in mid-epoch is kept for ever.
                keep_checkpoints_without_metrics=False,
            ),
        ]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            best_fn=lambda metrics: metrics["accuracy"],
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,  # of saves that a kill cut off
            todelete_subdir=_OLD,
            create=False,  # Orbax's own way of making it is for managers in all processes
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                primary_host=0, active_processes={0}, barrier_sync_key_prefix="checkpoints"
            ),
        )
        self._manager: ocp.CheckpointManager | None = None
        if jax.process_index() == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._empty()
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        self._saving, self._needed = 0, 0  # the step in flight, the bytes that it takes
        self._latest = processes.first(self.latest_step)
        self.failed = False

    def save(
        self,
        state: Any,
        meta: dict[str, Any],
        accuracy: float | None,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        """Starts saving a state of host arrays; waits only for the save before it.

        If the disk is full, a warning says so, and what was saved before stays.

        Args:
          state: a TrainState of NumPy arrays; it must not be changed afterwards.
          meta: JSON content that the resumed run needs.
          accuracy: on public_test at this step, None where it was not evaluated.
          before: writes what must not be older than the checkpoint, in process 0; if it fails
            nothing is saved.
        """

        def begin() -> list[Any]:
            assert self._manager is not None
            if why := self._finished():
                self._warn(why)
            self._empty()
            step, tree = int(state.step), to_state_dict(state)
            self._saving = step
            self._needed = sum(np.asarray(x).nbytes for x in jax.tree.leaves(tree)) + _OVERHEAD
            why = self._obstacle(before)
            try:
                if not why:
                    if step in self._manager.all_steps():
                        # It was saved before it was scored. A kill in between loses it, not the
                        # one before.
                        self._manager.delete(step)
                    content = {**meta, "accuracy": accuracy, "crc": checksums(tree)}
                    content["crc_meta"] = _crc(content)
                    self._manager.save(
                        step,
                        args=ocp.args.Composite(
                            state=ocp.args.StandardSave(tree), meta=ocp.args.JsonSave(content)
                        ),
                        metrics=None if accuracy is None else {"accuracy": accuracy},
                    )
            except self._write_errors as error:
                why = str(error) or type(error).__name__
            if why:
                self._warn(why)
            return [bool(why), self._manager.latest_step()]

        self.failed, self._latest = processes.first(begin)

    def _finished(self) -> str:
        """Waits for the save in flight; why it has failed, "" if it has not."""
        assert self._manager is not None
        try:
            self._manager.wait_until_finished()
        except self._write_errors as error:
            return str(error) or type(error).__name__
        return ""

    def _obstacle(self, before: Callable[[], None]) -> str:
        """Why a save would fail, "" if nothing speaks against it."""
        if not is_remote(self.directory):
            free = shutil.disk_usage(self.directory).free
            if free < self._needed:
                return f"{free / 1e6:,.1f} MB are free"
        try:
            before()
        except write_errors(self.directory) as error:
            return reason(error)
        return ""

    def latest_step(self) -> int | None:
        """The newest step that is saved, None if there is none; elsewhere as of the last save."""
        return self._latest if self._manager is None else self._manager.latest_step()

    def wait(self) -> None:
        """Until the save in flight is on disk, or has failed: see `failed`. For all processes."""

        def finish() -> bool:
            if why := self._finished():
                self._warn(why)
            return bool(why)

        self.failed = processes.first(finish) or self.failed

    def _warn(self, why: str) -> None:
        """Says that a save has failed, and removes what there is of it, which takes up room."""
        with contextlib.suppress(*self._write_errors):
            self._remove_unfinished()
        latest = self.latest_step()
        log.warning(
            "step %d could not be saved in %s, which takes %.1f MB: %s. Training goes on; the last "
            "checkpoint is %s: %s",
            *(self._saving, self.directory, self._needed / 1e6, " ".join(why.split())[:200]),
            "none" if latest is None else f"step {latest}",
            "see to the bucket" if is_remote(self.directory) else "free some room",
        )

    def _empty(self) -> None:
        """Removes what the manager has moved aside instead of deleting it.

        A kill in the middle of a deletion would leave a part of a checkpoint under its own name.
        (A bucket knows no renaming: there the part stays until it is deleted again.)
        """
        if not is_remote(self.directory):
            shutil.rmtree(self.directory / _OLD, ignore_errors=True)

    def _remove_unfinished(self) -> None:
        if is_remote(self.directory):
            # There is no temporary name: what lacks Orbax's last file is not finished.
            path = self.directory / str(self._saving)
            if path.is_dir() and not (path / COMMITTED).exists():
                path.rmtree(missing_ok=True)
            return
        for unfinished in self.directory.glob(f"{self._saving}.orbax-checkpoint-tmp*"):
            shutil.rmtree(unfinished, ignore_errors=True)

    def close(self) -> None:
        """Finishes the save in flight and lets go of the directory; no process waits for another.

        So it can be called where only some processes have failed.
        """
        if self._manager is not None:
            if why := self._finished():
                self._warn(why)
            self._empty()
            self._manager.close()


class NotScoredError(UserError):
    """No checkpoint has been evaluated yet, so none is the best."""


class DamagedError(Exception):
    """A checkpoint whose files are not those that were written."""


def restore_latest(workdir: epath.Path, like: Any) -> tuple[Any, dict[str, Any]] | None:
    """The newest checkpoint that is whole, or None if nothing was saved.

    Process 0 chooses, the others read what it chose. Newer ones that are damaged, and older ones
    whose score is, by which they are kept, are named in a warning and moved to
    `<workdir>/damaged`, so that their steps can be saved again; nothing is deleted. Call it before
    `Checkpoints` is made.

    Args:
      workdir: of the run.
      like: a TrainState of the same shapes, of arrays or of `jax.ShapeDtypeStruct`.

    Raises:
      DamagedError: there are checkpoints, but none is whole.
      UserError: the checkpoint is of another network than `like`.
    """
    found: list[tuple[Any, dict[str, Any]]] = []

    def choose_whole() -> str | None:
        damaged: list[epath.Path] = []
        whole = ""
        for path in reversed(saved(workdir)):
            try:
                if whole:
                    _accuracy(path)
                else:
                    found.append(_restored(path, like))
                    whole = str(path)
            except DamagedError as error:
                log.warning("checkpoint %s is damaged and is left out: %s", path.name, error)
                damaged.append(path)
        if damaged and not whole:
            names = ", ".join(path.name for path in damaged)
            raise DamagedError(f"no checkpoint in {workdir} is whole (damaged: {names})")
        for path in damaged:
            (workdir / "damaged").mkdir(exist_ok=True)
            move(path, workdir / "damaged" / f"{path.name}-{time.time_ns()}")
        return whole or None

    path = processes.first(choose_whole, errors=(UserError, UnreachableError, DamagedError))
    if path is None:
        return None
    return found[0] if found else _restored(epath.Path(path), like)


def _restored(path: epath.Path, like: Any) -> tuple[Any, dict[str, Any]]:
    """A checkpoint's state in the form of `like`, and `meta`.

    Raises:
      DamagedError: it is not whole.
      UserError: it is of another network than `like`.
    """
    tree, meta = read(path)
    if _shapes(to_state_dict(like)) != _shapes(tree):
        raise UserError(
            f"{path} holds other arrays than this config's network has: was it saved by another "
            "version of ferjax? Give another --workdir"
        )
    try:
        return from_state_dict(like, tree), meta
    except (ValueError, KeyError) as error:  # of a part without arrays, which no sum covers
        why = " ".join(str(error).split())[:200]
        raise DamagedError(
            f"{path}: the arrays are whole, but not the form that they are kept in (was it saved "
            f"by another version of ferjax or Optax?): {why}"
        ) from error


def saved(workdir: epath.Path) -> list[epath.Path]:
    """The finished checkpoints of a workdir, by step."""
    directory = absolute(workdir / "checkpoints")
    steps = ocp.utils.checkpoint_steps(directory) if directory.is_dir() else []
    return [epath.Path(directory) / str(step) for step in sorted(steps)]


def read(path: epath.Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads one checkpoint without a manager, which might delete others, and verifies it.

    Returns:
      The state as nested dicts of NumPy arrays, and `meta`.

    Raises:
      DamagedError: a file is missing, cut off or changed.
    """
    # Without this Orbax waits for all processes, which do not all come here at the same time.
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process_{me}"
    )
    try:
        with ocp.StandardCheckpointer(multiprocessing_options=alone) as reader:
            tree = reader.restore(path / "state")
        json_handler = ocp.JsonCheckpointHandler(multiprocessing_options=alone)
        with ocp.Checkpointer(json_handler, multiprocessing_options=alone) as reader:
            meta = reader.restore(path / "meta")
        crc = meta["crc"]
    # What Orbax and TensorStore raise for a file that is missing, cut off or changed. Other errors
    # (no permission, a stale mount, no memory) say nothing about the checkpoint.
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{path}: {' '.join(str(error).split())[:200]}") from error
    wrong = [name for name, value in checksums(tree).items() if crc.get(name) != value]
    if wrong or len(crc) != len(jax.tree.leaves(tree)):
        raise DamagedError(f"{path}: the content of {(wrong or ['a leaf'])[0]} has changed")
    if meta.get("crc_meta") not in (None, _crc(meta)):  # None: it is older than these sums
        raise DamagedError(f"{path}: the content of meta has changed")
    _accuracy(path)
    return tree, meta


def choose(workdir: epath.Path, which: str) -> epath.Path:
    """The checkpoint directory that "best", "latest" or a step number names.

    "best" is the highest accuracy on public_test among those kept; the later one of equals.

    Raises:
      NotScoredError: there is no best one yet.
      UserError: there is none such, naming those that there are; or a score is damaged.
    """
    paths = {path.name: path for path in saved(workdir)}
    if not paths:
        raise UserError(f"{workdir} holds no checkpoint: has a run been started there?")
    if which == "latest":
        return list(paths.values())[-1]
    if which == "best":
        scored = []
        for name, path in paths.items():
            try:
                accuracy = _accuracy(path)
            except DamagedError as error:
                if path not in saved(workdir):  # its trainer has just removed it
                    continue
                raise UserError(
                    f"which checkpoint is the best can't be told ({error}): start the training "
                    "command again, which moves what is damaged aside, or name one with "
                    "--checkpoint="
                ) from None
            if accuracy is not None:
                scored.append((accuracy, int(name)))
        if not scored:
            raise NotScoredError(
                f"{workdir} has not been evaluated yet, so there is no best checkpoint: "
                "use --checkpoint=latest"
            )
        return paths[str(max(scored)[1])]
    if which not in paths:
        raise UserError(f"--checkpoint={which}: use best, latest or one of {', '.join(paths)}")
    return paths[which]


def checksums(tree: Any) -> dict[str, int]:
    """CRC-32 of each leaf's bytes, type and shape, by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    result = {}
    for path, leaf in leaves:
        array = np.asarray(leaf)
        seed = zlib.crc32(f"{array.dtype}{array.shape}".encode())
        result[jax.tree_util.keystr(path)] = zlib.crc32(array.tobytes(), seed)
    return result


def _shapes(tree: Any) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): f"{leaf.dtype}{leaf.shape}" for path, leaf in leaves}


def _crc(meta: dict[str, Any]) -> int:
    """CRC-32 of `meta` as JSON gives it back, without this sum itself."""
    content = json.loads(json.dumps({k: v for k, v in meta.items() if k != "crc_meta"}))
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _accuracy(path: epath.Path) -> float | None:
    """On public_test, None where a checkpoint was not scored.

    Raises:
      DamagedError: meta and the file by which Orbax keeps the best differ, or can't be read.
    """
    metrics = path / "metrics" / "metrics"
    try:
        accuracy = json.loads((path / "meta" / "metadata").read_text())["accuracy"]
        kept = json.loads(metrics.read_text())["accuracy"] if metrics.exists() else None
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{path}: its score: {' '.join(str(error).split())[:200]}") from error
    if accuracy != kept:
        raise DamagedError(f"{path}: its score is {accuracy} in meta and {kept} in {metrics.name}")
    return accuracy
