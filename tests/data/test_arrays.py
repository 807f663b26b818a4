"""Arrays from prepared data: right content, the digest, and what happens when it is damaged."""

import dataclasses
import errno
import hashlib
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from ferjax.config import UnreachableError, UserError
from ferjax.data import arrays
from ferjax.data.builder import unreadable

ALL = ("train", "public_test", "private_test")
TINY = "synthetic_faces/tiny"


def load(data_dir, splits=("train", "public_test"), name=TINY):
    return arrays.load(name, data_dir=str(data_dir), splits=splits)


def test_arrays_equal_what_pillow_decodes(prepared_tiny):
    data = load(prepared_tiny)
    assert set(data.splits) == {"train", "public_test"}
    assert data.class_names == (
        "angry", "disgust", "fear", "happy", "sad", "surprise", "neutral",
    )  # fmt: skip
    train = data.splits["train"]
    assert (train.images.dtype, train.labels.dtype, train.rows.dtype) == ("u1", "i4", "i4")
    assert train.images.shape == (280, 48, 48, 1)
    builder = tfds.builder(TINY, data_dir=prepared_tiny)
    source = builder.as_data_source("train", decoders={"image": tfds.decode.SkipDecoding()})
    for place in range(0, 280, 7):
        record = source[place]
        assert train.rows[place] == record["row"] == place
        assert train.labels[place] == record["label"]
        np.testing.assert_array_equal(
            train.images[place, ..., 0], np.asarray(Image.open(io.BytesIO(record["image"])))
        )


def test_the_digest_is_that_of_all_splits(prepared_tiny):
    data = load(prepared_tiny, ALL)
    lines = ""
    for name in ALL:
        split = data.splits[name]
        content = str(split.images.shape).encode()
        content += split.rows.astype("<i4").tobytes() + split.labels.astype("<i4").tobytes()
        lines += f"{name} {hashlib.sha256(content + split.images.tobytes()).hexdigest()}\n"
    assert data.digest == hashlib.sha256(lines.encode()).hexdigest()
    assert load(prepared_tiny, ("private_test",)).digest == data.digest


def test_frozen(prepared_tiny):
    with pytest.raises(dataclasses.FrozenInstanceError):
        load(prepared_tiny).digest = ""


def test_the_directory_comes_from_the_environment_at_call_time(tiny_copy, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tiny_copy))
    builder = arrays.builder(TINY)
    assert Path(builder.data_path) == tiny_copy / "synthetic_faces/tiny/1.0.0"
    assert builder.is_prepared()


def test_what_does_not_exist(prepared_tiny):
    with pytest.raises(UserError, match=r"no split 'test': it has train, public_test"):
        load(prepared_tiny, ("test",))
    with pytest.raises(UserError, match=r"no split 'unlabeled': it has train, public_test"):
        load(prepared_tiny, ("train", "unlabeled"))
    with pytest.raises(UserError, match="synthetic_faces"):
        load(prepared_tiny, name="synthetic_face")
    with pytest.raises(UserError, match="no config 'huge': it has standard, tiny"):
        load(prepared_tiny, name="synthetic_faces/huge")


def test_a_builder_made_before_another_process_prepared(tmp_path):
    early = arrays.builder(TINY, data_dir=str(tmp_path))
    expected = load(tmp_path).digest
    early.download_and_prepare()
    assert arrays.read(early, ("train",)).digest == expected


def flip(place):
    def damage(path):
        content = bytearray(path.read_bytes())
        content[place] ^= 1
        path.write_bytes(content)

    return damage


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("*train*", Path.unlink),
        ("*train*", lambda path: path.write_bytes(b"")),
        ("*train*", lambda path: path.write_bytes(path.read_bytes()[:200000])),
        ("*train*", flip(1000)),
        ("metadata.json", Path.unlink),
        ("metadata.json", lambda path: path.write_text("")),
        ("dataset_info.json", Path.unlink),
        ("dataset_info.json", lambda path: path.write_text("{")),
    ],
)
def test_damaged_records_are_refused(tiny_copy, file, damage):
    (path,) = (tiny_copy / "synthetic_faces/tiny/1.0.0").glob(file)
    damage(path)
    with pytest.raises(UserError, match=r"is damaged .* delete this folder") as caught:
        load(tiny_copy)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="of Linux")
@pytest.mark.parametrize("file", ["*train*", "dataset_info.json"])
def test_a_disk_that_fails_is_no_damage(tiny_copy, file):
    (path,) = (tiny_copy / "synthetic_faces/tiny/1.0.0").glob(file)
    path.unlink()
    path.symlink_to("/proc/self/mem")  # nothing is mapped at its start: EIO
    with pytest.raises(UnreachableError, match=r"can't be read \(.*: Input/output error\)$"):
        load(tiny_copy)


def test_data_that_may_not_be_read_are_not_damaged(tmp_path):
    refused = PermissionError(errno.EACCES, "Permission denied", f"{tmp_path}/metadata.json")
    error = unreadable(tmp_path, refused)
    assert type(error) is UserError
    assert str(error).startswith(f"{tmp_path}/metadata.json: Permission denied: ")
    assert "delete" not in str(error)


def test_other_pixels_than_were_prepared_are_refused(tiny_copy):
    folder = tiny_copy / "synthetic_faces/tiny/1.0.0"
    path = folder / "metadata.json"
    text = path.read_text()
    digest = load(tiny_copy).digest
    train = tfds.builder(TINY, data_dir=tiny_copy).info.metadata["split_digests"]["train"]
    path.write_text(text.replace(train, digest))
    with pytest.raises(UserError, match="train decodes to other images"):
        load(tiny_copy)


def test_a_disk_that_fills_while_a_set_is_prepared(tmp_path):
    code = f"""
import resource, signal
from ferjax.config import UserError
from ferjax.data import arrays
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    arrays.load("{TINY}", data_dir="{tmp_path}")
except UserError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert f"cannot write {tmp_path}" in done.stdout, done.stderr
    assert "File too large" in done.stdout


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*--config.data.data_dir="):
        load(tmp_path / "file")


def test_the_command_prints_the_table(tiny_copy):
    def prepare(name):
        return subprocess.run(
            [
                sys.executable,
                "-m",
                "ferjax.data.prepare",
                f"--dataset={name}",
                f"--data.data_dir={tiny_copy}",
            ],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[2],
        )

    done = prepare(TINY)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[1].split() == ["split", *load(tiny_copy).class_names, "all"]
    data = load(tiny_copy, ALL)
    for name, line in zip(ALL, lines[2:5], strict=True):
        counts = np.bincount(data.splits[name].labels, minlength=7)
        assert line.split() == [name, *map(str, counts), str(len(data.splits[name]))]
    assert len({len(line) for line in lines[1:5]}) == 1
    assert len(lines[1]) <= 80
    assert data.digest in done.stdout
    wrong = prepare("nothing")
    assert wrong.returncode == 2
    assert "Traceback" not in wrong.stderr
