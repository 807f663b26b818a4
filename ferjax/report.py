"""Writes a run's report: `python -m ferjax.report --workdir=DIR`.

One file, `<workdir>/report.html`, from a finished or a running workdir, its figures as
`<workdir>/figures/*.png`, and the model card `<workdir>/MODEL_CARD.md`. It reads what training
wrote, and scores one checkpoint on public_test by the one evaluation path. It never scores
private_test: it shows what `ferjax.evaluate` wrote of it.
"""

import dataclasses
import logging

import jax
from absl import flags
from etils import epath
from ml_collections import FrozenConfigDict

from ferjax import config as configs
from ferjax import model_card, runtime
from ferjax.analysis import figures, scores
from ferjax.command import run
from ferjax.config import UserError
from ferjax.data import splits
from ferjax.engine import checkpoint
from ferjax.load import load, load_data
from ferjax.report_sections import SPLIT, Report, Scored
from ferjax.workdir import absolute, reason, workdir_path, write_errors

FLAGS = flags.FLAGS
log = logging.getLogger("ferjax")


def define_flags() -> None:
    """The command's flags; the same names may be defined by other commands in one process."""
    flags.DEFINE_string("workdir", "", "The run's directory.")
    flags.DEFINE_string("checkpoint", "", "best, latest, or a step; empty: best, else latest.")
    flags.DEFINE_string("weights", "ema", "ema or raw.")
    flags.DEFINE_string("data.source", "", "Replaces the path that the run recorded.")
    flags.DEFINE_string("data.data_dir", "", "Where prepared data is, if not as recorded.")
    runtime.define_flags()


def score(workdir: epath.Path, config: FrozenConfigDict) -> Scored | None:
    """Scores the checkpoint that the flags name, None if nothing was saved yet."""
    if not checkpoint.saved(workdir):
        return None
    data_dir = FLAGS["data.data_dir"].value or ""
    which = FLAGS.checkpoint or "best"
    try:
        checkpoint.choose(workdir, which)
    except checkpoint.NotScoredError:
        if FLAGS.checkpoint:
            raise
        which = "latest"
    trained = load(absolute(workdir), checkpoint=which, weights=FLAGS.weights, data_dir=data_dir)
    source = FLAGS["data.source"].value or ""
    own = splits.recorded(workdir / "split.json")
    data = load_data(config, (SPLIT,), recorded=own, source=source, data_dir=data_dir)
    if not splits.is_of(workdir, data.digest):
        raise UserError(
            f"{workdir}: the data there is now ({data.digest[:12]}) is not what the run was "
            f"trained on ({own['data_digest'][:12]}): give that with --data.source= or "
            "--data.data_dir=; to score the run on other pictures there is ferjax.evaluate"
        )
    logits = trained.logits(data.splits[SPLIT].images)
    logits = scores.restrict(logits, trained.classes, data.class_names)
    return Scored(trained, which, FLAGS.weights, data, logits)


def card(report: Report) -> str:
    """The model card of the checkpoint that the report scores."""
    assert report.scored
    assert report.scored.trained.weights
    source = report.scored.trained.weights
    facts = model_card.gather(
        report.workdir,
        source,
        checkpoint=report.scored.which,
        kind=FLAGS.weights,
        public=report.summary,
    )
    return model_card.text(dataclasses.replace(source, facts=facts))


def main() -> int:
    """Writes the report, its figures, and the model card."""
    if not FLAGS.workdir:
        raise UserError("--workdir is missing: give the directory of a run")
    workdir = workdir_path(FLAGS.workdir)
    config = configs.load(workdir / "config.json")
    runtime.start(config.evaluate.batch_size, float64=config.dtype == "float64")
    report = Report(workdir, config, score(workdir, config))
    text = report.html()
    if jax.process_index():
        return configs.EXIT_OK
    path = workdir / "report.html"
    try:
        configs.write_whole(path, text.encode())
        (workdir / "figures").mkdir(exist_ok=True)
        if report.scored:
            configs.write_whole(workdir / "MODEL_CARD.md", card(report).encode())
        for name, figure in report.drawn.items():
            (workdir / "figures" / f"{name}.png").write_bytes(figures.png(figure))
    except write_errors(workdir) as error:
        raise UserError(f"{path} can't be written: {reason(error)}") from None
    log.info("written to %s (%.1f MB) and %s/figures", path, len(text) / 1e6, workdir)
    return configs.EXIT_OK


if __name__ == "__main__":
    define_flags()
    run(main)
