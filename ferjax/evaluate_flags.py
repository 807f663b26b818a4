"""The flags of `ferjax.evaluate`, and which of them go together."""

from absl import flags

from ferjax import runtime
from ferjax.augment import tta
from ferjax.config import UserError
from ferjax.evaluate_targets import LABELS

FLAGS = flags.FLAGS
SPLITS = ("train", "public_test", "private_test")
FITTED_ON = "public_test"  # temperatures
PROBE_LABELS = ("labeled", "all")


def define_flags() -> None:
    """The command's flags; the same names may be defined by other commands in one process."""
    flags.DEFINE_string("workdir", "", "The run's directory; several with commas: an ensemble.")
    flags.DEFINE_string(
        "checkpoint", "best", "best (on public_test), latest, a step, or all: their ensemble."
    )
    flags.DEFINE_string("split", FITTED_ON, ", ".join(SPLITS))
    flags.DEFINE_string("folder", "", "Scores the faces DIR/<class>/*.jpg in place of a split.")
    flags.DEFINE_string("labels", "own", f"What is right: {', '.join(LABELS)}; of fer2013.")
    flags.DEFINE_string("weights", "ema", "ema or raw.")
    flags.DEFINE_string("tta", "none", f"Test-time augmentation: {', '.join(tta.KINDS)}.")
    flags.DEFINE_bool("calibrate", False, "Fit a temperature on public_test; show its effect.")
    flags.DEFINE_string("against", "", "Compare with the run in this directory.")
    flags.DEFINE_bool("corruptions", False, "Score occluded, dark, grey, noisy and turned images.")
    flags.DEFINE_bool("keep_predictions", False, "Write each image's probabilities.")
    flags.DEFINE_bool("probes", False, "Fit other classifiers on features of training images.")
    flags.DEFINE_string(
        "probe_labels", "labeled", "Probes are fitted on: labeled (the run's), all."
    )
    flags.DEFINE_string(
        "probe_tree", "", "Groups, such as '((angry,sad),(happy,...))'; else found."
    )
    flags.DEFINE_string("data.source", "", "Replaces the path that the run recorded.")
    flags.DEFINE_string("data.ferplus_source", "", "fer2013new.csv, if not as recorded.")
    flags.DEFINE_string("data.data_dir", "", "Where prepared data is, if not as recorded.")
    runtime.define_flags()


def check_flags(runs: int) -> None:
    """Raises UserError for values that there are not, or that do not go together.

    Args:
      runs: how many --workdir names.
    """
    for name, allowed in (
        ("split", SPLITS),
        ("tta", tta.KINDS),
        ("labels", LABELS),
        ("probe_labels", PROBE_LABELS),
    ):
        if FLAGS[name].value not in allowed:
            raise UserError(f"--{name}={FLAGS[name].value}: use {', '.join(allowed)}")
    if FLAGS.folder and FLAGS["split"].present:
        raise UserError("--folder and --split: give one of them")
    if FLAGS.folder and FLAGS.labels != "own":
        raise UserError(f"--labels={FLAGS.labels}: a folder has its own labels: leave it out")
    if FLAGS.folder and FLAGS.keep_predictions:
        raise UserError("--keep_predictions is for a split: leave --folder out")
    if FLAGS.probe_tree and not FLAGS.probes:
        raise UserError("--probe_tree groups the classes of --probes: give that, too")
    if FLAGS.probes and (runs > 1 or FLAGS.checkpoint == "all"):
        raise UserError("--probes looks at one network's features: give one run, one checkpoint")
    if FLAGS.probes and FLAGS.split == "train":
        raise UserError("--probes are fitted on train: give another --split")
