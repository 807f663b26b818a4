"""The poster's settings, supervised, with ResNet-18; its 64.57 % is of Roy & Etemad (2022).

    python -m ferjax.main --config=configs/seeds/supervised_resnet18.py

Settings and assumptions: configs/seeds/fixmatch_resnet50.py.

Result: not measured yet (needs a GPU).
"""

from pathlib import Path

from ml_collections import ConfigDict

from ferjax.config import from_file


def get_config() -> ConfigDict:
    """The settings."""
    c = from_file(Path(__file__).with_name("fixmatch_resnet50.py"))
    c.algorithm = {"name": "supervised"}
    c.data.labeled = "all"
    c.cpu_config = "configs/supervised.py:cpu"
    c.model.depth = 18
    return c
