"""The poster's FixMatch with ResNet-18: published 59.46 %, but with 700 labels.

    python -m ferjax.main --config=configs/seeds/fixmatch_resnet18.py

The published figure is Roy & Etemad's (2022) with 100 labels a class; these settings use 8,612.

Settings and assumptions: configs/seeds/fixmatch_resnet50.py.

Result: not measured yet (needs a GPU).
"""

from pathlib import Path

from ml_collections import ConfigDict

from ferjax.config import from_file


def get_config() -> ConfigDict:
    """The settings."""
    c = from_file(Path(__file__).with_name("fixmatch_resnet50.py"))
    c.model.depth = 18
    return c
