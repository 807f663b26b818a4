"""The slides' augmentation with rotation_range=40: published 60.62 %.

    python -m ferjax.main --config=configs/seeds/cnn_keras40.py

Keras' ImageDataGenerator with shifts, shear and zoom of .2 and flips; the preset keras40 of
ferjax/augment/policies.py says how its units are read. Without an L2 term:
configs/seeds/cnn_keras20.py says why. Other settings: configs/seeds/cnn_plain.py.

Result, seed 0, one core of an AMD EPYC with AVX-512, 51 minutes beside other work: private_test
62.39 % (95 %: 60.79 to 63.96), best checkpoint by public_test the last one (60.57 %), which still
gained.
"""

from pathlib import Path

from ml_collections import ConfigDict

from ferjax.config import from_file


def get_config() -> ConfigDict:
    """The settings."""
    c = from_file(Path(__file__).with_name("cnn_plain.py"))
    c.views.weak.policy = "keras40"
    c.epochs = 24
    return c
