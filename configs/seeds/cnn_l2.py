"""The slides' "kernel regularizers with l2 (0.001) in the dense layer": published 59.7 %.

    python -m ferjax.main --config=configs/seeds/cnn_l2.py

Keras' l2(.001) adds .001 w^2 to the loss, so .002 w to the gradient, here of all dense layers. (The
slides' table of the final network has it on the first convolution instead.) Other settings:
configs/seeds/cnn_plain.py.

Result, seed 0, one core of an AMD EPYC with AVX-512, 27 minutes: private_test 61.58 % (95 %: 59.97
to 63.16), best checkpoint by public_test (60.85 %, epoch 10; final EMA 60.66 %). With the 6 epochs
of cnn_plain.py: 59.68 % of public_test, 59.54 % of private_test (read before 12 were tried).
Without the term (cnn_plain.py, 6 epochs): 62.05 % of public_test.
"""

from pathlib import Path

from ml_collections import ConfigDict

from ferjax.config import from_file


def get_config() -> ConfigDict:
    """The settings."""
    c = from_file(Path(__file__).with_name("cnn_plain.py"))
    c.epochs = 12  # the term holds the dense layers back: after 6 it still gained
    c.optimizer.weight_decay = 2e-3
    c.optimizer.decayed = "dense"
    return c
