"""What is scored: label sets of votes, folders of pictures, the images that probes see."""

import logging
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import scipy.special

from ferjax import config as configs
from ferjax import evaluate_flags
from ferjax.analysis import scores
from ferjax.augment import corruptions
from ferjax.config import UserError
from ferjax.data import arrays, ferplus, spool
from ferjax.evaluate_sections import Contender, calibrate, corrupted, ensemble, fresh, score
from ferjax.evaluate_targets import (
    Target,
    label_sets,
    read_folder,
    split_targets,
    training_images,
)
from ferjax.load import Trained

ANGRY, DISGUST, FEAR, HAPPY, SAD, SURPRISE, NEUTRAL, CONTEMPT = range(8)
SEVEN, EIGHT = ferplus.EMOTIONS, ferplus.CLASSES


def votes(*columns):
    """Ten votes for one column of the file each."""
    counts = np.zeros((len(columns), 10), np.int32)
    for row, column in enumerate(columns):
        counts[row, ferplus.COLUMNS.index(column)] = 10
    return ferplus.Votes(counts, np.zeros(len(columns), bool))


@pytest.fixture
def data(monkeypatch):
    """Six images of FER2013, and what people said of them."""
    said = votes("anger", "contempt", "NF", "happiness", "sadness", "unknown")
    monkeypatch.setattr(ferplus, "load", lambda source="", data_dir="": said)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 8, 8, 1)).astype(np.uint8)
    labels = np.array([ANGRY, NEUTRAL, SAD, SURPRISE, SAD, FEAR], np.int32)
    split = arrays.Split(images, labels, np.arange(6, dtype=np.int32))
    return arrays.Dataset("fer2013", SEVEN, {"train": split, "public_test": split}, "d")


def config(name="fer2013", labels="hard"):
    c = configs.base()
    c.data.name, c.data.labels = name, labels
    return configs.finalize(c)


def trained(classes, table, features=None):
    """A network whose logits are read from a table, at an image's first pixel."""

    def logits(images, corrected=False):
        return table[images[:, 0, 0, 0]]

    return Trained(config(), 5, classes, (8, 8, 1), logits, features=features)


def test_the_label_sets_of_a_split(data):
    own, seven, eight = split_targets(
        config(), data, "public_test", ["fer2013", "ferplus7", "ferplus8"]
    )
    assert own.positions.tolist() == [0, 1, 2, 3, 4, 5]
    assert own.labels.tolist() == [ANGRY, NEUTRAL, SAD, SURPRISE, SAD, FEAR]
    assert (seven.positions.tolist(), seven.labels.tolist()) == ([0, 3, 4], [ANGRY, HAPPY, SAD])
    assert eight.positions.tolist() == [0, 1, 3, 4]  # not a face and unknown have no label
    assert eight.labels.tolist() == [ANGRY, CONTEMPT, HAPPY, SAD]
    assert (seven.classes, eight.classes) == (SEVEN, EIGHT)


def test_which_label_sets_fit_a_run():
    fer = config()
    assert label_sets("own", fer, SEVEN) == label_sets("fer2013", fer, EIGHT) == ["fer2013"]
    assert label_sets("both", fer, SEVEN) == ["fer2013", "ferplus7"]
    assert label_sets("both", fer, EIGHT) == ["fer2013", "ferplus7", "ferplus8"]
    assert label_sets("own", config("synthetic_faces/tiny"), SEVEN) == ["own"]
    for wanted, of, known, message in (
        ("ferplus8", fer, SEVEN, "knows no contempt: use --labels=ferplus7"),
        ("both", config("synthetic_faces"), SEVEN, "use --labels=own"),
        ("fer", fer, SEVEN, "use own, fer2013, ferplus7, ferplus8, both"),
    ):
        with pytest.raises(UserError, match=message):
            label_sets(wanted, of, known)


def test_eight_classes_are_scored_on_seven():
    rng = np.random.default_rng(1)
    table = rng.normal(size=(256, 8)) * 2
    table[:, CONTEMPT] += 2  # often the likeliest of eight
    images = np.arange(60, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 1), np.uint8)
    labels = rng.integers(0, 7, 60)
    target = Target("fer2013", SEVEN, np.arange(60), labels)
    eight = Contender(["a"], [trained(EIGHT, table)], "none")
    eight.check(SEVEN, images.shape[1:])
    summary, logits = score(eight, eight.outputs(images), target)
    p = scipy.special.softmax(table[:60], -1)
    kept = p[:, :7] / p[:, :7].sum(1, keepdims=True)
    np.testing.assert_allclose(scores.softmax(logits), kept)
    assert summary["accuracy"] == np.mean(kept.argmax(1) == labels)
    own = kept[np.arange(60), labels]
    assert summary["nll"] == pytest.approx(-np.log(own).mean())
    assert summary["brier"] == pytest.approx(np.square(kept - np.eye(7)[labels]).sum(1).mean())
    # With a network of seven classes, each gives what it knows about them.
    seven = trained(SEVEN, rng.normal(size=(256, 7)))
    both = Contender(["a", "b"], [*eight.members, seven], "none")
    other = scipy.special.softmax(seven.logits(images), -1)
    both.check(SEVEN, images.shape[1:])
    with pytest.raises(UserError, match=r"a was trained on .*: give runs on images of one"):
        both.check(SEVEN, (96, 96, 3))
    outputs = both.outputs(images)
    mean = both.combine(outputs, SEVEN)
    np.testing.assert_allclose(np.exp(mean), (kept + other) / 2)
    shares = [np.mean(x.argmax(1) == labels) for x in (kept, other)]
    found = ensemble(both, outputs, target, 0.5)
    assert [each["accuracy"] for each in found["members"]] == shares
    assert found["gain"] == pytest.approx(0.5 - np.mean(shares))
    assert found["gain_over_best"] == pytest.approx(0.5 - max(shares))
    # All eight, where contempt counts; and a network that knows none can't be scored on it.
    assert eight.combine(eight.outputs(images), EIGHT).shape == (60, 8)
    for contender, classes in ((both, EIGHT), (eight, SEVEN[:5])):
        with pytest.raises(UserError, match="give runs on the same classes"):
            contender.check(classes, images.shape[1:])
    with pytest.raises(UserError, match="and not contempt"):
        both.combine(outputs, EIGHT)


def test_only_the_labelled_images_are_corrupted_and_scored(monkeypatch):
    # Those that compile nothing; test_corruptions.py has them all.
    monkeypatch.setattr(corruptions, "LEVELS", {"noise": (10.0, 50.0)})
    seen = []

    def logits(images, corrected=False):
        seen.append(images)
        return np.eye(7)[images[:, 0, 0, 0] % 7]

    member = Trained(config(), 1, SEVEN, (8, 8, 1), logits)
    images = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 1)).astype(np.uint8)
    positions = np.array([1, 4, 8])
    labels = images[positions, 0, 0, 0] % 7
    target = Target("ferplus7", SEVEN, positions, labels)
    found = corrupted(Contender(["a"], [member], "none"), images, target, np.eye(7)[labels])
    assert found["clean_accuracy"] == 1
    assert {len(x) for x in seen} == {3}
    by_hand = [float(np.mean(x[:, 0, 0, 0] % 7 == labels)) for x in seen]
    assert by_hand == [row["accuracy"] for rows in found["kinds"].values() for row in rows]


def test_a_temperature_of_other_images():
    rng = np.random.default_rng(0)
    logits, fitting = rng.normal(size=(2, 300, 4)) * 3
    labels, others = rng.integers(0, 4, (2, 300))
    found = calibrate(logits, labels, (fitting, others), "public_test")
    assert not found["cross_fitted"]
    by_hand = scipy.special.log_softmax(logits / found["temperature"], -1)
    assert found["after"]["nll"] == pytest.approx(-by_hand[np.arange(300), labels].mean())
    assert calibrate(fitting, others, None, "x")["temperature"] == found["temperature"]


def test_which_images_have_a_copy_in_train():
    images = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 1), np.uint8)
    assert fresh(images[:4], images[[0, 5, 1, 4]]).tolist() == [False, True, False, True]


def test_the_images_that_probes_are_fitted_on(data):
    recorded = {"labeled_rows": [0, 1, 2]}
    images, labels = training_images(config(), data, recorded, "labeled", SEVEN)
    assert labels.tolist() == [ANGRY, NEUTRAL, SAD]
    np.testing.assert_array_equal(images, data.splits["train"].images[:3])
    assert len(training_images(config(), data, recorded, "all", SEVEN)[0]) == 6
    # As the run saw them: by votes; contempt plays no part where seven classes are scored.
    run = config(labels="ferplus8_majority")
    images, labels = training_images(run, data, recorded, "labeled", SEVEN)
    assert labels.tolist() == [ANGRY]
    _, labels = training_images(run, data, recorded, "all", EIGHT)
    assert labels.tolist() == [ANGRY, CONTEMPT, HAPPY, SAD]
    with pytest.raises(UserError, match="--probe_labels=all"):
        training_images(config(), data, {}, "labeled", SEVEN)


def test_a_folder_of_pictures(tmp_path):
    rng = np.random.default_rng(0)
    root = tmp_path / "my faces"
    for name, shape in (
        ("Happy/a.png", (90, 60, 3)),
        ("SAD/b.jpg", (16, 16)),
        ("sad/c.PNG", (8, 8)),
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(root / name), rng.integers(0, 256, shape, np.uint8))
    (root / "sad" / "deeper").mkdir()
    (root / "sad" / "deeper" / "broken.jpg").write_bytes(b"no picture")
    (root / "sad" / "notes.txt").write_text("not looked at")
    (root / ".cache").mkdir()
    subject = read_folder(str(root), SEVEN, (8, 8, 1))
    target = subject.targets[0]
    assert subject.name == f"folder_{tmp_path.name}_my_faces"
    assert subject.images.shape == (3, 8, 8, 1)
    assert target.labels.tolist() == [HAPPY, SAD, SAD]
    assert [x["image"].rpartition("/")[2] for x in subject.skipped] == ["broken.jpg"]
    # What has the right size and is grey is taken as it is.
    grey = cv2.imread(str(root / "sad" / "c.PNG"), cv2.IMREAD_GRAYSCALE)
    np.testing.assert_array_equal(subject.images[2, ..., 0], grey)
    # A colour picture: its middle square, areas averaged.
    colour = cv2.imread(str(root / "Happy" / "a.png"))[15:75]
    small = cv2.resize(
        cv2.cvtColor(colour, cv2.COLOR_BGR2GRAY), (8, 8), interpolation=cv2.INTER_AREA
    )
    np.testing.assert_array_equal(subject.images[0, ..., 0], small)


def test_the_largest_face_is_cut_out_where_it_was_for_training(tmp_path, monkeypatch, caplog):
    (tmp_path / "happy").mkdir()
    large = np.random.default_rng(0).integers(0, 256, (32, 32), np.uint8)
    cv2.imwrite(str(tmp_path / "happy" / "a.png"), large)
    cv2.imwrite(str(tmp_path / "happy" / "b.png"), large[:20])
    monkeypatch.setattr(
        spool, "faces", lambda image, _: [[10, 4, 16, 16]] if len(image) == 32 else []
    )
    with caplog.at_level(logging.INFO, "ferjax"):
        images = read_folder(str(tmp_path), SEVEN, (16, 16, 1), detect=True).images[..., 0]
    np.testing.assert_array_equal(images[0], large[4:20, 10:26])
    assert "no face found in 1 of 2 pictures" in caplog.text
    whole = read_folder(str(tmp_path), SEVEN, (16, 16, 1)).images[..., 0]
    assert (whole[0] != images[0]).any()
    np.testing.assert_array_equal(whole[1], images[1])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "is not a folder"),
        (["happy/"], "holds no pictures: put them into folders named angry, disgust"),
        (
            ["smiling/a.jpg", "sad/b.jpg"],
            "smiling is no class of this run: .* named angry, disgust",
        ),
        (["sad/b.jpg"], "no picture can be read, such as"),
    ],
)
def test_a_wrong_folder_gets_one_line(tmp_path, files, message):
    root = tmp_path / "faces"
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).mkdir() if name.endswith("/") else (root / name).write_bytes(b"x")
    with pytest.raises(UserError, match=message) as error:
        read_folder(str(root), SEVEN, (8, 8, 1))
    assert "\n" not in str(error.value)


class Given(dict):
    """Flags as absl has them, of which some are given."""

    def __getitem__(self, name):
        return SimpleNamespace(value=getattr(self, name), present=int(name in self))

    def __getattr__(self, name):
        defaults = {"split": "public_test", "tta": "none", "labels": "own"}
        return self.get(name, {**defaults, "probe_labels": "labeled"}.get(name, ""))


@pytest.mark.parametrize(
    ("given", "runs", "message"),
    [
        ({"split": "test"}, 1, "use train, public_test, private_test"),
        ({"folder": "x", "split": "public_test"}, 1, "give one of them"),
        ({"folder": "x", "labels": "both"}, 1, "a folder has its own labels"),
        ({"probe_tree": "(a,b)"}, 1, "give that, too"),
        ({"probes": True}, 2, "one run, one checkpoint"),
        ({"probes": True, "checkpoint": "all"}, 1, "one run, one checkpoint"),
        ({"probes": True, "split": "train"}, 1, "give another --split"),
    ],
)
def test_flags_that_do_not_go_together(monkeypatch, given, runs, message):
    monkeypatch.setattr(evaluate_flags, "FLAGS", Given(given))
    with pytest.raises(UserError, match=message):
        evaluate_flags.check_flags(runs)
    monkeypatch.setattr(evaluate_flags, "FLAGS", Given(folder="x", probes=True))
    evaluate_flags.check_flags(1)
