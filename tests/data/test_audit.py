"""The audit against planted faults, SciPy and, where it is given, the real data."""

import base64
import html.parser
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ferjax.config import UserError
from ferjax.data import arrays, audit, audit_sheet, duplicates, ferplus

ROOT = Path(__file__).parents[2]
ALL = ("train", "public_test", "private_test")


def faces(count, seed, side=24):
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 6, 6), np.uint8)
    return np.stack([cv2.resize(image, (side, side)) for image in coarse])[..., None]


def planted():
    """30 images with one of each fault, rows 100 ... 129.

    train: 0 and 1 equal, same label; 2 and 3 equal, other label; 4 blank; 5 equal to public_test 0;
    6 padded; 7 nearly equal to private_test 1 (other brightness, contrast and some noise).
    private_test 0 equals public_test 1.
    """
    images = faces(30, 0)
    labels = np.arange(30, dtype=np.int32) % 3
    images[1], labels[1] = images[0], labels[0]
    images[3] = images[2]
    images[4] = 7
    images[20] = images[5]
    images[6, :4] = 0
    images[25], labels[25] = images[21], labels[21]
    noise = np.random.default_rng(1).normal(0, 2, images[7].shape)
    images[26] = np.clip(30 + 0.6 * images[7] + noise, 0, 255)
    rows = np.arange(100, 130, dtype=np.int32)
    parts = {"train": slice(0, 20), "public_test": slice(20, 25), "private_test": slice(25, 30)}
    splits = {n: arrays.Split(images[p], labels[p], rows[p]) for n, p in parts.items()}
    return arrays.Dataset("planted", ("a", "b", "<c>"), splits, "d" * 64)


def test_every_planted_fault_is_found_and_nothing_else():
    report = audit.audit(planted())
    found = {tuple(group["rows"]): group for group in report["exact_groups"]}
    assert found.keys() == {(100, 101), (102, 103), (105, 120), (121, 125)}
    assert found[105, 120]["splits"] == ["train", "public_test"]
    assert found[102, 103]["labels"] == [2, 0]
    whole = report["exact"]["whole set"]
    assert (whole["groups"], whole["images"], whole["conflicting"]) == (4, 8, 1)
    assert report["exact"]["train"] == {
        "groups": 2,
        "images": 4,
        "one_label": 1,
        "conflicting": 1,
        "conflicting_images": 2,
    }
    assert report["exact"]["public_test"]["groups"] == 0
    assert report["copies"]["public_test"] == {"train": 1, "private_test": 1}
    assert report["copies"]["private_test"] == {"train": 0, "public_test": 1}
    assert [pair[:2] for pair in report["near_pairs"]] == [[107, 126]]
    assert report["near"]["copies"]["private_test"] == {"train": 1, "public_test": 0}
    assert report["near"]["copies"]["train"] == {"public_test": 0, "private_test": 1}
    assert (report["blank"], report["padded"]["rows"]) == ([104], [106])
    assert report["cleaning"]["leaks"]["dropped"] == {"leak": 1}
    assert "not_a_face" not in report
    json.dumps(report)


def test_votes_name_what_is_no_face():
    counts = np.zeros((130, 10), np.int32)
    counts[:, 0] = 10
    counts[[103, 128], 9] = 11  # more than half
    votes = ferplus.Votes(counts, np.zeros(130, bool))
    data = planted()
    report = audit.audit(data, votes=votes)
    assert report["not_a_face"] == [103, 128]
    assert "Not a face: 2</h2>" in audit_sheet.sheet(report, data, 5)
    assert "not a face" in audit.table(report)


def test_brightness_and_contrast_are_those_of_numpy():
    data = planted()
    split = audit.audit(data)["splits"]["train"]
    pixels = data.splits["train"].images.reshape(20, -1).astype(np.float64)
    assert split["classes"] == np.bincount(data.splits["train"].labels).tolist()
    for what, values in (("brightness", pixels.mean(1)), ("contrast", pixels.std(1))):
        assert split[what]["quantiles"]["50%"] == pytest.approx(np.median(values), abs=0.01)
        assert split[what]["mean"] == pytest.approx(values.mean(), abs=0.01)
        assert sum(split[what]["histogram"]) == 20


def test_correlations_across_blocks_are_those_of_numpy(monkeypatch):
    monkeypatch.setattr(duplicates, "_BLOCK", 7)
    images = faces(30, 3, side=48)
    images[12] = images[11] // 2 + 40
    images[5] = 99
    members = np.setdiff1d(np.arange(30), [3])
    pairs = duplicates.near_pairs(duplicates.thumbnails(images, 8), 0.3, members)
    small = images[..., 0].reshape(30, 8, 6, 8, 6).mean(axis=(2, 4)).reshape(30, -1)
    others = np.setdiff1d(members, [5])  # the blank one correlates with nothing
    wanted = {}
    for a in others:
        for b in others[others > a]:
            if (r := np.corrcoef(small[a], small[b])[0, 1]) >= 0.3:
                wanted[a, b] = r
    got = dict(zip(zip(pairs.first, pairs.second, strict=True), pairs.correlation, strict=True))
    assert len(wanted) > 10
    assert got.keys() == wanted.keys()
    for key, r in wanted.items():
        assert got[key] == pytest.approx(r, abs=1e-5)
    assert (np.diff(pairs.correlation) <= 0).all()
    assert (pairs.first[0], pairs.second[0]) == (11, 12)


def test_colour_is_averaged():
    grey = faces(2, 4)
    colour = np.repeat(grey, 3, axis=-1)
    np.testing.assert_allclose(
        duplicates.thumbnails(colour), duplicates.thumbnails(grey), atol=1e-6
    )


def test_sets_of_pairs_are_scipys_components():
    rng = np.random.default_rng(2)
    first, second = rng.integers(0, 60, (2, 40))
    roots = duplicates.connected(60, first, second)
    graph = coo_array((np.ones(40), (first, second)), shape=(60, 60))
    _, wanted = connected_components(graph, directed=False)
    assert len(np.unique(roots)) == len(np.unique(wanted)) < 60
    for root in np.unique(roots):
        members = np.flatnonzero(roots == root)
        assert members[0] == root
        assert len(np.unique(wanted[members])) == 1


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.5, float("nan")])
def test_a_threshold_that_is_none(threshold):
    with pytest.raises(UserError, match=r"--threshold=.*such as \.95"):
        duplicates.near_pairs(duplicates.thumbnails(faces(3, 0)), threshold)


def test_too_many_pairs_are_refused(monkeypatch):
    monkeypatch.setattr(duplicates, "MAX_PAIRS", 5)
    same = duplicates.thumbnails(np.repeat(faces(1, 0), 4, axis=0))
    with pytest.raises(UserError, match=r"more than 5 pairs .* raise it"):
        duplicates.near_pairs(same, 0.9)


class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.images, self.links = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if tag == "img" and name == "src":
                self.images.append(value)
            elif name in ("src", "href"):
                self.links.append(value)


def test_the_sheet_holds_its_pictures_and_asks_for_nothing():
    data = planted()
    text = audit_sheet.sheet(audit.audit(data), data, 10)
    page = Page(text)
    assert page.links == []
    assert not re.search(r"url\(|@import|<script|https?:", text)
    assert "prefers-color-scheme:dark" in text
    # 2 conflicting, 4 in two splits, 2 nearly equal, 1 blank, 1 padded
    assert len(page.images) == 10
    assert "&lt;c&gt;" in text
    assert "<c>" not in text
    blank = cv2.imdecode(np.frombuffer(_decoded(page.images[8]), np.uint8), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(blank, data.splits["train"].images[4, ..., 0])


def test_the_sheet_says_what_it_leaves_out():
    data = planted()
    text = audit_sheet.sheet(audit.audit(data), data, 1)
    assert "Equal pixels in two splits: 1 of 2 shown" in text


def _decoded(uri):
    head, _, body = uri.partition(",")
    assert head == "data:image/png;base64"
    return base64.b64decode(body)


def run_audit(*args):
    return subprocess.run(
        [sys.executable, "-m", "ferjax.data.audit", *args],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )


def test_a_reader_that_goes_away_is_no_error(prepared_tiny, tmp_path):
    """`... | head -1`."""
    args = ("--dataset=synthetic_faces/tiny", f"--data.data_dir={prepared_tiny}")
    child = subprocess.Popen(
        [sys.executable, "-m", "ferjax.data.audit", *args, f"--workdir={tmp_path}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert child.stdout
    child.stdout.close()
    assert child.stderr
    assert child.stderr.read() == ""
    assert child.wait() == 0
    assert (tmp_path / "audit" / "audit.json").exists()


def test_the_command(prepared_tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("FERPLUS_SOURCE", "votes.csv")  # of another set: not looked at
    where = f"--data.data_dir={prepared_tiny}"
    done = run_audit("--dataset=synthetic_faces/tiny", where, f"--workdir={tmp_path}/new")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "new" / "audit"
    assert sorted(path.name for path in folder.iterdir()) == ["audit.html", "audit.json"]
    report = json.loads((folder / "audit.json").read_text())
    assert report["exact"]["whole set"]["groups"] == 0
    assert "train, clean=strict" in done.stdout
    assert str(folder / "audit.json") in done.stdout

    votes = run_audit("--dataset=synthetic_faces/tiny", where, "--data.ferplus_source=votes.csv")
    assert votes.returncode == 2
    assert "--data.ferplus_source=votes.csv" in votes.stderr.splitlines()[-1]

    wrong = run_audit("--dataset=synthetic_faces/tiny", where, "--threshold=2")
    assert wrong.returncode == 2
    assert "--threshold=2" in wrong.stderr.splitlines()[-1]
    assert "Traceback" not in wrong.stderr


@pytest.mark.skipif("FER2013_SOURCE" not in os.environ, reason="needs FER2013_SOURCE")
def test_the_real_data(tmp_path):
    data = arrays.load(
        "fer2013", source=os.environ["FER2013_SOURCE"], data_dir=str(tmp_path), splits=ALL
    )
    report = audit.audit(data)
    table = {
        name: [e["groups"], e["images"], e["one_label"], e["conflicting"], e["conflicting_images"]]
        for name, e in report["exact"].items()
    }
    assert table["whole set"] == [1516, 3369, 1459, 57, 160]
    assert table["train"] == [1035, 2271, 996, 39, 107]
    assert table["public_test"][:4] == [26, 52, 25, 1]
    assert table["private_test"][:4] == [16, 33, 14, 2]
    assert report["copies"]["public_test"]["train"] == 280
    assert report["copies"]["private_test"] == {"train": 288, "public_test": 44}
    assert len(report["blank"]) == 12
    assert sum(row < 28709 for row in report["blank"]) == 11
    assert report["cleaning"]["strict"]["images"] == 26912
    assert report["cleaning"]["strict"]["classes"] == [3776, 350, 3797, 7030, 4677, 2460, 4822]
