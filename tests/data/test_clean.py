"""Cleaning: what is left out of training, and what it never touches."""

import json
import logging
import os

import numpy as np
import pytest

from ferjax import config as configs
from ferjax.config import UserError
from ferjax.data import arrays, duplicates, splits
from ferjax.engine.experiment import Experiment

SECTION = {
    "labeled": "all",
    "unlabeled": "rest",
    "split_seed": 0,
    "split_file": "",
    "clean": "strict",
}


def planted():
    """40 training images of four classes, and two test splits of 8.

    Training: 0 equals a public_test image, 1 a private_test image; 2 is blank; 3 and 7 are equal
    with one label; 4, 5 and 9 are equal, 5 with another label; 10 and 11 are blank and equal; 12
    and 16 equal a public_test image.
    """
    images = np.random.default_rng(0).integers(0, 256, (56, 16, 16, 1), dtype=np.uint8)
    labels = (np.arange(56) % 4).astype(np.int32)
    images[40], images[48] = images[0], images[1]
    images[2], images[10], images[11] = 9, 0, 0
    images[7] = images[3]
    images[5] = images[9] = images[4]
    images[12] = images[16] = images[41]
    labels[9], labels[11] = labels[4], labels[10]
    rows = np.arange(56, dtype=np.int32)
    parts = {"train": slice(0, 40), "public_test": slice(40, 48), "private_test": slice(48, 56)}
    made = {n: arrays.Split(images[p], labels[p], rows[p]) for n, p in parts.items()}
    return arrays.Dataset("planted", ("a", "b", "c", "d"), made, "d" * 64)


def dropped(mode):
    data = planted()
    train = data.splits["train"]
    tests = [data.splits[name].images for name in ("public_test", "private_test")]
    found = duplicates.to_drop(mode, train.images, train.labels, tests)
    return {reason: places.tolist() for reason, places in found.items()}


def test_each_mode_drops_what_it_says_and_names_no_image_twice():
    assert dropped("none") == {}
    assert dropped("leaks") == {"leak": [0, 1, 12, 16]}
    assert dropped("strict") == {
        "leak": [0, 1, 12, 16],
        "blank": [2, 10, 11],
        "conflict": [4, 5, 9],
        "repeat": [7],
    }
    with pytest.raises(UserError, match=r"clean=all: there are none, leaks, strict"):
        dropped("all")


def make(**changes):
    train = planted().splits["train"]
    places = {k: np.array(v, np.int32) for k, v in dropped("strict").items()}
    return splits.make({**SECTION, **changes}, train.labels, train.rows, places)


def test_dropped_images_are_in_no_subset():
    gone = [0, 1, 2, 4, 5, 7, 9, 10, 11, 12, 16]
    for labeled, unlabeled in (("all", "rest"), ("50%", "rest"), ("3/class", "all")):
        subsets = make(labeled=labeled, unlabeled=unlabeled)
        used = np.union1d(subsets.labeled, subsets.unlabeled)
        np.testing.assert_array_equal(used, np.setdiff1d(np.arange(40), gone))
        assert subsets.dropped == {"leak": 4, "blank": 3, "conflict": 3, "repeat": 1}
    assert len(make(labeled="50%").labeled) == 14  # of the 29 that are left


def test_without_cleaning_nothing_changes():
    train = planted().splits["train"]
    plain = splits.make({**SECTION, "labeled": "50%"}, train.labels, train.rows)
    none = splits.make({**SECTION, "labeled": "50%"}, train.labels, train.rows, {})
    assert plain.digest == none.digest
    assert plain.dropped == {}


def test_a_class_that_cleaning_empties_is_seen():
    labels = np.array([0, 0, 1, 1], np.int32)
    with pytest.raises(UserError, match="smallest class has 0"):
        splits.make(
            {**SECTION, "labeled": "1/class"}, labels, np.arange(4), {"leak": np.array([2, 3])}
        )


def test_a_split_file_loses_its_dropped_images(tmp_path):
    path = tmp_path / "split.json"
    path.write_text(json.dumps({"labeled_rows": [0, 3, 7, 8]}))
    assert make(split_file=str(path)).labeled.tolist() == [3, 8]
    path.write_text(json.dumps({"labeled_rows": [0, 7]}))
    with pytest.raises(UserError, match=r"clean=strict drops all images of .*split\.json"):
        make(split_file=str(path))


def experiment(monkeypatch, workdir, clean):
    seen = []

    def load(*_, splits, optional=(), **__):
        whole = planted()
        splits = (*splits, *(name for name in optional if name in whole.splits))
        seen.append(splits)
        return arrays.Dataset(
            "p", whole.class_names, {n: whole.splits[n] for n in splits}, "d" * 64
        )

    monkeypatch.setattr("ferjax.data.arrays.load", load)
    c = configs.base()
    c.batch_size = 4
    c.algorithm = {"name": "supervised"}
    c.model = {"name": "cnn", "layers": ("conv 4 3", "gap")}
    c.data.clean = clean
    return Experiment(configs.finalize(c), workdir), seen


def test_a_run_logs_and_records_what_it_left_out(monkeypatch, tmp_path, caplog):
    log = logging.getLogger("ferjax")
    monkeypatch.setattr(log, "propagate", True)
    with caplog.at_level(logging.INFO, logger="ferjax"):
        run, seen = experiment(monkeypatch, tmp_path / "run", "strict")
    assert "clean=strict, labels=hard: 11 of 40 training images left out" in caplog.text
    assert "leak 4, blank 3, conflict 3, repeat 1" in caplog.text
    assert seen == [("train", "public_test", "private_test")]
    trained = {row for step in range(20) for row in run.rows(step)["labeled"]}
    assert trained == set(run.subsets.labeled.tolist())
    assert len(trained) == 29
    assert len(run.dataset.splits["public_test"]) == 8  # test images stay, blank or not
    run.claim_workdir()
    run.lock.release()
    content = json.loads((tmp_path / "run" / "split.json").read_text())
    assert content["labeled_count"] == 29
    assert content["dropped_count"] == 11
    assert content["dropped"] == {"leak": 4, "blank": 3, "conflict": 3, "repeat": 1}


def test_without_cleaning_private_test_is_not_read(monkeypatch, tmp_path):
    run, seen = experiment(monkeypatch, tmp_path / "run", "none")
    assert seen == [("train", "public_test")]
    assert len(run.subsets.labeled) == 40


def test_a_mode_that_is_none_is_refused():
    c = configs.base()
    c.data.clean = "leak"
    with pytest.raises(UserError, match=r"config\.data\.clean=leak: did you mean leaks\?"):
        configs.finalize(c)


@pytest.mark.slow
@pytest.mark.skipif("FER2013_SOURCE" not in os.environ, reason="needs FER2013_SOURCE")
def test_the_real_data(tmp_path):
    names = ("train", "public_test", "private_test")
    data = arrays.load(
        "fer2013", source=os.environ["FER2013_SOURCE"], data_dir=str(tmp_path), splits=names
    )
    train = data.splits["train"]
    tests = [data.splits[name].images for name in names[1:]]
    places = duplicates.to_drop("strict", train.images, train.labels, tests)
    subsets = splits.make(SECTION, train.labels, train.rows, places)
    assert len(subsets.labeled) == 26912
    assert np.bincount(train.labels[subsets.labeled]).tolist() == [
        *(3776, 350, 3797, 7030, 4677, 2460, 4822)
    ]
