"""AdaMatch on FER2013, with the data, network and schedule of configs/fixmatch.py.

python -m ferjax.main --config=configs/adamatch.py        WRN-28-2, 8,612 labels; a GPU or TPU
python -m ferjax.main --config=configs/adamatch.py:cpu    small CNN, 2,870 labels; two CPU cores

Hyperparameters of the method are the published ones; :cpu changes them for its short schedule.

Result: not measured yet (needs a GPU).
Result of :cpu, seeds 0 to 2 on the labels of split_seed 0, one core of an AMD EPYC (AVX-512) and
one JAX device each (XLA_FLAGS=--xla_force_host_platform_device_count=1), 30 minutes for a seed
alone: private_test 57.11 +- 0.21 %, best checkpoint by public_test (57.85 +- 0.38 %; final EMA
57.73 +- 0.54 %). The supervised baseline, on the same labels: 53.66 +- 0.92 %.
Result of :cpu --config.data.labeled=30%, seed 0, the same, 31 minutes: private_test 59.01 %,
public_test 58.43 % (final EMA 58.29 %), below the supervised baseline (60.21 +- 0.11 and 59.78 +-
0.25 %): an epoch here is one of the unlabelled images, so that sixteen see each of the 8,612 labels
19 times, the baseline 30 times.
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
