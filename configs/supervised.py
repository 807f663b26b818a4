"""Supervised training on FER2013, the baseline of configs/fixmatch.py on the same labels.

python -m ferjax.main --config=configs/supervised.py        WRN-28-2, 8,612 labels; a GPU or TPU
python -m ferjax.main --config=configs/supervised.py:cpu    small CNN, 2,870 labels; two CPU cores

Result: not measured yet (needs a GPU).
Result of :cpu, seed 0, one device (XLA_FLAGS=--xla_force_host_platform_device_count=1; two, now
the default, round otherwise) on two cores of an AMD EPYC (Zen 3) shared with other jobs, 22
minutes: private_test 54.58 % (95 %: 52.95 to 56.21), best checkpoint by public_test (54.53 %,
epoch 28; final EMA 52.86 %). Seeds 0 to 2 on the same labels: private_test 53.66 +- 0.92 %
(public_test 53.88 +- 0.59 %).
Result of :cpu --config.data.labeled=all --config.epochs=30, seeds 0 to 2, one device, 16 minutes of
one core of an AMD EPYC (AVX-512) each: private_test 66.17 +- 0.48 %, best checkpoint by public_test
(65.78 +- 0.31 %; final EMA 65.38 +- 0.37 %). Seed 0 comes with the package.
"""

from ml_collections import ConfigDict

from ferjax.config import UserError, base


def get_config(variant: str = "") -> ConfigDict:
    """`variant` is "" or "cpu"."""
    c = base()
    c.algorithm = {"name": "supervised"}
    if variant == "cpu":
        c.data.labeled = "10%"
        c.epochs = 60
        c.model = {"name": "cnn", "preset": "small"}
        c.optimizer.learning_rate = 0.06
        c.ema_decay = 0.99
    elif not variant:
        c.data.labeled = "30%"
        c.epochs = 120
        c.model = {"name": "wide_resnet", "depth": 28, "width": 2, "bn_momentum": 0.99}
        c.dtype = "bfloat16"
        c.cpu_config = "configs/supervised.py:cpu"
    else:
        raise UserError(f"configs/supervised.py has no variant {variant!r}: there is cpu, or none")
    return c
