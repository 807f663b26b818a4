"""AdaMatch on FER2013, with the data, network and schedule of configs/fixmatch.py.

python -m ferjax.main --config=configs/adamatch.py        WRN-28-2, 8,612 labels; a GPU or TPU
python -m ferjax.main --config=configs/adamatch.py:cpu    small CNN, 2,870 labels; two CPU cores

Hyperparameters of the method are the published ones; :cpu changes them for its short schedule.

Result: not measured yet (needs a GPU).
Result of :cpu with --config.epochs=10, seed 0, 64 minutes of one core of an AMD EPYC (Zen 3):
public_test 55.75 % at the end, 55.81 % at its best; private_test was not read.
"""

from pathlib import Path

from ml_collections import ConfigDict

from ferjax.config import from_file


def get_config(variant: str = "") -> ConfigDict:
    """`variant` is "" or "cpu"."""
    c = from_file(Path(__file__).with_name("fixmatch.py"), variant)
    if variant == "cpu":
        c.algorithm = {"name": "adamatch", "mu": 2, "decay": 0.99}
    else:
        c.algorithm = {"name": "adamatch"}
        c.cpu_config = "configs/adamatch.py:cpu"
    return c
