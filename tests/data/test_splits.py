"""Labelled subsets: counts, seeds, files."""

import json

import numpy as np
import pytest

from ferjax.config import UserError
from ferjax.data import splits

TRAIN = [3995, 436, 4097, 7215, 4830, 3171, 4965]  # FER2013
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(7), TRAIN))
ROWS = np.arange(len(LABELS)) + 10


def make(labeled, unlabeled="rest", seed=0, file=""):
    config = {
        "labeled": labeled,
        "unlabeled": unlabeled,
        "split_seed": seed,
        "split_file": str(file),
    }
    return splits.make(config, LABELS, ROWS)


def test_the_seeds_split_is_30_percent():
    subsets = make("30%")
    assert (len(subsets.labeled), len(subsets.unlabeled)) == (8612, 20097)
    assert not np.intersect1d(subsets.labeled, subsets.unlabeled).size
    counts = np.bincount(LABELS[subsets.labeled])
    exact = np.array(TRAIN) * 8612 / 28709
    assert (np.abs(counts - exact) < 1).all()


@pytest.mark.parametrize(
    ("text", "count"),
    [("10%", 2870), ("0.5%", 143), ("2870", 2870), ("all", 28709), ("100%", 28709)],
)
def test_totals_are_exact(text, count):
    assert len(make(text).labeled) == count


def test_largest_remainders_against_a_plain_computation():
    for wanted in (1, 6, 100, 2871):
        counts = np.bincount(LABELS[make(str(wanted)).labeled], minlength=7)
        exact = [n * wanted / 28709 for n in TRAIN]
        floors = [int(e) for e in exact]
        by_remainder = sorted(range(7), key=lambda i: (-(exact[i] - floors[i]), i))
        for i in by_remainder[: wanted - sum(floors)]:
            floors[i] += 1
        assert counts.tolist() == floors


def test_per_class():
    assert np.bincount(LABELS[make("25/class").labeled]).tolist() == [25] * 7


def test_seed_decides_and_larger_shares_contain_smaller():
    a, b, other = make("10%"), make("10%"), make("10%", seed=1)
    assert a.digest == b.digest != other.digest
    assert (a.labeled == b.labeled).all()
    assert np.isin(a.labeled, make("30%").labeled).all()
    overlap = np.isin(a.labeled, other.labeled).mean()
    assert 0.05 < overlap < 0.2


def test_unlabeled_all():
    assert len(make("10%", "all").unlabeled) == len(LABELS)


def test_a_written_split_is_taken_over(tmp_path):
    first = make("5/class", seed=7)
    path = tmp_path / "split.json"
    splits.save(first, path, LABELS, ROWS, "d1")
    content = json.loads(path.read_text())
    assert content["labeled_rows"] == (first.labeled + 10).tolist()
    assert content["labeled_per_class"] == [5] * 7
    assert splits.recorded(path)["digest"] == make("all", file=path).digest == first.digest
    assert splits.recorded(tmp_path / "none.json") == {}
    path.write_text("{")
    with pytest.raises(UserError, match="not what ferjax wrote"):
        splits.recorded(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("30000", "asks for 30000 labelled images of 28709"),
        ("101%", "of 28709"),
        ("0", "asks for 0"),
        ("0.001%", "asks for 0"),
        ("437/class", "smallest class has 436"),
        ("0/class", "at least 1"),
        ("0.3", "write all, a share"),
        ("many", "write all, a share"),
        ("-5", "write all, a share"),
    ],
)
def test_bad_requests(text, message):
    with pytest.raises(UserError, match=message):
        make(text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no list"),
        ("[1, 2]", "holds no list"),
        ('{"labeled_rows": "x"}', "holds no list"),
        ('{"labeled_rows": [1]}', "row 1 is not in the training set"),
        ('{"labeled_rows": [11, 11]}', "a row twice"),
        ('{"labeled_rows": []}', "none"),
        ('{"labeled_rows": [[11], [12]]}', "holds no list"),
        ('{"labeled_rows": [11.5]}', "holds no list"),
        (f'{{"labeled_rows": [{10**30}]}}', "holds no list"),
    ],
)
def test_bad_split_files(tmp_path, content, message):
    path = tmp_path / "split.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        make("all", file=path)


def test_missing_split_file(tmp_path):
    with pytest.raises(UserError, match="is not there"):
        make("all", file=tmp_path / "no.json")
    with pytest.raises(UserError, match=r"Is a directory: give a run's split.json"):
        make("all", file=tmp_path)
