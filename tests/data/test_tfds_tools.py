"""What TFDS's own test case asks of a builder, for each of ours, and TFDS's own tools."""

import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import simple_parsing
import tensorflow_datasets as tfds
from tensorflow_datasets.scripts.cli import build

from ferjax.config import UserError
from ferjax.data import arrays, fer2013, image_folder, synthetic_faces

SETS = {
    "fer2013": (fer2013.Fer2013, "jpeg", {"train": 42, "public_test": 14, "private_test": 14}),
    "synthetic_faces": (
        *(synthetic_faces.SyntheticFaces, "tiny"),
        {"train": 280, "public_test": 70, "private_test": 70},
    ),
    "image_folder": (
        *(image_folder.ImageFolder, "16_rgb"),
        {"train": 9, "public_test": 2, "unlabeled": 3},
    ),
}


@pytest.fixture
def sources(small_fer2013, tmp_path):
    rng = np.random.default_rng(0)
    for folder, count in (("train/a", 6), ("train/b", 5), ("unlabeled", 3)):
        (tmp_path / "own" / folder).mkdir(parents=True)
        for number in range(count):
            image = rng.integers(0, 256, (20, 30, 3), np.uint8)
            cv2.imwrite(str(tmp_path / "own" / folder / f"{number}.png"), image)
    small_fer2013.folder(tmp_path / "fer")
    return {"fer2013": str(tmp_path / "fer"), "image_folder": str(tmp_path / "own")}


@pytest.fixture(params=SETS)
def prepared(request, sources, tmp_path):
    """A set's name, and its builder, made and prepared by TFDS's own means."""
    given = {"source": sources[request.param]} if request.param in sources else {}
    name = f"{request.param}/{SETS[request.param][1]}"
    builder = tfds.builder(name, data_dir=tmp_path / "tfds", **given)
    assert type(builder) is SETS[request.param][0] is tfds.builder_cls(request.param)
    builder.download_and_prepare()
    return request.param, builder


def test_what_is_written_down(prepared):
    name, builder = prepared
    read = tfds.builder_from_directory(builder.data_path)
    info = read.info
    assert {split: part.num_examples for split, part in info.splits.items()} == SETS[name][2]
    assert info.description.strip()
    assert info.citation.strip()
    assert info.redistribution_info.license.strip()
    assert (builder.data_path / "LICENSE").exists()
    assert str(builder.version) in builder.RELEASE_NOTES
    assert info.supervised_keys == ("image", "label")
    assert info.features["label"].names == builder.info.features["label"].names
    digests = [info.metadata["digest"], *info.metadata["split_digests"].values()]
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in digests)
    assert len(set(digests)) == len(digests) == 1 + len(info.splits)


def test_every_record_fits_the_features_and_is_there_once(prepared):
    name, builder = prepared
    image, classes = (builder.info.features[key] for key in ("image", "label"))
    rows, contents = [], set()
    for split, count in SETS[name][2].items():
        source = builder.as_data_source(split)
        assert len(source) == count
        for record in source:
            assert set(record) == {"image", "label", "row"}
            assert (record["image"].dtype, record["image"].shape) == (np.uint8, image.shape)
            allowed = [-1] if split == "unlabeled" else range(classes.num_classes)
            assert int(record["label"]) in allowed
            rows.append(int(record["row"]))
            contents.add(record["image"].tobytes())
    assert rows == list(range(len(rows)))
    assert len(contents) == len(rows)


def test_preparing_again_touches_nothing(prepared):
    _, builder = prepared
    before = {path: path.stat().st_mtime_ns for path in _files(builder)}
    builder.download_and_prepare()
    again = tfds.builder_from_directory(builder.data_path)
    again.download_and_prepare()
    assert {path: path.stat().st_mtime_ns for path in _files(builder)} == before


def _files(builder):
    return sorted(Path(builder.data_path).iterdir())


def test_tfds_load(prepared_tiny, tmp_path):
    """TFDS makes a tf.data of TFRecord files alone."""
    pytest.importorskip("tensorflow")
    kwargs = {"data_dir": tmp_path, "builder_kwargs": {"file_format": "tfrecord"}}
    read, info = tfds.load("synthetic_faces/tiny", split="train", with_info=True, **kwargs)
    source = tfds.data_source("synthetic_faces/tiny", split="train", data_dir=prepared_tiny)
    for count, (record, other) in enumerate(zip(read.as_numpy_iterator(), source, strict=True)):
        if count % 50 == 0:
            np.testing.assert_array_equal(record["image"], other["image"])
        assert (record["row"], record["label"]) == (other["row"], other["label"])
    assert (
        info.metadata["digest"]
        == arrays.load("synthetic_faces/tiny", data_dir=prepared_tiny, splits=["train"]).digest
    )
    with pytest.raises(UserError, match="are of another file format"):
        arrays.load("synthetic_faces/tiny", data_dir=str(tmp_path), splits=["train"])


def test_tfds_build(prepared, sources, tmp_path, monkeypatch):
    """`tfds build`; the command's file itself imports Apache Beam, this part of it does not."""
    name, builder = prepared
    monkeypatch.setenv("FER2013_SOURCE", sources["fer2013"])
    config = SETS[name][1]
    if name == "image_folder":
        form = {"name": "any", "size": 16, "channels": 3, "source": sources[name]}
        config = json.dumps(form)
    parser = simple_parsing.ArgumentParser()
    parser.add_arguments(build.Args, "args")
    given = [name, f"--imports=ferjax.data.{name}", f"--data_dir={tmp_path}/built"]
    parser.parse_args([*given, "--config", config]).args.execute()
    built = tfds.builder_from_directory(
        tmp_path / "built" / name / builder.builder_config.name / str(builder.VERSION)
    )
    assert built.info.metadata["digest"] == builder.info.metadata["digest"]
