"""A ladder around a network (Rasmus et al. 2015, arXiv:1507.02672): its two encoders and costs.

Rung 0 is the image. Every further rung is a place where the encoder normalises: z is what comes out
before scale and bias, where the noisy encoder adds its noise. The rungs of a `cnn` are

- each `bn`, with its own scale, bias and running statistics; right after a `conv` or `dense` it
  bears that layer's name;
- each `conv` and `dense` without one, the implied last layer `classifier` among them. With
  norms="added" it gets a BatchNorm of the ladder's, since algorithm 1 normalises every layer. With
  norms="kept" the batch's own deviation and mean take the place of scale and bias, so that
  z + noise becomes the layer's output plus noise of `sigma` deviations: without noise the network
  is the plain one, which suits weights that were trained before.

Those of a `resnet` or `wide_resnet` are stem, output of each block (rectified in a resnet) and
classifier; a block and a wide_resnet's stem are "kept", and BatchNorm inside a block is no rung.
Pools, activations and gap lie between two rungs (the reference code normalises after pools too).
Dropout acts in the noisy encoder only.

decoder.py goes down from the noisy softmax; it takes a whole block for one convolution.

Parameters: `backbone` (the network's own tree), `added_<rung>` (its norms), `decoder`.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from ferjax.config import UserError
from ferjax.models import cnn, ops, resnet, wide_resnet
from ferjax.models.decoder import Decoder, Shape, after, standardise
from ferjax.models.layers import BatchNorm, param_dtype

NORMS = ("added", "kept")
INPUT = "input"


class Layer(NamedTuple):
    """One step of an encoder.

    Attributes:
      entry: what it is, in the words of cnn.py.
      run: (h, train, keys) -> h, without the normalisation.
      rung: its name if the result is normalised.
      norm: the BatchNorm for it, if the network has one; `keeps`: it never gets one.
    """

    entry: cnn.Entry
    run: Callable[[jax.Array, bool, jax.Array | None], jax.Array]
    rung: str = ""
    norm: BatchNorm | None = None
    keeps: bool = False


class Encoding(NamedTuple):
    """What an encoder leaves behind; the lists go from rung 0 to the top.

    Attributes:
      z: float [N, ...], normalised, with noise in the noisy encoder.
      mean, std: float [C] of the batch before normalisation; 0 and 1 for rung 0.
      logits: float [N, classes].
    """

    z: list[jax.Array]
    mean: list[Any]
    std: list[Any]
    logits: jax.Array


class Ladder(nn.Module):
    """A network with a decoder; its own call is the clean encoder.

    Attributes:
      backbone: a cnn, resnet or wide_resnet.
      sigma: standard deviation of the noise.
      denoise: vanilla | gaussian | seed | none, see `Combinator`.
      cost_layers, weights: see `layer_weights`.
      norms: added | kept, see above.
    """

    backbone: nn.Module
    sigma: float = 0.3
    denoise: str = "vanilla"
    cost_layers: str = "all"
    weights: tuple[float, ...] = (1000.0, 10.0, 0.1)
    norms: str = "added"

    def setup(self) -> None:
        """The norms that the network lacks, and the decoder."""
        net: Any = self.backbone
        self.dtype = net.dtype
        self.epsilon = net.bn_epsilon
        self.layers, self.split = describe(net)
        self.added = {
            x.rung: BatchNorm(net.axis_name, net.bn_momentum, net.bn_epsilon, dtype=net.dtype)
            for x in self.layers
            if x.rung and x.norm is None and not x.keeps and self.norms == "added"
        }
        self.rungs = (INPUT, *(x.rung for x in self.layers if x.rung))
        self.lambdas = layer_weights(self.rungs, self.cost_layers, self.weights)
        self.decoder = Decoder(
            tuple(between(self.layers)),
            self.rungs,
            min((self.rungs.index(name) for name in self.lambdas), default=len(self.rungs)),
            self.sigma,
            self.denoise,
            net.axis_name,
            net.bn_epsilon,
            net.dtype,
        )

    def features(
        self, x: jax.Array, train: bool = False, keys: jax.Array | None = None
    ) -> jax.Array:
        """The clean encoder's last feature map [N, h, w, c] of x [N, H, W, C]."""
        return self._encode(x, self.layers[: self.split], train)[0]

    def head(
        self, fmap: jax.Array, train: bool = False, keys: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Feature map -> logits [N, classes] and the classifier's input, both clean."""
        vector = self._encode(fmap, self.layers[self.split : -1], train)[0]
        logits = self._encode(vector, self.layers[-1:], train)[0]
        return logits.astype(param_dtype(self.dtype)), vector

    def __call__(
        self, x: jax.Array, train: bool = False, keys: jax.Array | None = None
    ) -> jax.Array:
        """Logits [N, classes] of images x [N, H, W, C] without noise; `keys` are not used."""
        if self.is_initializing():
            self.backbone(x)
            clean = self.clean(x, True)
            self.costs((clean, clean))
        return self.clean(x, train).logits

    def clean(self, x: jax.Array, train: bool, keys: jax.Array | None = None) -> Encoding:
        """The clean encoder of images x [N, H, W, C]; train=True moves the running statistics."""
        h, z, mean, std = self._encode(x, self.layers, train)
        return Encoding([x, *z], [0.0, *mean], [1.0, *std], h.astype(param_dtype(self.dtype)))

    def noisy(self, x: jax.Array, train: bool, keys: jax.Array) -> Encoding:
        """The noisy encoder of images x [N, H, W, C]; its noise comes from `keys` [N] alone."""
        noise = self._noise(x.shape[1:], keys)
        x = x + noise[INPUT].astype(x.dtype)
        h, z, mean, std = self._encode(x, self.layers, train, keys, noise)
        return Encoding([x, *z], [0.0, *mean], [1.0, *std], h.astype(param_dtype(self.dtype)))

    def costs(
        self, both: tuple[Encoding, Encoding], train: bool = True, keys: jax.Array | None = None
    ) -> dict[str, tuple[float, jax.Array]]:
        """Denoising costs of a noisy and a clean encoding of the same images.

        Returns:
          rung -> lambda_l and |z - (z^ - mean) / std|^2 / d_l float [N] (eq. 3), of those rungs
          that have a lambda_l above 0. d_l is the number of units of the rung.
        """
        noisy, clean = both
        made, costs = self.decoder(noisy.z, noisy.logits), {}
        for name, weight in self.lambdas.items():
            i = self.rungs.index(name)
            error = clean.z[i] - (made[name] - clean.mean[i]) / clean.std[i]
            costs[name] = (weight, jnp.mean(error**2, range(1, error.ndim)))
        return costs

    def _noise(self, shape: Shape, keys: jax.Array) -> dict[str, jax.Array]:
        """sigma * N(0, 1) float32 [N, ...] for each rung, row by row from `keys` [N]."""
        shapes = {INPUT: shape}
        for layer in self.layers:
            shapes[layer.rung] = shape = after(layer.entry, shape)
        shapes.pop("", None)  # what is no rung
        ends = list(itertools.accumulate(math.prod(s) for s in shapes.values()))
        # One draw for all: XLA takes seconds to compile each.
        draw = jax.vmap(lambda key: jax.random.normal(key, ends[-1:], jnp.float32))(keys)
        parts = jnp.split(self.sigma * draw, ends[:-1], axis=1)
        return {
            name: part.reshape(-1, *shape)
            for (name, shape), part in zip(shapes.items(), parts, strict=True)
        }

    def _encode(
        self,
        h: jax.Array,
        layers: Sequence[Layer],
        train: bool,
        keys: jax.Array | None = None,
        noise: Mapping[str, jax.Array] | None = None,
    ) -> tuple[Any, ...]:
        """h after some layers, and (z, mean, std) of the rungs among them; `keys` for dropout."""
        values: tuple[list[jax.Array], ...] = ([], [], [])
        for layer in layers:
            h = layer.run(h, train, keys)
            norm = layer.norm or self.added.get(layer.rung)
            if not layer.rung or (norm is None and not train):
                continue
            z, mean, var = self._normalise(norm, h, train, update=noise is None)
            std = jnp.sqrt(var + (norm.epsilon if norm else self.epsilon))
            if noise is not None:
                z = z + noise[layer.rung].astype(z.dtype)
            if norm is None:
                scale, bias = std, mean  # so that h stays what it was, but for noise
            else:
                scale, bias = (norm.get_variable("params", name) for name in ("scale", "bias"))
            h = z * scale + bias
            if layer is not self.layers[-1]:  # logits keep full precision
                h = h.astype(self.dtype)
            for column, value in zip(values, (z, mean, std), strict=True):
                column.append(value)
        return h, *values

    def _normalise(
        self, norm: BatchNorm | None, h: jax.Array, train: bool, update: bool
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """z in full precision, mean and variance; the running ones if not train."""
        net: Any = self.backbone
        epsilon = self.epsilon if norm is None else norm.epsilon
        if norm is not None and self.is_initializing():
            norm(h, False)  # makes its parameters
        if not train:
            assert norm is not None
            mean: Any = norm.get_variable("batch_stats", "mean")
            var: Any = norm.get_variable("batch_stats", "var")
            return (h - mean) * lax.rsqrt(var + epsilon), mean, var
        first = self.is_initializing()  # outside the axis
        axis_name = None if first else net.axis_name
        z, mean, var = standardise(h.astype(param_dtype(self.dtype)), axis_name, epsilon)
        if norm and update and not first and self.is_mutable_collection("batch_stats"):
            for name, new in (("mean", mean), ("var", var)):
                old: Any = norm.get_variable("batch_stats", name)
                kept = norm.momentum * old + (1 - norm.momentum) * new
                norm.put_variable("batch_stats", name, kept)
        return z, mean, var


def between(layers: Sequence[Layer]) -> list[tuple[cnn.Entry, ...]]:
    """The entries from each rung (rung 0 first) to the next."""
    ways: list[tuple[cnn.Entry, ...]] = []
    way: list[cnn.Entry] = []
    for layer in layers:
        way.append(layer.entry)
        if layer.rung:
            ways.append(tuple(way))
            way = []
    return ways


def layer_weights(
    rungs: tuple[str, ...], cost_layers: str, weights: tuple[float, ...]
) -> dict[str, float]:
    """lambda_l by rung, of those above 0, from the image upwards.

    Args:
      rungs: all names; the first is `input`.
      cost_layers: "all", "top" (the Gamma-model), or rungs by name or number, separated by spaces.
      weights: lambda_0, lambda_1, ...; the last is that of all further rungs too.

    Raises:
      UserError: there is no such rung.
    """
    chosen: set[str] = set()
    for word in cost_layers.split():
        if word == "all":
            chosen.update(rungs)
        elif word == "top":
            chosen.add(rungs[-1])
        elif word in rungs:
            chosen.add(word)
        elif word.isdecimal() and int(word) < len(rungs):
            chosen.add(rungs[int(word)])
        else:
            raise UserError(
                f"config.algorithm.cost_layers={cost_layers}: {word!r} is not all, top, a number "
                f"from 0 to {len(rungs) - 1}, or one of {', '.join(rungs)}"
            )
    every = (*weights, *weights[-1:] * len(rungs))
    return {n: w for n, w in zip(rungs, every, strict=False) if n in chosen and w > 0}


def describe(net: Any) -> tuple[list[Layer], int]:
    """The layers of a bound network, and how many of them come before its gap or flatten.

    Raises:
      UserError: a ladder cannot be built around such a network.
    """
    if isinstance(net, cnn.Model):
        return _describe_cnn(net), net.split
    if isinstance(net, resnet.Model | wide_resnet.Model):
        layers = _describe_residual(net)
        return layers, [x.entry[0] for x in layers].index("gap")
    raise UserError("config.algorithm=ladder goes with the models cnn, resnet and wide_resnet")


def _entry(word: str, *numbers: float) -> cnn.Entry:
    return word, numbers, frozenset()


def _describe_cnn(net: cnn.Model) -> list[Layer]:
    layers = []
    for i, (name, entry) in enumerate(zip(net.names, net.entries, strict=True)):

        def run(h: jax.Array, train: bool, keys: jax.Array | None, i: int = i) -> jax.Array:
            return net._apply(i, h, train and keys is not None, keys)

        before, following = ([*net.names, ""][k] for k in (i - 1, i + 1))
        if entry[0] == "bn":
            rung = before if before.startswith(("conv", "dense")) else name
            layers.append(Layer(entry, lambda h, *_: h, rung, getattr(net, name)))
        elif entry[0] in ("conv", "dense") and not following.startswith("bn"):
            layers.append(Layer(entry, run, name))
        else:
            layers.append(Layer(entry, run))
    last = _entry("dense", net.num_classes)
    return [*layers, Layer(last, lambda h, *_: net.classifier(h), "classifier")]


def _describe_residual(net: Any) -> list[Layer]:
    if wide := isinstance(net, wide_resnet.Model):
        layers = [Layer(_entry("conv", 16, 3), lambda h, *_: net.stem(h), "stem", keeps=True)]
    else:
        size, stride = (7, 2) if net.stem == "imagenet" else (3, 1)
        entry = _entry("conv", net.width, size, stride)
        stem = Layer(entry, lambda h, *_: net.stem_conv(h), "stem", net.stem_norm)
        layers = [stem, Layer(_entry("relu"), lambda h, *_: nn.relu(h))]
        if net.stem == "imagenet":
            pool: cnn.Entry = ("maxpool", (2,), frozenset({"same"}))
            layers.append(Layer(pool, lambda h, *_: ops.max_pool(h, 3, 2, padding=1)))
    for i, block in enumerate(net.blocks):
        width = block.width * (4 if getattr(block, "bottleneck", False) else 1)

        def run(h: jax.Array, train: bool, _: Any, block: nn.Module = block) -> jax.Array:
            return block(h, train)

        layers.append(Layer(_entry("conv", width, 3, block.stride), run, f"block_{i}", keeps=True))
    if wide:
        layers += [
            Layer(_entry("leaky_relu"), lambda h, train, _: net.last_norm(h, train)),
            Layer(_entry("leaky_relu"), lambda h, *_: nn.leaky_relu(h, net.slope)),
        ]
    stored = param_dtype(net.dtype)
    layers.append(Layer(_entry("gap"), lambda h, *_: h.astype(stored).mean((1, 2))))
    if wide:

        def drop(h: jax.Array, train: bool, keys: jax.Array | None) -> jax.Array:
            return net.drop(h, train and keys is not None, keys)

        layers.append(Layer(_entry("dropout"), drop))
    last = _entry("dense", net.num_classes)
    return [*layers, Layer(last, lambda h, *_: net.classifier(h), "classifier")]
