"""FixMatch on FER2013.

python -m ferjax.main --config=configs/fixmatch.py        WRN-28-2, 8,612 labels; a GPU or TPU
python -m ferjax.main --config=configs/fixmatch.py:cpu    small CNN, 2,870 labels; two CPU cores
"""

from ml_collections import ConfigDict

from ferjax.config import UserError, base


def get_config(variant: str = "") -> ConfigDict:
    """`variant` is "" or "cpu"."""
    c = base()
    if variant == "cpu":
        c.data.labeled = "10%"
        c.epochs = 20
        c.algorithm = {"name": "fixmatch", "mu": 4, "threshold": 0.8}
        c.model = {"name": "cnn", "preset": "small"}
        c.optimizer.learning_rate = 0.06
        c.ema_decay = 0.99
    elif not variant:
        c.data.labeled = "30%"
        c.epochs = 30
        c.algorithm = {"name": "fixmatch"}
        # Statistics that forget within this schedule; the model's own .999 suits 2^20 steps.
        c.model = {"name": "wide_resnet", "depth": 28, "width": 2, "bn_momentum": 0.99}
        c.dtype = "bfloat16"
        c.optimizer.schedule = "cosine_7_16"
        c.cpu_config = "configs/fixmatch.py:cpu"
    else:
        raise UserError(f"configs/fixmatch.py has no variant {variant!r}: there is cpu, or none")
    return c
