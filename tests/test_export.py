"""Exported files compute what the network computes; weights travel in one file; the card says so.

The tests of ONNX need the extra [export]; where FERJAX_NO_SKIPS is set its absence is a failure.
"""

import contextlib
import dataclasses
import json
import os
import re
import subprocess
import sys

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from test_end_to_end import ROOT, environment, ferjax

import ferjax as package
from ferjax import config as configs
from ferjax import export, model_card, weights
from ferjax.config import UserError
from ferjax.data.synthetic_faces import make_face
from ferjax.engine.state import build

# One channel, stride 1: our own convolution; pools with and without overlap; sums and maxima.
LAYERS = (
    "conv 4 3",
    "bn",
    "prelu",
    "maxpool 3 2",
    "avgpool 3 2",
    "conv 4 3 2",
    "relu",
    "maxpool 2",
)
LAYERS = (*LAYERS, "prelu", "flatten", "dense 8", "prelu", "dropout 0.5")
CLASSES = ("angry", "disgust", "fear", "happy", "sad", "surprise", "neutral")


def described(text, arrays=None):
    """A safetensors file that says `text` of itself."""
    arrays = {"a": np.zeros(2)} if arrays is None else arrays
    return safetensors.numpy.save(arrays, metadata={"ferjax": text})


def need(module):
    if os.environ.get("FERJAX_NO_SKIPS"):
        return __import__(module)
    return pytest.importorskip(module)


def random_weights(shape=(48, 48, 1), *, model=None, **data):
    """An untrained network whose BatchNorm statistics are no longer 0 and 1."""
    given = configs.base()
    given.model = model or {"name": "cnn", "layers": LAYERS}
    given.data.update(data)
    config = configs.finalize(given)
    side = config.data.image_size or shape[0]
    network = build(config, len(CLASSES))[1]
    x = jax.ShapeDtypeStruct((1, side, side, config.data.channels), jnp.float32)
    rng = np.random.default_rng(0)

    def drawn(path, leaf):
        name = path[-1].key
        if name in ("scale", "var"):
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        spread = np.sqrt(2 / np.prod(leaf.shape[:-1])) if name == "kernel" else 0.1
        return rng.normal(0, spread, leaf.shape).astype(np.float32)

    shapes = jax.eval_shape(network.init, jax.random.key(0), x)
    variables = jax.tree_util.tree_map_with_path(drawn, shapes)
    variables = {"batch_stats": {}, **variables}
    return weights.Weights(config, 7, CLASSES, shape, variables)


def grey_faces(count):
    return np.stack([make_face(row).pixels for row in range(count)])[..., None]


@pytest.fixture(scope="module")
def network():
    return random_weights()


@pytest.fixture
def saved(network, tmp_path):
    """The file of a network with the facts of a run that was never scored."""
    (tmp_path / "run").mkdir()
    facts = model_card.gather(tmp_path / "run", network, checkpoint="best", kind="ema")
    path = tmp_path / "net.safetensors"
    path.write_bytes(weights.encode(dataclasses.replace(network, facts=facts)))
    return path


def test_weights_are_read_as_they_were_written(network, saved):
    again = weights.read(saved)
    assert jax.tree.all(jax.tree.map(np.array_equal, network.variables, again.variables))
    assert (again.step, again.classes, again.image_shape) == (7, CLASSES, (48, 48, 1))
    assert again.config == network.config
    content = saved.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["ferjax"])
    assert (header["mean"], header["std"], header["image_size"]) == ([0.5077], [0.2551], 48)
    arrays = safetensors.numpy.load(content)
    kernel = network.variables["params"]["classifier"]["kernel"]
    np.testing.assert_array_equal(arrays["params/classifier/kernel"], kernel)


def test_a_file_is_loaded_like_a_workdir(network, saved):
    x = grey_faces(3)
    model = build(network.config, 7)[1]
    normalised = (x / 255 - 0.5077) / 0.2551
    logits = np.asarray(model.apply(network.variables, normalised.astype(np.float32)), float)
    expected = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(package.load(saved).predict(x).probabilities, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c[:-1], "is damaged"),
        (lambda c: c[:-3] + bytes([c[-3] ^ 1]) + c[-2:], "its arrays are not those"),
        (lambda c: c.replace(b"0.5077", b"0.9077"), "its description is not what was written"),
        (lambda c: c.replace(b'\\"happy', b'\\"sappy'), "its description is not what was written"),
        (lambda c: b"", "is not a safetensors file"),
        (lambda c: b"\xff" * 64, "is not a safetensors file"),
        (lambda c: safetensors.numpy.save({"a": np.zeros(2)}), "says nothing of a ferjax config"),
        (lambda c: described("{}"), "is damaged"),
        (lambda c: described("[1]"), "is damaged"),
        (lambda c: described('{"config": {"algorithm": 5}}'), "is damaged"),
        (lambda c: described('{"config": {"algorithm": 5}, "crc": {}}', {}), "is damaged"),
    ],
)
def test_other_files_are_refused_in_one_line(change, message, saved):
    saved.write_bytes(change(saved.read_bytes()))
    with pytest.raises(UserError, match=message) as caught:
        package.load(saved)
    assert "\n" not in str(caught.value)
    with contextlib.suppress(UserError):  # it does not read the arrays, which may be the damage
        weights.config(saved)


def test_a_network_comes_with_the_package():
    path = weights.PACKAGED["small"]
    assert path.stat().st_size < 2e6
    assert path.with_suffix(".md").read_text() == model_card.text(weights.read("small"))
    model = package.load("small")
    assert model.classes == CLASSES
    assert model.predict(grey_faces(2)).probabilities.shape == (2, 7)


def test_stablehlo_holds_everything_for_three_platforms():
    need("flatbuffers")
    source = random_weights(image_size=24, channels=3, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    content = export.to_stablehlo(source)
    assert export.check(source, content, "stablehlo") < 1e-5
    exported = jax.export.deserialize(bytearray(content))
    assert set(exported.platforms) == {"cpu", "cuda", "tpu"}
    assert exported.in_avals[0].dtype == np.uint8
    for count in (1, 3):
        p, logits = exported.call(grey_faces(count))
        assert p.shape == logits.shape == (count, 7)
        np.testing.assert_allclose(p, jax.nn.softmax(logits), atol=1e-6)


NETWORKS = {
    "cnn": {},
    "resized": {"image_size": 24, "channels": 3},
    "small": {"model": {"name": "cnn", "preset": "small"}},
    "seed": {"model": {"name": "cnn", "preset": "seed"}},
    "resnet18": {"model": {"name": "resnet", "width": 8}},
    "wide_resnet": {"model": {"name": "wide_resnet", "depth": 10}},
    "standardize": {"illumination": "standardize"},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_onnx_agrees_with_flax(name, tmp_path):
    need("jax2onnx")
    onnxruntime, onnx = need("onnxruntime"), need("onnx")
    source = random_weights(**NETWORKS[name])
    content = export.to_onnx(source)
    (tmp_path / "x.onnx").write_bytes(content)
    model = onnx.load(tmp_path / "x.onnx")
    onnx.checker.check_model(model)
    found = {p.key: p.value for p in model.metadata_props}
    assert json.loads(found["labels"]) == list(CLASSES)
    assert found["step"] == "7"
    assert {node.op_type for node in model.graph.node}.isdisjoint({"If", "Loop", "Scan"})
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    assert (given.type, given.shape[1:]) == ("tensor(uint8)", [48, 48, 1])
    assert isinstance(given.shape[0], str)
    x = grey_faces(9)
    expected = package.load.build_trained(source).predict(x)
    for part in (slice(0, 1), slice(1, 9)):
        p, logits = session.run(["probabilities", "logits"], {"images": x[part]})
        np.testing.assert_allclose(p, expected.probabilities[part], atol=1e-4)
        np.testing.assert_allclose(p, jax.nn.softmax(logits), atol=1e-5)


def test_jax_is_as_before_after_an_export():
    before = jax.lax.platform_dependent, jax.lax.reduce_window

    def fail():
        with export._plain_operations():
            assert jax.lax.reduce_window is not before[1]
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert (jax.lax.platform_dependent, jax.lax.reduce_window) == before


def test_the_command_writes_the_file_and_its_card(saved, tmp_path):
    out = tmp_path / "below" / "copy.safetensors"
    args = (f"--workdir={saved}", "--format=safetensors", f"--output={out}")
    done = ferjax("export", *args)
    assert done.returncode == 0, done.stderr
    assert {p.name for p in out.parent.iterdir()} == {"copy.safetensors", "copy.md"}
    assert out.read_bytes() == saved.read_bytes()
    assert "labels are the network's" in done.stdout


def test_a_wrong_file_is_not_written(saved, tmp_path):
    """The command, but for a file that computes something else; and what it refuses at once."""
    out = tmp_path / "out" / "x.safetensors"
    wanted = {
        "": "--workdir is missing",
        "--workdir=x --format=tflite": "use onnx, stablehlo, safetensors",
        "--workdir=x --format=onnx --output=x.bin": "must end with .onnx",
        "--workdir=nowhere.safetensors --format=safetensors": "is not there",
    }
    code = f"""
import dataclasses, jax, numpy as np
from ferjax import export, weights
export.define_flags()
for line in {list(wanted)!r}:
    export.FLAGS.unparse_flags()
    for name in ("workdir", "format", "output"):
        export.FLAGS[name].unparse()
    export.FLAGS(["export", *line.split()])
    try:
        export.main()
    except export.UserError as error:
        print("refused:", error)
encode = weights.encode
def wrong(source):
    zeros = jax.tree.map(np.zeros_like, source.variables)
    return encode(dataclasses.replace(source, variables=zeros))
weights.encode = wrong
export.FLAGS(["export", "--workdir={saved}", "--format=safetensors", "--output={out}"])
raise SystemExit(export.main())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment()
    )
    assert done.returncode == 1, done.stderr
    refused = [line for line in done.stdout.splitlines() if line.startswith("refused:")]
    assert len(refused) == len(wanted)
    for line, message in zip(refused, wanted.values(), strict=True):
        assert message in line
    assert "another label" in done.stderr
    assert "nothing was written" in done.stderr
    assert not out.parent.exists()


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    for kind in ("onnx", "stablehlo"):
        with pytest.raises(UserError, match=re.escape("pip install '.[export]'")):
            export._require_extra(kind)
    export._require_extra("safetensors")


def test_corrections_outside_the_network_are_not_exported():
    source = random_weights(illumination="clahe")
    with pytest.raises(UserError, match="illumination=clahe is done by OpenCV"):
        export.classifier(source)


SCORE = {"images": 3589, "accuracy": 0.5, "accuracy_interval": [0.4837, 0.5163]}


@pytest.fixture
def scored_workdir(tmp_path):
    (tmp_path / "eval").mkdir()
    rows = [{"kind": "eval", "step": 7, "epoch": 1, "ema_accuracy": 0.5, "raw_accuracy": 0.4}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    final = {**SCORE, "step": 99, "weights": "ema"}
    (tmp_path / "eval" / "final.json").write_text(json.dumps(final))
    clean = {"images": 3301, "accuracy": 0.48, "accuracy_interval": [0.46, 0.5]}
    private = {**SCORE, "step": 7, "weights": "ema", "accuracy": 0.4912, "clean": clean}
    (tmp_path / "eval" / "private_test.json").write_text(json.dumps(private))
    (tmp_path / "eval" / "private_test_readings.jsonl").write_text("{}\n{}\n")
    split = {"labeled_count": 70, "unlabeled_count": 28639, "labeled_per_class": [10] * 7}
    (tmp_path / "split.json").write_text(json.dumps({**split, "digest": "d" * 64}))
    return tmp_path


def test_the_card_says_what_the_workdir_knows(network, scored_workdir):
    facts = model_card.gather(scored_workdir, network, checkpoint="best", kind="ema")
    text = model_card.text(dataclasses.replace(network, facts=json.loads(json.dumps(facts))))
    for said in (
        "70 labelled images of `fer2013` (angry 10, ",
        "28,639 unlabelled",
        "step 7, the best of 1 evaluations on public_test",
        "| public_test | 3,589 | 50.00 % (48.37 to 51.63) |",
        "| private_test | 3,589 | 49.12 % (48.37 to 51.63) |",
        "private_test was read 2 times for this run",
        "Without those images: 48.00 % (46.00 to 50.00).",
        "65 +- 5 %",
        "Who is missing",
        "Not for decisions about people",
        "Apache-2.0",
        "ferjax.load",
    ):
        assert said in text, said
    raw = model_card.gather(scored_workdir, network, checkpoint="7", kind="raw")
    assert "private_test" not in raw["scores"], "scored with other weights"
    assert raw["scores"]["public_test"]["accuracy"] == 0.4
    text = model_card.text(dataclasses.replace(network, facts=raw))
    assert "private_test has not been scored with this checkpoint" in text


def test_the_card_of_other_data_says_other_things(tmp_path):
    for name, said in (("synthetic_faces/tiny", "They are no people"), ("fer2013", "FER2013")):
        source = random_weights(name=name)
        facts = model_card.gather(tmp_path, source, checkpoint="latest", kind="raw")
        text = model_card.text(dataclasses.replace(source, facts=facts))
        assert said in text
        assert "Not scored yet" in text
        assert ("Kaggle" in text) == (name == "fer2013")
