"""`ferjax.evaluate` beyond one run's plain score: ensembles, views, temperatures, comparisons."""

import json
import shutil

import cv2
import numpy as np
import pytest
import scipy.special
import scipy.stats
from test_end_to_end import SMALL, ferjax

from ferjax.algorithms import self_training
from ferjax.algorithms.base import TrainingSet
from ferjax.analysis import probes
from ferjax.augment import corruptions, tta
from ferjax.config import UserError
from ferjax.data import arrays, soft_labels
from ferjax.evaluate_sections import clean_line, clean_score
from ferjax.load import load


@pytest.fixture(scope="module")
def runs(data_dir, tmp_path_factory):
    """Two runs of one epoch that differ in their seed."""
    workdirs = []
    for seed in (0, 1):
        workdirs.append(tmp_path_factory.mktemp("evaluated") / f"run{seed}")
        args = ["--config.epochs=1", f"--config.seed={seed}", f"--workdir={workdirs[-1]}"]
        done = ferjax("main", *SMALL, *args)
        assert done.returncode == 0, done.stderr
    return workdirs


@pytest.fixture(scope="module")
def split(data_dir):
    return arrays.load("synthetic_faces/tiny", splits=("public_test",)).splits["public_test"]


def probabilities(workdir, images):
    return scipy.special.softmax(load(workdir).logits(images).astype(float), -1)


def scored(workdir, name):
    return json.loads((workdir / "eval" / f"{name}.json").read_text())


def test_an_ensemble_over_views_against_another_run(runs, split):
    """One command with everything; each figure made again with SciPy."""
    first, second = runs
    args = [f"--workdir={first},{second}", "--tta=flip", "--calibrate", f"--against={second}"]
    done = ferjax("evaluate", *args)
    assert done.returncode == 0, done.stderr
    found = scored(first, "public_test_flip_ensemble")
    both = (split.images, split.images[:, :, ::-1])
    p = np.mean([probabilities(run, x) for run in runs for x in both], 0)
    other = np.mean([probabilities(second, x) for x in both], 0)
    right, other_right = (q.argmax(-1) == split.labels for q in (p, other))
    own = p[np.arange(70), split.labels]
    assert found["accuracy"] == pytest.approx(right.mean())
    assert found["nll"] == pytest.approx(-np.log(own).mean(), rel=1e-4)
    errors = np.square(p - np.eye(7)[split.labels]).sum(-1)
    assert found["brier"] == pytest.approx(errors.mean(), rel=1e-4)
    assert found["workdirs"] == [str(first), str(second)]
    alone = [np.mean([probabilities(run, x) for x in both], 0) for run in runs]
    shares = [(q.argmax(-1) == split.labels).mean() for q in alone]
    assert [x["accuracy"] for x in found["ensemble"]["members"]] == pytest.approx(shares)
    assert found["ensemble"]["gain"] == pytest.approx(right.mean() - np.mean(shares))

    against = found["against"]
    assert against["accuracy"] == pytest.approx(other_right.mean())
    assert against["difference"] == pytest.approx(right.mean() - other_right.mean())
    b, c = int((right & ~other_right).sum()), int((other_right & ~right).sum())
    assert (against["only_first"], against["only_second"]) == (b, c)
    wanted = scipy.stats.binomtest(b, b + c).pvalue if b + c else 1.0
    assert against["mcnemar_p"] == pytest.approx(wanted)

    fitted = found["calibration"]

    def nll(temperature):
        log_p = scipy.special.log_softmax(np.log(p) / temperature, -1)
        return -log_p[np.arange(70), split.labels].mean()

    assert nll(fitted["temperature"]) <= min(map(nll, np.geomspace(0.01, 100, 300))) + 1e-6
    assert fitted["before"]["nll"] == pytest.approx(found["nll"])
    assert fitted["cross_fitted"]
    for text in ("Brier score", "temperature", "McNemar's exact p", "paired bootstrap"):
        assert text in done.stdout


def test_an_ensemble_is_a_teacher(runs, data_dir):
    """Self-training reads what the command wrote, and what it wrote is the members' mean."""
    args = [f"--workdir={runs[0]},{runs[1]}", "--split=train", "--keep_predictions"]
    done = ferjax("evaluate", *args)
    assert done.returncode == 0, done.stderr
    path = runs[0] / "eval" / "train_ensemble_predictions.npz"
    assert f"probabilities of each image: {path}" in done.stdout
    data = arrays.load("synthetic_faces/tiny", splits=("train",))
    train = data.splits["train"]
    p = np.mean([probabilities(run, train.images) for run in runs], 0)
    teacher = soft_labels.read(path)
    np.testing.assert_array_equal(teacher.rows, train.rows)
    np.testing.assert_allclose(teacher.probabilities, p, atol=1e-5)
    labeled = json.loads((runs[0] / "split.json").read_text())["labeled_rows"]
    assert teacher.labeled_rows.tolist() == labeled  # both have learnt from these

    chosen = np.arange(0, len(train.rows), 3)
    student = TrainingSet(
        train.rows[chosen], np.arange(5), np.arange(9), data.class_names, data.digest
    )
    method = self_training.Algorithm(predictions=str(path))
    extra = {"targets": np.zeros((len(chosen), 7), np.float32)}
    found = method.read_extra(extra, student)["targets"]
    np.testing.assert_array_equal(found, teacher.probabilities[chosen])


def test_private_test_with_the_temperature_of_public_test(runs):
    first, second = runs
    plain = ferjax("evaluate", f"--workdir={first}", "--calibrate")
    assert plain.returncode == 0, plain.stderr
    args = [f"--workdir={first}", "--split=private_test", "--calibrate", f"--against={second}"]
    args += ["--probes", "--corruptions"]
    done = ferjax("evaluate", *args)
    assert done.returncode == 0, done.stderr
    public, private = (scored(first, name) for name in ("public_test", "private_test"))
    temperature = public["calibration"]["temperature"]
    assert private["calibration"]["temperature"] == pytest.approx(temperature, rel=1e-5)
    assert not private["calibration"]["cross_fitted"]
    # Both runs' looks at private_test are noted.
    for run, accuracy in zip(
        runs, (private["accuracy"], private["against"]["accuracy"]), strict=True
    ):
        lines = (run / "eval" / "private_test_readings.jsonl").read_text().splitlines()
        assert [json.loads(x)["accuracy"] for x in lines] == [accuracy]
        analyses = json.loads(lines[0])["analyses"]
        assert analyses == ["calibrate", "against", "corruptions", "probes"]
    data = arrays.load("synthetic_faces/tiny", splits=("train", "private_test")).splits
    train, test = (data[k].images.reshape(len(data[k].images), -1) for k in data)
    copies = sum(bool((train == row).all(-1).any()) for row in test)
    assert private["clean"]["images"] == private["images"] - copies
    assert "without exact copies of training images" in done.stdout

    # The features of the run's own labelled images, by the rules of `probes`.
    trained, split = load(first), data["private_test"]
    recorded = json.loads((first / "split.json").read_text())
    mine = np.isin(data["train"].rows, recorded["labeled_rows"])
    fitted, judged = (trained.features(x) for x in (data["train"].images[mine], split.images))
    found = probes.nearest_neighbours(fitted, data["train"].labels[mine], judged)
    assert private["probes"]["fitted_images"] == len(recorded["labeled_rows"]) == 28
    assert private["probes"]["knn"]["accuracy"] == pytest.approx(np.mean(found == split.labels))
    assert private["probes"]["network"]["accuracy"] == private["accuracy"]
    dark = corruptions.corrupt(split.images, "darkness", 0.25)
    row = private["corruptions"]["kinds"]["darkness"][1]
    wanted = probabilities(first, dark).argmax(-1) == split.labels
    assert (row["level"], row["accuracy"]) == (0.25, pytest.approx(wanted.mean()))
    assert "corruptions: accuracy in %" in done.stdout
    assert "the network itself" in done.stdout


def test_what_is_wrong_gets_one_line(runs):
    for args, message in (
        ([f"--workdir={runs[0]}", "--tta=rotate"], "use none, flip, ten_crop"),
        ([f"--workdir={runs[0]}", "--against=nowhere"], "a ferjax workdir"),
        (["--workdir=,"], "--workdir is missing"),
    ):
        done = ferjax("evaluate", *args)
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def test_the_score_without_copies():
    labels = np.array([0, 1, 0, 1])
    logits = np.eye(2)[[1, 1, 1, 0]]  # right on the second image alone
    found = clean_score(np.array([False, True, False, True]), labels, logits)
    assert (found["images"], found["accuracy"]) == (2, 0.5)
    low, high = scipy.stats.binomtest(1, 2).proportion_ci(method="wilson")
    assert found["accuracy_interval"] == pytest.approx([low, high], abs=1e-6)
    none = clean_score(np.zeros(4, bool), labels, logits)
    assert none["accuracy"] is None
    assert clean_line(none) == "each image has an exact copy in train"


def test_a_folder_by_all_checkpoints_of_a_run(runs, tmp_path):
    """The second run's weights are put beside the first one's, as another step of it."""
    first, second = runs
    run = tmp_path / "run"
    shutil.copytree(first, run, ignore=shutil.ignore_patterns("eval"))
    step = next((run / "checkpoints").iterdir()).name
    shutil.copytree(second / "checkpoints" / step, run / "checkpoints" / "7")
    split = arrays.load("synthetic_faces/tiny", splits=("public_test",))
    data, names = split.splits["public_test"], split.class_names
    for row, (image, label) in enumerate(zip(data.images, data.labels, strict=True)):
        path = tmp_path / "mine" / names[label].upper() / f"{row:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(path), image)
    (path.parent / "zzz.png").write_bytes(b"no picture")
    args = [f"--workdir={run}", "--checkpoint=all", f"--folder={tmp_path / 'mine'}"]
    done = ferjax("evaluate", *args)
    assert done.returncode == 0, done.stderr
    name = f"folder_{tmp_path.name}_mine_checkpoints"
    found = scored(run, name)
    both = [probabilities(each, data.images) for each in (second, first)]  # by step
    right = [(p.argmax(-1) == data.labels).mean() for p in (*both, np.mean(both, 0))]
    assert [x["accuracy"] for x in found["ensemble"]["members"]] == pytest.approx(right[:2])
    assert found["accuracy"] == pytest.approx(right[2])
    assert found["ensemble"]["gain"] == pytest.approx(right[2] - np.mean(right[:2]))
    assert found["images"] == 70
    assert [x["image"] for x in found["skipped"]] == [str(path.parent / "zzz.png")]
    assert "zzz.png: not a picture that OpenCV reads" in done.stdout
    assert [x.name for x in (run / "eval").iterdir()] == [f"{name}.json"]


def test_the_classes_are_known_without_the_data(runs, tmp_path):
    recorded = json.loads((runs[0] / "split.json").read_text())
    trained = load(runs[0], data_dir=str(tmp_path))
    assert trained.classes == tuple(recorded["class_names"])
    assert list(trained.image_shape) == recorded["image_shape"] == [48, 48, 1]
    # Runs of before these were written down ask the data set.
    old = tmp_path / "old"
    shutil.copytree(runs[0], old)
    for key in ("class_names", "image_shape"):
        del recorded[key]
    (old / "split.json").write_text(json.dumps(recorded))
    again = load(old)
    assert (again.classes, again.image_shape) == (trained.classes, trained.image_shape)


def test_the_versions_of_test_time_augmentation():
    images = np.arange(2 * 48 * 48, dtype=np.uint32).reshape(2, 48, 48, 1) % 251
    images = images.astype(np.uint8)
    assert len(tta.variants(images, "none")) == 1
    plain, mirrored = tta.variants(images, "flip")
    assert plain is images
    np.testing.assert_array_equal(mirrored[0, :, ::-1], images[0])
    # A ramp from left to right stays one in each crop: its ends say where the crop lies.
    ramp = np.broadcast_to(np.arange(48, dtype=np.uint8)[:, None], (1, 48, 48, 1)).copy()
    ten = tta.variants(ramp, "ten_crop")
    assert len(ten) == 10
    assert all(x.shape == ramp.shape and x.dtype == np.uint8 for x in ten)
    ends = [(int(x[0, 0, 0, 0]), int(x[0, 0, -1, 0])) for x in ten]
    assert ends[:5] == [(0, 39), (8, 47), (0, 39), (8, 47), (4, 43)]
    assert ends[5:] == [(b, a) for a, b in ends[:5]]
    upright = tta.variants(ramp.transpose(0, 2, 1, 3), "ten_crop")
    assert [int(x[0, 0, 0, 0]) for x in upright[:5]] == [0, 0, 8, 8, 4]
    with pytest.raises(UserError, match="use none, flip, ten_crop"):
        tta.variants(images, "rotate")
