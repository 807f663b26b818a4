"""What `ferjax.evaluate` finds out, a function each: the JSON file's content, and its lines."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath

from ferjax.analysis import calibration, robustness, scores
from ferjax.augment import corruptions, tta
from ferjax.config import UserError
from ferjax.data import illumination
from ferjax.data.ferplus import CLASSES
from ferjax.evaluate_targets import Target
from ferjax.load import Trained

# For each member and each version of the images the logits [N, the member's classes].
Outputs = list[list[np.ndarray]]


@dataclass(frozen=True)
class Contender:
    """One network, or several whose probabilities are averaged.

    Attributes:
      workdirs: of each member: several checkpoints of one run have the same.
      members: the networks.
      views: kind of test-time augmentation, see `tta.variants`.
    """

    workdirs: Sequence[epath.Path]
    members: Sequence[Trained]
    views: str

    def outputs(self, images: np.ndarray) -> Outputs:
        """What each member says of each version of the images, uint8 [N, H, W, C]."""

        def versions(member: Trained) -> list[np.ndarray]:
            data = member.config.data
            # Whole images are corrected before they are cut, as in training.
            whole = illumination.apply(images, data.illumination)
            made = tta.variants(whole, self.views, data.crop)
            return [member.logits(x, corrected=True) for x in made]

        return [versions(member) for member in self.members]

    def combine(self, outputs: Outputs, classes: Sequence[str]) -> np.ndarray:
        """Logits [N, C] of some classes: of one network, or the log of the mean probability.

        Classes of a member that are not wanted are dropped and the others' probabilities scaled up
        before the mean is taken.
        """
        every = [
            scores.restrict(logits, member.classes, classes)
            for member, versions in zip(self.members, outputs, strict=True)
            for logits in versions
        ]
        if len(every) == 1:
            return every[0]
        return np.log(np.maximum(np.mean([scores.softmax(x) for x in every], 0), 1e-300))

    def logits(self, images: np.ndarray, classes: Sequence[str]) -> np.ndarray:
        """Both: [N, C] of uint8 images [N, H, W, C]."""
        return self.combine(self.outputs(images), classes)

    def alone(self, member: int) -> "Contender":
        """One of the members."""
        return Contender([self.workdirs[member]], [self.members[member]], self.views)

    def check(self, classes: Sequence[str], image_shape: tuple[int, ...]) -> None:
        """Raises UserError unless all members see such images and tell these classes apart alone.

        Contempt may be one more: FER+'s eighth class, which is dropped.
        """
        for workdir, member in zip(self.workdirs, self.members, strict=True):
            others = set(member.classes) - set(classes) - {CLASSES[-1]}
            if others or set(classes) - set(member.classes):
                raise UserError(
                    f"{workdir} tells apart {', '.join(member.classes)}, what is scored "
                    f"{', '.join(classes)}: give runs on the same classes"
                )
            if tuple(member.image_shape) != tuple(image_shape):
                sizes = (" x ".join(map(str, x)) for x in (member.image_shape, image_shape))
                raise UserError(
                    "{} was trained on images of {}, what is scored has {}: give runs on images of "
                    "one size".format(workdir, *sizes)
                )


def score(
    contender: Contender, outputs: Outputs, target: Target
) -> tuple[dict[str, Any], np.ndarray]:
    """The plain scores of one target, and its logits [M, C]."""
    logits = contender.combine(outputs, target.classes)[target.positions]
    summary = scores.summarize(logits, target.labels, target.classes)
    return {
        **summary,
        "brier": calibration.brier(scores.softmax(logits), target.labels),
    }, logits


def label_set_lines(found: dict[str, dict[str, Any]], total: int) -> list[str]:
    """A line for each label set: see `score`."""
    lines = ["", f"{'labels':<12}{'images':>10}{'accuracy':>10}{'95 %':>18}{'macro-F1':>10}"]
    for name, row in found.items():
        low, high = (100 * x for x in row["accuracy_interval"])
        lines.append(
            f"{name:<12}{row['images']:>10,}{100 * row['accuracy']:>10.2f}"
            f"{f'{low:.2f} to {high:.2f}':>18}{100 * row['macro_f1']:>10.2f}"
        )
    lines.append(f"of {total:,} images; those without a majority of FER+'s votes are left out")
    return lines


def fresh(train: np.ndarray, images: np.ndarray) -> np.ndarray:
    """bool [N]: whether no training image is an exact copy of the image; uint8 [., H, W, C]."""
    wanted = {image.tobytes() for image in images}
    found: set[bytes] = set()
    for start in range(0, len(train), 1024):  # training images may be streamed from disk
        found |= wanted.intersection(image.tobytes() for image in train[start : start + 1024])
    return np.array([image.tobytes() not in found for image in images], bool)


def clean_score(kept: np.ndarray, labels: np.ndarray, logits: np.ndarray) -> dict[str, Any]:
    """The score on some images.

    Args:
      kept: bool [N], see `fresh`; labels: int [N]; logits: [N, C].

    Returns:
      images; accuracy and accuracy_interval (95 %), which are None if none is kept.
    """
    n = int(kept.sum())
    share = scores.accuracy(logits[kept], labels[kept]) if n else None
    interval = None if share is None else list(scores.wilson_interval(share, n))
    return {"images": n, "accuracy": share, "accuracy_interval": interval}


def clean_line(clean: dict[str, Any]) -> str:
    """`clean_score` as text."""
    if clean["accuracy"] is None:
        return "each image has an exact copy in train"
    low, high = (100 * x for x in clean["accuracy_interval"])
    return (
        f"without exact copies of training images: {100 * clean['accuracy']:.2f} % "
        f"(95 %: {low:.2f} to {high:.2f}), {clean['images']:,} images"
    )


def ensemble(
    contender: Contender, outputs: Outputs, target: Target, accuracy: float
) -> dict[str, Any]:
    """What averaging gains over the members.

    Returns:
      members: workdir, step and accuracy of each, over the same views; mean_accuracy and
      best_accuracy of them; gain and gain_over_best: `accuracy` less these.
    """
    members: list[dict[str, Any]] = []
    for place, (workdir, member) in enumerate(
        zip(contender.workdirs, contender.members, strict=True)
    ):
        logits = contender.alone(place).combine([outputs[place]], target.classes)
        share = scores.accuracy(logits[target.positions], target.labels)
        members.append({"workdir": str(workdir), "step": member.step, "accuracy": share})
    shares = [member["accuracy"] for member in members]
    mean, best = float(np.mean(shares)), max(shares)
    return {
        "members": members,
        "mean_accuracy": mean,
        "best_accuracy": best,
        "gain": accuracy - mean,
        "gain_over_best": accuracy - best,
    }


def ensemble_lines(found: dict[str, Any]) -> list[str]:
    """`ensemble` as text."""
    lines = ["", f"ensemble of {len(found['members'])}"]
    for member in found["members"]:
        share = f"{100 * member['accuracy']:.2f} %"
        lines.append(f"  {share}  {member['workdir']}, step {member['step']}")
    lines.append(
        f"mean of the members {100 * found['mean_accuracy']:.2f} %, gain "
        f"{100 * found['gain']:+.2f} points ({100 * found['gain_over_best']:+.2f} over the best)"
    )
    return lines


def calibrate(
    logits: np.ndarray, labels: np.ndarray, fitting: tuple[np.ndarray, np.ndarray] | None, on: str
) -> dict[str, Any]:
    """The scores of a split before and after its confidence is scaled.

    Args:
      logits: [N, C]; labels: int [N].
      fitting: logits and labels that the temperature is fitted on; None: the split's own, each half
        of which is judged by the other's temperature.
      on: the name of the split that is fitted on.
    """
    if fitting is None:
        temperature = calibration.fit_temperature(logits, labels)
        scaled = calibration.cross_fitted(logits, labels)
    else:
        temperature = calibration.fit_temperature(*fitting)
        scaled = scores.softmax(logits / temperature)
    return {
        "temperature": temperature,
        "fitted_on": on,
        "cross_fitted": fitting is None,
        "before": calibration.summarize_calibration(scores.softmax(logits), labels),
        "after": calibration.summarize_calibration(scaled, labels),
    }


def calibration_lines(found: dict[str, Any]) -> list[str]:
    """`calibrate` as text."""
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


def comparison_lines(found: dict[str, Any]) -> list[str]:
    """`calibration.compare` as text."""
    low, high = (100 * x for x in found["difference_interval"])
    return [
        "",
        f"against {', '.join(found['workdirs'])}: {100 * found['accuracy']:.2f} %",
        f"difference {100 * found['difference']:+.2f} points (95 %, paired bootstrap: "
        f"{low:+.2f} to {high:+.2f})",
        f"right alone: {found['only_first']:,} here, {found['only_second']:,} there; McNemar's "
        f"exact p = {found['mcnemar_p']:.3g}",
    ]


def corrupted(
    contender: Contender, images: np.ndarray, target: Target, clean: np.ndarray
) -> dict[str, Any]:
    """The scores of one target under every corruption; clean: its logits [M, C] without."""
    images = images[target.positions]
    logits = {
        kind: {
            level: contender.logits(corruptions.corrupt(images, kind, level), target.classes)
            for level in levels
        }
        for kind, levels in corruptions.LEVELS.items()
    }
    return robustness.summarize_robustness(clean, target.labels, logits)


def probed(
    contender: Contender,
    training: tuple[np.ndarray, np.ndarray],
    images: np.ndarray,
    target: Target,
    clean: np.ndarray,
    tree: str,
) -> tuple[dict[str, Any], str]:
    """Other classifiers on the features of one network, and their table.

    Args:
      contender: of one member.
      training: images uint8 [n, H, W, C] to fit on, and their labels int [n].
      images: all that `target` is about; clean: its logits [M, C].
      tree: of the hierarchical classifier, see `probes.parse_tree`; empty: found.

    Raises:
      UserError: the network gives no features, or the tree is wrong.
    """
    from ferjax.analysis import probes  # scikit-learn takes a second to import

    features = contender.members[0].features
    if features is None:
        raise UserError("--probes: this run's network has no features(): it can't be probed")
    given = probes.parse_tree(tree, target.classes) if tree else None
    found = probes.summarize_probes(
        features(training[0]),
        training[1],
        contender.logits(training[0], target.classes),
        features(images[target.positions]),
        target.labels,
        clean,
        target.classes,
        given,
    )
    return found, probes.table(found)
