"""Scores a run: `python -m ferjax.evaluate --workdir=DIR [--split=private_test]`.

Prints the table and writes `<workdir>/eval/<split>.json`. Needs nothing but the workdir and the
data. Each reading of private_test is noted in `<workdir>/eval/private_test_readings.jsonl`.

    --workdir=A,B,C    the mean of several runs' probabilities; written to A
    --checkpoint=all   the mean of a run's kept checkpoints
    --tta=flip         the mean over the image and its mirror image, or ten_crop
    --labels=both      by FER2013's labels and by the majority of FER+'s votes
    --folder=DIR       your own faces, DIR/<class>/*.jpg, in place of a split
    --calibrate        the temperature that fits public_test, and what it does
    --against=D        compares with another run (or D,E: an ensemble) on the same images
    --corruptions      accuracy with parts covered, in the dark, with noise, turned
    --keep_predictions each image's probabilities as an .npz file: a teacher for self_training
    --probes           other classifiers on the network's features: neighbours, SVM, tree, k-means
"""

import json
import logging
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from etils import epath
from ml_collections import FrozenConfigDict

from ferjax import config as configs
from ferjax import evaluate_sections as sections
from ferjax import runtime
from ferjax.analysis import calibration, robustness, scores
from ferjax.command import run
from ferjax.config import UserError
from ferjax.data import arrays, ferplus, image_folder, soft_labels, splits
from ferjax.engine import checkpoint
from ferjax.evaluate_flags import FITTED_ON, SPLITS, check_flags, define_flags
from ferjax.evaluate_sections import Contender
from ferjax.evaluate_targets import (
    Subject,
    Target,
    label_sets,
    read_folder,
    split_targets,
    training_images,
)
from ferjax.load import load, load_data
from ferjax.workdir import absolute, append_text, reason, workdir_path, write_errors

FLAGS = flags.FLAGS
log = logging.getLogger("ferjax")


def main() -> int:
    """Evaluates one checkpoint, or some, of each run on one split or folder."""
    workdirs, others = _paths(FLAGS.workdir), _paths(FLAGS.against)
    if not workdirs:
        raise UserError("--workdir is missing: give the directory of a run")
    check_flags(len(workdirs))
    config = configs.load(workdirs[0] / "config.json")
    runtime.start(
        config.evaluate.batch_size,
        deterministic=config.deterministic,
        float64=config.dtype == "float64",
    )
    contender, other = _load(workdirs), _load(others)
    data = _data(config, workdirs[0])
    if data:
        _compare_digests(contender, data)
        _compare_digests(other, data)
    subject = _subject(config, data, contender)
    target = subject.targets[0]
    for each in (contender, other):
        each.check(target.classes, subject.images.shape[1:])

    record, lines = _score(config, data, subject, contender, other)
    if jax.process_index():
        return configs.EXIT_OK
    path = workdirs[0] / "eval" / f"{_file_name(subject, workdirs, data)}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if _private():
            _note_reading(contender, target, record["accuracy"])
            if other.members:
                _note_reading(other, target, record["against"]["accuracy"])
        configs.write_json(path, _joined(path, record), indent=2)
    except write_errors(path) as error:
        if not _private():  # what can't be noted is not shown
            log.info("%s", "\n".join(lines))
        raise UserError(f"{path} can't be written: {reason(error)}") from None
    log.info(
        "%s, step %s (%s), %s weights, tta %s, labels %s\n%s\nwritten to %s",
        *(subject.name, "+".join(str(m.step) for m in contender.members), FLAGS.checkpoint),
        *(FLAGS.weights, FLAGS.tta, target.name, "\n".join(lines), path),
    )
    return configs.EXIT_OK


def _score(
    config: FrozenConfigDict,
    data: arrays.Dataset | None,
    subject: Subject,
    contender: Contender,
    other: Contender,
) -> tuple[dict[str, Any], list[str]]:
    """What the flags ask for: the JSON file's content, and the lines for the terminal."""
    target = subject.targets[0]
    outputs = contender.outputs(subject.images)
    summary, logits = sections.score(contender, outputs, target)
    record: dict[str, Any] = {
        "split": "" if FLAGS.folder else FLAGS.split,
        "labels": target.name,
        "step": contender.members[0].step,
        "checkpoint": FLAGS.checkpoint,
        "weights": FLAGS.weights,
        "tta": FLAGS.tta,
        "workdirs": _names(contender),
        "data_digest": data.digest if data and not FLAGS.folder else "",
        **summary,
    }
    lines = [scores.table(summary), "", f"Brier score {record['brier']:.3f} (0 to 2)"]
    if FLAGS.folder:
        record |= {"folder": FLAGS.folder, "skipped": list(subject.skipped)}
        lines += [f"skipped: {each['image']}: {each['error']}" for each in subject.skipped]
    if len(subject.targets) > 1:
        record["label_sets"] = {target.name: summary} | {
            each.name: sections.score(contender, outputs, each)[0] for each in subject.targets[1:]
        }
        lines += sections.label_set_lines(record["label_sets"], len(subject.images))
    if _private() and data:
        kept = sections.fresh(data.splits["train"].images, subject.images)[target.positions]
        record["clean"] = sections.clean_score(kept, target.labels, logits)
        lines.append(sections.clean_line(record["clean"]))
    if len(contender.members) > 1:
        record["ensemble"] = sections.ensemble(contender, outputs, target, record["accuracy"])
        lines += sections.ensemble_lines(record["ensemble"])
    if FLAGS.calibrate and data:
        fitting = None
        if FLAGS.folder or FLAGS.split != FITTED_ON:
            on = _split_targets(config, data, FITTED_ON, [target.name])[0]
            images = data.splits[FITTED_ON].images[on.positions]
            # A folder's classes are the network's, in the same order; it may know one more.
            fitting = contender.logits(images, target.classes), on.labels
        record["calibration"] = sections.calibrate(logits, target.labels, fitting, FITTED_ON)
        lines += sections.calibration_lines(record["calibration"])
    if other.members:
        theirs = other.logits(subject.images[target.positions], target.classes)
        record["against"] = {
            "workdirs": _names(other),
            "accuracy": scores.accuracy(theirs, target.labels),
            **calibration.compare(logits, theirs, target.labels),
        }
        lines += sections.comparison_lines(record["against"])
    if FLAGS.corruptions:
        record["corruptions"] = sections.corrupted(contender, subject.images, target, logits)
        lines += ["", robustness.table(record["corruptions"])]
    if FLAGS.probes and data:
        training = training_images(
            config,
            data,
            splits.recorded(contender.workdirs[0] / "split.json"),
            FLAGS.probe_labels,
            target.classes,
            source=FLAGS["data.ferplus_source"].value or "",
            data_dir=FLAGS["data.data_dir"].value or "",
        )
        record["probes"], table = sections.probed(
            contender, training, subject.images, target, logits, FLAGS.probe_tree
        )
        lines += ["", table]
    # Last, when nothing that was read can still go unnoted for an error.
    if FLAGS.keep_predictions and data:
        lines.append(f"probabilities of each image: {_keep(data, subject, contender, outputs)}")
    return record, lines


def _joined(path: epath.Path, record: dict[str, Any]) -> dict[str, Any]:
    """The record, with the further analyses of the same scores that are in the file already."""
    try:
        old = dict(json.loads(path.read_text())) if path.exists() else {}
    except (TypeError, ValueError):
        old = {}  # not what ferjax wrote: it is written anew
    same = ("step", "checkpoint", "weights", "labels", "workdirs", "data_digest", "accuracy")
    return {**old, **record} if all(old.get(k) == record.get(k) for k in same) else record


def _private() -> bool:
    return FLAGS.split == "private_test" and not FLAGS.folder


def _paths(flag: str) -> list[epath.Path]:
    return [workdir_path(part.strip()) for part in flag.split(",") if part.strip()]


def _data(config: FrozenConfigDict, workdir: epath.Path) -> arrays.Dataset | None:
    """The splits that the flags need, of the run's data set; None if they need none."""
    wanted = set() if FLAGS.folder else {FLAGS.split}
    if FLAGS.calibrate:
        wanted.add(FITTED_ON)
    if FLAGS.probes or _private():
        wanted.add("train")  # private_test: to tell which images are copies of training images
    if not wanted:
        return None
    return load_data(
        config,
        tuple(s for s in SPLITS if s in wanted),
        recorded=splits.recorded(workdir / "split.json"),
        source=FLAGS["data.source"].value or "",
        data_dir=FLAGS["data.data_dir"].value or "",
    )


def _load(workdirs: Sequence[epath.Path]) -> Contender:
    """The checkpoint of each run that the flag names, or all of them."""
    chosen = []
    for workdir in map(absolute, workdirs):  # a relative `small` is the packaged network's name
        if not (workdir / "config.json").exists():
            raise UserError(f"{workdir}/config.json is not there: is {workdir} a ferjax workdir?")
        names = [FLAGS.checkpoint]
        if FLAGS.checkpoint == "all":
            names = [path.name for path in checkpoint.saved(workdir)] or ["best"]
        chosen += [(workdir, name) for name in names]
    members = [
        load(
            workdir,
            checkpoint=name,
            weights=FLAGS.weights,
            data_dir=FLAGS["data.data_dir"].value or "",
        )
        for workdir, name in chosen
    ]
    return Contender([workdir for workdir, _ in chosen], members, FLAGS.tta)


def _compare_digests(contender: Contender, data: arrays.Dataset) -> None:
    for workdir in dict.fromkeys(contender.workdirs):
        if not splits.is_of(workdir, data.digest):
            recorded = splits.recorded(workdir / "split.json")["data_digest"]
            log.warning(
                "warning: this data (%s) is not what the run was trained on (%s): the scores are "
                "of this data",
                *(data.digest[:12], recorded[:12]),
            )


def _subject(
    config: FrozenConfigDict, data: arrays.Dataset | None, contender: Contender
) -> Subject:
    first = contender.members[0]
    if FLAGS.folder or data is None:
        module, _, form = config.data.name.partition(":")[0].partition("/")
        detect = module == "image_folder" and image_folder.parse(form).detect
        return read_folder(FLAGS.folder, first.classes, first.image_shape, detect=detect)
    names = label_sets(FLAGS.labels, config, first.classes)
    images = data.splits[FLAGS.split].images
    return Subject(
        FLAGS.split,
        images if FLAGS.tta == "none" else images[:],  # its views need them all in memory
        _split_targets(config, data, FLAGS.split, names),
    )


def _split_targets(
    config: FrozenConfigDict, data: arrays.Dataset, split: str, names: Sequence[str]
) -> list[Target]:
    return split_targets(
        config,
        data,
        split,
        names,
        source=FLAGS["data.ferplus_source"].value or "",
        data_dir=FLAGS["data.data_dir"].value or "",
    )


def _file_name(
    subject: Subject, workdirs: Sequence[epath.Path], data: arrays.Dataset | None
) -> str:
    """What is not the plain score of one run on its own data must not take the place of it."""
    parts = [subject.name]
    if data and not FLAGS.folder and not splits.is_of(workdirs[0], data.digest):
        parts.append(f"of_{data.digest[:12]}")
    if subject.targets[0].name in ferplus.SCORED:
        parts.append(subject.targets[0].name)
    if FLAGS.tta != "none":
        parts.append(FLAGS.tta)
    if FLAGS.checkpoint != "best":
        parts.append("checkpoints" if FLAGS.checkpoint == "all" else f"at_{FLAGS.checkpoint}")
    if FLAGS.weights != "ema":
        parts.append(FLAGS.weights)
    if len(workdirs) > 1:
        parts.append("ensemble")
    return "_".join(parts)


def _keep(data: arrays.Dataset, subject: Subject, contender: Contender, outputs: Any) -> epath.Path:
    """Writes what the contender says of each image of the split, in process 0."""
    workdirs = list(dict.fromkeys(contender.workdirs))
    path = workdirs[0] / "eval" / f"{_file_name(subject, workdirs, data)}_predictions.npz"
    if jax.process_index() == 0:
        classes = contender.members[0].classes
        learnt = [splits.recorded(w / "split.json").get("labeled_rows", []) for w in workdirs]
        labels = soft_labels.SoftLabels(
            data.splits[FLAGS.split].rows,
            scores.softmax(contender.combine(outputs, classes)),
            classes,
            data.digest,
            np.unique(np.concatenate(learnt)),
        )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            soft_labels.save(labels, path)
        except write_errors(path) as error:
            raise UserError(f"{path} can't be written: {reason(error)}") from None
    return path


def _names(contender: Contender) -> list[str]:
    return [str(path) for path in dict.fromkeys(contender.workdirs)]


def _note_reading(contender: Contender, target: Target, accuracy: float) -> None:
    """One line in each run's log: private_test was looked at, whatever for."""
    asked = ("calibrate", "against", "corruptions", "probes", "keep_predictions")
    note = {
        "checkpoint": FLAGS.checkpoint,
        "weights": FLAGS.weights,
        "tta": FLAGS.tta,
        "labels": FLAGS.labels if FLAGS.labels == "both" else target.name,
        "analyses": [name for name in asked if FLAGS[name].value],
        "workdirs": _names(contender),
        "accuracy": accuracy,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    for workdir in dict.fromkeys(contender.workdirs):
        pairs = zip(contender.workdirs, contender.members, strict=True)
        steps = [member.step for path, member in pairs if path == workdir]
        (workdir / "eval").mkdir(parents=True, exist_ok=True)
        line = {"step": steps[0] if len(steps) == 1 else steps, **note}
        append_text(workdir / "eval" / "private_test_readings.jsonl", json.dumps(line) + "\n")


if __name__ == "__main__":
    define_flags()
    run(main)
