"""The poster's FixMatch with ResNet-50: published 56.21 %.

    python -m ferjax.main --config=configs/seeds/fixmatch_resnet50.py

Published: 8,612 labelled (30 %) and 20,097 unlabelled images, 224-pixel random resized crop,
horizontal flip, ImageNet mean and standard deviation, learning rate .001, batch 32, 30 epochs,
threshold .95. It names no optimizer, mu, lambda, strong view, weight decay, schedule or
initialisation: what we took is marked "assumed".

Result: not measured yet (needs a GPU).
"""

from ml_collections import ConfigDict

from ferjax.config import base


def get_config() -> ConfigDict:
    """The settings."""
    c = base()
    c.epochs = 30
    c.batch_size = 32
    c.dtype = "bfloat16"  # assumed
    c.algorithm = {
        "name": "fixmatch",
        "threshold": 0.95,
        "mu": 7,  # assumed: the paper's
        "lambda_u": 1.0,  # assumed: the paper's
        "forward": "joint",  # assumed: as the reference code
    }
    c.model = {"name": "resnet", "depth": 50, "stem": "imagenet"}  # assumed: random initialisation
    c.data.labeled = "30%"
    c.data.image_size = 224
    c.data.channels = 3
    c.data.mean = (0.485, 0.456, 0.406)
    c.data.std = (0.229, 0.224, 0.225)
    c.views.weak = {"policy": "seed_crop"}
    # Assumed: the same crop, then FixMatch's RandAugment and cutout.
    c.views.strong = {"policy": "strong", "crop": 0.0, "resized_crop": (0.08, 1.0)}
    c.optimizer.name = "adam"  # assumed: the usual companion of .001
    c.optimizer.learning_rate = 0.001
    c.optimizer.schedule = "constant"  # assumed
    c.optimizer.weight_decay = 0.0  # assumed
    c.ema_decay = 0.0  # assumed: the weights themselves are scored
    c.cpu_config = "configs/fixmatch.py:cpu"
    return c
