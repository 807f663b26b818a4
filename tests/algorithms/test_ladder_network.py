"""The ladder's loss and gradients against torch in float64, what its parts reach, and that it
trains, resumes and is the same on four devices."""

import harness
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fakes import one_device, one_hot

from ferjax.algorithms import ladder
from ferjax.algorithms.base import Batch, Part, Time
from ferjax.config import UserError
from ferjax.data import arrays
from ferjax.engine.parallel import Layout
from ferjax.engine.step import BoundNet
from ferjax.models.cnn import Model

N, SIDE, SIGMA, EPSILON = 5, 9, 0.4, 1e-3
# Not maxpool: without XLA's optimisations ops.max_pool can miss a maximum and lose its gradient.
LAYERS = ("conv 3 3 nobias", "bn", "relu", "avgpool 2", "conv 4 3 valid", "relu", "flatten")
LAYERS = (*LAYERS, "dense 6", "relu")
SHAPES = {
    "input": (SIDE, SIDE, 1),
    "conv_0": (SIDE, SIDE, 3),
    "conv_4": (2, 2, 4),
    "dense_7": (6,),
    "classifier": (7,),
}
WEIGHTS = (3.0, 2.0, 1.5, 0.7, 0.4)


def part(rng, n, prefix):
    return Part(
        views={"weak": jnp.asarray(rng.normal(0, 1, (n, SIDE, SIDE, 1)))},
        target=jnp.asarray(one_hot(rng.integers(0, 7, n))),
        weight=jnp.ones(n),
        index=jnp.arange(n),
        keys=jax.random.split(jax.random.key(len(prefix)), n),
    )


def make_batch():
    rng = np.random.default_rng(0)
    return Batch(part(rng, N, "x"), part(rng, 2 * N, "u-"), one_device)


def random_tree(net, rng):
    """Random variables of everything: nothing is 0 or 1, as it is at the start."""
    image = jax.ShapeDtypeStruct((1, SIDE, SIDE, 1), jnp.float64)
    shapes = jax.eval_shape(net.init, jax.random.key(0), image)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0.2, 0.5, x.shape)), shapes)


def make(method, seed=0):
    """(loss, gradients) as a compiled function, variables and a batch, in float64."""
    net = method.wrap(Model(layers=LAYERS, dtype=jnp.float64))
    variables = random_tree(net, np.random.default_rng(seed))

    def loss(params, batch):
        bound = BoundNet(net, params, variables["batch_stats"], None)
        value, metrics, _ = method.loss(bound, batch, {}, Time(0, 0.0))
        return value, metrics

    return jax.jit(jax.value_and_grad(loss, has_aux=True)), variables["params"], make_batch()


def noise(keys):
    """The encoder's noise by rung: one draw for each image."""
    sizes = [int(np.prod(shape)) for shape in SHAPES.values()]
    draws = np.stack([np.asarray(jax.random.normal(k, (sum(sizes),), jnp.float32)) for k in keys])
    draws = (np.float32(SIGMA) * draws).astype(np.float64)
    parts = np.split(draws, np.cumsum(sizes)[:-1], axis=1)
    return {n: p.reshape(-1, *s) for (n, s), p in zip(SHAPES.items(), parts, strict=True)}


def torch_loss(torch, params, batch):
    """Algorithm 1 by itself, in torch: maps are [N, C, H, W], layers are torch's own."""
    f = torch.nn.functional

    def chw(x):
        x = torch.as_tensor(np.array(x))
        return x.permute(0, 3, 1, 2) if x.ndim == 4 else x

    def channels(a, x):
        return a.reshape(1, -1, *[1] * (x.ndim - 2))

    def moments(x):
        axes = [0, *range(2, x.ndim)]
        return x.mean(axes), x.var(axes, unbiased=False)

    def norm(x):
        mean, var = moments(x)
        std = torch.sqrt(var + EPSILON)
        return (x - channels(mean, x)) / channels(std, x), mean, std

    net = params["backbone"]
    affine = {
        "conv_0": net["bn_1"],
        **{name: params[f"added_{name}"] for name in ("conv_4", "dense_7", "classifier")},
    }

    def encode(x, noise=None):
        noise = noise and {name: chw(value) for name, value in noise.items()}
        h = x + noise["input"] if noise else x
        z, mean, std = {"input": h}, {}, {}

        def rung(name, pre):
            z[name], mean[name], std[name] = norm(pre)
            if noise:
                z[name] = z[name] + noise[name]
            scale, bias = affine[name]["scale"], affine[name]["bias"]
            return z[name] * channels(scale, pre) + channels(bias, pre)

        h = rung("conv_0", f.conv2d(h, net["conv_0"]["kernel"].permute(3, 2, 0, 1), padding=1))
        h = f.avg_pool2d(torch.relu(h), 2)
        conv = net["conv_4"]
        h = rung("conv_4", f.conv2d(h, conv["kernel"].permute(3, 2, 0, 1), conv["bias"]))
        h = torch.relu(h).permute(0, 2, 3, 1).flatten(1)
        h = rung("dense_7", h @ net["dense_7"]["kernel"] + net["dense_7"]["bias"])
        last = net["classifier"]
        logits = rung("classifier", torch.relu(h) @ last["kernel"] + last["bias"])
        return z, mean, std, logits

    down = params["decoder"]

    def combine(name, noisy, u):
        u = norm(u)[0]
        a = [channels(row, u) for row in down[f"g_{name}"]["a"]]
        m = a[0] * torch.sigmoid(a[1] * u + a[2]) + a[3] * u + a[4]
        v = a[5] * torch.sigmoid(a[6] * u + a[7]) + a[8] * u + a[9]
        return (noisy - m) * v + m

    def transposed(u, part, crop):
        """torch's own transposed convolution: its kernels are turned by half a turn."""
        kernel = part["kernel"].flip(0, 1).permute(2, 3, 0, 1)
        return f.conv_transpose2d(u, kernel, padding=crop)

    z, mean, std, _ = encode(chw(batch.unlabeled.views["weak"]))
    keys = batch.unlabeled.key("model")
    noisy, _, _, logits = encode(chw(batch.unlabeled.views["weak"]), noise(keys))
    made = {"classifier": combine("classifier", noisy["classifier"], logits.softmax(-1))}

    def dense(u, name):
        return u @ down[name]["kernel"] + down[name]["bias"]

    made["dense_7"] = combine("dense_7", noisy["dense_7"], dense(made["classifier"], "v_dense_7_1"))
    flat = dense(made["dense_7"], "v_conv_4_2").reshape(-1, 2, 2, 4).permute(0, 3, 1, 2)
    made["conv_4"] = combine("conv_4", noisy["conv_4"], flat)
    up = transposed(made["conv_4"], down["v_conv_0_2"], 0)
    up = f.pad(f.interpolate(up, scale_factor=2, mode="nearest"), (0, 1, 0, 1))
    made["conv_0"] = combine("conv_0", noisy["conv_0"], up)
    up = transposed(made["conv_0"], down["v_input_0"], 1)
    made["input"] = combine("input", noisy["input"], up)

    costs = {"input": (z["input"] - made["input"]) ** 2}
    for name in list(SHAPES)[1:]:
        back = (made[name] - channels(mean[name], made[name])) / channels(std[name], made[name])
        costs[name] = (z[name] - back) ** 2
    labeled = batch.labeled
    x_noise = noise(labeled.key("model"))
    x_logits = encode(chw(labeled.views["weak"]), x_noise)[3]
    target = torch.as_tensor(np.array(labeled.target))
    supervised = -(target * x_logits.log_softmax(-1)).sum(-1).mean()
    # The mean over images and units is the sum over units, over d_l, averaged over images.
    denoising = {name: cost.mean() for name, cost in costs.items()}
    weighted = zip(WEIGHTS, denoising.values(), strict=True)
    return supervised + sum(w * c for w, c in weighted), supervised, denoising


def test_loss_and_all_gradients_are_torch_s():
    torch = pytest.importorskip("torch")
    with harness.float64():
        method = ladder.Algorithm(mu=2, sigma=SIGMA, weights=WEIGHTS)
        step, params, batch = make(method)
        (loss, metrics), grads = step(params, batch)
        leaves, tree = jax.tree.flatten(params)
        tensors = [torch.tensor(np.asarray(x), requires_grad=True) for x in leaves]
        wanted, supervised, costs = torch_loss(torch, tree.unflatten(tensors), batch)
        wanted.backward()
        lied_to = batch.replace(
            unlabeled=batch.unlabeled.replace(target=jnp.roll(batch.unlabeled.target, 1, 1))
        )
        assert float(step(params, lied_to)[0][0]) == float(loss)  # hidden labels stay hidden
    # The float32 noise differs in its last bit between the two programs.
    np.testing.assert_allclose(loss, wanted.item(), rtol=1e-6)
    got = {name: float(total / weight) for name, (total, weight) in metrics.items()}
    np.testing.assert_allclose(got["loss_labeled"], supervised.item(), rtol=1e-6)
    for name, cost in costs.items():
        assert cost.item() > 1e-3
        np.testing.assert_allclose(got[f"cost_{name}"], cost.item(), rtol=1e-6)
    paths = jax.tree_util.tree_leaves_with_path(grads)
    for (path, grad), tensor in zip(paths, tensors, strict=True):
        name = jax.tree_util.keystr(path)
        scale = float(tensor.grad.abs().max())
        np.testing.assert_allclose(
            grad, tensor.grad, rtol=1e-4, atol=1e-5 * max(scale, 1e-3), err_msg=name
        )
        # A bias before a normalisation does nothing; all else has a gradient.
        assert scale > 1e-6 or name.endswith("['bias']"), name


def test_gamma_model_touches_the_top_alone():
    method = ladder.Algorithm(mu=2, cost_layers="top", weights=(1.0,))
    net = method.wrap(Model(layers=LAYERS))
    batch = make_batch()

    def metrics(batch):
        x = batch.labeled.views["weak"]
        variables = net.init(jax.random.key(0), x)
        assert set(variables["params"]["decoder"]) == {"g_classifier"}
        bound = BoundNet(net, variables["params"], variables["batch_stats"], None)
        return method.loss(bound, batch, {}, Time(0, 0.0))[1]

    names = jax.eval_shape(metrics, batch)
    assert [name for name in names if name.startswith("cost_")] == ["cost_classifier"]


def test_trains_on_faces_resumes_and_is_the_same_on_four_devices(data_dir, monkeypatch):
    faces = arrays.load("synthetic_faces/tiny", data_dir=str(data_dir)).splits["train"]
    images, labels = faces.images[: harness.IMAGES, ::3, ::3], faces.labels[: harness.IMAGES]
    assert images.shape[1:] == (harness.SIDE, harness.SIDE, 1)
    data = {"images": images, "targets": np.eye(harness.CLASSES)[labels]}
    monkeypatch.setattr(harness, "make_data", lambda: data)
    with harness.float64():
        config = harness.make_config(
            algorithm={"name": "ladder", "weights": (1.0, 0.5), "denoise": "gaussian"},
            model={"name": "cnn", "layers": ("conv 8 3 4 nobias", "bn", "relu", "flatten")},
            views={"weak": {"policy": "none"}},
            optimizer={"learning_rate": 0.1},
        )
        run = harness.Small(config, steps=40)
        one, four = (Layout("pmap", jax.devices()[:n]) for n in (1, 4))
        start = run.init()
        half, _ = run.run(one, steps=20)
        rest, late = run.run(one, steps=20, state=half)
        whole, metrics = run.run(one)
        few, _ = run.run(one, steps=4)
        spread, on_four = run.run(four, steps=4)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(rest), strict=True):
        assert np.array_equal(a, b)
    for a, b in zip(jax.tree.leaves(few), jax.tree.leaves(spread), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-8, atol=1e-11)
    for name, factor in (("loss_labeled", 0.7), ("loss_unlabeled", 0.8), ("cost_input", 0.8)):
        values, spread_values = (m[name][0] / m[name][1] for m in (metrics, on_four))
        np.testing.assert_allclose(spread_values, values[:4], rtol=1e-9)
        assert values[-10:].mean() < factor * values[:5].mean(), (name, values)
        np.testing.assert_array_equal(late[name][0], metrics[name][0][20:])
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), start.params, whole.params)
    for path, change in jax.tree_util.tree_leaves_with_path(moved):
        if path[-1].key != "bias":  # one before a normalisation does nothing
            assert change > 1e-6, path


def test_bad_hyperparameters():
    with pytest.raises(UserError, match="denoise=x: use vanilla, gaussian, seed, none"):
        ladder.Algorithm(denoise="x")
    with pytest.raises(UserError, match="norms=x: use added, kept"):
        ladder.Algorithm(norms="x")
    with pytest.raises(UserError, match=r"weights=\(1.0, -1.0\): give numbers of 0 or more"):
        ladder.Algorithm(weights=(1.0, -1.0))
    with pytest.raises(UserError, match=r"sigma=-1"):
        ladder.Algorithm(sigma=-1.0)
