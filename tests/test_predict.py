"""`ferjax.load`, `predict` and the command, on a tiny trained run and on real files."""

import csv
import json
import subprocess
import sys

import cv2
import jax
import numpy as np
import pytest
from PIL import Image
from test_end_to_end import ROOT, SMALL, environment, ferjax

import ferjax as package
from ferjax import predict as command
from ferjax.augment import policies
from ferjax.config import UserError
from ferjax.data import arrays
from ferjax.engine import checkpoint
from ferjax.engine.state import build, build_view
from ferjax.load import Trained, fit


@pytest.fixture(scope="module")
def trained(data_dir, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("predicting") / "run"
    done = ferjax("main", *SMALL, "--config.epochs=1", f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    return workdir


@pytest.fixture(scope="module")
def model(trained):
    return package.load(trained)


@pytest.fixture(scope="module")
def faces(data_dir):
    return arrays.load("synthetic_faces/tiny", splits=("public_test",)).splits["public_test"].images


def test_importing_ferjax_is_cheap_and_load_is_called_either_way(tmp_path):
    code = """
import sys
import ferjax
assert not {"jax", "numpy", "cv2"} & set(sys.modules), "the import is heavy"
assert "load" in ferjax.__all__
try:
    ferjax.load("nowhere")
except Exception as error:
    print(type(error).__name__, error)
import ferjax.load
assert callable(ferjax.load)
assert ferjax.load is sys.modules["ferjax.load"]
from ferjax.load import load
try:
    ferjax.lod
except AttributeError as error:
    print(error)
import jax._src.xla_bridge as bridge
assert not bridge._backends, "a backend was started"
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    assert "UserError nowhere/config.json is not there" in done.stdout
    assert "has no attribute 'lod'" in done.stdout


def test_one_or_many_grey_or_colour_are_the_same_prediction(model, faces):
    one = faces[0, ..., 0]
    expected = model.predict(faces[:1])
    assert expected.probabilities.shape == (1, 7)
    assert expected.probabilities.sum() == pytest.approx(1)
    assert expected.classes == model.classes
    assert expected.labels == [model.classes[expected.probabilities[0].argmax()]]
    colour = np.repeat(one[..., None], 3, -1)
    forms = [one, one[..., None], colour, one / 255.0, (one / np.float32(255)), [one], one[None]]
    for form in [*forms, colour[None], [colour]]:
        got = model.predict(form)
        np.testing.assert_allclose(got.probabilities, expected.probabilities, atol=1e-6)
    many = model.predict(faces[:20])
    assert many.probabilities.shape == (20, 7)
    assert len(many.labels) == 20
    np.testing.assert_allclose(many.probabilities[:1], expected.probabilities, atol=1e-5)
    empty = model.predict([])
    assert empty.probabilities.shape == (0, 7)
    assert empty.labels == []


def test_predict_is_what_evaluation_says(model, faces):
    logits = model.logits(faces)
    exp = np.exp(logits - logits.max(-1, keepdims=True))
    np.testing.assert_allclose(
        model.predict(faces).probabilities, exp / exp.sum(-1, keepdims=True), atol=1e-6
    )
    assert model.features(faces[:3]).shape == (3, 8)


def test_gradcam_of_an_averaged_map_is_the_weighted_map(model, trained, faces):
    """Before an average and a linear layer, Grad-CAM is CAM: relu(sum_k w_kc f_k) / (h w)."""
    tree, _ = checkpoint.read(checkpoint.choose(trained, "best"))
    variables = {k: tree["ema"][k] for k in ("params", "batch_stats")}
    network = build(model.config, 7)[1]
    view = build_view(model.config, policies.NONE)
    x = view(faces[:5], jax.random.split(jax.random.key(0), 5))
    maps = np.asarray(network.apply(variables, x, method="features"), float)
    kernel = np.asarray(tree["ema"]["params"]["classifier"]["kernel"], float)
    likeliest = model.predict(faces[:5]).probabilities.argmax(-1)
    cam = np.einsum("nhwk,kn->nhw", maps, kernel[:, likeliest])
    cam = np.maximum(cam, 0) / np.prod(maps.shape[1:3])
    np.testing.assert_allclose(model.gradcam(faces[:5]), cam, atol=1e-5)
    assert cam.max() > 1e-3


def test_fit_against_pillow():
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (96, 144, 3), np.uint8)
    middle = Image.fromarray(picture[:, 24:120])
    grey = np.asarray(middle.convert("L"), float)
    expected = grey.reshape(48, 2, 48, 2).mean((1, 3))
    got = fit(picture, (48, 48, 1))
    assert got.shape == (48, 48, 1)
    assert got.dtype == np.uint8
    assert np.abs(got[..., 0] - expected).max() <= 1.5
    assert (fit(np.full((1, 1), 200, np.uint8), (48, 48, 1)) == 200).all()
    colour = fit(picture[..., :1], (48, 48, 3))
    assert (colour[..., 0] == colour[..., 2]).all()


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((4, 4), int), "type int64: give uint8"),
        (np.full((4, 4), 1.5), "floats from 1.5 to 1.5"),
        (np.full((4, 4), np.nan), "floats from nan to nan"),
        (np.zeros((4, 4, 4, 2), np.uint8), r"shape \(4, 4, 2\)"),
        (np.zeros((2, 2, 2, 2, 1), np.uint8), "give one image, a list"),
        ([np.zeros((4, 4), np.uint8), np.zeros((0, 4), np.uint8)], "image 1: shape"),
    ],
)
def test_wrong_images_are_refused(images, message):
    model = Trained(None, 0, ("a", "b"), (48, 48, 1), lambda x: np.zeros((len(x), 2)))
    with pytest.raises(UserError, match=message):
        model.predict(images)


@pytest.fixture
def folder(tmp_path, faces):
    pictures = tmp_path / "pictures"
    (pictures / "below").mkdir(parents=True)
    for name, image in (("a.png", faces[0]), ("below/b.jpg", faces[1])):
        Image.fromarray(image[..., 0]).save(pictures / name)
    Image.new("RGB", (1, 1)).save(pictures / "one.png")
    (pictures / "broken.png").write_bytes(b"\x89PNG not really")
    (pictures / "empty.jpg").write_bytes(b"")
    (pictures / "notes.txt").write_text("no picture")
    return pictures


def test_the_command_goes_on_after_bad_files(trained, model, folder, faces):
    out = folder / "found.json"
    done = ferjax(
        "predict",
        *(f"--workdir={trained}", "--detect=none", f"--output={out}"),
        *(str(folder), str(folder / "nowhere.png")),
    )
    assert done.returncode == 0, done.stderr
    rows = {row["image"].removeprefix(f"{folder}/"): row for row in json.loads(out.read_text())}
    assert set(rows) == {
        *("a.png", "below/b.jpg", "one.png", "broken.png", "empty.jpg", "nowhere.png")
    }
    expected = model.predict(faces[0])
    got = rows["a.png"]
    assert got["label"] == expected.labels[0]
    assert list(got["probabilities"]) == list(model.classes)
    np.testing.assert_allclose(
        list(got["probabilities"].values()), expected.probabilities[0], atol=1e-5
    )
    assert "OpenCV" in rows["broken.png"]["error"]
    assert "OpenCV" in rows["empty.jpg"]["error"]
    assert rows["nowhere.png"]["error"] == "No such file or directory"
    assert got["label"] in done.stdout
    assert "whole picture" in done.stdout


def test_faces_are_found_largest_first(monkeypatch):
    """The boxes are scaled back to the picture, and cut from it."""

    class Cascade:
        def detectMultiScale(self, grey, **_):
            assert max(grey.shape) == command.SEARCH_SIDE
            return np.array([[10, 20, 30, 30], [100, 50, 60, 60]], np.int32)

    boxes = command.faces(np.zeros((400, 1600, 3), np.uint8), Cascade())
    assert boxes == [[200, 100, 120, 120], [20, 40, 60, 60]]
    seen = []
    model = Trained(
        None, 0, ("a", "b"), (48, 48, 1), lambda x: seen.append(x) or np.zeros((len(x), 2))
    )
    picture = np.zeros((400, 1600, 3), np.uint8)
    picture[100:220, 200:320] = 255
    monkeypatch.setattr(command, "_read", lambda path: picture)
    monkeypatch.setattr(cv2, "CascadeClassifier", lambda path: Cascade())
    rows = command.predict(model, ["x"], "all")
    assert [row["box"] for row in rows] == boxes
    assert seen[0][0].min() == 255
    assert seen[0][1].max() == 0
    assert len(command.predict(model, ["x"], "largest")) == 1


def test_a_picture_without_a_face_says_so():
    model = Trained(None, 0, ("a",), (48, 48, 1), lambda x: np.zeros((len(x), 1)))
    plain = str(ROOT / "tests" / "nowhere.png")
    rows = command.predict(model, [plain])
    assert rows == [{"image": plain, "error": "No such file or directory"}]


def test_the_cascade_finds_nothing_in_a_plain_picture(tmp_path):
    Image.new("RGB", (200, 200), (90, 90, 90)).save(tmp_path / "grey.png")
    model = Trained(None, 0, ("a",), (48, 48, 1), lambda x: np.zeros((len(x), 1)))
    (row,) = command.predict(model, [str(tmp_path / "grey.png")])
    assert "no face found" in row["error"]
    assert "--detect=none" in row["error"]


def test_written_forms_agree(tmp_path):
    good = {"image": "a", "box": [1, 2, 3, 4], "label": "x", "confidence": 0.75}
    rows = [{**good, "probabilities": {"x": 0.75, "y": 0.25}}, {"image": "b", "error": "why"}]
    for suffix in (".json", ".jsonl", ".csv"):
        command.write(rows, tmp_path / f"out{suffix}", ("x", "y"))
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert [json.loads(x) for x in lines] == json.loads((tmp_path / "out.json").read_text()) == rows
    with (tmp_path / "out.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["x"], first["y"], first["box_width"], first["confidence"]) == (
        "0.75",
        "0.25",
        "3",
        "0.75",
    )
    assert (second["image"], second["label"], second["error"]) == ("b", "", "why")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["x.png"], "--workdir is missing"),
        (["--workdir={run}"], "no picture is given"),
        (["--workdir={run}", "{tmp}"], "holds no picture"),
        (["--workdir={run}", "{tmp}/*.png"], "matches no file"),
        (["--workdir={run}", "x.png", "--output=x.xls"], "must end with .json, .jsonl, .csv"),
        (["--workdir={run}", "x.png", "--detect=some"], "use largest, all, none"),
    ],
)
def test_what_is_wrong_gets_one_line(args, message, trained, tmp_path):
    done = ferjax("predict", *(a.format(run=trained, tmp=tmp_path) for a in args))
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
