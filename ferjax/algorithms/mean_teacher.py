"""Mean Teacher (Tarvainen and Valpola 2017, arXiv:1703.01780).

loss = mean_b CE(y_b, p(weak(x_b))) + lambda r(t) mean_u 1/C |p(weak_1(u)) - p'(weak_2(u))|^2

p' is the prediction of the running average of the student's weights, theta' (eq. 1 and 2; its decay
is `config.ema_decay`), on a weak view of its own: without that noise the two would see the same
image. r is linear over the first `warmup` of training, as in the later codes; `ramp=sigmoid` is
the paper's exp(-5 (1 - t/T)^2). Labelled images take no part in the second term; in the paper they
do. A widely used code computes both sides from the teacher's logits, so its loss is 0 always.

The teacher is in evaluation mode: it normalises by the running average of the statistics and has no
dropout; in the reference codes it normalises by its own batch. The student's unlabelled forward
has a gradient, is normalised by its own batch, and leaves the running statistics alone, as there.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax

from ferjax.algorithms.base import (
    BaseAlgorithm,
    Batch,
    Metrics,
    Net,
    Time,
    accuracy_metric,
    check_fields,
    cross_entropy,
    mean_metric,
    ramp_up,
    squared_distance,
    weighted_mean,
)


@dataclass(frozen=True)
class Algorithm(BaseAlgorithm):
    """Mean Teacher.

    Attributes:
      mu: unlabelled images a step for each labelled one.
      lambda_u: weight of the consistency loss.
      warmup: share of training over which lambda_u rises, in [0, 1].
      ramp: "linear" or "sigmoid".
    """

    mu: int = 1
    lambda_u: float = 50.0
    warmup: float = 0.4
    ramp: str = "linear"
    unlabeled_views: ClassVar[tuple[str, ...]] = ("weak", "weak:2")

    def __post_init__(self) -> None:
        check_fields(self, lambda_u=1e6, warmup=1)

    def loss(self, net: Net, batch: Batch, extra: Any, t: Time) -> tuple[jax.Array, Metrics, Any]:
        """See the module's docstring."""
        labeled, unlabeled = batch.labeled, batch.unlabeled
        assert unlabeled is not None
        logits = net(labeled.views["weak"], keys=labeled.key("model"))
        student = net(unlabeled.views["weak"], keys=unlabeled.key("model"), update=False)
        teacher = net.teacher(unlabeled.views["weak:2"])

        target = jax.lax.stop_gradient(jax.nn.softmax(teacher))
        ce_labeled = cross_entropy(logits, labeled.target)
        distance = squared_distance(student, target)
        weight = self.lambda_u * ramp_up(t.progress, self.warmup, self.ramp)
        loss = weighted_mean(ce_labeled, labeled.weight)
        loss += weight * weighted_mean(distance, unlabeled.weight)
        metrics = {
            "loss_labeled": mean_metric(ce_labeled, labeled.weight),
            "loss_unlabeled": mean_metric(distance, unlabeled.weight),
            "train_accuracy": accuracy_metric(logits, labeled.target),
            "unlabeled_accuracy": accuracy_metric(student, unlabeled.target),
            "teacher_accuracy": accuracy_metric(teacher, unlabeled.target),
        }
        return loss, metrics, extra
