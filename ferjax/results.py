"""Collects what runs reached: `python -m ferjax.results [--collect=DIR,DIR]`.

Looks through the directories for workdirs, writes a summary of each that has the config of a row
of `--rows` to `<results>/<row>/<seed>.json`, and renders the table of all rows to `--output`. No
figure is typed by hand, and a row without runs says so. A run counts for a row by what its config
trains, whether a sweep or a person started it.
"""

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from etils import epath
from ml_collections import FrozenConfigDict

from ferjax import config as configs
from ferjax import rows
from ferjax.analysis import tables
from ferjax.command import run
from ferjax.config import EXIT_OK, UserError
from ferjax.data import splits
from ferjax.engine import checkpoint, starts
from ferjax.engine.metrics import read_rows, training_seconds
from ferjax.rows import Row

FLAGS = flags.FLAGS
log = logging.getLogger("ferjax")

Summary = dict[str, Any]

_SPLITS = ("public_test", "private_test")


def define_flags() -> None:
    """The command's flags; the same names may be defined by other commands in one process."""
    flags.DEFINE_string("results", "results", "Where the summaries are kept.")
    flags.DEFINE_list("collect", [], "Directories to look for finished and cut runs in.")
    flags.DEFINE_string("rows", "configs/sweeps/results.py", "The file of the table's rows.")
    flags.DEFINE_string("output", "RESULTS.md", "The table.")


def main() -> int:
    """Collects, then renders."""
    sweep = rows.load(FLAGS.rows)
    digests = _digests(sweep)
    directory = epath.Path(FLAGS.results)
    for given in FLAGS.collect:
        if not epath.Path(given).is_dir():
            raise UserError(f"--collect={given}: there is no such directory")
        for workdir in workdirs(epath.Path(given)):
            _collect(workdir, sweep, digests, directory)
    path = Path(FLAGS.output)
    text = render(sweep, digests, read(directory))
    try:
        configs.write_whole(path, text.encode())
    except OSError as error:
        raise UserError(f"--output={path} can't be written: {error.strerror}") from None
    log.info("written to %s", path)
    return EXIT_OK


def workdirs(path: epath.Path) -> Iterator[epath.Path]:
    """The workdirs at and below a directory."""
    if (path / "config.json").exists():
        yield path
    elif path.is_dir():
        for child in sorted(path.iterdir()):
            yield from workdirs(child)


def summarize(
    workdir: epath.Path, config: FrozenConfigDict, *, row: str, command: str, failed: str = ""
) -> Summary:
    """What is kept of a run: no path and no name of a machine is in it.

    What a finished run's `summary.json` says of its machine, code and time stands: a sweep wrote it
    when the run ended. So does that of a run of an early version, which wrote no `starts.jsonl`.

    Args:
      workdir: of the run.
      config: of the run, finalized.
      row: name of the row.
      command: that trains it.
      failed: why it did not end, "" if it ended or was stopped.
    """
    metrics = read_rows(workdir / "metrics.jsonl")
    scored = [r for r in metrics if r["kind"] == "eval" and r["ema_accuracy"] is not None]
    best = max(scored, key=lambda r: (r["ema_accuracy"], r["step"]), default=None)
    final = read_json(workdir / "eval" / "final.json")
    last = metrics[-1] if metrics else {"step": 0, "epoch": 0.0}
    summary: Summary = {
        "row": row,
        "seed": config.seed,
        "state": "failed" if failed else "done" if final else "cut",
        "reason": failed,
        "command": command,
        "config_digest": rows.digest(config),
        "changed": rows.changed(config),
        "minutes": round(training_seconds(metrics) / 60, 2),
        "steps": last["step"],
        "epochs_done": round(last["epoch"], 2),
        "epochs": config.epochs,
        "public_test": {
            "best": best and best["ema_accuracy"],
            "best_epoch": best and best["epoch"],
            "final": final.get("accuracy"),
        },
        "scores": _scores(workdir),
        "machine": machine(workdir),
        "code": starts.last(workdir).get("code", ""),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    if config.data.split_seed != config.seed:
        summary["split_seed"] = config.data.split_seed
    before = read_json(workdir / "summary.json")
    early = before and not summary["machine"]["cpu"]  # the run writes no starts
    if early or summary["state"] == before.get("state") == "done":
        summary |= {key: before[key] for key in ("machine", "code", "time")}
    return summary


def has_split_of(row: Row, summary: Summary) -> bool:
    """`rows.has_split_of` for the summary of a run."""
    seed = summary["seed"]
    return summary.get("split_seed", seed) == rows.wanted_split(row, seed)


def read(directory: epath.Path) -> dict[str, dict[int, Summary]]:
    """The summaries in a results directory, by config digest and seed."""
    found: dict[str, dict[int, Summary]] = {}
    for path in sorted(directory.glob("*/*.json")):
        summary = read_json(path)
        if "config_digest" not in summary:
            raise UserError(f"{path} is not a summary that ferjax wrote: delete it")
        found.setdefault(summary["config_digest"], {})[summary["seed"]] = summary
    return found


def lines(sweep: rows.Sweep, found: Mapping[str, Mapping[int, Summary]]) -> dict[str, tables.Line]:
    """A line for each row of a sweep, by its name.

    Args:
      sweep: its rows.
      found: the summaries of each row, by the row's name and the seed.
    """
    by_name = {row.name: row for row in sweep.rows}

    def line(row: Row, *, beaten: bool = False) -> tables.Line:
        other = line(by_name[row.beats], beaten=True) if row.beats and not beaten else None
        return tables.Line(
            name=row.name,
            runs=found.get(row.name, {}),
            seeds=row.seeds,
            published=row.published,
            reach=row.reach,
            beats=other,
            margin=row.margin,
            on=row.on,
            scored=row.scored,
            note=row.note,
            series=row.series,
            x=row.x,
        )

    return {row.name: line(row) for row in sweep.rows}


def render(
    sweep: rows.Sweep,
    digests: Mapping[str, str],
    found: Mapping[str, Mapping[int, Summary]],
) -> str:
    """RESULTS.md.

    Args:
      sweep: its rows, under their sections' headings.
      digests: of the rows' configs, by name.
      found: what `read` returns.
    """
    of_row = {
        row.name: {
            seed: summary
            for seed, summary in found.get(digests[row.name], {}).items()
            if has_split_of(row, summary)
        }
        for row in sweep.rows
    }
    every = lines(sweep, of_row)
    out = [f"# {sweep.title}", "", sweep.note, ""]
    for section in dict.fromkeys(row.section for row in sweep.rows):
        mine = [row for row in sweep.rows if row.section == section]
        out += [f"## {section}", "", tables.readable([every[r.name] for r in mine]).markdown()]
        facts = _facts(mine, [every[r.name] for r in mine])
        out += [*facts, ""] if facts else []
    return "\n".join(out).rstrip() + "\n"


def _facts(section: Sequence[Row], of_section: Sequence[tables.Line]) -> list[str]:
    """Under a section's table: where its figures come from, and the machines."""
    facts = [f"- {source}" for source in dict.fromkeys(r.source for r in section) if source]
    runs = [run for line in of_section for run in line.runs.values()]
    if machines := sorted({_machine_text(run["machine"]) for run in runs}):
        facts.append(f"- Run on {'; '.join(machines)}.")
    return facts


def _digests(sweep: rows.Sweep) -> dict[str, str]:
    """Of the rows' configs, by name; "" for one that is wrong, which is said.

    Raises:
      UserError: two rows differ in nothing but whose labels they see.
    """
    digests: dict[str, str] = {}
    labels: dict[str, int | None] = {}
    for row in sweep.rows:
        digests[row.name] = ""
        try:
            digest = rows.digest(rows.configuration(row, row.seeds[0], sweep.root))
        except UserError as error:
            log.warning("no run can count for it: %s", error)
            continue
        digests[row.name] = digest
        if labels.setdefault(digest, row.split_seed) != row.split_seed:
            raise UserError(f"row {row.name} trains what another one does, with another split_seed")
    return digests


def _collect(
    workdir: epath.Path, sweep: rows.Sweep, digests: Mapping[str, str], directory: epath.Path
) -> None:
    """Keeps the summary of one workdir, if it is of a row and no better one is there."""
    try:
        config = configs.load(workdir / "config.json")
    except UserError as error:
        log.warning("left out: %s", error)
        return
    digest = rows.digest(config)
    row = next((row for row in sweep.rows if digests[row.name] == digest), None)
    if row is None or not rows.has_split_of(row, config):
        why = "its labelled subset is not the row's" if row else "no row has its config"
        log.info("left out: %s: %s", workdir, why)
        return
    command = rows.command(row, config.seed, sweep.root)
    summary = summarize(workdir, config, row=row.name, command=command)
    path = directory / row.name / f"{config.seed}.json"
    kept = read_json(path)
    if _worth(summary) < _worth(kept):
        log.info("left out: %s: %s is of a longer run", workdir, path)
        return
    if kept.get("state") == "done" and not summary["machine"]["cpu"]:  # of an early version
        summary |= {key: kept[key] for key in ("machine", "code", "time")}
    lost = sorted(kept.get("scores", {}).keys() - summary["scores"].keys())
    if lost and kept["state"] == "done":
        log.info("left out: %s: %s has scores that it lacks: %s", workdir, path, ", ".join(lost))
        return
    if _found(summary) == _found(kept):
        log.info("%s: %s says the same", workdir, path)  # and names the code of its own time
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    configs.write_json(path, summary, indent=1)
    log.info("%s: %s", workdir, path)


def _worth(summary: Summary) -> tuple[bool, int, float]:
    """Of two runs of one config and seed, which to keep: the finished, the scored, the longer."""
    scores = len(summary.get("scores", {}))
    return summary.get("state") == "done", scores, summary.get("epochs_done", -1.0)


def _found(summary: Summary) -> str:
    """A summary without what differs each time it is written."""
    return json.dumps({**summary, "code": "", "time": ""}, sort_keys=True)


def _scores(workdir: epath.Path) -> dict[str, Summary]:
    """What `ferjax.evaluate` wrote of the two test splits, by the file's name.

    Scores of other pixels or labels than the run's, and of a checkpoint that was the best when it
    was scored and is not any more, are left out.
    """
    scores = {}
    own = splits.recorded(workdir / "split.json").get("data_digest", "")
    for path in sorted((workdir / "eval").glob("*.json")) if (workdir / "eval").exists() else []:
        if path.name.startswith(_SPLITS):
            found = read_json(path)
            if stale(workdir, found) or (own and found.get("data_digest", own) != own):
                continue
            kept = ["accuracy", "accuracy_interval", "images"]
            kept += ["step", "checkpoint", "weights", "tta"]
            scores[path.stem] = {key: found[key] for key in kept if key in found}
            scores[path.stem]["members"] = len(found.get("workdirs", ["one"]))
            if clean := found.get("clean"):
                scores[path.stem] |= {f"clean_{key}": clean[key] for key in ("accuracy", "images")}
    return scores


def stale(workdir: epath.Path, score: Mapping[str, Any]) -> bool:
    """Whether a score is of a checkpoint that was the best, but is not any more."""
    if score.get("checkpoint") != "best" or not checkpoint.saved(workdir):
        return False
    try:
        return checkpoint.choose(workdir, "best").name != str(score.get("step"))
    except UserError:  # what checkpoints are kept by is damaged; it was the best when it was scored
        return False


def machine(workdir: epath.Path) -> Summary:
    """What the run's last start ran on; blank of a run of an early version."""
    last = starts.last(workdir)
    blank = {"device": "", "devices": 0, "processes": 0, "cpu": "", "cores": 0, "jax": ""}
    return {key: last.get(key, nothing) for key, nothing in blank.items()}


def _machine_text(machine: Mapping[str, Any]) -> str:
    # Not the machine's cores: a run may have been given some of them.
    processor = machine["cpu"]
    if not processor:
        return "a machine that is not known"
    if not machine["devices"]:
        return f"{processor}, jax {machine['jax']}"
    if machine["device"] == "cpu":
        return f"{processor}, {machine['devices']} JAX device(s), jax {machine['jax']}"
    return f"{machine['devices']} {machine['device']} ({processor}), jax {machine['jax']}"


def read_json(path: epath.Path) -> Summary:
    """What a JSON file holds, {} if there is none.

    Raises:
      UserError: it is no JSON.
    """
    try:
        return dict(json.loads(path.read_text())) if path.exists() else {}
    except (TypeError, ValueError):
        raise UserError(f"{path} is not what ferjax wrote: delete it or take it back") from None


if __name__ == "__main__":
    define_flags()
    run(main)
