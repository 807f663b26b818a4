"""Every method against supervised training, on drawn faces with 10 labels a class, three seeds.

python -m ferjax.sweep --sweep=configs/sweeps/methods_on_faces.py    an hour on two CPU cores

A check that each method learns something from images without labels, not a ranking: one small
network, the settings of the methods' own `:cpu` configs, and the same 1,700 steps for all.
"""

from pathlib import Path

from ferjax import config as configs
from ferjax.data.batches import steps_per_epoch
from ferjax.rows import Row, Sweep

METHODS = (
    *("pseudo_label", "entropy_min", "pi_model", "mean_teacher", "vat", "uda", "mixmatch"),
    *("fixmatch", "flexmatch", "freematch", "softmatch", "adamatch", "remixmatch", "ada_cm"),
    "ladder",
)
STEPS, BATCH, LABELED, IMAGES = 1_700, 16, 70, 2_800
LAYERS = (
    "space_to_depth 4",
    *("conv 64 3 nobias", "bn", "relu", "maxpool 2"),
    *("conv 128 3 nobias", "bn", "relu", "maxpool 2"),
    *("conv 128 3 nobias", "bn", "relu", "gap"),
)


def get_sweep(cpu: bool = False) -> Sweep:
    """Supervised training and the methods."""
    del cpu
    return Sweep(
        "Methods on drawn faces, 10 labels a class",
        [_row("supervised"), *(_row(name, beats="supervised") for name in METHODS)],
    )


def _row(name: str, **wanted: str) -> Row:
    config = f"configs/{name}.py"
    algorithm = configs.from_file(Path(__file__).parents[2] / config, "cpu").algorithm
    fields = configs.field_defaults(configs.find("algorithms", name))
    mu = algorithm.get("mu", fields.get("mu", 0))
    epochs = max(1, round(STEPS / steps_per_epoch(LABELED, IMAGES - LABELED, BATCH, mu)))
    return Row(
        name=name,
        config=f"{config}:cpu",
        changes={
            "data.name": "synthetic_faces",
            "data.labeled": "10/class",
            "data.unlabeled": "rest",
            "batch_size": BATCH,
            "epochs": epochs,
            "evaluate.every_epochs": max(1, epochs // 4),
            "ema_decay": 0.99,
            "model.layers": LAYERS,
        },
        on="C",
        **wanted,
    )
