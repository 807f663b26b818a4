"""FreeMatch on FER2013, with the data, network and schedule of configs/fixmatch.py.

python -m ferjax.main --config=configs/freematch.py        WRN-28-2, 8,612 labels; a GPU or TPU
python -m ferjax.main --config=configs/freematch.py:cpu    small CNN, 2,870 labels; two CPU cores

Hyperparameters of the method are the published ones; :cpu changes them for its
short schedule.

Result: not measured yet (needs a GPU).
Result of :cpu, seed 0, 13 minutes of one core of an AMD EPYC (AVX-512), one JAX device
(XLA_FLAGS=--xla_force_host_platform_device_count=1): private_test 57.54 %, best checkpoint by
public_test (57.45 %; final EMA 57.12 %). Supervised, the same labels and seed: 54.58. Seeds 0 to 2:
56.28 +- 1.09 % (public_test 56.40 +- 1.19 %); supervised 53.66 +- 0.92 %.
"""

from pathlib import Path

from ml_collections import ConfigDict

from ferjax.config import from_file


def get_config(variant: str = "") -> ConfigDict:
    """`variant` is "" or "cpu"."""
    c = from_file(Path(__file__).with_name("fixmatch.py"), variant)
    if variant == "cpu":
        c.algorithm = {"name": "freematch", "mu": 2, "decay": 0.99, "forward": "apart"}
    else:
        c.algorithm = {"name": "freematch"}
        c.cpu_config = "configs/freematch.py:cpu"
    return c
