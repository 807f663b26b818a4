"""Scores a run: `python -m ferjax.evaluate --workdir=DIR [--split=private_test]`.

Prints the table and writes `<workdir>/eval/<split>.json`. Needs nothing but the workdir and the
data. Each reading of private_test is noted in `<workdir>/eval/private_test_readings.jsonl`.
"""

import json
import logging
import time
from pathlib import Path

import jax
from absl import flags

from ferjax import config as configs
from ferjax import runtime
from ferjax.analysis import scores
from ferjax.command import run
from ferjax.config import UserError
from ferjax.data import splits
from ferjax.load import load, load_data

FLAGS = flags.FLAGS
log = logging.getLogger("ferjax")
SPLITS = ("train", "public_test", "private_test")


def define_flags() -> None:
    """The command's flags; the same names may be defined by other commands in one process."""
    flags.DEFINE_string("workdir", "", "The run's directory.")
    flags.DEFINE_string("checkpoint", "best", "best (on public_test), latest, or a step.")
    flags.DEFINE_string("split", "public_test", ", ".join(SPLITS))
    flags.DEFINE_string("weights", "ema", "ema or raw.")
    flags.DEFINE_string("data.source", "", "Replaces the path that the run recorded.")
    flags.DEFINE_string("data.data_dir", "", "Where prepared data is, if not as recorded.")
    runtime.define_flags()


def main() -> int:
    """Evaluates one checkpoint on one split."""
    if not FLAGS.workdir:
        raise UserError("--workdir is missing: give the directory of a run")
    if FLAGS.split not in SPLITS:
        raise UserError(f"--split={FLAGS.split}: use {', '.join(SPLITS)}")
    workdir = Path(FLAGS.workdir)
    config = configs.load(workdir / "config.json")
    runtime.start(
        config.evaluate.batch_size,
        deterministic=config.deterministic,
        float64=config.dtype == "float64",
    )
    data = load_data(
        config,
        (FLAGS.split,),
        source=FLAGS["data.source"].value or "",
        data_dir=FLAGS["data.data_dir"].value or "",
    )
    recorded = splits.recorded(workdir / "split.json").get("data_digest")
    if recorded and recorded != data.digest:
        log.warning(
            "warning: this data (%s) is not what the run was trained on (%s): the scores are of "
            "this data",
            *(data.digest[:12], recorded[:12]),
        )
    trained = load(
        workdir,
        num_classes=len(data.class_names),
        which=FLAGS.checkpoint,
        weights=FLAGS.weights,
    )
    split = data.splits[FLAGS.split]
    summary = scores.summarize(trained.logits(split.images), split.labels, data.class_names)
    record = {
        "split": FLAGS.split,
        "step": trained.step,
        "checkpoint": FLAGS.checkpoint,
        "weights": FLAGS.weights,
        "data_digest": data.digest,
        **summary,
    }
    if jax.process_index():
        return configs.EXIT_OK
    directory = workdir / "eval"
    directory.mkdir(exist_ok=True)
    if FLAGS.split == "private_test":
        with (directory / "private_test_readings.jsonl").open("a") as file:
            note = {k: record[k] for k in ("step", "checkpoint", "weights", "accuracy")}
            note["time"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            file.write(json.dumps(note) + "\n")
    path = directory / f"{FLAGS.split}.json"
    configs.write_json(path, record, indent=2)
    log.info(
        "%s, step %d (%s), %s weights\n%s\nwritten to %s",
        *(FLAGS.split, trained.step, FLAGS.checkpoint, FLAGS.weights),
        *(scores.table(summary), path),
    )
    return configs.EXIT_OK


if __name__ == "__main__":
    define_flags()
    run(main)
