"""Scores a run: `python -m ferjax.evaluate --workdir=DIR [--split=private_test]`.

Prints the table and writes `<workdir>/eval/<split>.json`. Needs nothing but the workdir and the
data. Each reading of private_test is noted in `<workdir>/eval/private_test_readings.jsonl`.

    --workdir=A,B,C    the mean of several runs' probabilities; written to A
    --tta=flip         the mean over the image and its mirror image, or ten_crop
    --calibrate        the temperature that fits public_test, and what it does
    --against=D        compares with another run (or D,E: an ensemble) on the same images
"""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from ferjax import config as configs
from ferjax import runtime
from ferjax.analysis import calibration, scores
from ferjax.augment import tta
from ferjax.command import run
from ferjax.config import UserError
from ferjax.data import arrays, duplicates, splits
from ferjax.load import Trained, load, load_data

FLAGS = flags.FLAGS
log = logging.getLogger("ferjax")
SPLITS = ("train", "public_test", "private_test")
FITTED_ON = "public_test"  # temperatures


def define_flags() -> None:
    """The command's flags; the same names may be defined by other commands in one process."""
    flags.DEFINE_string("workdir", "", "The run's directory; several with commas: an ensemble.")
    flags.DEFINE_string("checkpoint", "best", "best (on public_test), latest, or a step.")
    flags.DEFINE_string("split", "public_test", ", ".join(SPLITS))
    flags.DEFINE_string("weights", "ema", "ema or raw.")
    flags.DEFINE_string("tta", "none", f"Test-time augmentation: {', '.join(tta.KINDS)}.")
    flags.DEFINE_bool("calibrate", False, "Fit a temperature on public_test; show its effect.")
    flags.DEFINE_string("against", "", "Compare with the run in this directory.")
    flags.DEFINE_string("data.source", "", "Replaces the path that the run recorded.")
    flags.DEFINE_string("data.data_dir", "", "Where prepared data is, if not as recorded.")
    runtime.define_flags()


@dataclass(frozen=True)
class Contender:
    """One run, or several whose probabilities are averaged."""

    workdirs: Sequence[Path]
    members: Sequence[Trained]

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Logits [N, C] of one run, or the log of the mean probability of all runs and views."""
        if len(self.members) == 1 and FLAGS.tta == "none":
            return self.members[0].logits(images)
        versions = tta.variants(images, FLAGS.tta)
        every = [scores.softmax(m.logits(x)) for m in self.members for x in versions]
        return np.log(np.maximum(np.mean(every, 0), 1e-300))


def main() -> int:
    """Evaluates one checkpoint of each run on one split."""
    workdirs, others = _paths(FLAGS.workdir), _paths(FLAGS.against)
    if not workdirs:
        raise UserError("--workdir is missing: give the directory of a run")
    for name, allowed in (("split", SPLITS), ("tta", tta.KINDS)):
        if FLAGS[name].value not in allowed:
            raise UserError(f"--{name}={FLAGS[name].value}: use {', '.join(allowed)}")
    config = configs.load(workdirs[0] / "config.json")
    runtime.start(
        config.evaluate.batch_size,
        deterministic=config.deterministic,
        float64=config.dtype == "float64",
    )
    private = FLAGS.split == "private_test"
    wanted = {FLAGS.split, *([FITTED_ON] if FLAGS.calibrate else [])}
    wanted |= {"train"} if private else set()  # to tell which images are copies of training images
    data = load_data(
        config,
        tuple(s for s in SPLITS if s in wanted),
        source=FLAGS["data.source"].value or "",
        data_dir=FLAGS["data.data_dir"].value or "",
    )
    contender, other = _load(workdirs, data), _load(others, data)
    split = data.splits[FLAGS.split]
    logits = contender.logits(split.images)
    summary = scores.summarize(logits, split.labels, data.class_names)
    probabilities = scores.softmax(logits)
    record: dict[str, Any] = {
        "split": FLAGS.split,
        "step": contender.members[0].step,
        "checkpoint": FLAGS.checkpoint,
        "weights": FLAGS.weights,
        "tta": FLAGS.tta,
        "workdirs": [str(path) for path in workdirs],
        "data_digest": data.digest,
        **summary,
        "brier": calibration.brier(probabilities, split.labels),
    }
    lines = [scores.table(summary), "", f"Brier score {record['brier']:.3f} (0 to 2)"]
    if private:
        record["clean"] = clean_score(data, FLAGS.split, logits)
        lines.append(_clean_line(record["clean"]))
    if FLAGS.calibrate:
        record["calibration"] = _calibrate(contender, data, logits)
        lines += _calibration_lines(record["calibration"])
    if other.members:
        theirs = other.logits(split.images)
        accuracy = scores.accuracy(theirs, split.labels)
        record["against"] = {
            "workdirs": [str(path) for path in others],
            "accuracy": accuracy,
            **calibration.compare(logits, theirs, split.labels),
        }
        lines += _comparison_lines(record["against"])
    if jax.process_index():
        return configs.EXIT_OK
    directory = workdirs[0] / "eval"
    directory.mkdir(exist_ok=True)
    if private:
        _note_reading(contender, record["accuracy"])
        if other.members:
            _note_reading(other, record["against"]["accuracy"])
    # What is not the plain score of this run must not take the place of it.
    name = FLAGS.split + (f"_{FLAGS.tta}" if FLAGS.tta != "none" else "")
    path = directory / f"{name}{'_ensemble' if len(workdirs) > 1 else ''}.json"
    configs.write_json(path, record, indent=2)
    log.info(
        "%s, step %s (%s), %s weights, tta %s\n%s\nwritten to %s",
        *(FLAGS.split, "+".join(str(m.step) for m in contender.members), FLAGS.checkpoint),
        *(FLAGS.weights, FLAGS.tta, "\n".join(lines), path),
    )
    return configs.EXIT_OK


def _paths(flag: str) -> list[Path]:
    return [Path(part.strip()) for part in flag.split(",") if part.strip()]


def _load(workdirs: Sequence[Path], data: arrays.Dataset) -> Contender:
    """Loads each run, after comparing its data with what is scored."""
    members = []
    for workdir in workdirs:
        recorded = splits.recorded(workdir / "split.json").get("data_digest")
        if recorded and recorded != data.digest:
            log.warning(
                "warning: this data (%s) is not what the run was trained on (%s): the scores are "
                "of this data",
                *(data.digest[:12], recorded[:12]),
            )
        trained = load(
            workdir,
            checkpoint=FLAGS.checkpoint,
            weights=FLAGS.weights,
            data_dir=FLAGS["data.data_dir"].value or "",
        )
        if trained.classes != tuple(data.class_names):
            raise UserError(
                f"{workdir} tells apart {', '.join(trained.classes)}, the first run "
                f"{', '.join(data.class_names)}: give runs on the same classes"
            )
        members.append(trained)
    return Contender(workdirs, members)


def clean_score(data: arrays.Dataset, name: str, logits: np.ndarray) -> dict[str, Any]:
    """The score of a split on the images of which the training set holds no exact copy.

    Args:
      data: with the splits "train" and `name`.
      name: of the split.
      logits: [N, C] of it.

    Returns:
      images; accuracy and accuracy_interval (95 %), which are None if every image has a copy.
    """
    split = data.splits[name]
    train = data.splits["train"].images
    # The id of an image is its first place: below len(train) where training holds a copy.
    fresh = duplicates.exact_ids(np.concatenate([train, split.images]))[len(train) :] >= len(train)
    n = int(fresh.sum())
    share = scores.accuracy(logits[fresh], split.labels[fresh]) if n else None
    interval = None if share is None else list(scores.wilson_interval(share, n))
    return {"images": n, "accuracy": share, "accuracy_interval": interval}


def _calibrate(contender: Contender, data: arrays.Dataset, logits: np.ndarray) -> dict[str, Any]:
    """The temperature of public_test, and the scores of the split before and after it."""
    labels = data.splits[FLAGS.split].labels
    if FLAGS.split == FITTED_ON:
        temperature = calibration.fit_temperature(logits, labels)
        scaled = calibration.cross_fitted(logits, labels)
    else:
        fitting = data.splits[FITTED_ON]
        temperature = calibration.fit_temperature(contender.logits(fitting.images), fitting.labels)
        scaled = scores.softmax(logits / temperature)
    return {
        "temperature": temperature,
        "fitted_on": FITTED_ON,
        "cross_fitted": FLAGS.split == FITTED_ON,
        "before": calibration.summarize_calibration(scores.softmax(logits), labels),
        "after": calibration.summarize_calibration(scaled, labels),
    }


def _note_reading(contender: Contender, accuracy: float) -> None:
    note = {
        "checkpoint": FLAGS.checkpoint,
        "weights": FLAGS.weights,
        "tta": FLAGS.tta,
        "workdirs": [str(path) for path in contender.workdirs],
        "accuracy": accuracy,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    for workdir, member in zip(contender.workdirs, contender.members, strict=True):
        (workdir / "eval").mkdir(exist_ok=True)
        with (workdir / "eval" / "private_test_readings.jsonl").open("a") as file:
            file.write(json.dumps({"step": member.step, **note}) + "\n")


def _clean_line(clean: dict[str, Any]) -> str:
    if clean["accuracy"] is None:
        return "each image has an exact copy in train"
    low, high = (100 * x for x in clean["accuracy_interval"])
    return (
        f"without exact copies of training images: {100 * clean['accuracy']:.2f} % "
        f"(95 %: {low:.2f} to {high:.2f}), {clean['images']:,} images"
    )


def _calibration_lines(found: dict[str, Any]) -> list[str]:
    how = ", each half scaled by the other's" if found["cross_fitted"] else ""
    lines = [
        "",
        f"temperature {found['temperature']:.3f}, fitted on {found['fitted_on']}{how}",
        f"{'':<12}{'NLL':>10}{'Brier':>10}{'ECE':>10}{'ECE, equal mass':>18}",
    ]
    for name in ("before", "after"):
        row = found[name]
        values = "".join(f"{row[key]:>10.3f}" for key in ("nll", "brier", "ece"))
        lines.append(f"{name:<12}{values}{row['ece_equal_mass']:>18.3f}")
    return lines


def _comparison_lines(found: dict[str, Any]) -> list[str]:
    low, high = (100 * x for x in found["difference_interval"])
    return [
        "",
        f"against {', '.join(found['workdirs'])}: {100 * found['accuracy']:.2f} %",
        f"difference {100 * found['difference']:+.2f} points (95 %, paired bootstrap: "
        f"{low:+.2f} to {high:+.2f})",
        f"right alone: {found['only_first']:,} here, {found['only_second']:,} there; McNemar's "
        f"exact p = {found['mcnemar_p']:.3g}",
    ]


if __name__ == "__main__":
    define_flags()
    run(main)
