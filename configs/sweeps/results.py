"""The rows of RESULTS.md: what others published, what is to be reached, and the config for it.

python -m ferjax.sweep --sweep=configs/sweeps/results.py --only='cnn_.*'       runs rows
python -m ferjax.results --collect=runs                                        writes RESULTS.md

"on" says where a row is run: C on CPU cores, G on a GPU. --cpu takes the rows of the first kind
only.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

from ferjax.rows import Row, Sweep, load

NOTE = """\
Written by `python -m ferjax.results` from the summaries in `results/`; nothing is typed by
hand. Accuracies are percent, the mean and the sample standard deviation over seeds. "best" is
the checkpoint with the highest accuracy of the EMA weights on public_test (3,589 images; the 95
% interval of one run at 55 % is +- 1.6), which is then scored on private_test, once. "clean" is
private_test without the images that have an exact copy in train. "reached" compares the mean on
private_test, or on public_test's best as long as private_test was not read; two rows on the
seeds that both have. "on": C is run on CPU cores, G waits for a GPU. "minutes" are those of
training by the clock, whatever else ran; of an ensemble, those of all its members. One seed
proves little. In the comparison of methods on 10 and 30 % of the labels all seeds have one
labelled subset, so that their deviation is without the luck of the draw; and 3,589 labels to
choose the best checkpoint by are more than most of them train on: hence "final". The configs
are in `configs/sweeps/results.py` and the files that it names, the commands in
`results/*/*.json`; with the XLA_FLAGS that make one JAX device
(`--xla_force_host_platform_device_count=1`) a CPU gives the same figures.

    python -m ferjax.sweep --sweep=configs/sweeps/results.py --only=ROW    trains a row
    the same with --finish                                                 reads private_test, once
    python -m ferjax.results --collect=runs                                writes this file"""

POSTER = "Seed poster: learning rate .001, batch 32, 30 epochs, 224 pixels; split not named."
ROY = (
    "Roy & Etemad (2022), quoted by the poster: 64.57 supervised, 59.46 with 100 labels a class, "
    "700 in all."
)
STUDIES = "https://arxiv.org/abs/1612.02903 (72.7 VGG, 72.4 ResNet, 75.2 eight networks together)."
STUDENT = "configs/medium.py:student"
# The six that promise most, by configs/sweeps/methods_on_faces.py and their papers.
METHODS = ("adamatch", "freematch", "softmatch", "mixmatch", "fixmatch", "uda")
# What two CPU cores compare with supervised training. The teachers of self_training's rows must be
# there before: configs/self_training.py says how they are made.
COMPARED = {
    10: ("adamatch_students", "self_training", *METHODS),
    30: ("adamatch", "self_training"),
}


def get_sweep(cpu: bool = False) -> Sweep:
    """All rows, section by section."""
    rows = [
        *_of("seed_cnn_architectures", "The seed slides' CNN: architectures"),
        *_of("seed_augmentation", "The seed slides' CNN: augmentation", only="cnn_keras.*"),
        *_of("seed_label_ratio", "The seed slides' CNN: share of labels"),
        *_of("ladder_noise", "Ladder network, 10 % labels"),
        *_few_labels(),
        *_supervised(),
        *_poster(),
        *_of("labels_per_class", "FixMatch: labels a class", only="fixmatch.*", cpu=False),
    ]
    if cpu:
        rows = [row for row in rows if row.on == "C"]
    return Sweep("Results", rows, note=NOTE)


def _of(sweep: str, section: str, *, only: str = ".*", cpu: bool = True) -> list[Row]:
    """The rows of another sweep's file whose names match."""
    other = load(Path(__file__).with_name(f"{sweep}.py"), cpu=cpu)
    chosen = [row for row in other.rows if re.fullmatch(only, row.name)]
    return [dataclasses.replace(row, section=section) for row in chosen]


def _few_labels() -> list[Row]:
    """The methods on 10 % of the labels, as their configs for two cores stand, and one on 30 %.

    All see the same labels, those of split_seed 0: teachers for each subset would take hours.
    """
    section = "Semi-supervised against supervised: small CNN, 10 and 30 % labels"
    changes: dict[str, dict[str, Any]] = {
        "adamatch_students_10": {
            "algorithm.predictions": "runs/adamatch_0/eval/train_flip_ensemble_predictions.npz"
        },
        "supervised_30": {"data.labeled": "30%", "epochs": 30},
        "adamatch_30": {"data.labeled": "30%"},
        "self_training_30": {
            "data.labeled": "30%",
            "algorithm.predictions": "runs/supervised_30/eval/train_flip_predictions.npz",
        },
    }
    notes = {
        "supervised_10": "one of the seeds was scored before there was a clean private_test",
        "fixmatch_10": "its students, with others, reach it (self_training_10)",
        "self_training_10": "one set of teachers for all seeds, whose minutes come on top",
        "adamatch_10": "without a teacher",
        "adamatch_students_10": "of the three of adamatch_10 together, whose minutes come on top",
        "adamatch_30": "sees each label 19 times, supervised_30 does 30 times",
        "self_training_30": "one teacher for all seeds",
    }
    rows = []
    for share in (10, 30):
        for method in ("supervised", *COMPARED[share]):
            name = f"{method}_{share}"
            config = "self_training" if method.endswith("_students") else method
            wanted = {"beats": f"supervised_{share}"} if method != "supervised" else {}
            rows.append(
                Row(
                    name=name,
                    config=f"configs/{config}.py:cpu",
                    changes=changes.get(name, {}),
                    split_seed=0,
                    margin=3.0 if wanted and share == 10 else 0.0,
                    on="C",
                    section=section,
                    note=notes.get(name, ""),
                    **wanted,
                )
            )
    rows += [
        Row(
            name="medium_supervised_10",
            config="configs/medium.py",
            changes={"data.labeled": "10%", "epochs": 100},
            split_seed=0,
            note="the CNN of 1,148,679 parameters",
            on="C",
            section=section,
        ),
        Row(
            name="medium_student_10",
            config="configs/medium.py:student_10",
            split_seed=0,
            beats="medium_supervised_10",
            margin=3.0,
            note="of the three of adamatch_10 together, whose minutes come on top",
            on="C",
            section=section,
        ),
    ]
    return rows


def _supervised() -> list[Row]:
    section = "Supervised, all labels"
    recipe = "configs/recipe73.py"
    return [
        Row(
            name="small_cnn",
            config="configs/supervised.py:cpu",
            changes={"data.labeled": "all", "epochs": 30},
            published=64.18,
            source=POSTER,
            reach=64.18,
            note="288,647 parameters; the published figure is a ResNet-50's at 224 pixels",
            on="C",
            section=section,
        ),
        Row(
            name="small_cnn_ensemble",
            config="configs/supervised.py:cpu",
            changes={"data.labeled": "all", "epochs": 30},
            scored="flip_ensemble",
            note="the three seeds of small_cnn, with mirrored images",
            on="C",
            section=section,
        ),
        *(
            Row(
                name=name,
                config=config,
                published=64.57,
                source=ROY,
                reach=68.0,
                scored=scored,
                note=note,
                on="C",
                section=section,
            )
            for name, config, scored, note in (
                ("medium_cnn", "configs/medium.py", "", "1,148,679 parameters"),
                ("medium_cnn_flip", "configs/medium.py", "flip", "with mirrored images"),
                ("medium_student", STUDENT, "", "of small_cnn_ensemble"),
                ("medium_student_flip", STUDENT, "flip", "with mirrored images"),
            )
        ),
        Row(
            name="medium_cnn_ensemble",
            config="configs/medium.py",
            published=75.2,
            source=STUDIES,
            reach=70.0,
            scored="flip_ensemble",
            note="the three seeds of medium_cnn, with mirrored images; published: eight networks",
            on="C",
            section=section,
        ),
        Row(
            name="resnet18",
            config=recipe,
            published=64.57,
            source=ROY,
            reach=72.0,
            on="G",
            section=section,
        ),
        Row(
            name="resnet18_ten_crop",
            config=recipe,
            published=73.70,
            source="ResNet-18 with ten crops (LetheSec): checkpoint picked on private_test.",
            reach=73.0,
            scored="ten_crop",
            on="G",
            section=section,
        ),
        Row(
            name="resnet50",
            config=recipe,
            changes={"model.depth": 50},
            published=64.18,
            source=POSTER,
            reach=72.0,
            on="G",
            section=section,
        ),
        Row(
            name="ensemble",
            config=recipe,
            seeds=tuple(range(8)),
            published=75.2,
            source=STUDIES,
            reach=75.5,
            scored="ten_crop_ensemble",
            note="eight seeds of resnet18, ten crops",
            on="G",
            section=section,
        ),
        Row(
            name="speedrun",
            config="configs/speedrun.py",
            reach=70.0,
            scored="flip",
            note="in 60 s of one H100, on private_test",
            on="G",
            section=section,
        ),
    ]


def _poster() -> list[Row]:
    section = "FixMatch with 8,612 labels"
    published = {
        "supervised_resnet50": (64.18, POSTER),
        "fixmatch_resnet50": (56.21, POSTER),
        "supervised_resnet18": (64.57, ROY),
        "fixmatch_resnet18": (59.46, ROY),
    }
    return [
        Row(
            name="fixmatch",
            config="configs/fixmatch.py",
            published=56.21,
            source=POSTER,
            reach=69.0,
            beats="supervised",
            note="to be killed once and resumed",
            on="G",
            section=section,
        ),
        Row(name="supervised", config="configs/supervised.py", on="G", section=section),
        Row(
            name="medium_supervised_30",
            config="configs/medium.py",
            changes={"data.labeled": "30%", "epochs": 60},
            split_seed=0,
            note="the CNN of 1,148,679 parameters, on the labels of adamatch_30",
            on="C",
            section=section,
        ),
        Row(
            name="medium_student_30",
            config="configs/medium.py:student_30",
            split_seed=0,
            published=56.21,
            source=POSTER,
            reach=64.18,
            beats="medium_supervised_30",
            note="of the three above, whose minutes come on top; to reach: the poster, all labels",
            on="C",
            section=section,
        ),
        *(
            Row(
                name=f"poster_{name}",
                config=f"configs/seeds/{name}.py",
                published=figure,
                source=source,
                reach=figure,
                note="all labels" if name.startswith("supervised") else "",
                on="G",
                section=section,
            )
            for name, (figure, source) in published.items()
        ),
    ]
