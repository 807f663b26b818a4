"""`ferjax.load`, `predict` and the command, on a tiny trained run and on real files."""

import csv
import json
import os
import subprocess
import sys
import types

import cv2
import jax
import numpy as np
import pytest
from PIL import Image
from test_end_to_end import ROOT, SMALL, environment, ferjax

import ferjax as package
from ferjax import predict as command
from ferjax import predict_sources as sources
from ferjax.annotate import annotate
from ferjax.augment import policies
from ferjax.config import UserError
from ferjax.data import arrays
from ferjax.data.faces import SEARCH_SIDE
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


def test_training_left_curves_and_pictures_for_tensorboard(trained):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    pytest.importorskip("tensorflow")
    events = reader.EventAccumulator(str(trained / "events"))
    events.Reload()
    tags = set(events.Tags()["tensors"])
    assert {"train/loss", "eval/ema_accuracy", "eval/confusion", "eval/faces"} <= tags
    (faces,) = events.Tensors("eval/faces")
    shown = cv2.imdecode(np.frombuffer(faces.tensor_proto.string_val[2], np.uint8), 1)
    assert shown.shape == (450, 720, 3)


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


def test_predict_is_what_evaluation_says(model, trained, data_dir):
    split = arrays.load("synthetic_faces/tiny", splits=("public_test",)).splits["public_test"]
    faces = split.images
    rows = map(json.loads, (trained / "metrics.jsonl").read_text().splitlines())
    (row,) = [row for row in rows if row["kind"] == "eval"]
    right = np.array(model.predict(faces).labels) == np.array(model.classes)[split.labels]
    assert right.mean() == pytest.approx(row["ema_accuracy"], abs=1e-6)
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
        (np.zeros((2, 2, 2, 2, 1), np.uint8), "give one image, grey or RGB"),
        (np.zeros((9, 9, 4), np.uint8), "RGB without transparency, a list"),
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
    out, drawn = folder / "found.json", folder.parent / "drawn"
    done = ferjax(
        "predict",
        *(f"--workdir={trained}", "--no-detect", f"--output={out}", f"--annotate={drawn}"),
        *(str(folder), str(folder / "nowhere.png"), str(folder / "notes.txt")),
    )
    assert done.returncode == 0, done.stderr
    rows = {row["image"].removeprefix(f"{folder}/"): row for row in json.loads(out.read_text())}
    assert set(rows) == {
        *("a.png", "below/b.jpg", "one.png", "broken.png", "empty.jpg", "nowhere.png", "notes.txt")
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
    assert "OpenCV" in rows["notes.txt"]["error"]
    assert rows["nowhere.png"]["error"] == "No such file or directory"
    assert got["label"] in done.stdout
    assert "whole picture" in done.stdout
    copies = {path.stem: Image.open(path) for path in drawn.iterdir()}
    assert len(copies) == 3  # of what could be read
    assert all(min(copy.size) >= 360 for copy in copies.values())


def test_an_exported_run_predicts_what_the_run_does(trained, model, faces):
    """The command, with its defaults: the best EMA weights, into the run's directory."""
    done = ferjax("export", f"--workdir={trained}", "--format=safetensors")
    assert done.returncode == 0, done.stderr
    path = trained / "model.safetensors"
    assert f"written to {path}" in done.stdout
    assert "the probabilities differ by at most" in " ".join(done.stdout.split())
    exported = package.load(path)
    assert exported.classes == model.classes
    np.testing.assert_allclose(exported.logits(faces), model.logits(faces), atol=1e-5)
    assert path.with_suffix(".md").read_text().startswith("# ")


class Cascade:
    """Finds two faces in what is 800 pixels wide."""

    def detectMultiScale(self, grey, **_):
        assert max(grey.shape) == SEARCH_SIDE
        return np.array([[10, 20, 30, 30], [100, 50, 60, 60]], np.int32)


def constant(*classes):
    """A network that says the first class of everything, and what it was shown."""
    seen = []
    logits = np.eye(len(classes))[:1]
    return seen, Trained(
        *(None, 0, classes, (48, 48, 1)),
        lambda x: seen.append(x) or np.repeat(logits, len(x), 0),
    )


def predict(model, *names, **options):
    return command.predict(model, sources.find([str(name) for name in names]), **options)


def test_faces_are_found_largest_first(monkeypatch, tmp_path):
    """The boxes are scaled back to the picture, and cut from it."""
    picture = np.zeros((400, 1600, 3), np.uint8)
    picture[100:220, 200:320] = 255
    boxes = command.faces(picture, Cascade())
    assert boxes == [[200, 100, 120, 120], [20, 40, 60, 60]]
    cv2.imwrite(str(tmp_path / "x.png"), picture)
    monkeypatch.setattr(command, "make_cascade", Cascade)
    seen, model = constant("a", "b")
    rows = predict(model, tmp_path / "x.png", detect="all")
    assert [row["box"] for row in rows] == boxes
    assert seen[0][0].min() == 255
    assert seen[0][1].max() == 0
    assert len(predict(model, tmp_path / "x.png", detect="largest")) == 1


def test_what_shows_no_face_says_so(tmp_path):
    """Plain, tiny, very long, and too large pictures, with the real cascade."""
    Image.new("RGB", (200, 200), (90, 90, 90)).save(tmp_path / "a.png")
    Image.new("RGB", (1, 1)).save(tmp_path / "b.png")
    Image.new("L", (20000, 1)).save(tmp_path / "c.png")
    _, model = constant("a")
    rows = predict(model, tmp_path, tmp_path / "nowhere.png", tmp_path / "*.gif")
    said = [row["error"] for row in rows]
    assert said[:3] == [command.NO_FACE] * 3
    assert said[3:] == ["No such file or directory", "matches no file"]


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="Linux tells the most memory")
def test_a_decompression_bomb_takes_no_memory(tmp_path):
    """20,000 x 20,000 pixels in 50 kB would be 1.2 GB."""
    Image.new("1", (20000, 20000)).save(tmp_path / "bomb.png")
    Image.new("1", (12000, 12000)).save(tmp_path / "smaller.png")
    code = f"""
from ferjax.data import pictures
def most():  # memory ever held; ru_maxrss would begin with the parent's
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
before = most()
for name in ("bomb", "smaller"):
    print(pictures.read("{tmp_path}/" + name + ".png"))
print(most() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    *said, kilobytes = done.stdout.splitlines()
    assert said == ["more than 134 megapixels: shrink it first"] * 2, done.stderr
    assert int(kilobytes) < 50_000


@pytest.fixture
def clip(tmp_path):
    """25 frames at 10 a second, the first ten dark."""
    path = tmp_path / "clip.mp4"
    video = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 10, (1600, 400))
    for place in range(25):
        video.write(np.full((400, 1600, 3), 0 if place < 10 else 200, np.uint8))
    video.release()
    return path


def test_a_video_has_a_row_for_each_face_with_its_time(monkeypatch, clip, tmp_path):
    class Bright(Cascade):
        def detectMultiScale(self, grey, **options):
            found = super().detectMultiScale(grey, **options)
            return found if grey.mean() > 100 else ()

    monkeypatch.setattr(command, "make_cascade", Bright)
    _, model = constant("a", "b")
    rows = predict(model, clip, detect="all", every=4, folder=tmp_path)
    where = [(row["frame"], row["time"]) for row in rows]
    assert where == [(n, pytest.approx(n / 10)) for n in (12, 16, 20, 24) for _ in range(2)]
    drawn = sorted(path.name for path in tmp_path.glob("*_faces.jpg"))
    assert drawn == [f"clip_{n:06d}_faces.jpg" for n in range(0, 25, 4)]
    command.write(rows, tmp_path / "x.csv", model.classes)
    with (tmp_path / "x.csv").open(newline="") as file:
        assert next(csv.DictReader(file))["time"] == "1.2"
    rows = predict(model, clip, detect="largest", every=100)
    assert rows == [{"image": str(clip), "error": command.NO_FACE}]
    (tmp_path / "broken.avi").write_bytes(b"no video")
    (row,) = predict(model, tmp_path / "broken.avi")
    assert "not a video" in row["error"]
    os.mkfifo(tmp_path / "pipe.mp4")  # nobody will write into it
    (row,) = predict(model, tmp_path / "pipe.mp4")
    assert row["error"] == "not a file"
    (tmp_path / "folder").mkdir()
    for name in ("clip.mp4", "._clip.mp4"):  # the second is what macOS leaves behind
        (tmp_path / "folder" / name).write_bytes(clip.read_bytes())
    (found,) = sources.find([str(tmp_path / "folder")])
    assert found == (str(tmp_path / "folder" / "clip.mp4"), "")


def test_a_video_without_a_readable_frame_has_a_row(monkeypatch, clip):
    class Blind:
        def __init__(self, *_):
            self.left = 3

        def grab(self):
            self.left -= 1
            return self.left >= 0

        retrieve = staticmethod(lambda: (False, None))
        get = staticmethod(lambda _: 0)
        release = staticmethod(lambda: None)

    monkeypatch.setattr(sources.cv2, "VideoCapture", Blind)
    _, model = constant("a")
    (row,) = predict(model, clip)
    assert "not a video" in row["error"]


def test_drawings_are_readable_and_leave_the_faces_visible():
    face = {"box": [300, 200, 400, 400], "label": "happy", "confidence": 0.5}
    picture = np.full((3000, 4000, 3), 120, np.uint8)
    drawn = np.asarray(annotate(picture, [face, {**face, "box": [1200, 200, 300, 300]}]))
    assert drawn.shape == (1800, 2400, 3), "large ones are reduced"
    inside = drawn[135:350, 195:410]
    assert (inside == 120).all()
    label = drawn[70:115, 180:420]
    assert label.min() < 30
    assert label.max() > 240
    small = np.asarray(annotate(picture[:48, :48], [{**face, "box": None}]))
    assert small.shape[1] == 360, "small ones are enlarged"
    assert (small[:360] == 120).all()
    assert small[360:].max() > 240
    at_the_edge = annotate(picture[:60, :400], [{**face, "box": [0, 0, 60, 60]}])
    assert np.asarray(at_the_edge).max() > 240


def test_pictures_of_one_name_are_all_drawn(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (60, 60)).save(tmp_path / name / "x.png")
    (tmp_path / "out").mkdir()
    _, model = constant("a", "b")
    predict(model, tmp_path, detect="none", folder=tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"x_faces.jpg", "x_faces_2.jpg"}


@pytest.mark.parametrize("flag", ["--workdir", "--detect"])
def test_values_may_follow_their_flags_and_pictures_need_none(flag):
    known = dict.fromkeys(("workdir", "detect"), types.SimpleNamespace(boolean=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "FLAGS", known)
        named = command._named([flag, "x", "a.jpg", "--no-detect", "b.jpg", f"{flag}=y"])
    assert named == [flag, "x", "--image=a.jpg", "--detect=none", "--image=b.jpg", f"{flag}=y"]


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


def test_a_name_of_bytes_that_are_no_text_is_written(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    row = {"image": name, "box": None, "label": "x", "confidence": 1.0, "probabilities": {"x": 1.0}}
    for suffix in (".csv", ".json", ".jsonl"):
        command.write([row], tmp_path / f"out{suffix}", ("x",))
    assert b"caf\xe9.png" in (tmp_path / "out.csv").read_bytes()
    assert json.loads((tmp_path / "out.json").read_text())[0]["image"] == name


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["x.png", "--workdir=nowhere"], "nowhere/config.json is not there"),
        (["--workdir={run}"], "no picture is given"),
        (["{tmp}", "{tmp}/*.png"], "none of the pictures gave a prediction; {tmp}: holds no pict"),
        (["x.png", "--annotate=nowhere/below"], "nowhere is not there"),
        (["x_faces.jpg", "--annotate=."], "--annotate=.: x_faces.jpg may be drawn over"),
        (["x.png", "--annotate=."], "none of the pictures gave a prediction"),
        (["--workdir={run}", "x.png", "--output=x.xls"], "must end with .json, .jsonl, .csv"),
        (["--workdir={run}", "x.png", "--detect=some"], "use largest, all, none"),
    ],
)
def test_what_is_wrong_gets_one_line(args, message, trained, tmp_path):
    done = ferjax("predict", *(a.format(run=trained, tmp=tmp_path) for a in args))
    assert done.returncode == 2
    assert message.format(tmp=tmp_path) in done.stderr
    assert "Traceback" not in done.stderr
