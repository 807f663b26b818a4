"""Fixed inputs and a network whose outputs can be worked out by hand, for tests of losses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ferjax.algorithms.base import Batch, Part, Time

N, C, SIDE = 6, 7, 4  # labelled images, classes, pixels of a side


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def log_softmax(x):
    return np.log(softmax(x))


def cross_entropy(logits, target):
    return -(target * log_softmax(logits)).sum(-1)


def one_hot(classes):
    return np.eye(C)[classes]


class FakeNet:
    """Logits are an image's first C pixels; the teacher's are half of the first C pixels.

    Rotation logits are the last 4 pixels, the feature map is the image and the penultimate vector
    all of its pixels. `calls` lists (method, images, update) of each call, `seen` the images.
    """

    def __init__(self):
        self.calls, self.seen = [], []

    def __call__(self, images, *, keys=None, update=True, method="__call__"):
        assert keys is None or len(keys) == len(images)
        self.calls.append((method, len(images), update))
        self.seen.append(images)
        flat = images.reshape(len(images), -1)
        if method == "features":
            return images
        if method == "head":
            return flat[:, :C], flat
        return flat[:, -4:] if method == "rotation" else flat[:, :C]

    def teacher(self, images):
        self.calls.append(("teacher", len(images), False))
        self.seen.append(images)
        return 0.5 * images.reshape(len(images), -1)[:, :C]


def make_part(rng, n, views, prefix, scale, first=0):
    images = {v: rng.normal(0, scale, (n, SIDE, SIDE, 1)) for v in views}
    target = one_hot(rng.integers(0, C, n))
    part = Part(
        views={v: jnp.asarray(x, jnp.float32) for v, x in images.items()},
        target=jnp.asarray(target, jnp.float32),
        weight=jnp.ones(n, jnp.float32),
        index=jnp.arange(first, first + n, dtype=jnp.int32),
        keys=jax.random.split(jax.random.key(len(prefix)), n),
    )
    arrays = {f"{prefix}:{v}": x.reshape(n, -1)[:, :C] for v, x in images.items()}
    return part, {**arrays, f"{prefix}:target": target}


def one_device(x):
    return x


def make_batch(method, seed=3, scale=2.0):
    """A batch for a method, and its logits as NumPy arrays: "x:weak", "x:target", "u:strong"..."""
    rng = np.random.default_rng(seed)
    labeled, x = make_part(rng, N, method.labeled_views, "x", scale)
    unlabeled, u = make_part(rng, N * method.mu, method.unlabeled_views, "u", scale, first=N)
    return Batch(labeled, unlabeled, one_device), {**x, **u}


def supervised(a):
    return cross_entropy(a["x:weak"], a["x:target"]).mean()


def means(metrics):
    return {name: float(s) / float(w) for name, (s, w) in metrics.items() if float(w)}


@functools.cache
def compiled(method):
    """(loss, gradients by the unlabelled views), compiled once for a method."""

    def loss(batch, extra, t):
        return method.loss(FakeNet(), batch, extra, t)

    def total(views, batch, extra, t):
        unlabeled = batch.unlabeled.replace(views=views)
        return loss(batch.replace(unlabeled=unlabeled), extra, t)[0]

    return jax.jit(loss), jax.jit(jax.grad(total))


def loss(method, batch, extra, t):
    """What the method's loss returns with FakeNet."""
    return compiled(method)[0](batch, extra, t)


def calls(method, batch, extra):
    """The calls that the loss makes of its net."""
    net = FakeNet()
    jax.eval_shape(lambda b, e: method.loss(net, b, e, Time(0, 0.0))[0], batch, extra)
    return net.calls


def gradients(method, batch, extra, t):
    """d loss / d images of each unlabelled view: what flows back through each of them."""
    got = compiled(method)[1](dict(batch.unlabeled.views), batch, extra, t)
    return {name: np.asarray(g) for name, g in got.items()}
