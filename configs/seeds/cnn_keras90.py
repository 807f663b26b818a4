"""The slides' augmentation with rotation_range=90: published 48.55 %.

    python -m ferjax.main --config=configs/seeds/cnn_keras90.py

Keras' ImageDataGenerator with shifts, shear and zoom of .4 and flips; the preset keras90 of
ferjax/augment/policies.py says how its units are read. Without an L2 term:
configs/seeds/cnn_keras20.py says why. Other settings: configs/seeds/cnn_plain.py.

Result: not finished. Seed 0 was cut at epoch 14 of 24, where it had 39.68 % of public_test and
gained a point an epoch (the milder keras40 had 58.85 % there).
"""

from pathlib import Path

from ml_collections import ConfigDict

from ferjax.config import from_file


def get_config() -> ConfigDict:
    """The settings."""
    c = from_file(Path(__file__).with_name("cnn_plain.py"))
    c.views.weak.policy = "keras90"
    c.epochs = 24
    return c
