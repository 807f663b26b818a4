"""The slides' "Changing the size and number of filters in Conv2D": published 59.7 %.

    python -m ferjax.main --config=configs/seeds/cnn_filters.py

The slides do not say to what. Assumed: half as many filters again, and 5x5 windows in the first
convolution. Other settings: configs/seeds/cnn_l2.py.

Result: not measured yet.
"""

from pathlib import Path

from ml_collections import ConfigDict

from ferjax.config import from_file
from ferjax.models.cnn import SEED


def get_config() -> ConfigDict:
    """The settings."""
    c = from_file(Path(__file__).with_name("cnn_l2.py"))
    wider = {
        "conv 32 3 valid": "conv 48 5 valid",
        "conv 64 3 valid": "conv 96 3 valid",
        "conv 128 3 valid": "conv 192 3 valid",
    }
    c.model.layers = tuple(wider.get(entry, entry) for entry in SEED)
    return c
