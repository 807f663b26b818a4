"""Supervised training on all of FER2013 with a CNN of 1.1 million parameters.

    python -m ferjax.main --config=configs/medium.py
    python -m ferjax.evaluate --workdir=runs/medium --tta=flip

The most accurate network that is trained here without a GPU: twice as wide as the small one, with
dropout, label smoothing, rotation and zoom.

Result: running.
"""

from ml_collections import ConfigDict

from ferjax.config import base


def get_config() -> ConfigDict:
    """The settings."""
    c = base()
    c.algorithm = {"name": "supervised", "label_smoothing": 0.1}
    c.model = {"name": "cnn", "preset": "medium"}
    c.views.weak.rotation = 10.0
    c.views.weak.zoom = (0.9, 1.1)
    c.epochs = 40
    c.optimizer.learning_rate = 0.06
    c.optimizer.weight_decay = 1e-3
    c.ema_decay = 0.99
    return c
