"""Self-training on FER2013: a student of the supervised baseline, on the same labels.

python -m ferjax.main --config=configs/self_training.py      WRN-28-2, 8,612 labels; a GPU or TPU
python -m ferjax.main --config=configs/self_training.py:cpu  small CNN, 2,870 labels; two CPU cores

The teacher comes first (without :cpu and _cpu on a GPU or TPU):

python -m ferjax.main --config=configs/supervised.py:cpu
python -m ferjax.evaluate --workdir=runs/supervised_cpu --split=train --keep_predictions

Another teacher, a FixMatch run or last time's student: --config.algorithm.predictions=WORKDIR.

Result: not measured yet.
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
            "predictions": "runs/supervised_cpu",
            "mu": 2,
            "forward": "apart",
        }
    else:
        c.algorithm = {"name": "self_training", "predictions": "runs/supervised"}
        c.cpu_config = "configs/self_training.py:cpu"
    return c
