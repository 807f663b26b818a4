"""Operations of a step, against the products of a network that are counted by hand."""

import pytest
from harness import make_config

from ferjax.engine import flops

SHAPE = (24, 24, 1)
# Multiplications of one image's forward, as ferjax.models.cnn reads the layers: 24x24 positions of
# a 3x3 window over 1 channel, 12x12 over 16, and the dense layer to 7 classes.
LAYERS = ("conv 16 3", "relu", "maxpool 2", "conv 32 3", "relu", "gap")
FIRST, SECOND, DENSE = 24**2 * 9 * 16, 12**2 * 9 * 16 * 32, 32 * 7


def counted(**changes):
    given = {"algorithm": {"name": "supervised"}, "dtype": "float32", **changes}
    config = make_config(model={"name": "cnn", "layers": LAYERS}, **given)
    return flops.of_step(config, 7, SHAPE)


def test_a_supervised_step_holds_its_products():
    # Each product is an addition, too; the gradient has two more, but none of the images.
    products = 2 * (2 * FIRST + 3 * SECOND + 3 * DENSE) * 8
    # The windows at the edge lack some of their positions; the rest of the step comes on top.
    assert 0.9 < counted() / products < 1.35


def test_it_is_of_the_whole_batch_and_of_all_its_parts():
    one = counted()
    assert counted(batch_size=16) / one == pytest.approx(2, rel=0.05)
    assert counted(microbatches=2) / one == pytest.approx(1, rel=0.05)
    # FixMatch with mu 2: the labelled and the strong views have a gradient, the weak ones none.
    both = counted(algorithm={"name": "fixmatch", "mu": 2, "forward": "split"})
    assert 3.2 < both / one < 4.6
