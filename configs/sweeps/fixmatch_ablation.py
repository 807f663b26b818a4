"""What each part of FixMatch is worth: one change at a time to configs/fixmatch.py.

python -m ferjax.sweep --sweep=configs/sweeps/fixmatch_ablation.py          a GPU or TPU
python -m ferjax.sweep --sweep=configs/sweeps/fixmatch_ablation.py --cpu    two CPU cores

The rows of another mu have another number of steps an epoch: they train for as many steps as the
base. The supervised row has the base's weak views and weight decay.
"""

from typing import Any

from ferjax.rows import Row, Sweep

CHANGES: dict[str, dict[str, Any]] = {
    "base": {},
    "supervised": {"algorithm.name": "supervised"},
    **{f"threshold_{t}": {"algorithm.threshold": t} for t in (0.6, 0.7, 0.8, 0.9, 0.95, 0.98)},
    **{f"mu_{mu}": {"algorithm.mu": mu} for mu in (1, 2, 4, 7)},
    "soft_targets": {"algorithm.temperature": 0.5},
    "warmup_0": {"algorithm.warmup": 0.0},
    "warmup_0.2": {"algorithm.warmup": 0.2},
    **{f"forward_{how}": {"algorithm.forward": how} for how in ("joint", "split", "apart")},
    "strong_usb": {"views.strong.policy": "strong_usb"},
    "strong_without_cutout": {"views.strong.cutout": 0.0},
    "strong_without_randaugment": {"views.strong.ops": 0},
    "strong_is_weak": {"views.strong.policy": "weak"},
    "ema_0": {"ema_decay": 0.0},
    "ema_0.99": {"ema_decay": 0.99},
    "ema_0.999": {"ema_decay": 0.999},
    "unlabeled_all": {"data.unlabeled": "all"},
}


def get_sweep(cpu: bool = False) -> Sweep:
    """Settings equal to the base's share its runs."""
    rows = [
        Row(
            name=name,
            config="configs/fixmatch.py" + (":cpu" if cpu else ""),
            changes=changes,
            # That of the base: 16 epochs of 202, or 30 of 135.
            steps=3_232 if cpu else 4_050,
            on="C" if cpu else "G",
        )
        for name, changes in CHANGES.items()
    ]
    return Sweep("FixMatch, one change at a time", rows)
