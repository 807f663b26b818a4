"""FixMatch on FER2013.

python -m ferjax.main --config=configs/fixmatch.py        WRN-28-2, 8,612 labels; a GPU or TPU
python -m ferjax.main --config=configs/fixmatch.py:cpu    small CNN, 2,870 labels; two CPU cores
python -m ferjax.main --config=configs/fixmatch.py:pod    the first, batch 512; a TPU pod

Result: not measured yet (needs a GPU). :pod makes as many steps on 8 times the images; its
learning rate grows with the square root of the batch and is warmed up (not measured either).
Result of :cpu, seed 0, one device (XLA_FLAGS=--xla_force_host_platform_device_count=1; two, now
the default, round otherwise) on two cores of an AMD EPYC (Zen 3) shared with other jobs, 48
minutes: private_test 55.73 % (95 %: 54.10 to 57.34), best checkpoint by public_test (56.81 %;
final EMA 55.89 %). The supervised baseline on the same labels: private_test 54.58 %
(configs/supervised.py). Seeds 0 to 2 on the labels of split_seed 0, 1 and 2 in 12 to 16 minutes of
one core of an AMD EPYC (AVX-512): private_test 55.49 +- 0.21 %, public_test 56.42 +- 0.35 % (final
EMA 56.09 +- 0.21 %); supervised 53.66 +- 0.92 %. Other settings: BUILD_NOTES.md.
"""

from ml_collections import ConfigDict

from ferjax.config import UserError, base


def get_config(variant: str = "") -> ConfigDict:
    """`variant` is "", "cpu" or "pod"."""
    c = base()
    if variant == "cpu":
        c.data.labeled = "10%"
        c.epochs = 16
        c.algorithm = {
            "name": "fixmatch",
            "mu": 2,
            "threshold": 0.8,
            "warmup": 0.2,
            "forward": "apart",
        }
        c.model = {"name": "cnn", "preset": "small"}
        c.views.weak.rotation = 10.0
        c.views.weak.zoom = (0.9, 1.1)
        c.optimizer.learning_rate = 0.06
        c.optimizer.weight_decay = 1e-3
        c.ema_decay = 0.99
    elif variant in ("", "pod"):
        c.data.labeled = "30%"
        c.epochs = 30
        c.algorithm = {"name": "fixmatch"}
        # Statistics that forget within this schedule; the model's own .999 suits 2^20 steps.
        c.model = {"name": "wide_resnet", "depth": 28, "width": 2, "bn_momentum": 0.99}
        c.dtype = "bfloat16"
        c.optimizer.schedule = "cosine_7_16"
        c.cpu_config = "configs/fixmatch.py:cpu"
        if variant == "pod":
            c.batch_size, c.epochs = 8 * c.batch_size, 8 * c.epochs
            c.optimizer.learning_rate *= 8**0.5
            c.optimizer.warmup_epochs = 10.0
            c.evaluate.every_epochs = 8
    else:
        raise UserError(f"configs/fixmatch.py has no variant {variant!r}: there is cpu or pod")
    return c
