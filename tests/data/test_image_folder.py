"""A user's own pictures: what is taken as what, in which form, and what is refused in one line."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ferjax import config as configs
from ferjax.config import UserError
from ferjax.data import arrays, folders, image_folder, spool
from ferjax.load import load_data

VERSION = str(image_folder.ImageFolder.VERSION)
ALL = ("private_test", "unlabeled")


def picture(path, seed=0, shape=(48, 48), **options):
    """Writes noise as a picture file; returns its pixels."""
    pixels = np.random.default_rng([seed, *shape]).integers(0, 256, shape, np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return pixels


def make(top, counts, shape=(8, 8)):
    """Pictures `<top>/<folder>/<number>.png`, all different."""
    for place, (folder, count) in enumerate(counts.items()):
        for number in range(count):
            picture(top / folder / f"{number}.png", 1000 * place + number, shape)
    return top


def small(top):
    return make(top, {"train/happy": 3, "train/sad": 2, "validation/happy": 1, "validation/sad": 1})


def load(source, data_dir, name="image_folder/8"):
    return arrays.load(name, source=str(source), data_dir=str(data_dir), optional=ALL)


def skipped(data_dir):
    (path,) = Path(data_dir).glob(f"image_folder/*/{VERSION}/skipped.json")
    return json.loads(path.read_text())


# --- what is taken as what -----------------------------------------------------------------------


def test_folders_become_splits_classes_and_rows(tmp_path):
    top = tmp_path / "my faces"
    want = {}
    for name, label in (
        ("train/sad/2.png", 1),
        ("train/Ärger/b c.png", 2),
        ("train/happy/deep/er/1.png", 0),
        ("validation/happy/x.png", 0),
        ("test/sad/é.png", 1),
        ("unlabeled/a/b/1.png", -1),
        ("unlabeled/2.png", -1),
    ):
        want[name] = (label, picture(top / name, len(want)))
    data = load(top, tmp_path / "tfds", "image_folder")
    assert data.class_names == ("happy", "sad", "Ärger")
    order = {
        "train": ["train/happy/deep/er/1.png", "train/sad/2.png", "train/Ärger/b c.png"],
        "public_test": ["validation/happy/x.png"],
        "private_test": ["test/sad/é.png"],
        "unlabeled": ["unlabeled/2.png", "unlabeled/a/b/1.png"],
    }
    rows = iter(range(len(want)))
    for split, names in order.items():
        found = data.splits[split]
        assert found.labels.tolist() == [want[name][0] for name in names]
        assert found.rows.tolist() == [next(rows) for _ in names]
        for image, name in zip(found.images, names, strict=True):
            np.testing.assert_array_equal(image[..., 0], want[name][1])


def test_sizes_and_colours(tmp_path):
    """The middle square, areas averaged; grey is repeated, colour keeps its order."""
    small(tmp_path / "faces")
    wide = picture(tmp_path / "faces/train/happy/00.png", 1, (16, 24, 3)).astype(float)
    grey = picture(tmp_path / "faces/train/happy/01.png", 2, (24, 16)).astype(float)
    train = load(tmp_path / "faces", tmp_path / "tfds", "image_folder/8_rgb").splits["train"]
    assert train.images.shape == (7, 8, 8, 3)
    wanted = wide[:, 4:20].reshape(8, 2, 8, 2, 3).mean((1, 3))
    assert np.abs(train.images[1] - wanted).max() <= 0.5
    wanted = grey[4:20].reshape(8, 2, 8, 2, 1).mean((1, 3))
    assert np.abs(train.images[2] - wanted).max() <= 0.5
    by_pillow = np.asarray(Image.fromarray(wide.astype(np.uint8)).convert("L"), float)
    train = load(tmp_path / "faces", tmp_path / "tfds").splits["train"]
    wanted = by_pillow[:, 4:20].reshape(8, 2, 8, 2).mean((1, 3))
    assert np.abs(train.images[1, ..., 0] - wanted).max() <= 1.5  # both round twice


@pytest.mark.parametrize("suffix", ["jpg", "webp", "bmp", "tiff", "pgm"])
def test_formats(tmp_path, suffix):
    top = small(tmp_path / "faces")
    options = {"lossless": True} if suffix == "webp" else {}
    pixels = picture(top / f"train/happy/-first.{suffix}", 5, (8, 8), **options)
    found = load(top, tmp_path / "tfds").splits["train"].images[0, ..., 0]
    expected = Image.open(top / f"train/happy/-first.{suffix}").convert("L")
    assert np.abs(found.astype(int) - np.asarray(expected)).max() <= 1
    assert suffix == "jpg" or np.abs(found.astype(int) - pixels).max() <= 1


def test_without_validation_a_share_is_set_aside_by_content(tmp_path, caplog):
    top = make(tmp_path / "faces", {"train/a": 40, "train/b": 20})
    for number in range(40):  # a copy of each, elsewhere in the order
        shutil.copy(top / f"train/a/{number}.png", top / f"train/a/z{number}.png")
    with caplog.at_level(logging.INFO, "ferjax"):
        data = load(top, tmp_path / "tfds")
    test, train = data.splits["public_test"], data.splits["train"]
    assert "no validation/: 10 of 100 training pictures" in caplog.text
    assert np.bincount(test.labels).tolist() == [8, 2]
    kept = {image.tobytes() for image in train.images}
    assert not kept & {image.tobytes() for image in test.images}
    # Other names, another order: the same pictures.
    for number in range(40):
        (top / f"train/a/{number}.png").rename(top / f"train/a/{99 - number}.jpg")
    again = load(top, tmp_path / "tfds").splits["public_test"]
    assert sorted(i.tobytes() for i in again.images) == sorted(i.tobytes() for i in test.images)


def test_the_same_pictures_are_set_aside_in_every_form(tmp_path):
    top = tmp_path / "faces"
    for number in range(60):  # each of one grey, so that it is known in any size
        path = top / f"train/{'ab'[number % 2]}/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((16, 16, 3), 4 * number, np.uint8)).save(path)
    aside = []
    for form in ("8", "16_rgb", "12"):
        test = load(top, tmp_path / "tfds", f"image_folder/{form}").splits["public_test"]
        aside.append(sorted(test.images[:, 0, 0, 0].tolist()))
    assert len(aside[0]) == 6
    assert aside[0] == aside[1] == aside[2]


def test_copies_with_another_label_are_set_aside_together(tmp_path):
    top = make(tmp_path / "faces", {"train/a": 40, "train/b": 40})
    for number in range(40):
        shutil.copy(top / f"train/a/{number}.png", top / f"train/b/z{number}.png")
    data = load(top, tmp_path / "tfds")
    parts = [{i.tobytes() for i in data.splits[n].images} for n in ("train", "public_test")]
    assert not set.intersection(*parts)
    assert np.bincount(data.splits["public_test"].labels).min() >= 4


def test_a_csv(tmp_path):
    pixels = [picture(tmp_path / f"{n}.png", n, (8, 8)) for n in range(6)]
    (tmp_path / "lists").mkdir()
    table = tmp_path / "lists/faces.csv"
    table.write_text(
        "label, path, who, split\n"
        f"sad,{tmp_path}/0.png,x,train\n"
        '"happy, very",../1.png,x,\n'
        "sad,../2.png,x,validation\n"
        "sad,../3.png,x,private_test\n"
        ",../4.png,x,\n"
        "sad,../5.png,x,unlabeled\n",
        encoding="utf-8-sig",
    )
    data = load(table, tmp_path / "tfds")
    assert data.class_names == ("happy, very", "sad")
    found = {
        split: [(int(label), image.tobytes()) for label, image in zip(s.labels, s.images)]  # noqa: B905
        for split, s in data.splits.items()
    }
    one, two, *rest = [image.tobytes() for image in pixels]
    assert found == {
        "train": [(0, two), (1, one)],
        "public_test": [(1, rest[0])],
        "private_test": [(1, rest[1])],
        "unlabeled": [(-1, rest[2]), (-1, rest[3])],
    }


def test_faces_are_cut_out(tmp_path, monkeypatch, caplog):
    """The largest face; without one the whole picture, with a count."""
    top = small(tmp_path / "faces")
    large = picture(top / "train/happy/0.png", 7, (32, 32))
    monkeypatch.setattr(
        spool, "faces", lambda p, _: [[10, 4, 16, 16], [0, 0, 8, 8]] if len(p) == 32 else []
    )
    with caplog.at_level(logging.INFO, "ferjax"):
        data = load(top, tmp_path / "tfds", "image_folder/8_detect")
    wanted = large[4:20, 10:26].reshape(8, 2, 8, 2).astype(float).mean((1, 3))
    assert np.abs(data.splits["train"].images[0, ..., 0] - wanted).max() <= 0.5
    assert "no face found in 6 of 7 pictures" in caplog.text
    assert "train/happy/1.png" in skipped(tmp_path / "tfds")["no_face"]


# --- what is left out, and what is refused -------------------------------------------------------


def test_what_is_no_picture_is_listed_or_passed_over(tmp_path, caplog):
    top = small(tmp_path / "faces")
    (top / "train/happy/.hidden.png").write_bytes(b"x")
    (top / "train/happy/notes.txt").write_bytes(b"x")
    (top / "train/readme.png").write_bytes(b"x")
    (top / "train/happy/loop").symlink_to(top / "train", target_is_directory=True)
    (top / "extra").mkdir()
    os.mkfifo(top / "train/sad/pipe.png")
    elsewhere = make(tmp_path / "elsewhere", {"more": 2}) / "more"
    (top / "train/sad/linked").symlink_to(elsewhere, target_is_directory=True)
    with caplog.at_level(logging.INFO, "ferjax"):
        data = load(top, tmp_path / "tfds")
    assert np.bincount(data.splits["train"].labels).tolist() == [3, 4]
    report = skipped(tmp_path / "tfds")
    assert report["skipped"] == {
        "extra/": "none of the folders train, validation, test, unlabeled",
        "train/happy/loop/": "a link to a folder that it lies in",
        "train/happy/notes.txt": "not named like a picture",
        "train/readme.png": "not in the folder of a class",
        "train/sad/pipe.png": "not a file",
    }
    assert "not used" in caplog.text


def spoil(top):
    """One file for each way to be broken; returns what should be said of each."""
    whole = (top / "train/happy/0.png").read_bytes()
    picture(top / "train/happy/cut.jpg", 1, (40, 40))
    cut = (top / "train/happy/cut.jpg").read_bytes()
    (top / "train/happy/cut.jpg").write_bytes(cut[: len(cut) * 2 // 3])
    (top / "train/happy/cut.png").write_bytes(whole[: len(whole) * 2 // 3])
    (top / "train/happy/empty.png").write_bytes(b"")
    (top / "train/happy/gone.png").symlink_to(top / "nowhere.png")
    (top / "train/happy/text.jpg").write_bytes(b"hello")
    return {
        "train/happy/cut.jpg": "a JPEG that ends early",
        "train/happy/cut.png": "not a picture that OpenCV reads",
        "train/happy/empty.png": "an empty file",
        "train/happy/gone.png": "No such file or directory",
        "train/happy/text.jpg": "not a picture that OpenCV reads",
    }


def test_broken_pictures_are_listed_up_to_one_in_a_hundred(tmp_path, caplog, capfd):
    top = make(tmp_path / "faces", {"train/happy": 480, "train/sad": 15})
    broken = spoil(top)
    with caplog.at_level(logging.INFO, "ferjax"):
        data = load(top, tmp_path / "tfds")
    assert sum(map(len, data.splits.values())) == 495
    assert skipped(tmp_path / "tfds")["broken"] == broken
    assert "left out: train/happy/empty.png: an empty file" in caplog.text
    assert capfd.readouterr().err == ""  # OpenCV's own words are kept away
    (top / "train/sad/0.png").unlink()
    with pytest.raises(UserError, match=r"5 of 499 pictures can't be read, more than 1 %"):
        load(top, tmp_path / "other")
    assert not (tmp_path / "other/image_folder").exists()


def test_a_jpeg_is_whole_whatever_stands_before_and_behind_its_scan(tmp_path):
    """Phones append a film to a picture; a thumbnail has marks of its own."""
    path = tmp_path / "0.jpg"
    picture(path, 1, (40, 40))
    whole = path.read_bytes()
    tail = np.random.default_rng(0).bytes(300_000)
    assert tail.rfind(b"\xff\xda") > tail.rfind(b"\xff\xd9") > 0
    thumbnail = b"\xff\xe1" + (2 + len(whole)).to_bytes(2, "big") + whole
    read = spool.Reader((40, 40, 1), False)
    file = folders.Picture(str(path), path.name, "train", 0)
    expected, *_ = read(file)
    for content in (whole, whole + tail, whole[:2] + thumbnail + whole[2:]):
        path.write_bytes(content)
        pixels, *_ = read(file)
        np.testing.assert_array_equal(pixels, expected)
    for content in (whole[:-2], whole[:200], whole[:2] + thumbnail + whole[2:-2], whole[:3]):
        path.write_bytes(content)
        assert read(file) == "a JPEG that ends early"


def test_links_that_lead_to_themselves_are_broken_pictures(tmp_path):
    top = make(tmp_path / "faces", {"train/happy": 480, "train/sad": 15})
    (top / "train/happy/loop.png").symlink_to("loop.png")
    (top / "train/around").symlink_to("around")
    load(top, tmp_path / "tfds")
    report = skipped(tmp_path / "tfds")
    assert report["broken"] == {"train/happy/loop.png": "Too many levels of symbolic links"}
    assert report["skipped"] == {"train/around": "not in the folder of a class"}


def moved(old, new):
    return lambda top: (top / old).rename(top / new)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (moved("train", "Train"), "Train: rename it to train"),
        (moved("validation", "val"), "val: rename it to validation"),
        (lambda top: shutil.rmtree(top / "train"), "has no folder train: put the pictures into"),
        (lambda top: shutil.rmtree(top / "train/sad"), "class sad has no picture in train"),
        (lambda top: (top / "train/sad").rename(top / "validation/odd"), "class odd has no pic"),
        (lambda top: (top / "train/angry").mkdir(), "train/angry holds no picture"),
        (lambda top: make(top, {"train/Happy": 1}), "Happy and happy differ only in case"),
        (lambda top: make(top, {"train/e\u0301": 1, "train/\u00e9": 1}), "how letters are enc"),
        (lambda top: make(top, {"test/Sad": 1}), "Sad and sad differ only in case"),
        (lambda top: make(top, {"train/sad ": 1}), "'sad ' has blanks around it"),
        (
            lambda top: [shutil.rmtree(top / f"{s}/sad") for s in ("train", "validation")],
            "1 class:",
        ),
    ],
)
def test_folders_that_do_not_fit_together(tmp_path, change, message):
    top = small(tmp_path / "faces")
    change(top)
    with pytest.raises(UserError, match=message) as caught:
        load(top, tmp_path / "tfds")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "tfds").exists()


def test_sources_that_are_none(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        load(tmp_path / "nowhere", tmp_path / "tfds")
    (tmp_path / "x.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"is no folder and no \.csv"):
        load(tmp_path / "x.zip", tmp_path / "tfds")
    small(tmp_path / "outer/inner")
    with pytest.raises(UserError, match=f"give {tmp_path}/outer/inner"):
        load(tmp_path / "outer", tmp_path / "tfds")
    make(tmp_path / "two", {"train/a": 1, "train/b": 1})
    with pytest.raises(UserError, match="each class has too few different pictures"):
        load(tmp_path / "two", tmp_path / "tfds")
    with pytest.raises(UserError, match="two sources are given"):
        arrays.builder("image_folder:x", source="y")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,label\n", "no column 'path'"),
        ("path,class\n", "no column 'label'"),
        ("", "no column 'path'"),
        ("path,label\n,a\n", "line 2: the path is empty"),
        ("path,label\nx\0.png,a\n", "line 2: the path is empty, or not one"),
        ("path,label\nx.png,a\nx.png,b\n", "line 3: x.png is on line 2 already"),
        ("path,label,split\nx.png,a,dev\n", "split 'dev' is none of train, validation"),
        ("path,label,split\nx.png,,test\n", "x.png is in split test and has no label"),
        ("path,label\nx.png,a\ny.png,b\n", "2 of 2 pictures can't be read"),
        (b"path,label\n\xff\xfe,a\n", "not CSV text in UTF-8"),
    ],
)
def test_a_csv_that_is_wrong(tmp_path, text, message):
    path = tmp_path / "faces.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message) as caught:
        load(path, tmp_path / "tfds")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["7", "2000", "blue", "48-grey", "48 rgb"])
def test_forms_that_are_none(tmp_path, name):
    with pytest.raises(UserError, match="is no size from 8 to 1024"):
        arrays.builder(f"image_folder/{name}", source=str(tmp_path))


# --- where it is kept ----------------------------------------------------------------------------


def test_prepared_once_and_anew_when_the_folder_changes(tmp_path, monkeypatch):
    top, data_dir = small(tmp_path / "faces"), tmp_path / "tfds"
    first = load(top, data_dir)
    with monkeypatch.context() as patch:
        patch.setattr(spool, "read", None)  # not called again
        assert load(top, data_dir).digest == first.digest
        assert load("", data_dir).digest == first.digest  # the only one in this form
        moved = top.rename(tmp_path / "renamed")
        assert load(moved, data_dir).digest == first.digest
    os.utime(moved / "train/sad/0.png", (1, 1))
    picture(moved / "train/sad/0.png", 99, (8, 8))
    second = load(moved, data_dir)
    assert second.digest != first.digest
    with pytest.raises(UserError, match="there are several prepared"):
        load("", data_dir)
    (old,) = (p for p in data_dir.glob("image_folder/8*") if p.name != second_path(moved))
    assert load("", data_dir, f"image_folder/{old.name}").digest == first.digest
    with pytest.raises(UserError, match="is not what image_folder/8_grey-"):
        load(moved, data_dir, f"image_folder/{old.name}")
    with pytest.raises(UserError, match="has no source, and none is prepared"):
        load("", data_dir, "image_folder/9")


def second_path(source):
    return f"8_grey-{folders.read(str(source)).key}"


CHILD = """
import sys
from ferjax.data import arrays, image_folder
original = image_folder.ImageFolder._generate_examples
def stuck(self, faces):
    for number, item in enumerate(original(self, faces)):
        if number == 1:
            print("half", flush=True)
            sys.stdin.read()
        yield item
image_folder.ImageFolder._generate_examples = stuck
arrays.load("image_folder/8", source=sys.argv[1], data_dir=sys.argv[2])
"""


def test_killed_in_the_middle(tmp_path):
    top = small(tmp_path / "faces")
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(top), str(tmp_path / "tfds")],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout.readline() == "half\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (left,) = (tmp_path / "tfds/image_folder").glob("8*/*")
    assert left.name.startswith("incomplete")
    assert len(load(top, tmp_path / "tfds").splits["train"]) == 5
    assert left.exists()  # another machine might still be writing there
    for path in (*left.iterdir(), left):
        os.utime(path, (0, 0))
    assert len(load(top, tmp_path / "tfds").splits["train"]) == 5
    names = {p.name for p in (tmp_path / "tfds").rglob("*") if p.is_dir()}
    ours = {"image_folder", second_path(top), VERSION}
    assert names == {*ours, ".config", "downloads", "extracted"}  # three of TFDS's own


def test_threads_run_only_a_little_ahead(monkeypatch):
    monkeypatch.setattr(spool.os, "cpu_count", lambda: 64)
    started = []

    def work(item):
        started.append(item)
        return item * item

    ahead = 0
    for number, result in enumerate(spool.in_order(work, range(5000))):
        assert result == number * number
        ahead = max(ahead, len(started) - number)
    assert ahead < 1000
    assert len(started) == 5000


def test_the_command_takes_the_short_form(tmp_path):
    top = small(tmp_path / "my faces")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "ferjax.data.prepare", "--detect"),
            *(f"--dataset=image_folder/8:{top}", f"--data.data_dir={tmp_path}/tfds"),
        ],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "image_folder/8_grey_detect-" in done.stdout
    assert "happy  sad  all" in done.stdout
    last = done.stdout.splitlines()[-1]
    keys = {"name": "image_folder/8_detect", "source": f"'{top}'", "data_dir": tmp_path / "tfds"}
    assert last.endswith(" ".join(f"--config.data.{key}={value}" for key, value in keys.items()))


def test_parse_and_form_agree():
    for name in ("48_grey", "96_rgb_detect", "8_grey_unlabeled"):
        assert image_folder.parse(name).form == name
    assert image_folder.parse("rgb_detect-0123456789ab").key == "0123456789ab"
    assert image_folder.parse("").form == "48_grey"


def test_what_a_run_saw_is_found_after_its_folder_has_changed(tmp_path):
    top, data_dir = small(tmp_path / "faces"), tmp_path / "tfds"
    c = configs.base()
    c.algorithm = {"name": "supervised"}
    c.model = {"name": "cnn", "preset": "small"}
    c.data.update(name="image_folder/8", source=str(top), data_dir=str(data_dir))
    config = configs.finalize(c)
    before = load(top, data_dir)
    picture(top / "train/happy/new.png", 77, (8, 8))
    after = load(top, data_dir)
    assert len(after.splits["train"]) == len(before.splits["train"]) + 1
    own_digest = {"data_digest": before.digest, "class_names": list(before.class_names)}
    own = load_data(config, ("train",), recorded=own_digest)
    assert own.digest == before.digest
    np.testing.assert_array_equal(own.splits["train"].images, before.splits["train"].images)
    # The folder as it is now, where that is asked for, or nothing is known of the run's data.
    assert load_data(config, ("train",), source=str(top), recorded=own_digest).digest == (
        load_data(config, ("train",)).digest
    )
    assert load_data(config, ("train",), recorded={"data_digest": "0" * 64}).digest == after.digest
    shutil.rmtree(top)
    assert load_data(config, ("train",), recorded=own_digest).digest == before.digest
    next(data_dir.glob(f"image_folder/*/{VERSION}/metadata.json")).write_text("[")

    def find(digest):
        return arrays.prepared_as("image_folder", digest, data_dir=str(data_dir))

    assert sorted(map(bool, map(find, (before.digest, after.digest)))) == [False, True]


def test_of_two_sets_with_equal_pictures_the_one_with_the_runs_classes_is_found(tmp_path):
    data_dir = str(tmp_path / "tfds")
    for number, sad in enumerate(("sad", "unhappy", "sorry", "sulky")):
        top = small(tmp_path / str(number))
        for split in ("train", "validation"):
            (top / split / "sad").rename(top / split / sad)
        data = load(top, data_dir)
    for sad in ("sad", "unhappy", "sorry", "sulky"):
        name = arrays.prepared_as("image_folder", data.digest, ("happy", sad), data_dir)
        assert arrays.load(name, data_dir=data_dir).class_names == ("happy", sad)
