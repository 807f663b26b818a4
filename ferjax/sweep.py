"""Runs and compares configs: `python -m ferjax.sweep --sweep=configs/sweeps/label_ratio.py`.

Each run is a `ferjax.main` of its own, in `<workdir>/<row>/<seed>`: it starts with all memory free,
sets its own XLA flags, and takes nothing with it if it dies. The same command goes on where the
last one stopped: what is finished is not run again, and what was cut goes on from its checkpoint.
After each run `table.md`, `table.csv` and `plot.png` in the workdir are written anew, of all that
has run there: --only and --seeds run a sweep part by part.

    --cpu                    the rows for two CPU cores
    --only=REGEX             rows whose whole name matches
    --seeds=0,1              instead of the rows' own
    --stop_after_minutes=50  save, and exit with 75
    --quick                  seconds a run on a few drawn faces: tries the sweep out
    --finish                 scores each finished run on private_test, once and for all

Exit status: 0 done; 75 stopped after saving; 1 a run has failed, the others were run; 2 what was
given is wrong.
"""

import ctypes
import dataclasses
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags
from etils import epath

from ferjax import config as configs
from ferjax import results, rows, runtime
from ferjax.analysis import figures, sweep_plot, tables
from ferjax.command import run
from ferjax.config import EXIT_FAILED, EXIT_OK, EXIT_PREEMPTED, UserError
from ferjax.engine.stop_signal import StopSignal
from ferjax.rows import Row
from ferjax.workdir import workdir_path

FLAGS = flags.FLAGS
log = logging.getLogger("ferjax")


def define_flags() -> None:
    """The command's flags; the same names may be defined by other commands in one process."""
    flags.DEFINE_string("sweep", "", "The sweep's file.")
    flags.DEFINE_string("workdir", "", "Of runs and tables; runs/<the sweep's name> if empty.")
    flags.DEFINE_bool("cpu", False, "Rows for two CPU cores instead of an accelerator.")
    flags.DEFINE_bool("quick", False, "A tiny network and data set, one seed.")
    flags.DEFINE_bool("finish", False, "Score finished runs on private_test.")
    flags.DEFINE_list("seeds", [], "Instead of the rows' own.")
    flags.DEFINE_string("only", "", "Rows whose whole name this regular expression matches.")
    flags.DEFINE_float("stop_after_minutes", 0.0, "Save and exit with 75; 0: never.", 0.0)


def main() -> int:
    """Runs what is missing; returns the exit status."""
    if not FLAGS.sweep:
        raise UserError("--sweep is missing: for example --sweep=configs/sweeps/label_ratio.py")
    _require_alone()
    sweep, chosen = _chosen(rows.load(FLAGS.sweep, cpu=FLAGS.cpu))
    marks = ("_cpu" if FLAGS.cpu else "") + ("_quick" if FLAGS.quick else "")
    workdir = workdir_path(FLAGS.workdir or f"runs/{sweep.name}{marks}")
    with _Children() as children:
        deadline = time.monotonic() + 60 * FLAGS.stop_after_minutes
        sweeper = Sweeper(
            *(sweep, workdir, children, deadline if FLAGS.stop_after_minutes else None),
            chosen=chosen,
        )
        return sweeper.run(finish=FLAGS.finish)


def _require_alone() -> None:
    """Refuses to be one of several processes."""
    try:
        several = runtime.from_environment(os.environ)
    except UserError:  # as in a SLURM job of several tasks, without srun
        several = "by the environment", {}
    if several and several[0] != "TPU VM":  # which may be the only one
        raise UserError(
            f"a sweep is one process that starts its runs, and this looks like one of several "
            f"({several[0]}): start it alone (under SLURM with srun --ntasks=1), or its runs one "
            "by one (launch/README.md)"
        )


def _chosen(sweep: rows.Sweep) -> tuple[rows.Sweep, dict[str, tuple[int, ...]]]:
    """All rows, as small as the flags say, and the seeds of those that are to be run.

    Raises:
      UserError: there are none, or a row's config is wrong.
    """
    try:
        chosen = [row.name for row in sweep.rows if re.fullmatch(FLAGS.only or ".*", row.name)]
    except re.error as error:
        raise UserError(f"--only={FLAGS.only}: not a regular expression: {error}") from None
    if not chosen:
        there = ", ".join(row.name for row in sweep.rows)
        raise UserError(f"--only={FLAGS.only}: no row has this name; there are {there}")
    seeds = [seed.strip() for seed in FLAGS.seeds or ("0" if FLAGS.quick else "")]
    if not all(seed.isdigit() for seed in seeds):
        raise UserError(
            f"--seeds={','.join(FLAGS.seeds)}: whole numbers with commas, such as 0,1,2"
        )
    given = tuple(sorted(set(map(int, seeds))))
    if FLAGS.quick:
        sweep = _quick(sweep, given)
    return sweep, {row.name: given or row.seeds for row in sweep.rows if row.name in chosen}


def _quick(sweep: rows.Sweep, seeds: tuple[int, ...]) -> rows.Sweep:
    nothing: dict[str, Any] = {"published": None, "source": "", "reach": None, "beats": ""}
    small = [
        dataclasses.replace(rows.shrink(row, sweep.root), seeds=seeds, **nothing)
        for row in sweep.rows
    ]
    note = "Tried out for some steps on a few drawn faces: the figures mean nothing."
    return dataclasses.replace(sweep, title=f"{sweep.title}, --quick", note=note, rows=small)


class Sweeper:
    """The runs of a sweep and what is written of them.

    Args:
      sweep: with at least one row.
      workdir: of the sweep.
      children: starts processes.
      deadline: on `time.monotonic`'s clock; None: none.
      chosen: names of the rows that are to be run, and for which seeds; None: all with their own.

    Raises:
      UserError: a row's config is wrong. This comes before anything is run.
    """

    def __init__(
        self,
        sweep: rows.Sweep,
        workdir: epath.Path,
        children: "_Children",
        deadline: float | None = None,
        chosen: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        self._sweep, self._workdir = sweep, workdir
        self._children, self._deadline = children, deadline
        everything = {row.name: row.seeds for row in sweep.rows}
        self._chosen = everything if chosen is None else chosen
        self._configs: dict[str, Any] = {}  # with the row's first seed
        self._digests: dict[str, str] = {}  # the same for all seeds
        homes: dict[Any, str] = {}
        # Rows that train the same share their runs, whichever of them are chosen.
        self._home: dict[str, str] = {}
        usable = []
        for row in sweep.rows:
            try:
                config = rows.configuration(row, row.seeds[0], sweep.root)
            except UserError as error:
                if row.name in self._chosen:
                    raise
                log.info("left out: %s", error)
                continue
            usable.append(row)
            self._configs[row.name], self._digests[row.name] = config, rows.digest(config)
            trained = (self._digests[row.name], row.split_seed)
            self._home[row.name] = homes.setdefault(trained, row.name)
        self._sweep = dataclasses.replace(sweep, rows=usable)

    def run(self, *, finish: bool) -> int:
        """Runs what is not finished, scores what is, and writes the table.

        Args:
          finish: read private_test too.
        """
        jobs = [(row, seed) for row in self._sweep.rows for seed in self._seeds(row)]
        failed, done = [], set()
        status = EXIT_OK
        for i, (row, seed) in enumerate(jobs):
            if (place := self._place(row, seed)) in done or self._finished(row, seed):
                continue
            if self._children.seen or self._late():
                status = EXIT_PREEMPTED
                break
            log.info("\n== %d of %d: %s, seed %d", i + 1, len(jobs), row.name, seed)
            status, reason = self._train(row, seed)
            self._write()
            if status == EXIT_PREEMPTED:
                break
            done.add(place)
            if status != EXIT_OK:
                failed.append(f"{row.name}, seed {seed}: {reason}")
        if status != EXIT_PREEMPTED:
            failed += self._score(finish)
            status = EXIT_FAILED if failed else EXIT_OK
            if self._children.seen:
                status = EXIT_PREEMPTED
        log.info("\n%s\nwritten to %s: table.md, table.csv, plot.png", self._write(), self._workdir)
        for line in failed:
            log.info("failed: %s", line)
        if status == EXIT_PREEMPTED:
            log.info("stopped, saved: start again to go on")
        return status

    def _seeds(self, row: Row) -> tuple[int, ...]:
        """For which a row is to be run; () if it is not chosen."""
        return self._chosen.get(row.name, ())

    def _place(self, row: Row, seed: int) -> epath.Path:
        return self._workdir / self._home[row.name] / str(seed)

    def _late(self) -> bool:
        return self._deadline is not None and time.monotonic() >= self._deadline

    def _finished(self, row: Row, seed: int) -> bool:
        """Whether the run has ended, and was of this very config."""
        place = self._place(row, seed)
        if not (place / "eval" / "final.json").exists():
            return False
        theirs = configs.load(place / "config.json")
        same = theirs.seed == seed and rows.has_split_of(row, theirs)
        return same and rows.digest(theirs) == self._digests[row.name]

    def _train(self, row: Row, seed: int) -> tuple[int, str]:
        """Runs `ferjax.main`; returns its status and, if it failed, why."""
        place = self._place(row, seed)
        # The config's file by its whole path, for this may have been started anywhere.
        config, *others = rows.arguments(row, seed, self._sweep.root)
        path = self._sweep.root / config.removeprefix("--config=")
        arguments = [f"--config={path}", *others, f"--workdir={place}"]
        if self._deadline is not None:
            left = max(self._deadline - time.monotonic(), 1.0) / 60
            arguments.append(f"--config.stop_after_minutes={left:.4f}")
        status, reason = self._children.call("main", arguments)
        if status != EXIT_OK and self._children.seen:
            status = EXIT_PREEMPTED  # stopped before it could save
        failed = "" if status in (EXIT_OK, EXIT_PREEMPTED) else reason
        self._summarize(row, seed, failed)
        return status, reason

    def _summarize(self, row: Row, seed: int, failed: str = "") -> None:
        place, root = self._place(row, seed), self._sweep.root
        summary = results.summarize(
            place,
            rows.with_seed(self._configs[row.name], row, seed),
            row=self._home[row.name],
            command=rows.command(row, seed, root),
            failed=failed,
        )
        try:
            place.mkdir(parents=True, exist_ok=True)
            configs.write_json(place / "summary.json", summary, indent=1)
        except OSError as error:
            raise UserError(f"{place} can't be written: {error.strerror}") from None

    def _score(self, finish: bool) -> list[str]:
        """Runs `ferjax.evaluate` where a score is wanted and not there; returns what failed."""
        failed = []
        for row in self._sweep.rows:
            seeds = self._seeds(row)
            places = [self._place(row, seed) for seed in seeds if self._finished(row, seed)]
            together = "ensemble" in row.scored
            if together:
                complete = 1 < len(places) == len(seeds)
                groups = [",".join(map(str, places))] if complete else []
            else:
                groups = [str(place) for place in places]
            tta = row.scored.replace("ensemble", "").strip("_") or "none"
            wanted = ["public_test"] if row.scored else []
            wanted += ["private_test"] if finish else []
            for group in groups:
                place = epath.Path(group.split(",")[0])
                for split in wanted:
                    name = f"{split}_{row.scored}" if row.scored else split
                    # A score of private_test is never made twice, unless another checkpoint has
                    # become the best since, or it is of fewer members.
                    score = results.read_json(place / "eval" / f"{name}.json")
                    members, wanted_ones = (
                        {epath.Path(each).name for each in each_of}
                        for each_of in (score.get("workdirs", [place]), group.split(","))
                    )
                    there = score and (wanted_ones <= members if together else len(members) == 1)
                    # Of data that is not the run's any more there is another file.
                    there = there or any((place / "eval").glob(f"{split}_of_*.json"))
                    if (there and not results.stale(place, score)) or self._children.seen:
                        continue
                    log.info("\n== %s: %s", row.name, name)
                    arguments = [f"--workdir={group}", f"--split={split}", f"--tta={tta}"]
                    status, reason = self._children.call("evaluate", arguments)
                    if status != EXIT_OK:
                        failed.append(f"{row.name}, {name}: {reason}")
            for seed in seeds:
                if self._finished(row, seed):
                    self._summarize(row, seed)
        return failed

    def _summaries(self, row: Row) -> dict[int, results.Summary]:
        """Of all runs of a row that are there, by seed."""
        home, found = self._workdir / self._home[row.name], {}
        for place in sorted(home.glob("[0-9]*")):
            summary = results.read_json(place / "summary.json")
            # A row may have been changed since.
            same = summary.get("config_digest") == self._digests[row.name]
            if same and results.has_split_of(row, summary):
                found[summary["seed"]] = summary
        return found

    def _write(self) -> str:
        """Writes table and plot of the chosen rows and of all that were run; returns the table."""
        found = {row.name: self._summaries(row) for row in self._sweep.rows}
        names = {*self._chosen, *(name for name, runs in found.items() if runs)}
        shown = []
        for row in self._sweep.rows:
            seeds = tuple(sorted({*row.seeds, *found[row.name]}))
            if "ensemble" in row.scored:
                seeds = self._seeds(row) or row.seeds  # those that are put together
            beats = row.beats if row.beats in names else ""
            if row.name in names:
                shown.append(dataclasses.replace(row, seeds=seeds, beats=beats))
        lines = list(results.lines(dataclasses.replace(self._sweep, rows=shown), found).values())
        table = tables.readable(lines).markdown()
        sources = [f"- {s}" for s in dict.fromkeys(row.source for row in shown) if s]
        text = "\n".join([f"# {self._sweep.title}", "", table, *sources, "", self._sweep.note])
        figure = sweep_plot.draw(lines, x_label=self._sweep.x_label)
        files = {
            "table.md": (text.rstrip() + "\n").encode(),
            "table.csv": tables.exact(lines).csv().encode(),
            "plot.png": figures.png(figure),
        }
        try:
            self._workdir.mkdir(parents=True, exist_ok=True)
            for name, content in files.items():
                configs.write_whole(self._workdir / name, content)
        except OSError as error:
            raise UserError(f"{self._workdir} can't be written: {error.strerror}") from None
        return table


class _Children(StopSignal):
    """Starts one process at a time and hands signals on to it, so that it saves and exits."""

    def __init__(self) -> None:
        super().__init__()
        self._process: subprocess.Popen | None = None

    def handle(self, number: int, frame: Any) -> None:
        """Notes the signal, and hands it on."""
        super().handle(number, frame)
        if self._process is not None:
            self._process.send_signal(number)

    def call(self, command: str, arguments: Sequence[str]) -> tuple[int, str]:
        """Runs `python -m ferjax.<command>` to its end.

        Returns:
          Its exit status, and the line that says why if it is not 0.
        """
        with subprocess.Popen(
            [sys.executable, "-m", f"ferjax.{command}", *arguments],
            stderr=subprocess.PIPE,
            process_group=0,  # Ctrl-C reaches it through us alone, once
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        ) as process:
            self._process = process
            if self.seen:  # a signal came while it was being started
                process.send_signal(signal.SIGTERM)
            assert process.stderr is not None  # for the type checker
            last = b""
            while chunk := os.read(process.stderr.fileno(), 1 << 16):
                sys.stderr.buffer.write(chunk)
                sys.stderr.flush()
                last = (last + chunk)[-4096:]
            status = process.wait()
            self._process = None
        said = [line.strip() for line in re.split(r"[\r\n]+", last.decode(errors="replace"))]
        said = [line for line in said if line]
        own = [line.removeprefix("ferjax: ") for line in said if line.startswith("ferjax: ")]
        reason = (own or said or [""])[-1][:300]
        return status, f"exit status {status}" + (f": {reason}" if reason else "")


def _die_with_parent() -> None:
    """In the child: SIGKILL when the sweep is killed, or it would go on and keep its workdir."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


if __name__ == "__main__":
    define_flags()
    run(main)
