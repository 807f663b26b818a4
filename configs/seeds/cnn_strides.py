"""The slides' "strides in the maxpooling layer": published 58.6 %.

    python -m ferjax.main --config=configs/seeds/cnn_strides.py

Assumed: 5x5 windows at stride 2, which leaves a map of 22x22 and makes the first dense layer four
times as large. Other settings: configs/seeds/cnn_l2.py.

Result: not measured yet.
"""

from pathlib import Path

from ml_collections import ConfigDict

from ferjax.config import from_file
from ferjax.models.cnn import SEED


def get_config() -> ConfigDict:
    """The settings."""
    c = from_file(Path(__file__).with_name("cnn_l2.py"))
    c.model.layers = tuple("maxpool 5 2" if entry == "maxpool 5" else entry for entry in SEED)
    return c
