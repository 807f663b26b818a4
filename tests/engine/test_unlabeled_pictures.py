"""Images without any label, of the set itself and from elsewhere: trained on, never counted."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from harness import LAYERS
from PIL import Image

import ferjax
from ferjax import config as configs
from ferjax.algorithms import base
from ferjax.config import UserError
from ferjax.data import arrays, duplicates, splits, stream
from ferjax.engine import experiment
from ferjax.engine.train import train


def draw(top, counts, shape=(16, 16)):
    for place, (folder, count) in enumerate(counts.items()):
        for number in range(count):
            rng = np.random.default_rng([place, number, *shape])
            (top / folder).mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, shape, np.uint8)
            Image.fromarray(pixels).save(top / folder / f"{number}.png")
    return top


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    top = tmp_path_factory.mktemp("pictures")
    draw(
        top / "own",
        {"train/a": 12, "train/b": 9, "validation/a": 3, "validation/b": 3, "unlabeled": 10},
    )
    shutil.copy(top / "own/validation/a/0.png", top / "own/unlabeled/leak.png")
    draw(top / "other", {"deep/er": 14}, (20, 30, 3))
    return top


def make(folders, **data):
    c = configs.base()
    c.data.update(
        name="image_folder/16",
        source=str(folders / "own"),
        data_dir=str(folders / "tfds"),
        labeled="4/class",
        **data,
    )
    c.batch_size, c.epochs, c.log_every = 4, 2, 1
    c.algorithm = {"name": "fixmatch", "mu": 2, "threshold": 0.2}
    c.model = {"name": "cnn", "layers": LAYERS}
    c.views = {"weak": {"policy": "none"}, "strong": {"policy": "none"}}  # quick to compile
    return configs.finalize(c)


def test_they_join_the_unlabelled_images(folders, tmp_path):
    other = f"image_folder:{folders / 'other'}"
    run = experiment.Experiment(make(folders, unlabeled_source=other), tmp_path / "run")
    images, rows = (getattr(run.dataset.splits["train"], n) for n in ("images", "rows"))
    assert (len(images), len(run.subsets.labeled), len(run.subsets.unlabeled)) == (46, 8, 38)
    assert (np.diff(rows) > 0).all()
    # The first 21 have a label, hidden or not; the others' targets are zeros.
    np.testing.assert_array_equal(run.targets.sum(1), np.arange(46) < 21)
    assert set(run.subsets.labeled) < set(range(21))
    assert set(range(21, 46)) < set(run.subsets.unlabeled)
    own = arrays.load(
        "image_folder/16", source=str(folders / "own"), data_dir=str(folders / "tfds"),
        splits=("train", "unlabeled"),
    ).splits  # fmt: skip
    np.testing.assert_array_equal(images[:21], own["train"].images)
    np.testing.assert_array_equal(images[21:32], own["unlabeled"].images)
    one = np.asarray(Image.open(folders / "other/deep/er/0.png").convert("L"), np.float32)[:, 5:25]
    # 20 pixels become 16: each covers one and a quarter.
    weights = np.zeros((16, 20))
    for i in range(80):
        weights[i // 5, i // 4] += 0.2
    assert np.abs(images[32, ..., 0] - weights @ one @ weights.T).max() < 1.5


def test_if_some_do_not_fit_none_is_in_memory(folders, tmp_path, monkeypatch):
    """Each process that reads ahead would get a copy of those that are."""
    other = f"image_folder:{folders / 'other'}"
    whole = experiment.Experiment(make(folders, unlabeled_source=other), tmp_path / "run")
    monkeypatch.setattr(experiment.Layout, "room", lambda _: 32 * 16 * 16)  # own ones alone fit
    run = experiment.Experiment(make(folders, unlabeled_source=other), tmp_path / "run")
    assert run.streamed
    images = run.dataset.splits["train"].images
    assert [type(source) for source in images._sources] == [stream.Records] * 3
    np.testing.assert_array_equal(images[:], whole.dataset.splits["train"].images)


def test_the_devices_of_a_supervised_run_hold_none_of_them(folders, tmp_path):
    config = make(folders, unlabeled_source=f"image_folder:{folders / 'other'}").to_dict()
    config["algorithm"] = {"name": "supervised"}
    run = experiment.Experiment(configs.finalize(config), tmp_path / "run")
    assert len(run.dataset.splits["train"]) == 46
    held = run.device_data()
    assert held["images"].shape[-4:] == (21, 16, 16, 1)
    assert held["targets"].shape[-2:] == (21, 2)


def test_copies_of_test_images_are_left_out_of_them(folders, tmp_path):
    run = experiment.Experiment(make(folders, clean="leaks"), tmp_path / "run")
    assert run.subsets.dropped == {"leak": 1}
    assert len(run.subsets.unlabeled) == 21 - 8 + 10


def test_training_counts_only_what_is_known(folders, tmp_path):
    """A whole run; afterwards the predictor needs neither pictures nor prepared data."""
    source = tmp_path / "own"
    shutil.copytree(folders / "own", source)
    config = make(folders, unlabeled_source=f"image_folder:{folders / 'other'}").to_dict()
    config["data"].update(source=str(source), data_dir=str(tmp_path / "tfds"))
    assert train(configs.finalize(config), tmp_path / "run") == 0
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["kind"] == "train"]
    run = experiment.Experiment(configs.finalize(config), tmp_path / "run")
    shares = {"known": 0, "unknown": 0}
    for row in rows:  # each is of one step
        batch = run.batches["unlabeled"](row["step"] - 1)
        known = (batch < 21).sum()
        above = known * (row["mask_rate_known"] or 0)
        above += (8 - known) * (row["mask_rate_unknown"] or 0)
        assert row["mask_rate"] * 8 == pytest.approx(above)
        assert (row["mask_rate_unknown"] is None) == (known == 8)
        assert (row["unlabeled_accuracy"] is None) == (known == 0)
        if known:  # hits are whole images
            hits = row["unlabeled_accuracy"] * known
            assert hits == pytest.approx(round(hits), abs=1e-4)
        shares["known"] += known
        shares["unknown"] += 8 - known
    assert min(shares.values()) > 0

    shutil.copy(source / "train/a/0.png", source / "unlabeled/0.png")
    changed = experiment.Experiment(configs.finalize(config), tmp_path / "run")
    with pytest.raises(UserError, match="other pixels or labels"):
        changed.claim_workdir()
    shutil.rmtree(source)
    shutil.rmtree(tmp_path / "tfds")
    model = ferjax.load(tmp_path / "run")
    assert model.classes == ("a", "b")
    assert model.image_shape == (16, 16, 1)
    assert model.predict(np.zeros((50, 40, 3), np.uint8)).probabilities.shape == (1, 2)


def test_other_pictures_from_elsewhere_are_noticed(folders, tmp_path, monkeypatch):
    other = draw(tmp_path / "other", {"x": 4})
    config = make(folders, unlabeled_source=f"image_folder:{other}")
    first = experiment.Experiment(config, tmp_path / "run")
    first.claim_workdir()
    first.lock.release()
    monkeypatch.setattr(experiment, "saved", lambda _: [1])
    again = experiment.Experiment(config, tmp_path / "run")
    again.claim_workdir()
    again.lock.release()
    shutil.copy(other / "x/0.png", other / "x/1.png")
    changed = experiment.Experiment(config, tmp_path / "run")
    with pytest.raises(UserError, match="other pixels or labels"):
        changed.claim_workdir()


@pytest.mark.parametrize("text", ["{}", "fer2013:{}", "image_folder", "image_folder/96:{}"])
def test_a_source_that_is_none(folders, tmp_path, text):
    config = make(folders, unlabeled_source=text.format(folders / "other"))
    with pytest.raises(UserError, match=r"unlabeled_source=.*: give image_folder:DIR"):
        experiment.Experiment(config, tmp_path / "run")


def test_metrics_against_numpy():
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(40, 3)).astype(np.float32)
    labels = rng.integers(-1, 3, 40)
    truth = np.eye(3)[labels] * (labels >= 0)[:, None]
    mask = rng.integers(0, 2, 40).astype(np.float32)
    got = base.unlabeled_metrics(jnp.asarray(logits), jnp.asarray(truth), jnp.asarray(mask))
    hit, known = logits.argmax(1) == labels, labels >= 0
    want = {
        "mask_rate": (mask.sum(), 40),
        "mask_rate_known": (mask[known].sum(), known.sum()),
        "mask_rate_unknown": (mask[~known].sum(), (~known).sum()),
        "pseudo_label_accuracy": (mask[hit].sum(), mask[known].sum()),
        "unlabeled_accuracy": (hit.sum(), known.sum()),
    }
    assert {name: tuple(map(float, pair)) for name, pair in got.items()} == want
    pair = base.accuracy_metric(jnp.asarray(logits), jnp.asarray(truth))
    assert tuple(map(float, pair)) == want["unlabeled_accuracy"]


def test_shares_are_of_the_images_with_a_label():
    labels = np.array([0, 1, -1, 0, 1, -1, -1, -1, 0, 1])
    config = {"unlabeled": "rest", "split_seed": 0, "split_file": ""}
    half = splits.make({**config, "labeled": "50%"}, labels, np.arange(10))
    assert len(half.labeled) == 3
    assert (labels[half.labeled] >= 0).all()
    every = splits.make({**config, "labeled": "all"}, labels, np.arange(10))
    assert every.unlabeled.tolist() == [2, 5, 6, 7]


def test_a_copy_without_label_is_no_conflict():
    ids = np.array([0, 0, 2, 2, 4, 4])
    labels = np.array([1, -1, 0, 1, -1, -1])
    assert duplicates.conflicts(ids, labels).tolist() == [False, False, True, True, False, False]
