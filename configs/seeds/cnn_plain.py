"""The slides' final CNN, without regularisation: published 58.9 %.

    python -m ferjax.main --config=configs/seeds/cnn_plain.py
    python -m ferjax.main --config=configs/seeds/cnn_plain.py --config.data.labeled=10%

The row "4 conv2D, 1 maxpooling, 1 average pooling, 2 dense" of the slides' table of architectures
(4,829,319 numbers; ferjax/models/cnn.py has it layer by layer). The slides name neither optimizer
nor batch, epochs or split. Assumed here and in the other cnn_*.py: Adam at Keras' default rate,
batches of 64, all of train, selection on public_test. Ours, not theirs: 6 epochs, which
one CPU core makes in 50 minutes, a cosine schedule, and the EMA.

Result, seed 0, one CPU core of an AMD EPYC (Zen 3), 52 minutes: private_test 62.30 % (95 %: 60.70
to 63.87), best checkpoint by public_test (62.05 %, epoch 5; final EMA 61.58 %).
"""

from ml_collections import ConfigDict

from ferjax.config import base


def get_config() -> ConfigDict:
    """The settings."""
    c = base()
    c.algorithm = {"name": "supervised"}
    c.model = {"name": "cnn", "preset": "seed"}
    c.views.weak.policy = "none"
    c.epochs = 6
    c.optimizer.name = "adam"
    c.optimizer.learning_rate = 1e-3
    c.optimizer.weight_decay = 0.0
    return c
