"""Flips that alternate: which turn an image has is a function of seed, step and place alone."""

import dataclasses
import functools

import harness
import jax
import jax.numpy as jnp
import numpy as np

from ferjax.engine.parallel import Layout
from ferjax.engine.step import make_step

MEMBERS = 32  # of harness.Small's labelled part
STEPS = 4  # a pass


@dataclasses.dataclass(frozen=True)
class Shows:
    """A method whose metric is 1 + turn mod 2 at the place of each image that it saw."""

    mu = 0
    labeled_views = ("weak",)
    unlabeled_views = ()

    def loss(self, net, batch, extra, t):
        turn = batch.labeled.views["weak"][:, 0, 0, 0]
        shown = jnp.zeros(harness.IMAGES).at[batch.labeled.index].set(1 + turn % 2)
        logits = net(jnp.zeros((len(turn), harness.SIDE, harness.SIDE, 1)))
        return 0.0 * jnp.sum(logits), {"turn": (shown, jnp.ones(()))}, extra


def turns_as_images(images, keys, turns):
    return jnp.broadcast_to(turns[:, None, None, None].astype(jnp.float32), images.shape)


@functools.cache
def small():
    config = harness.make_config(
        dtype="float32",
        algorithm={"name": "supervised"},
        model={"name": "cnn", "layers": ("gap",)},
    )
    made = harness.Small(config)
    made.step = make_step(
        made.model,
        Shows(),
        made.optimizer,
        lambda step: 0.1,
        {"weak": turns_as_images},
        steps=40,
        ema_decay=0.9,
        alternating={"labeled": MEMBERS},
    )
    return made, made.init()


def passes(count, number, first=0):
    """[number, MEMBERS]: 0 or 1, each image's turn in some passes on `count` devices."""
    run, state = small()
    state = state.replace(step=np.asarray(first, np.int32))
    layout = Layout("pmap", jax.devices()[:count])
    _, metrics = run.run(layout, steps=number * STEPS, state=state)
    return metrics["turn"][0].reshape(number, STEPS, -1).sum(1)[:, :MEMBERS] - 1


def test_an_image_is_flipped_every_other_pass_on_any_number_of_devices():
    one = passes(1, 3)
    assert set(np.unique(one)) == {0, 1}
    np.testing.assert_array_equal(one[0], one[2])
    np.testing.assert_array_equal(one[0], 1 - one[1])
    assert 5 < one[0].sum() < 27  # about half of the images start flipped
    np.testing.assert_array_equal(passes(2, 3), one)
    # The next step starts pass 2^28, whose first image has place 2^33 in the stream.
    np.testing.assert_array_equal(passes(1, 1, first=2**30), one[:1])
