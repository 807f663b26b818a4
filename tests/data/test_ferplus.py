"""FER+: the file's checks, the rules for targets, and the published counts."""

import os
import shutil

import jax
import numpy as np
import pytest

from ferjax import config as configs
from ferjax.config import UserError
from ferjax.data import arrays, ferplus, sources, splits
from ferjax.engine.experiment import Experiment

# neutral, happiness, surprise, sadness, anger, disgust, fear, contempt, unknown, not a face
ANGRY, DISGUST, FEAR, HAPPY, SAD, SURPRISE, NEUTRAL, CONTEMPT = range(8)
real = pytest.mark.skipif("FERPLUS_SOURCE" not in os.environ, reason="needs FERPLUS_SOURCE")


def one(votes, labels):
    target, first = ferplus.targets(np.array([votes]), labels)
    return {k: round(float(v), 4) for k, v in enumerate(target[0]) if v}, int(first[0])


@pytest.mark.parametrize(
    ("votes", "majority", "distribution"),
    [
        # A single vote is noise: 8 of 8, not of 10.
        ([8, 1, 1, 0, 0, 0, 0, 0, 0, 0], {NEUTRAL: 1}, {NEUTRAL: 1}),
        ([6, 0, 0, 0, 0, 0, 4, 0, 0, 0], {NEUTRAL: 1}, {NEUTRAL: 0.6, FEAR: 0.4}),
        # Half is no majority; tied emotions come together.
        ([5, 5, 0, 0, 0, 0, 0, 0, 0, 0], {}, {NEUTRAL: 0.5, HAPPY: 0.5}),
        # 8 of 10 hold three quarters: the third one is left out.
        ([0, 0, 0, 4, 4, 0, 2, 0, 0, 0], {}, {SAD: 0.5, ANGRY: 0.5}),
        # Three hold 8 of 10; a fourth that is tied makes it too many.
        ([4, 2, 2, 2, 0, 0, 0, 0, 0, 0], {}, {}),
        # Unknown as the first choice, and in second place with enough before it.
        ([2, 0, 0, 0, 0, 0, 0, 0, 8, 0], {}, {}),
        ([6, 0, 0, 0, 0, 0, 0, 0, 4, 0], {NEUTRAL: 1}, {NEUTRAL: 1}),
        ([5, 0, 0, 0, 0, 0, 0, 0, 3, 2], {}, {}),
        ([0, 0, 0, 0, 0, 0, 0, 0, 0, 10], {}, {}),
        # No vote is left.
        ([1, 1, 1, 1, 1, 1, 1, 1, 1, 1], {}, {}),
    ],
)
def test_targets_by_hand(votes, majority, distribution):
    for labels, wanted in (("ferplus8_majority", majority), ("ferplus8", distribution)):
        target, first = one(votes, labels)
        assert target == wanted
        assert (first in wanted) if wanted else first == -1


def test_seven_classes_leave_contempt_out():
    mixed = [0, 6, 0, 0, 0, 0, 0, 4, 0, 0]
    assert one(mixed, "ferplus8") == ({HAPPY: 0.6, CONTEMPT: 0.4}, HAPPY)
    assert one(mixed, "ferplus7") == ({HAPPY: 1}, HAPPY)
    own = [0, 4, 0, 0, 0, 0, 0, 6, 0, 0]
    assert one(own, "ferplus8_majority") == ({CONTEMPT: 1}, CONTEMPT)
    assert one(own, "ferplus7") == one(own, "ferplus7_majority") == ({}, -1)
    assert ferplus.class_names("ferplus8")[:7] == ferplus.class_names("ferplus7")


def plainly(votes):
    """The rule for one image, sorted by votes instead of level by level."""
    votes = [v if v > 1 else 0 for v in votes]
    total, taken, used = sum(votes), {}, 0
    for level in sorted({v for v in votes if v}, reverse=True):
        if 4 * used >= 3 * total or len(taken) >= 3:
            break
        tied = [k for k, v in enumerate(votes) if v == level]
        taken |= {k: level for k in tied if k < 8}
        used += level * len(tied)
        if max(tied) >= 8:
            break
    if len(taken) > 3 or 2 * sum(taken.values()) <= total:
        return [0.0] * 8
    order = ["anger", "disgust", "fear", "happiness", "sadness", "surprise", "neutral", "contempt"]
    return [taken.get(ferplus.COLUMNS.index(n), 0) / sum(taken.values()) for n in order]


def test_distributions_against_a_plain_computation():
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.full(10, 0.4), 3000)
    counts = np.stack([rng.multinomial(10, share) for share in shares])
    target, first = ferplus.targets(counts, "ferplus8")
    np.testing.assert_allclose(target, [plainly(votes) for votes in counts], atol=1e-6)
    np.testing.assert_array_equal(first >= 0, target.sum(axis=1) > 0.5)
    assert 500 < (first >= 0).sum() < 2900
    kept = first >= 0
    np.testing.assert_array_equal(target[kept, first[kept]], target[kept].max(axis=1))


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Votes on six rows, in the form of the published file."""
    monkeypatch.delenv("FERPLUS_SOURCE", raising=False)
    monkeypatch.setattr(sources, "ROWS", 6)
    monkeypatch.setattr(sources, "USAGES", (("Training", 4), ("PublicTest", 5), ("PrivateTest", 6)))
    counts = np.zeros((6, 10), np.int32)
    for row, column in enumerate([0, 1, 9, 8, 4, 4]):
        counts[row, column] = 10
    removed = np.array([False, False, True, False, False, False])
    monkeypatch.setattr(ferplus, "SHA256", ferplus._digest(ferplus.Votes(counts, removed)))
    usages = ["Training"] * 4 + ["PublicTest", "PrivateTest"]
    lines = [",".join(["Usage", "Image name", *ferplus.COLUMNS])]
    for row in range(6):
        name = "" if removed[row] else f"fer{row:07}.png"
        lines.append(",".join([usages[row], name, *map(str, counts[row])]))
    path = tmp_path / "fer2013new.csv"
    path.write_bytes(("\r\n".join(lines) + "\r\n").encode())
    return path


def test_a_copy_with_other_line_ends_is_read(small):
    votes = ferplus.read(str(small))
    assert votes.not_a_face.tolist() == [False, False, True, False, False, False]
    assert votes.removed.tolist() == [False, False, True, False, False, False]
    assert votes.counts.sum(axis=1).tolist() == [10] * 6


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("Usage,Image", "usage,image", "its header is not"),
        (
            "PublicTest,fer0000004.png,0,0,0,0,10,0,0,0,0,0\r\n",
            "",
            "has 5 rows where FER2013 has 6",
        ),
        ("PublicTest", "Training", "row 4 is not PublicTest"),
        ("fer0000001.png,0,10", "fer0000001.png,x,10", "row 1 is not Training"),
        ("fer0000001.png,0,10", "fer0000001.png,10", "row 1 is not Training"),
        ("fer0000001.png,0,10", f"fer0000001.png,{5000 * '0'},10", "row 1 is not Training"),
        ("fer0000001.png,0,10", "fer0000001.png,5,10", "at most 10 votes"),
        ("fer0000001.png,0,10", "fer0000001.png,10,0", "not the published votes"),
        ("fer0000001.png", "", "not the published votes"),
    ],
)
def test_a_wrong_file_gets_one_line(small, old, new, message):
    text = small.read_bytes().decode()
    assert old in text
    small.write_bytes(text.replace(old, new, 1).encode())
    with pytest.raises(UserError, match=message) as error:
        ferplus.read(str(small))
    assert str(small) in str(error.value)
    assert "\n" not in str(error.value)


def test_no_file(tmp_path):
    with pytest.raises(UserError, match="FERPLUS_SOURCE"):
        ferplus.read(str(tmp_path / "none.csv"))


def test_downloaded_once_checked_and_kept(small, tmp_path, monkeypatch):
    asked = []

    def fetch(url, path, instead, title):
        assert "fer2013new.csv" in instead
        asked.append(url)
        shutil.copy(small, path)

    monkeypatch.setattr(ferplus, "download", fetch)
    first, again = (ferplus.load("", str(tmp_path / "data")) for _ in range(2))
    np.testing.assert_array_equal(first.counts, again.counts)
    assert asked == [ferplus.URL]
    assert [p.name for p in (tmp_path / "data" / "ferplus").iterdir()] == ["fer2013new.csv"]

    small.write_text(small.read_text().replace("0,10,0", "10,0,0", 1))
    with pytest.raises(UserError, match="not the published votes"):
        ferplus.load("", str(tmp_path / "other"))
    assert list((tmp_path / "other" / "ferplus").iterdir()) == []


def experiment(monkeypatch, workdir, source, **data):
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), dtype=np.uint8)
    labels = np.array([3, 3, 2, 5, 0], np.int32)
    rows = np.arange(5, dtype=np.int32)

    def load(*_, **__):
        parts = {"train": slice(0, 4), "public_test": slice(4, 5)}
        made = {n: arrays.Split(images[p], labels[p], rows[p]) for n, p in parts.items()}
        return arrays.Dataset("fer2013", ferplus.EMOTIONS, made, "d" * 64)

    monkeypatch.setattr("ferjax.data.arrays.load", load)
    c = configs.base()
    c.batch_size = 4
    c.algorithm = {"name": "supervised"}
    c.model = {"name": "cnn", "layers": ("conv 4 3", "gap")}
    c.data.ferplus_source = str(source)
    c.data.update(data)
    return Experiment(configs.finalize(c), workdir)


def test_a_run_trains_towards_votes_and_is_scored_on_fer2013(small, monkeypatch, tmp_path):
    run = experiment(monkeypatch, tmp_path / "run", small, labels="ferplus7")
    assert run.subsets.labeled.tolist() == [0, 1]  # the others: not a face, unknown
    assert run.subsets.dropped == {"no_label": 2}
    assert run.dataset.splits["train"].labels[:2].tolist() == [NEUTRAL, HAPPY]
    assert run.dataset.splits["public_test"].labels.tolist() == [0]
    targets = np.asarray(run.device_data()["targets"]).reshape(-1, 4, 7)[0]
    np.testing.assert_array_equal(targets[:2], np.eye(7)[[NEUTRAL, HAPPY]])
    np.testing.assert_array_equal(targets[2:], 0)
    hard = experiment(monkeypatch, tmp_path / "hard", "none.csv", labels="hard")
    targets = np.asarray(hard.device_data()["targets"]).reshape(-1, 4, 7)[0]
    np.testing.assert_array_equal(targets, np.eye(7)[[3, 3, 2, 5]])


def test_a_run_on_eight_classes_is_chosen_by_fer2013s_seven(small, monkeypatch, tmp_path):
    text = small.read_bytes().decode().replace("0,10,0,0,0,0,0,0,0,0", "0,0,0,0,0,0,0,10,0,0")
    small.write_bytes(text.encode())  # contempt in place of happiness
    monkeypatch.setattr(ferplus, "_digest", lambda votes: ferplus.SHA256)
    run = experiment(monkeypatch, tmp_path / "run", small, labels="ferplus8_majority")
    assert run.class_names == ferplus.CLASSES
    assert run.dataset.class_names == ferplus.EMOTIONS
    assert run.subsets.labeled.tolist() == [0, 1]
    targets = np.asarray(run.device_data()["targets"]).reshape(-1, 4, 8)[0]
    np.testing.assert_array_equal(targets[:2], np.eye(8)[[NEUTRAL, CONTEMPT]])
    state = run.init_state()
    assert 8 in {leaf.shape[-1] for leaf in jax.tree.leaves(state.params)}
    images = run.dataset.splits["public_test"].images
    weights = run.layout.replicate({"params": state.params, "batch_stats": state.batch_stats})
    own = run.predict(weights, images)
    replicated = run.layout.replicate(state)
    np.testing.assert_array_equal(run.evaluate(replicated)["raw"], own[:, :7])
    run.claim_workdir()
    recorded = splits.recorded(run.workdir / "split.json")
    assert recorded["class_names"] == list(ferplus.CLASSES)
    assert recorded["labeled_per_class"] == [0] * 6 + [1, 1]
    run.lock.release()


def test_other_data_sets_have_no_votes(small, monkeypatch, tmp_path):
    with pytest.raises(UserError, match="FER\\+ labels fer2013 only"):
        experiment(monkeypatch, tmp_path, small, labels="ferplus7", name="synthetic_faces/tiny")


@real
def test_the_published_votes():
    votes = ferplus.read(os.environ["FERPLUS_SOURCE"])
    sums = votes.counts.sum(axis=1)
    assert ((sums == 10).sum(), (sums == 9).sum()) == (35886, 1)
    top = votes.counts == votes.counts.max(axis=1, keepdims=True)
    clear = top.sum(axis=1) == 1
    winner = votes.counts.argmax(axis=1)
    table, ties, removed = [], [], []
    for start, end in ((0, 28709), (28709, 32298), (32298, 35887)):
        part = slice(start, end)
        table.append(np.bincount(winner[part][clear[part]], minlength=10).tolist())
        ties.append(int((~clear[part]).sum()))
        removed.append(int(votes.removed[part].sum()))
    assert table == [
        [9365, 7410, 3378, 3403, 2399, 175, 648, 162, 170, 150],
        [1242, 880, 441, 395, 310, 31, 73, 24, 25, 11],
        [1166, 909, 421, 424, 316, 22, 92, 26, 27, 16],
    ]
    assert ties == [1449, 157, 170]
    assert removed == [148, 10, 15]
    assert votes.not_a_face.sum() == 176
    # The sizes that the literature gives for majority labels.
    _, first = ferplus.targets(votes.counts, "ferplus8_majority")
    sizes = [int((first[a:b] >= 0).sum()) for a, b in ((0, 28709), (28709, 32298), (32298, 35887))]
    assert sizes == [25060, 3199, 3153]
