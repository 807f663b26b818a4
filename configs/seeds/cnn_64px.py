"""The slides' "Resizing the image (64 x 64)": published 59.7 %.

    python -m ferjax.main --config=configs/seeds/cnn_64px.py

Other settings: configs/seeds/cnn_l2.py.

Result: not measured yet.
"""

from pathlib import Path

from ml_collections import ConfigDict

from ferjax.config import from_file


def get_config() -> ConfigDict:
    """The settings."""
    c = from_file(Path(__file__).with_name("cnn_l2.py"))
    c.data.image_size = 64
    return c
