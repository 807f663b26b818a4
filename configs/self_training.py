"""Self-training on FER2013: a student of finished networks, on the same labels.

python -m ferjax.main --config=configs/self_training.py      WRN-28-2, 8,612 labels; a GPU or TPU
python -m ferjax.main --config=configs/self_training.py:cpu  small CNN, 2,870 labels; two CPU cores

The teacher comes first, the supervised baseline:

python -m ferjax.main --config=configs/supervised.py
python -m ferjax.evaluate --workdir=runs/supervised --split=train --keep_predictions

On two cores three networks together, asked about mirrored images, too:

python -m ferjax.main --config=configs/supervised.py:cpu
python -m ferjax.main --config=configs/fixmatch.py:cpu
python -m ferjax.main --config=configs/adamatch.py:cpu --config.epochs=10
python -m ferjax.evaluate --workdir=runs/fixmatch_cpu,runs/adamatch_cpu,runs/supervised_cpu \\
    --split=train --tta=flip --keep_predictions

Better teachers, three AdaMatch networks on the same labels:

for seed in 0 1 2; do
  python -m ferjax.main --config=configs/adamatch.py:cpu --config.seed=$seed \\
    --config.data.split_seed=0 --workdir=runs/adamatch_$seed
done
python -m ferjax.evaluate --workdir=runs/adamatch_0,runs/adamatch_1,runs/adamatch_2 \\
    --split=train --tta=flip --keep_predictions
python -m ferjax.main --config=configs/self_training.py:cpu --workdir=runs/adamatch_students_10 \\
    --config.algorithm.predictions=runs/adamatch_0/eval/train_flip_ensemble_predictions.npz

With 30 % of the labels, in `runs/supervised_30` and `runs/self_training_30`:

python -m ferjax.main --config=configs/supervised.py:cpu --workdir=runs/supervised_30 \\
    --config.data.labeled=30% --config.epochs=30
python -m ferjax.evaluate --workdir=runs/supervised_30 --split=train --tta=flip --keep_predictions
python -m ferjax.main --config=configs/self_training.py:cpu --workdir=runs/self_training_30 \\
    --config.data.labeled=30% \\
    --config.algorithm.predictions=runs/supervised_30/eval/train_flip_predictions.npz

Another teacher: --config.algorithm.predictions=WORKDIR, or the file that `evaluate` names.

Result: not measured yet (needs a GPU).
Result of :cpu, seeds 0 to 2 on the labels of split_seed 0, one core of an AMD EPYC (Zen 3), 30
minutes a seed besides the teachers' 134, which were of seed 0: private_test 57.53 +- 0.55 %, best
checkpoint by public_test (57.94 +- 0.13 %). The supervised baseline, on the same labels: 53.66 +-
0.92 %.
Result of the students of three AdaMatch networks, seeds 0 to 2 on the same labels, one core of an
AMD EPYC (AVX-512) and one JAX device each (XLA_FLAGS=--xla_force_host_platform_device_count=1), 11
minutes a seed besides the teachers' 118 (30 for one alone): private_test 58.27 +- 0.29 %, best
checkpoint by public_test (58.90 +- 0.27 %; final EMA 58.67 +- 0.15 %).
Result of :cpu with 30 %, seeds 0 to 2 on the labels of split_seed 0, 33 minutes of one core a seed
besides the teacher's 17 (of seed 0): private_test 61.58 +- 0.41 %, best checkpoint by public_test
(61.80 +- 0.18 %). Supervised on the same labels: 60.21 +- 0.11 and 59.78 +- 0.25 %.
"""

from pathlib import Path

from ml_collections import ConfigDict

from ferjax.config import from_file


def get_config(variant: str = "") -> ConfigDict:
    """`variant` is "" or "cpu"."""
    c = from_file(Path(__file__).with_name("fixmatch.py"), variant)
    if variant == "cpu":
        c.algorithm = {
            "name": "self_training",
            "predictions": "runs/fixmatch_cpu/eval/train_flip_ensemble_predictions.npz",
            "mu": 4,
            "weight": 4.0,  # each image counts as much, labelled or not
            "forward": "apart",
        }
        c.views.strong = {"policy": "keras20"}
        c.batch_size = 32
        c.optimizer.learning_rate = 0.03
        c.epochs = 14
    else:
        c.algorithm = {"name": "self_training", "predictions": "runs/supervised"}
        c.cpu_config = "configs/self_training.py:cpu"
    return c
