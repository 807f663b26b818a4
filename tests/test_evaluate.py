"""`ferjax.evaluate` beyond one run's plain score: ensembles, views, temperatures, comparisons."""

import json

import numpy as np
import pytest
import scipy.special
import scipy.stats
from test_end_to_end import SMALL, ferjax

from ferjax.augment import tta
from ferjax.config import UserError
from ferjax.data import arrays
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


def test_private_test_with_the_temperature_of_public_test(runs):
    first, second = runs
    plain = ferjax("evaluate", f"--workdir={first}", "--calibrate")
    assert plain.returncode == 0, plain.stderr
    args = [f"--workdir={first}", "--split=private_test", "--calibrate", f"--against={second}"]
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
    data = arrays.load("synthetic_faces/tiny", splits=("train", "private_test")).splits
    train, test = (data[k].images.reshape(len(data[k].images), -1) for k in data)
    copies = sum(bool((train == row).all(-1).any()) for row in test)
    assert private["clean"]["images"] == private["images"] - copies
    assert "without exact copies of training images" in done.stdout


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


def test_copies_of_training_images_are_left_out():
    from ferjax import evaluate

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 4, 4, 1), np.uint8)
    labels = np.array([0, 1, 0, 1])
    rows = np.arange(4, dtype=np.int32)
    test = arrays.Split(images[[0, 5, 1, 4]], labels, rows)
    train = arrays.Split(images[:4], labels, rows)
    data = arrays.Dataset("x", ("a", "b"), {"train": train, "private_test": test}, "d")
    logits = np.eye(2)[[1, 1, 1, 0]]  # right on the second image alone
    found = evaluate.clean_score(data, "private_test", logits)
    assert (found["images"], found["accuracy"]) == (2, 0.5)
    low, high = scipy.stats.binomtest(1, 2).proportion_ci(method="wilson")
    assert found["accuracy_interval"] == pytest.approx([low, high], abs=1e-6)
    all_copies = arrays.Dataset("x", ("a", "b"), {"train": test, "private_test": test}, "d")
    assert evaluate.clean_score(all_copies, "private_test", logits)["accuracy"] is None


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
