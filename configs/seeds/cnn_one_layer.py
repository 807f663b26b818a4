"""The slides' "Simple 1 layer CNN": published 36 %.

    python -m ferjax.main --config=configs/seeds/cnn_one_layer.py

Assumed: 32 filters of 3x3, ReLU, 2x2 maximum pooling, then the classes. Ours: 12 epochs.
Other settings: configs/seeds/cnn_plain.py.

Result, seed 0, one CPU core of an AMD EPYC (Zen 3), 7 minutes: private_test 48.93 % (95 %: 47.29 to
50.56), best checkpoint by public_test (48.62 %, epoch 7; it overfits after that).
"""

from pathlib import Path

from ml_collections import ConfigDict

from ferjax.config import from_file


def get_config() -> ConfigDict:
    """The settings."""
    c = from_file(Path(__file__).with_name("cnn_plain.py"))
    c.epochs = 12
    c.model = {"name": "cnn", "layers": ("conv 32 3 valid", "relu", "maxpool 2", "flatten")}
    return c
