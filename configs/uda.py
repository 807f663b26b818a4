"""UDA on FER2013, with the data, network and schedule of configs/fixmatch.py.

python -m ferjax.main --config=configs/uda.py        WRN-28-2, 8,612 labels; a GPU or TPU
python -m ferjax.main --config=configs/uda.py:cpu    small CNN, 2,870 labels; two CPU cores

Hyperparameters of the method are the published ones; :cpu has fewer unlabelled images a
step, and each kind of view in a forward of its own (BUILD_NOTES.md).

Result: not measured yet (needs a GPU).
Result of :cpu, seeds 0 and 1 on the labels of split_seed 0, 14 minutes of one core of an AMD EPYC
(AVX-512), one JAX device each (XLA_FLAGS=--xla_force_host_platform_device_count=1): private_test
55.46 +- 0.49 %, best checkpoint by public_test (56.10 +- 0.65 %; final EMA 55.45 +- 0.24 %). The
supervised baseline, on the same labels: 53.66 +- 0.92 %.
"""

from pathlib import Path

from ml_collections import ConfigDict

from ferjax.config import from_file


def get_config(variant: str = "") -> ConfigDict:
    """`variant` is "" or "cpu"."""
    c = from_file(Path(__file__).with_name("fixmatch.py"), variant)
    if variant == "cpu":
        c.algorithm = {"name": "uda", "mu": 2, "forward": "apart"}
    else:
        c.algorithm = {"name": "uda"}
        c.cpu_config = "configs/uda.py:cpu"
    return c
