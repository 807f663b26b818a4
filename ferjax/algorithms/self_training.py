"""Self-training: a finished run's predictions are the targets of a new one.

loss = mean_b CE(y_b, p(weak(x_b)))
     + weight mean_u 1[max q_u >= threshold] CE(target(q_u), p(strong(u)))

q_u is what the teacher, a trained network, said of image u itself, not of a view, before this run
began; it stays. target(q) is its argmax (`hard`; Lee 2013, "Pseudo-label") or q (Xie et
al. 2020, arXiv:1911.04252, "Noisy Student": the student sees strongly augmented images and may have
dropout). The second mean is over all unlabelled images. Lee takes the labels from the network in
training instead (pseudo_label.py). The paper filters at .3 and then draws classes equally often;
here the threshold is 0 and nothing is balanced. To repeat it, evaluate the student and name it as
the next teacher; `config.init_from` lets the student start from the teacher's weights.

    python -m ferjax.evaluate --workdir=TEACHER --split=train --keep_predictions

writes what `predictions` names. It is read once, into `extra`: a run goes on from its checkpoint
without the teacher. A teacher that has learnt from labels which this run hides gets a warning.

`joint` normalises labelled and strong views together, and both move the running statistics;
`apart` runs them through a forward each, and the labelled ones alone move them.
"""

import logging
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ferjax.algorithms.base import (
    BaseAlgorithm,
    Batch,
    Metrics,
    Net,
    Time,
    TrainingSet,
    accuracy_metric,
    check_fields,
    cross_entropy,
    mean_metric,
    unlabeled_metrics,
    weighted_mean,
)
from ferjax.config import UserError
from ferjax.data import soft_labels
from ferjax.workdir import workdir_path

log = logging.getLogger("ferjax")


@dataclass(frozen=True)
class Algorithm(BaseAlgorithm):
    """Self-training.

    Attributes:
      predictions: the teacher's workdir, or an .npz file that `ferjax.evaluate` wrote.
      mu: unlabelled images a step for each labelled one.
      hard: learn the teacher's likeliest class, not its probabilities.
      threshold: the least confidence of a target, in [0, 1].
      weight: of the unlabelled loss.
      forward: "joint" or "apart".
    """

    predictions: str = ""
    mu: int = 7
    hard: bool = False
    threshold: float = 0.0
    weight: float = 1.0
    forward: str = "joint"
    unlabeled_views: ClassVar[tuple[str, ...]] = ("strong",)

    def __post_init__(self) -> None:
        check_fields(self, threshold=1, weight=1e6)
        if self.forward == "split":
            raise UserError("config.algorithm.forward=split: use joint or apart")

    def init_extra(self, num_classes: int, num_images: int) -> Any:
        """`targets`: the teacher's probabilities [num_images, num_classes]; 0 where it has none."""
        return {"targets": jnp.zeros((num_images, num_classes))}

    def read_extra(self, extra: Any, train: TrainingSet) -> Any:
        """Reads the targets.

        Raises:
          UserError: there are none, or they are of other images or classes.
        """
        where = f"config.algorithm.predictions={self.predictions}"
        if not self.predictions:
            raise UserError(f"{where} is empty: give the workdir of a trained run, the teacher")
        path = workdir_path(self.predictions)
        if path.suffix != ".npz":
            path = path / "eval" / "train_predictions.npz"
        try:
            teacher = soft_labels.read(path)
        except FileNotFoundError:
            mend = "ferjax.evaluate --keep_predictions writes such a file and says where"
            if not self.predictions.endswith(".npz"):
                mend = f"python -m ferjax.evaluate --workdir={self.predictions} --split=train"
                mend = f"to write it: {mend} --keep_predictions"
            raise UserError(f"{where}: {path} is not there; {mend}") from None
        if teacher.digest != train.digest:
            raise UserError(f"{where}: the predictions are of other images than this run's")
        if teacher.class_names != tuple(train.class_names):
            raise UserError(f"{where}: the classes are {', '.join(teacher.class_names)}")
        hidden = np.setdiff1d(teacher.labeled_rows, train.rows[train.labeled])
        if len(hidden):
            log.warning(
                "warning: the teacher has learnt from the labels of %s images that this run takes "
                "for unlabelled: its figures are not those of fewer labels",
                f"{len(hidden):,}",
            )
        known = np.isin(train.rows, teacher.rows)
        if not known[train.unlabeled].any():
            raise UserError(
                f"{where}: none of the images that this run uses without label has a prediction: a "
                "teacher is asked about the images of train alone; label fewer of them "
                "(config.data.labeled), or take a method that needs no teacher"
            )
        if not known.all():
            log.warning(
                "warning: %s training images have no prediction of the teacher and count as none",
                f"{int((~known).sum()):,}",
            )
        targets = np.zeros_like(extra["targets"])
        targets[known] = teacher.probabilities[np.searchsorted(teacher.rows, train.rows[known])]
        return {"targets": targets}

    def loss(self, net: Net, batch: Batch, extra: Any, t: Time) -> tuple[jax.Array, Metrics, Any]:
        """See the module's docstring."""
        labeled, unlabeled = batch.labeled, batch.unlabeled
        assert unlabeled is not None
        weak, strong = labeled.views["weak"], unlabeled.views["strong"]
        keys = labeled.key("model"), unlabeled.key("model/strong")
        if self.forward == "joint":
            both = net(jnp.concatenate([weak, strong]), keys=jnp.concatenate(keys))
            logits, guesses = jnp.split(both, (len(weak),))
        else:
            logits = net(weak, keys=keys[0])
            guesses = net(strong, keys=keys[1], update=False)

        q = extra["targets"][unlabeled.index].astype(guesses.dtype)
        target = jax.nn.one_hot(jnp.argmax(q, -1), q.shape[-1], dtype=q.dtype) if self.hard else q
        surest = jnp.max(q, -1)
        mask = ((surest >= self.threshold) & (surest > 0)).astype(q.dtype)
        ce_labeled = cross_entropy(logits, labeled.target)
        ce_unlabeled = cross_entropy(guesses, target) * mask
        loss = weighted_mean(ce_labeled, labeled.weight)
        loss += self.weight * weighted_mean(ce_unlabeled, unlabeled.weight)
        metrics = {
            "loss_labeled": mean_metric(ce_labeled, labeled.weight),
            "loss_unlabeled": mean_metric(ce_unlabeled, unlabeled.weight),
            "train_accuracy": accuracy_metric(logits, labeled.target),
            # An image without a prediction is none that was judged rightly or wrongly.
            **unlabeled_metrics(q, unlabeled.target * (surest > 0)[:, None], mask),
        }
        return loss, metrics, extra
