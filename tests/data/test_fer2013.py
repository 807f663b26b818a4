"""Every form of FER2013 gives the same rows; every wrong one gives one line and no data."""

import csv
import hashlib
import http.server
import io
import os
import signal
import socketserver
import subprocess
import sys
import threading
import zipfile
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from ferjax.config import UserError
from ferjax.data import arrays, fer2013

ALL = ("train", "public_test", "private_test")


def load(source, data_dir, **kwargs):
    return arrays.load("fer2013", source=str(source), data_dir=str(data_dir), splits=ALL, **kwargs)


def version_folders(data_dir):
    return [path for path in Path(data_dir).rglob("1.0.0") if path.is_dir()]


def form(miniature, name, folder):
    """One of the published forms, written under `folder`."""
    return {
        "folder": lambda: miniature.folder(folder / "faces"),
        "wrapped": lambda: miniature.folder(folder / "faces", "Facial-Expression-Dataset-36180"),
        "twice wrapped": lambda: miniature.folder(folder / "faces", "download/archive"),
        "zip": lambda: miniature.zip(folder / "faces.zip"),
        "wrapped zip": lambda: miniature.zip(folder / "faces.zip", "Facial-Expression-36180/"),
        "fer2013.csv": lambda: miniature.csv(folder / "fer2013.csv"),
        "icml": lambda: miniature.csv(folder / "icml_face_data.csv", icml=True),
    }[name]()


@pytest.mark.parametrize(
    "name", ["folder", "wrapped", "twice wrapped", "zip", "wrapped zip", "fer2013.csv", "icml"]
)
def test_every_form_gives_the_official_rows(small_fer2013, tmp_path, name):
    data = load(form(small_fer2013, name, tmp_path), tmp_path / "tfds")
    rows = np.concatenate([data.splits[split].rows for split in ALL])
    labels = np.concatenate([data.splits[split].labels for split in ALL])
    images = np.concatenate([data.splits[split].images for split in ALL])
    np.testing.assert_array_equal(rows, np.arange(70))
    np.testing.assert_array_equal(labels, small_fer2013.labels)
    assert [len(data.splits[split]) for split in ALL] == [42, 14, 14]
    if "csv" in name or name == "icml":
        expected = small_fer2013.pixels
    else:
        expected = [np.asarray(Image.open(io.BytesIO(jpeg))) for jpeg in small_fer2013.jpegs]
    np.testing.assert_array_equal(images[..., 0], expected)


def test_tfds_finds_the_prepared_set_and_keeps_the_original_bytes(small_fer2013, tmp_path):
    load(small_fer2013.folder(tmp_path / "faces"), tmp_path / "tfds")
    builder = tfds.builder("fer2013", data_dir=tmp_path / "tfds")
    assert builder.info.full_name == "fer2013/jpeg/1.0.0"
    assert builder.info.features["label"].names == [
        "angry", "disgust", "fear", "happy", "sad", "surprise", "neutral",
    ]  # fmt: skip
    source = builder.as_data_source("public_test")
    assert [int(source[i]["row"]) for i in range(len(source))] == list(range(42, 56))
    assert source[0]["image"].shape == (48, 48, 1)
    assert source[0]["image"].dtype == np.uint8
    kept = builder.as_data_source("train", decoders={"image": tfds.decode.SkipDecoding()})
    assert kept[3]["image"] == small_fer2013.jpegs[3]
    assert "goodfellow2013challenges" in builder.info.citation


def test_jpeg_and_csv_lie_side_by_side(small_fer2013, tmp_path):
    by_csv = load(small_fer2013.csv(tmp_path / "fer2013.csv"), tmp_path / "tfds")
    # Only the CSV's pixels are prepared: without a source they are used.
    assert load("", tmp_path / "tfds").digest == by_csv.digest
    by_jpeg = load(small_fer2013.folder(tmp_path / "faces"), tmp_path / "tfds")
    assert by_jpeg.digest != by_csv.digest
    assert load("", tmp_path / "tfds").digest == by_jpeg.digest
    again = arrays.load("fer2013/csv", data_dir=str(tmp_path / "tfds"))
    assert again.digest == by_csv.digest


def test_source_from_the_environment(small_fer2013, tmp_path, monkeypatch):
    monkeypatch.setenv("FER2013_SOURCE", str(small_fer2013.zip(tmp_path / "faces.zip")))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    assert len(arrays.load("fer2013").splits["train"]) == 42
    assert [path.parent.name for path in version_folders(tmp_path / "tfds")] == ["jpeg"]


# --- what the user may get wrong -----------------------------------------------------------------


def wrong(source, tmp_path, *parts, **kwargs):
    """`source` gives one line that names all `parts`, and leaves the data directory untouched.

    Returns the exit status.
    """
    data_dir = tmp_path / "tfds"
    with pytest.raises(UserError) as caught:
        load(source, data_dir, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    assert not data_dir.exists()
    return caught.value.status


def test_a_missing_source_is_an_error_even_when_all_is_prepared(small_fer2013, tmp_path):
    wrong(tmp_path / "nowhere", tmp_path, str(tmp_path / "nowhere"), "does not exist")
    load(small_fer2013.folder(tmp_path / "faces"), tmp_path / "tfds")
    with pytest.raises(UserError, match="does not exist"):
        load(tmp_path / "nowhere", tmp_path / "tfds")


def test_a_source_of_the_other_kind_than_the_config(small_fer2013, tmp_path):
    source = str(small_fer2013.csv(tmp_path / "fer2013.csv"))
    with pytest.raises(UserError, match="ask for fer2013/csv"):
        arrays.load("fer2013/jpeg", source=source, data_dir=str(tmp_path / "tfds"))


@pytest.mark.parametrize("name", ["notes.txt", "weights.bin", "empty"])
def test_a_file_that_is_nothing_of_it(tmp_path, name):
    (tmp_path / name).write_bytes(b"" if name == "empty" else b"\x00\x01hello\n" * 99)
    wrong(tmp_path / name, tmp_path, name, "neither a folder, nor a zip, nor a CSV")


def test_an_empty_folder_and_a_wrong_folder(small_fer2013, tmp_path):
    (tmp_path / "empty").mkdir()
    wrong(tmp_path / "empty", tmp_path, "empty holds no train/<class>/<row>.jpg")
    small_fer2013.folder(tmp_path / "faces")
    wrong(tmp_path / "faces/train", tmp_path, "the folder (or zip) above train/")


def edited_csv(miniature, path, line, column, change):
    """The miniature's CSV with one cell changed; `line` counts from the header's, 1."""
    lines = [["emotion", "pixels", "Usage"], *miniature.csv_lines()]
    lines[line - 1][column] = change(lines[line - 1][column])
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(lines)
    return path


def swap_pixel(place, value):
    def change(text):
        tokens = text.split()
        tokens[place] = value
        return " ".join(tokens)

    return change


@pytest.mark.parametrize(
    ("line", "column", "change", "parts"),
    [
        (1, 0, lambda _: "label", ["no column 'emotion'", "label, pixels, Usage"]),
        (1, 1, lambda _: "image", ["no column 'pixels'"]),
        (1, 2, lambda _: "split", ["no column 'Usage'"]),
        (4, 1, lambda text: text.rsplit(" ", 1)[0], ["line 4 (row 2)", "2,303 values", "2,304"]),
        (4, 1, lambda text: text + " 0", ["line 4 (row 2)", "2,305 values"]),
        (3, 1, lambda text: "", ["line 3 (row 1)", "0 values"]),
        (3, 1, swap_pixel(7, "256"), ["line 3 (row 1), column pixels: value 8 is '256'"]),
        (3, 1, swap_pixel(0, "-1"), ["line 3 (row 1), column pixels: value 1 is '-1'"]),
        (3, 1, swap_pixel(2303, "x"), ["line 3 (row 1), column pixels: value 2304 is 'x'"]),
        (3, 1, swap_pixel(9, "1.5"), ["value 10 is '1.5'"]),
        (9, 0, lambda _: "7", ["line 9 (row 7), column emotion: '7'", "0 to 6"]),
        (9, 0, lambda _: "", ["column emotion: ''"]),
        (5, 2, lambda _: "Test", ["line 5 (row 3), column Usage: 'Test'", "PublicTest"]),
        (5, 2, lambda _: "PrivateTest", ["line 5 (row 3)", "official order has Training"]),
    ],
)
def test_a_wrong_cell(small_fer2013, tmp_path, line, column, change, parts):
    path = edited_csv(small_fer2013, tmp_path / "fer2013.csv", line, column, change)
    wrong(path, tmp_path, "fer2013.csv", *parts)


def test_a_csv_with_too_few_or_too_many_lines(small_fer2013, tmp_path):
    path = small_fer2013.csv(tmp_path / "fer2013.csv")
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:4]))
    wrong(path, tmp_path, "row 3 is missing (67 rows are missing in all)")
    path.write_text("\n".join([*lines, lines[-1]]))
    wrong(path, tmp_path, "line 72 (row 70): more than 70 rows")
    path.write_text("\n".join([*lines[:9], lines[8] + ",1", *lines[9:]]))
    wrong(path, tmp_path, "line 10 (row 8) has 4 columns where the header has 3")
    path.write_text("")
    wrong(path, tmp_path, "no column 'emotion'")
    path.write_bytes("\n".join(lines[:3]).encode() + b"\n\xff\xfe\x00")
    wrong(path, tmp_path, "fer2013.csv", "not CSV text")


def test_rows_in_another_order_are_noticed(small_fer2013, tmp_path):
    path = small_fer2013.csv(tmp_path / "fer2013.csv")
    header, *lines = path.read_text().splitlines()
    path.write_text("\n".join([header, *lines[::-1]]))
    wrong(path, tmp_path, "line 2 (row 0)", "PrivateTest", "reordered")


def test_labels_that_were_changed(small_fer2013, tmp_path):
    path = edited_csv(
        small_fer2013, tmp_path / "fer2013.csv", 50, 0, lambda text: str((int(text) + 1) % 7)
    )
    wrong(path, tmp_path, "public_test has", "labels were changed")


def test_a_damaged_image(small_fer2013, tmp_path):
    folder = small_fer2013.folder(tmp_path / "faces")
    name, whole = small_fer2013.names[5], small_fer2013.jpegs[5]
    for content, part in [
        (whole[:-40], "cut off"),
        (b"", "not a JPEG"),
        (b"\x89PNG\r\n", "not a JPEG"),
        (whole[:4] + bytes(60) + b"\xff\xd9", "damaged JPEG"),
        (cv2.imencode(".jpg", np.zeros((48, 47), np.uint8))[1].tobytes(), "47x48"),
        (cv2.imencode(".jpg", np.zeros((48, 48, 3), np.uint8))[1].tobytes(), "in colour"),
    ]:
        (folder / name).write_bytes(content)
        wrong(folder, tmp_path, name, part)
    # An intact image of the right size that is not the published one.
    (folder / name).write_bytes(cv2.imencode(".jpg", np.zeros((48, 48), np.uint8))[1].tobytes())
    wrong(folder, tmp_path, "not the published files")


def test_wrong_files_in_the_tree(small_fer2013, tmp_path):
    folder = small_fer2013.folder(tmp_path / "faces")
    (folder / small_fer2013.names[9]).unlink()
    wrong(folder, tmp_path, "row 9 is missing:")
    small_fer2013.folder(folder)
    (folder / ".DS_Store").touch()  # what file managers leave is no fault
    (folder / "train/happy/._3.jpg").touch()
    load(folder, tmp_path / "good")

    other = folder / "validation/fear/007.jpg"
    other.write_bytes(small_fer2013.jpegs[7])
    wrong(folder, tmp_path, "row 7 is there twice", small_fer2013.names[7], other.name)
    other.rename(folder / "validation/fear/face.jpg")
    wrong(folder, tmp_path, "fear/face.jpg is not named by its official row")
    (folder / "validation/fear/face.jpg").rename(folder / "validation/fear/1.jpg")
    (folder / "validation/fear/1.jpg").rename(folder / f"validation/fear/{'1' * 200}.jpg")
    wrong(folder, tmp_path, "is not named by its official row")
    (folder / f"validation/fear/{'1' * 200}.jpg").rename(folder / "validation/fear/70.jpg")
    wrong(folder, tmp_path, "fear/70.jpg", "0 to 69")
    (folder / "validation/fear").rename(folder / "validation/contempt")
    wrong(folder, tmp_path, "'contempt'", "angry, disgust")


def test_the_data_twice(small_fer2013, tmp_path):
    small_fer2013.folder(tmp_path / "faces", "a")
    (tmp_path / "faces/b/train/happy").mkdir(parents=True)
    (tmp_path / "faces/b/train/happy/99.jpg").touch()
    path = tmp_path / "faces.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/train/happy/1.jpg", small_fer2013.jpegs[1])
        archive.writestr("b/train/happy/2.jpg", small_fer2013.jpegs[2])
    wrong(path, tmp_path, "in a/ and again in b/")


@pytest.mark.parametrize(
    "name", ["../train/happy/3.jpg", "/etc/happy/3.jpg", "a/../../3.jpg", "..\\3.jpg", "C:\\3.jpg"]
)
def test_zip_members_that_point_outside(small_fer2013, tmp_path, name):
    path = small_fer2013.zip(tmp_path / "faces.zip")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, b"evil")
    before = sorted(tmp_path.rglob("*"))
    wrong(path, tmp_path, repr(name), "outside the zip")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_broken_zip(small_fer2013, tmp_path):
    path = small_fer2013.zip(tmp_path / "faces.zip")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    wrong(path, tmp_path, "broken zip")
    path.write_text("<html>Not found</html>")
    wrong(path, tmp_path, "broken zip")
    # The version that is needed to unpack a member, in the directory at the end.
    place = whole.index(b"PK\1\2") + 6
    path.write_bytes(whole[:place] + b"\x63" + whole[place + 1 :])
    wrong(path, tmp_path, "broken zip", "version 9.9")
    place = whole.index(small_fer2013.jpegs[20]) + 30
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
    wrong(path, tmp_path, "cannot read member " + small_fer2013.names[20], "CRC")


def test_a_good_preparation_follows_a_bad_one(small_fer2013, tmp_path, monkeypatch):
    folder = small_fer2013.folder(tmp_path / "faces")
    with monkeypatch.context() as patch:  # the disk fills up when half is written

        def full(self, faces):
            for number, item in enumerate(original(self, faces)):
                if number == 5:
                    raise OSError(28, "No space left on device")
                yield item

        original = fer2013.Fer2013._generate_examples
        patch.setattr(fer2013.Fer2013, "_generate_examples", full)
        with pytest.raises(UserError, match="No space left on device"):
            load(folder, tmp_path / "tfds")
    assert not version_folders(tmp_path / "tfds")
    assert not list((tmp_path / "tfds").rglob("incomplete*"))
    assert len(load(folder, tmp_path / "tfds").splits["train"]) == 42


# --- the download --------------------------------------------------------------------------------


class _Files(http.server.BaseHTTPRequestHandler):
    content = b""
    claimed = 0

    def do_GET(self):
        if self.path != "/archive.zip":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(self.claimed or len(self.content)))
        self.end_headers()
        self.wfile.write(self.content)

    def log_message(self, *args):
        pass


@pytest.fixture
def serve():
    """Starts a server that gives some bytes as /archive.zip; returns its address."""
    servers = []

    def start(content, claimed=0):
        handler = type("Handler", (_Files,), {"content": content, "claimed": claimed})
        server = socketserver.TCPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.slow
def test_download_of_an_archive_at_full_size(serve, tmp_path, monkeypatch):
    monkeypatch.delenv("FER2013_SOURCE", raising=False)
    # The published class table, in rows; one grey level a class is image enough.
    table = np.array(
        [
            [3995, 436, 4097, 7215, 4830, 3171, 4965],
            [467, 56, 496, 895, 653, 415, 607],
            [491, 55, 528, 879, 594, 416, 626],
        ]
    )
    rng = np.random.default_rng(0)
    labels = np.concatenate([rng.permutation(np.repeat(np.arange(7), row)) for row in table])
    jpegs = [
        cv2.imencode(".jpg", np.full((48, 48), 30 * k, np.uint8))[1].tobytes() for k in range(7)
    ]
    names = ("angry", "disgust", "fear", "happy", "sad", "surprise", "neutral")
    packed, digest = io.BytesIO(), hashlib.sha256()
    with zipfile.ZipFile(packed, "w") as archive:
        for row, label in enumerate(labels.tolist()):
            top = "validation" if row % 5 == 0 else "train"
            name = f"Facial-Expression-Dataset-361800d/{top}/{names[label]}/{row}.jpg"
            archive.writestr(name, jpegs[label])
            digest.update(jpegs[label])
    url = serve(packed.getvalue()) + "/archive.zip"
    wrong("", tmp_path, url, "not the published files", url=url)
    monkeypatch.setattr(fer2013, "JPEG_SHA256", digest.hexdigest())
    data = load("", tmp_path / "tfds", url=url)
    counts = [np.bincount(data.splits[split].labels, minlength=7) for split in ALL]
    np.testing.assert_array_equal(counts, table)
    np.testing.assert_array_equal(
        np.concatenate([data.splits[split].rows for split in ALL]), np.arange(35887)
    )


def test_a_download_that_fails(small_fer2013, serve, tmp_path, monkeypatch):
    whole = small_fer2013.zip(tmp_path / "faces.zip", "wrapper/").read_bytes()
    here = serve(whole)
    gone = wrong("", tmp_path, "404", "--config.data.source=", url=here + "/gone.zip")
    short = serve(whole[:5000], claimed=len(whole)) + "/archive.zip"
    cut = wrong("", tmp_path, short, f"5,000 of {len(whole):,} bytes", url=short)
    page = serve(b"<html>log in first</html>") + "/archive.zip"
    wrong("", tmp_path, page, "broken zip", url=page)
    with socketserver.TCPServer(("127.0.0.1", 0), _Files) as server:
        nobody = f"http://127.0.0.1:{server.server_address[1]}/archive.zip"
    closed = wrong("", tmp_path, nobody, "refused", "FER2013_SOURCE", url=nobody)
    assert wrong("", tmp_path, "unknown url type", url="foo.zip") == 2
    # A launcher starts a 1 again: the server may be back.
    assert (gone, cut, closed) == (2, 1, 1)
    monkeypatch.setenv("FER2013_URL", here + "/archive.zip")
    assert len(load("", tmp_path / "tfds").splits["train"]) == 42


# --- processes -----------------------------------------------------------------------------------

CHILD = """
import sys
from pathlib import Path
sys.path[:0] = [{tests!r}]
import numpy as np
from conftest import SIZES, USAGES
from ferjax.data import arrays, fer2013, sources
ends = np.cumsum(list(SIZES.values())).tolist()
sources.ROWS = ends[-1]
sources.USAGES = tuple(zip(USAGES, ends))
fer2013.CLASS_TABLE = {{name: (size // 7,) * 7 for name, size in SIZES.items()}}
"""


def child(code, *args):
    start = CHILD.format(tests=str(Path(__file__).parent))
    environment = {key: value for key, value in os.environ.items() if "FER2013" not in key}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    return subprocess.Popen(
        [sys.executable, "-c", start + code, *map(str, args)],
        env=environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def test_killed_in_the_middle(small_fer2013, tmp_path):
    path = small_fer2013.csv(tmp_path / "fer2013.csv")
    process = child(
        """
original = fer2013.Fer2013._generate_examples
def stuck(self, faces):
    for number, item in enumerate(original(self, faces)):
        if faces[0].row > 0 and number == 5:
            print("half", flush=True)
            sys.stdin.read()
        yield item
fer2013.Fer2013._generate_examples = stuck
arrays.load("fer2013", source=sys.argv[1], data_dir=sys.argv[2])
""",
        path,
        tmp_path / "tfds",
    )
    assert process.stdout.readline() == "half\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    left = list((tmp_path / "tfds/fer2013/csv").glob("incomplete*"))
    assert len(left) == 1
    assert not version_folders(tmp_path / "tfds")
    for old in (*left[0].iterdir(), left[0]):  # long ago: no other machine is still writing there
        os.utime(old, (0, 0))
    assert len(load(path, tmp_path / "tfds").splits["train"]) == 42
    assert not left[0].exists()


def test_processes_that_prepare_at_once_agree(small_fer2013, tmp_path):
    path = small_fer2013.csv(tmp_path / "fer2013.csv")
    code = """
print("ready", flush=True)
sys.stdin.readline()
print(arrays.load("fer2013", source=sys.argv[1], data_dir=sys.argv[2]).digest)
"""
    processes = [child(code, path, tmp_path / "tfds") for _ in range(3)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    digests = [process.communicate()[0] for process in processes]
    assert Counter(digests) == {load(path, tmp_path / "tfds").digest + "\n": 3}


def test_no_tensorflow(small_fer2013, tmp_path):
    # A stand-in, so that an import is noticed where the real one is not installed.
    (tmp_path / "packages/tensorflow").mkdir(parents=True)
    (tmp_path / "packages/tensorflow/__init__.py").write_text("print('imported')")
    process = child(
        """
sys.path.insert(0, sys.argv[3])
arrays.load("fer2013", source=sys.argv[1], data_dir=sys.argv[2])
arrays.load("synthetic_faces/tiny", data_dir=sys.argv[2])
print("tensorflow" in sys.modules)
""",
        small_fer2013.csv(tmp_path / "fer2013.csv"),
        tmp_path / "tfds",
        tmp_path / "packages",
    )
    assert process.communicate()[0] == "False\n"


def run_prepare(*args):
    environment = {key: value for key, value in os.environ.items() if "FER2013" not in key}
    return subprocess.run(
        [sys.executable, "-m", "ferjax.data.prepare", *args],
        env=environment,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )


def test_the_command_says_what_is_wrong_in_one_line(tmp_path):
    done = run_prepare(f"--data.source={tmp_path}/none", f"--data.data_dir={tmp_path}/tfds")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"ferjax: {tmp_path}/none does not exist")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "tfds").exists()


@pytest.mark.skipif("FER2013_SOURCE" not in os.environ, reason="needs FER2013_SOURCE")
def test_the_real_data(tmp_path):
    data = load(os.environ["FER2013_SOURCE"], tmp_path / "tfds")
    counts = [np.bincount(data.splits[split].labels, minlength=7).tolist() for split in ALL]
    assert counts == [
        [3995, 436, 4097, 7215, 4830, 3171, 4965],
        [467, 56, 496, 895, 653, 415, 607],
        [491, 55, 528, 879, 594, 416, 626],
    ]
    scaled = data.splits["train"].images / 255
    assert scaled.mean() == pytest.approx(0.5077, abs=1e-4)
    assert scaled.std() == pytest.approx(0.2551, abs=1e-4)
