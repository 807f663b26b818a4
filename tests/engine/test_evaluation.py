"""The evaluation path: every image once, on any number of devices, and stoppable."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ferjax.engine.evaluation import Interrupted, make_predict
from ferjax.engine.parallel import Layout


class Sums(nn.Module):
    """Logits that tell the images apart: the sum of their pixels, and a parameter's value."""

    @nn.compact
    def __call__(self, x):
        bias = self.param("bias", nn.initializers.ones, ())
        total = x.sum((1, 2, 3))
        return jnp.stack([total, jnp.broadcast_to(bias, total.shape)], -1)


@pytest.fixture(scope="module", params=[1, 2])
def predict(request):
    def view(images, keys):
        return images.astype(jnp.float32)

    layout = Layout("pmap", jax.devices()[: request.param])
    return layout, make_predict(Sums(), view, layout, batch_size=3, dtype=jnp.float32)


def test_logits_of_every_image_in_order(predict):
    layout, predict = predict
    images = np.arange(29 * 4, dtype=np.uint8).reshape(29, 2, 2, 1)
    variables = layout.replicate({"params": {"bias": np.float32(5)}})
    logits = predict(variables, images)
    assert logits.shape == (29, 2)
    np.testing.assert_array_equal(logits[:, 0], images.astype(np.float32).sum((1, 2, 3)))
    np.testing.assert_array_equal(logits[:, 1], 5)


def test_it_stops_when_asked_to(predict):
    layout, predict = predict
    variables = layout.replicate({"params": {"bias": np.float32(5)}})
    asked = []

    def stop():
        asked.append(None)
        return len(asked) == 3

    with pytest.raises(Interrupted):
        predict(variables, np.zeros((29, 2, 2, 1), np.uint8), stop)
    assert len(asked) == 3


def test_logits_of_a_bfloat16_network_are_float32():
    def view(images, keys):
        return images.astype(jnp.float32)

    layout = Layout("pmap", jax.devices()[:1])
    predict = make_predict(Sums(), view, layout, batch_size=2, dtype=jnp.bfloat16)
    variables = layout.replicate({"params": {"bias": jnp.ones((), jnp.bfloat16)}})
    logits = predict(variables, np.full((2, 2, 2, 1), 3, np.uint8))
    assert logits.dtype == np.float32
    np.testing.assert_array_equal(logits, [[12, 1], [12, 1]])
