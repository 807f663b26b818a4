"""The slides' "Replace normal dropout with Gaussian dropout": published 59.7 %.

    python -m ferjax.main --config=configs/seeds/cnn_gaussian_dropout.py

Other settings: configs/seeds/cnn_l2.py.

Result: not measured yet.
"""

from pathlib import Path

from ml_collections import ConfigDict

from ferjax.config import from_file
from ferjax.models.cnn import SEED


def get_config() -> ConfigDict:
    """The settings."""
    c = from_file(Path(__file__).with_name("cnn_l2.py"))
    c.model.layers = tuple(e.replace("dropout", "gaussian_dropout") for e in SEED)
    return c
