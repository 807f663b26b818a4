"""Writes a trained network for use elsewhere.

    python -m ferjax.export --workdir=DIR --format=onnx
    --format=onnx          for ONNX Runtime and others; needs the extra: pip install '.[export]'
    --format=stablehlo     for `jax.export.deserialize` on CPUs, GPUs and TPUs; the same extra
    --format=safetensors   the weights, for `ferjax.load`

The first two hold the whole way from uint8 faces [N, H, W, C] of the training images' size, N free,
to `probabilities` and `logits` [N, classes]: normalisation, and the change of size and channels
that the run made. They compute in float32, those of a bfloat16 run, too, whose own probabilities
differ by its rounding. Each file is read back and compared with the network in that precision on
100 faces before it gets its name; if labels differ, or probabilities by more than 1e-4, there is no
file and the status is 1. A model card is written beside it.
"""

import contextlib
import dataclasses
import json
import logging
import os
from collections.abc import Callable, Iterator
from functools import reduce
from importlib.util import find_spec
from typing import Any

import cv2
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from absl import flags
from etils import epath

from ferjax import config as configs
from ferjax import model_card, runtime, weights
from ferjax.analysis import scores
from ferjax.augment import policies
from ferjax.command import run
from ferjax.config import UserError
from ferjax.data.synthetic_faces import make_face
from ferjax.engine.state import build, build_view
from ferjax.load import build_trained, read_config, read_weights
from ferjax.weights import Weights
from ferjax.workdir import workdir_path, write_errors

FLAGS = flags.FLAGS
log = logging.getLogger("ferjax")
SUFFIXES = {"onnx": ".onnx", "stablehlo": ".stablehlo", "safetensors": weights.SUFFIX}
NEEDED = {"onnx": ("jax2onnx", "onnxruntime"), "stablehlo": ("flatbuffers",)}
PLATFORMS = ("cpu", "cuda", "tpu")
OPSET = 18  # of 2022: most runtimes have it
CHECKED, TOLERANCE = 100, 1e-4  # faces; the largest difference of a probability

Classify = Callable[[Any], tuple[jax.Array, jax.Array]]


class ExportError(Exception):
    """The file does not compute what the network computes."""


def define_flags() -> None:
    """The command's flags; the same names may be defined by other commands in one process."""
    flags.DEFINE_string("workdir", "", "The run's directory, or a .safetensors file, or small.")
    flags.DEFINE_string("format", "onnx", f"What to write: {', '.join(SUFFIXES)}.")
    flags.DEFINE_string("output", "", "The file; empty: model.<format> in the run's directory.")
    flags.DEFINE_string("checkpoint", "best", "best (on public_test), latest, or a step.")
    flags.DEFINE_string("weights", "ema", "ema or raw.")
    flags.DEFINE_string("licence", "", "Of the weights, for their card: such as Apache-2.0.")
    flags.DEFINE_string("data.data_dir", "", "Where prepared data is, if not as recorded.")
    runtime.define_flags()


def main() -> int:
    """Exports, checks, and writes the file and its model card."""
    if not FLAGS.workdir:
        raise UserError("--workdir is missing: give the directory of a run")
    if FLAGS.format not in SUFFIXES:
        raise UserError(f"--format={FLAGS.format}: use {', '.join(SUFFIXES)}")
    output = _output()
    config = read_config(FLAGS.workdir)
    _require_extra(FLAGS.format)
    runtime.start(config.evaluate.batch_size, float64=config.dtype == "float64")
    found, network = _gathered(), "network's"
    if FLAGS.format != "safetensors":
        found = in_float32(found)
        if config.dtype != "float32":
            network = f"network's in float32 (it was trained in {config.dtype})"
    try:
        content = {"onnx": to_onnx, "stablehlo": to_stablehlo, "safetensors": weights.encode}[
            FLAGS.format
        ](found)
        difference = check(found, content, FLAGS.format)
    except ExportError as error:
        log.error("ferjax: %s: nothing was written", error)
        return configs.EXIT_FAILED
    if jax.process_index():
        return configs.EXIT_OK
    card = output.with_suffix(".md")
    if card.exists() and not card.read_text().startswith(model_card.TITLE):
        raise UserError(f"{card} is no model card of ours: give another --output")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        configs.write_whole(output, content)
        configs.write_whole(card, model_card.text(found).encode())
    except write_errors(output) as error:
        raise UserError(f"{output} can't be written: {error}") from None
    log.info(
        "written to %s (%.2f MB) and %s; on %d faces the labels are the %s, the probabilities "
        "differ by at most %.1e",
        *(output, len(content) / 1e6, card, CHECKED, network, difference),
    )
    return configs.EXIT_OK


def in_float32(source: Weights) -> Weights:
    """The same network, whose arrays and activations are float32."""
    return dataclasses.replace(
        source,
        config=configs.finalize({**source.config.to_dict(), "dtype": "float32"}),
        variables=jax.tree.map(lambda x: np.asarray(x, np.float32), source.variables),
    )


def classifier(source: Weights) -> Classify:
    """uint8 faces [N, H, W, C] of the training images' size -> probabilities, logits [N, classes].

    Raises:
      UserError: the run corrected its images with OpenCV, outside the network.
    """
    config = source.config
    if config.data.illumination not in ("none", "standardize"):
        raise UserError(
            f"config.data.illumination={config.data.illumination} is done by OpenCV, before the "
            "network: use --format=safetensors"
        )
    model: Any = build(config, len(source.classes))[1]
    view = build_view(config, policies.NONE)

    def classify(images: Any) -> tuple[jax.Array, jax.Array]:
        logits = model.apply(source.variables, view(images, None))
        return jax.nn.softmax(logits), logits

    return classify


def to_onnx(source: Weights) -> bytes:
    """An ONNX model; the input `images`, the outputs `probabilities` and `logits`.

    Its metadata have `labels` (a JSON list), `name`, `step` and `ferjax` (versions).
    """
    import jax2onnx

    logging.getLogger("onnx_ir").setLevel(logging.ERROR)  # it warns of each shape it infers
    with _plain_operations():
        model: Any = jax2onnx.to_onnx(
            classifier(source),
            inputs=[jax.ShapeDtypeStruct(("N", *source.image_shape), np.uint8)],
            model_name="ferjax",
            opset=OPSET,
            input_names=["images"],
            output_names=["probabilities", "logits"],
        )
    for key, value in _metadata(source).items():
        model.metadata_props.add(key=key, value=value)
    return model.SerializeToString()


def to_stablehlo(source: Weights) -> bytes:
    """What `jax.export.deserialize` reads: its `call(images)` gives probabilities and logits."""
    scope = jax.export.SymbolicScope()
    (n,) = jax.export.symbolic_shape("n", scope=scope)
    images = jax.ShapeDtypeStruct((n, *source.image_shape), np.uint8)
    with jax.default_matmul_precision("highest"):
        exported = jax.export.export(jax.jit(classifier(source)), platforms=PLATFORMS)(images)
    return bytes(exported.serialize())


@jax.default_matmul_precision("highest")  # a GPU's or TPU's own product of float32 rounds to less
def check(source: Weights, content: bytes, kind: str) -> float:
    """Reads a file's content back and compares it with the network.

    Returns:
      The largest difference of a probability on `CHECKED` faces, in batches of two sizes.

    Raises:
      ExportError: another label, or a difference above `TOLERANCE`.
    """
    images = _faces(source.image_shape)
    expected = scores.softmax(build_trained(source).logits(images))
    run_file = {"onnx": _run_onnx, "stablehlo": _run_stablehlo, "safetensors": _run_safetensors}
    function = run_file[kind](content)
    found = np.concatenate([function(images[:1]), function(images[1:])])
    worst = float(np.abs(found - expected).max())
    other = int((found.argmax(-1) != expected.argmax(-1)).sum())
    if other or not worst <= TOLERANCE:
        raise ExportError(
            f"the {kind} file gives {other} of {CHECKED} faces another label, and probabilities "
            f"that differ by up to {worst:.1e}"
        )
    return worst


@contextlib.contextmanager
def _plain_operations() -> Iterator[None]:
    """While a network is traced for ONNX: only operations that every runtime has.

    jax2onnx knows no choice by platform: a convolution of one channel becomes the plain one, and a
    change of size the matrix product that a TPU gets. It writes a pool over [N, H, W, C] as one
    over four spatial axes, which ONNX Runtime refuses: shifted slices compute the same.
    """

    def chosen(*args: Any, default: Any = None, **by_platform: Any) -> Any:
        return by_platform.get("tpu", default)(*args)

    def pool(x: jax.Array, start: Any, op: Any, window: Any, strides: Any, pads: Any) -> jax.Array:
        if isinstance(pads, str):
            pads = jax.lax.padtype_to_pads(x.shape[1:3], window[1:3], strides[1:3], pads)
            pads = ((0, 0), *pads, (0, 0))
        x = jnp.pad(x, pads, constant_values=start)
        ends = [x.shape[axis] - window[axis] + 1 for axis in (1, 2)]
        shifted = [
            x[:, i : i + ends[0] : strides[1], j : j + ends[1] : strides[2]]
            for i in range(window[1])
            for j in range(window[2])
        ]
        return reduce(op, shifted)

    lax: Any = jax.lax
    before = lax.platform_dependent, lax.reduce_window
    lax.platform_dependent, lax.reduce_window = chosen, pool
    try:
        yield
    finally:
        lax.platform_dependent, lax.reduce_window = before


def _run_onnx(content: bytes) -> Callable[[np.ndarray], np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"])
        one = np.zeros([1, *session.get_inputs()[0].shape[1:]], np.uint8)
        session.run(["probabilities"], {"images": one})
    except Exception as error:  # ONNX Runtime's own types share no base class
        why = " ".join(str(error).split())[:200]
        raise ExportError(f"ONNX Runtime refuses the file ({why})") from None
    return lambda images: session.run(["probabilities"], {"images": images})[0]


def _run_stablehlo(content: bytes) -> Callable[[np.ndarray], np.ndarray]:
    exported = jax.export.deserialize(bytearray(content))
    return lambda images: np.asarray(exported.call(images)[0])


def _run_safetensors(content: bytes) -> Callable[[np.ndarray], np.ndarray]:
    trained = build_trained(weights.decode(content, "the file"))
    return lambda images: scores.softmax(trained.logits(images))


def _require_extra(kind: str) -> None:
    for name in NEEDED.get(kind, ()):
        if find_spec(name) is None:
            raise UserError(f"--format={kind} needs {name}: pip install '.[export]'")


def _gathered() -> Weights:
    """The weights with the facts for their card."""
    found = read_weights(
        FLAGS.workdir,
        checkpoint=FLAGS.checkpoint,
        weights=FLAGS.weights,
        data_dir=FLAGS["data.data_dir"].value or "",
    )
    facts = found.facts or model_card.gather(
        workdir_path(FLAGS.workdir), found, checkpoint=FLAGS.checkpoint, kind=FLAGS.weights
    )
    if FLAGS.licence:
        facts = {**facts, "licence": FLAGS.licence}
    return dataclasses.replace(found, facts=facts)


def _output() -> epath.Path:
    suffix = SUFFIXES[FLAGS.format]
    if FLAGS.output:
        output = epath.Path(os.path.expanduser(FLAGS.output))
        if output.suffix != suffix:
            raise UserError(f"--output={FLAGS.output}: the name must end with {suffix}")
        return output
    if weights.is_file(FLAGS.workdir):
        return epath.Path(f"{epath.Path(FLAGS.workdir).stem}{suffix}")
    return workdir_path(FLAGS.workdir) / f"model{suffix}"


def _metadata(source: Weights) -> dict[str, str]:
    return {
        "labels": json.dumps(source.classes),
        "name": source.config.name,
        "step": str(source.step),
        "input": "uint8 faces [N, H, W, C], 0 to 255; normalised inside",
        "ferjax": configs.code_version(),
        "facts": json.dumps(source.facts),
    }


def _faces(shape: tuple[int, int, int]) -> np.ndarray:
    """uint8 [CHECKED, H, W, C]: drawn faces, noise, black and white."""
    height, width, channels = shape
    drawn = [cv2.resize(make_face(row).pixels, (width, height)) for row in range(CHECKED - 12)]
    noise = np.random.default_rng(0).integers(0, 256, (10, height, width), np.uint8)
    plain = np.stack([np.full((height, width), level, np.uint8) for level in (0, 255)])
    grey = np.concatenate([np.stack(drawn), noise, plain])
    return np.repeat(grey[..., None], channels, -1)


if __name__ == "__main__":
    define_flags()
    run(main)
