"""Fixed inputs and a network whose outputs can be worked out by hand, for tests of losses."""

import jax
import jax.numpy as jnp
import numpy as np

from ferjax.algorithms.base import Batch, Part

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

    def __call__(self, images, *, keys=None, train=True, update=True, method="__call__"):
        assert train
        assert keys is None or len(keys) == len(images)
        self.calls.append((method, len(images), update))
        self.seen.append(images)
        flat = images.reshape(len(images), -1)
        if method == "features":
            return images
        if method == "head":
            return flat[:, :C], flat
        return flat[:, -4:] if method == "rotation" else flat[:, :C]

    def teacher(self, images, *, method="__call__"):
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


def make_batch(method, seed=3, scale=2.0):
    """A batch for a method, and its logits as NumPy arrays: "x:weak", "x:target", "u:strong"..."""
    rng = np.random.default_rng(seed)
    labeled, x = make_part(rng, N, method.labeled_views, "x", scale)
    unlabeled, u = make_part(rng, N * method.mu, method.unlabeled_views, "u", scale, first=N)
    return Batch(labeled, unlabeled, lambda x: x), {**x, **u}


def supervised(a):
    return cross_entropy(a["x:weak"], a["x:target"]).mean()


def means(metrics):
    return {name: float(s) / float(w) for name, (s, w) in metrics.items()}


def gradients(method, batch, extra, t, loss=None):
    """d loss / d images of each unlabelled view: what flows back through each of them."""

    def total(views):
        unlabeled = batch.unlabeled.replace(views=views)
        return method.loss(FakeNet(), batch.replace(unlabeled=unlabeled), extra, t)[0]

    return {k: np.asarray(g) for k, g in jax.grad(total)(dict(batch.unlabeled.views)).items()}
