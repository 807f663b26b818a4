"""Autoencoder pre-training on FER2013, with the data and network of configs/fixmatch.py.

python -m ferjax.main --config=configs/autoencoder.py        WRN-28-2, all images; a GPU or TPU
python -m ferjax.main --config=configs/autoencoder.py:cpu    small CNN, all images; two CPU cores

Then any method with the same network starts from it:

python -m ferjax.main --config=configs/fixmatch.py:cpu --config.init_from=runs/autoencoder_cpu

The accuracy that it reports is that of a classifier on features which no label has shaped
(ferjax/algorithms/autoencoder.py).

Result: not measured yet on FER2013. A first look on synthetic faces speaks against it: configs/
quickstart.py, supervised, 280 labels, 24 epochs, seed 0 reached 70 % on public_test from 108 steps
of this (noise .3) and 84 % from random weights.
"""

from pathlib import Path

from ml_collections import ConfigDict

from ferjax.config import from_file


def get_config(variant: str = "") -> ConfigDict:
    """`variant` is "" or "cpu"."""
    c = from_file(Path(__file__).with_name("fixmatch.py"), variant)
    # The decoder starts far from any image: a smooth loss, but large gradients at first.
    c.optimizer.clip_norm = 1.0
    if variant == "cpu":
        c.algorithm = {"name": "autoencoder", "mu": 4, "noise": 0.3, "width": 32}
        fixmatch = "configs/fixmatch.py:cpu"
    else:
        c.algorithm = {"name": "autoencoder", "noise": 0.3}
        c.cpu_config = "configs/autoencoder.py:cpu"
        fixmatch = "configs/fixmatch.py"
    c.next_command = f"python -m ferjax.main --config={fixmatch} --config.init_from=WORKDIR"
    return c
