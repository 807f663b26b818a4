"""Classifies faces: `python -m ferjax.predict photo.jpg folder 'more/*.png' clip.mp4`.

With the packaged network, or another: --workdir=DIR. In each picture the largest face is found
(OpenCV's Haar cascade), or all (--detect=all); pictures that are faces already are taken whole with
--no-detect. Of videos each tenth frame is looked at (--every). Prints a table; --output=x.json,
x.jsonl or x.csv writes it with all probabilities, and --annotate=DIR draws it into copies of the
pictures. What can't be read or shows no face has a row saying so.
"""

import csv
import io
import json
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from ferjax import config as configs
from ferjax import runtime
from ferjax.command import run
from ferjax.config import UserError
from ferjax.data.faces import faces, make_cascade
from ferjax.load import Trained, fit, load, read_config
from ferjax.predict_sources import Shot, find, shots

FLAGS = flags.FLAGS
log = logging.getLogger("ferjax")
DETECT = ("largest", "all", "none")
OUTPUTS = (".json", ".jsonl", ".csv")
NO_FACE = "no face found; for pictures that are faces already: --no-detect"
BATCH, MOST_BYTES = 256, 2**28  # faces, and bytes of pictures to draw, that wait for the network


def define_flags() -> None:
    """The command's flags; the same names may be defined by other commands in one process."""
    flags.DEFINE_string(
        "workdir",
        "small",
        "A run's directory, a .safetensors file, or small: it is in the package.",
    )
    flags.DEFINE_multi_string(
        "image", [], "A picture, a video, a folder or a pattern; the flag's name may be left out."
    )
    flags.DEFINE_string("detect", "largest", f"Which faces of a picture: {', '.join(DETECT)}.")
    flags.DEFINE_integer("every", 10, "Of a video, look at each N-th frame.", lower_bound=1)
    flags.DEFINE_string("annotate", "", "A folder for pictures with the faces and labels drawn in.")
    flags.DEFINE_string("output", "", f"A file to write: {', '.join(OUTPUTS)}.")
    flags.DEFINE_string("checkpoint", "best", "best (on public_test), latest, or a step.")
    flags.DEFINE_string("weights", "ema", "ema or raw.")
    flags.DEFINE_string("data.data_dir", "", "Where prepared data is, if not as recorded.")
    runtime.define_flags()


def main() -> int:
    """Predicts, prints and writes."""
    if FLAGS.detect not in DETECT:
        raise UserError(f"--detect={FLAGS.detect}: use {', '.join(DETECT)}")
    output = Path(FLAGS.output) if FLAGS.output else None
    if output and output.suffix not in OUTPUTS:
        raise UserError(f"--output={output}: the name must end with {', '.join(OUTPUTS)}")
    if not FLAGS.image:
        raise UserError("no picture is given: for example python -m ferjax.predict photo.jpg")
    for path in (output and output.parent, FLAGS.annotate and Path(FLAGS.annotate).parent):
        if path and not path.is_dir():
            raise UserError(f"{path} is not there: make this folder first")
    folder = Path(FLAGS.annotate) if FLAGS.annotate else None
    files = find(FLAGS.image)
    drawings = [Path(name) for name, _ in files if re.search(r"_faces(_\d+)?\.jpg$", name)]
    for path in drawings:
        if folder and path.resolve().parent == folder.resolve():
            raise UserError(f"--annotate={folder}: {path} may be drawn over: give another folder")
    config = read_config(FLAGS.workdir)
    runtime.start(config.evaluate.batch_size, float64=config.dtype == "float64")
    trained = load(
        FLAGS.workdir,
        checkpoint=FLAGS.checkpoint,
        weights=FLAGS.weights,
        data_dir=FLAGS["data.data_dir"].value or "",
    )
    try:
        if folder:
            folder.mkdir(exist_ok=True)
        rows = predict(trained, files, FLAGS.detect, every=FLAGS.every, folder=folder)
        if jax.process_index():
            return configs.EXIT_OK
        log.info("%s", table(rows))
        if output:
            write(rows, output, trained.classes)
    except OSError as error:
        raise UserError(f"{error.filename or output}: {error.strerror or error}") from None
    for path in filter(None, (output, folder)):
        log.info("written to %s", path)
    if all("error" in row for row in rows):
        first = f"{rows[0]['image']}: {rows[0]['error']}"
        raise UserError(f"none of the pictures gave a prediction; {first}")
    return configs.EXIT_OK


class Predictor:
    """Finds and classifies the faces of one picture after the other, in batches.

    Args:
      trained: the network.
      detect: "largest", "all", or "none": the whole picture is the face.
      folder: where pictures with what was found are drawn; None: nowhere.
    """

    def __init__(self, trained: Trained, detect: str, folder: Path | None = None) -> None:
        self.rows: list[dict[str, Any]] = []
        self._trained, self._detect, self._folder = trained, detect, folder
        self._cascade = make_cascade()
        self._crops: list[tuple[dict[str, Any], np.ndarray]] = []
        self._drawn: list[tuple[Shot, list[dict[str, Any]]]] = []
        self._bytes, self._names = 0, set[str]()

    def add(self, shot: Shot) -> bool:
        """Takes a picture or a frame; returns whether it has a face. A frame without has no row."""
        where: dict[str, Any] = {"image": shot.path}
        if shot.frame is not None:
            where |= {"frame": shot.frame, "time": shot.time}
        if isinstance(shot.picture, str):
            self.rows.append({**where, "error": shot.picture})
            return False
        picture, boxes = shot.picture, list[list[int] | None]([None])
        if self._detect != "none":
            boxes = [*faces(picture, self._cascade)]
            boxes = boxes if self._detect == "all" else boxes[:1]
        rows = [{**where, "box": box} for box in boxes]
        for row in rows:
            x, y, w, h = row["box"] or (0, 0, picture.shape[1], picture.shape[0])
            crop = fit(picture[y : y + h, x : x + w], self._trained.image_shape, shot.path)
            self._crops.append((row, crop))
        if not rows and shot.frame is None:
            rows.append({**where, "error": NO_FACE})
        self.rows += rows
        if self._folder:
            self._drawn.append((shot, rows))
            self._bytes += picture.nbytes
        if len(self._crops) >= BATCH or self._bytes > MOST_BYTES:
            self.finish()
        return bool(boxes)

    def finish(self) -> list[dict[str, Any]]:
        """Classifies and draws what is left; returns all rows."""
        found = self._trained.predict([crop for _, crop in self._crops])
        for (row, _), label, p in zip(self._crops, found.labels, found.probabilities, strict=True):
            row["label"], row["confidence"] = label, float(p.max())
            row["probabilities"] = dict(zip(found.classes, map(float, p), strict=True))
        for shot, rows in self._drawn:
            self._draw(shot, rows)
        self._crops, self._drawn, self._bytes = [], [], 0
        return self.rows

    def _draw(self, shot: Shot, rows: list[dict[str, Any]]) -> None:
        from ferjax.annotate import annotate  # Matplotlib's start takes a while

        assert self._folder
        assert not isinstance(shot.picture, str)
        place = "" if shot.frame is None else f"_{shot.frame:06d}"
        name = base = f"{Path(shot.path).stem}{place}_faces"
        count = 1
        while name in self._names:  # pictures of one name in several folders
            count += 1
            name = f"{base}_{count}"
        self._names.add(name)
        annotate(shot.picture, rows).save(self._folder / f"{name}.jpg", quality=90)


def predict(
    trained: Trained,
    files: Sequence[tuple[str, str]],
    detect: str = "largest",
    *,
    every: int = 1,
    folder: Path | None = None,
) -> list[dict[str, Any]]:
    """One row for each face, or for each picture that gave none, or each video without any.

    Args:
      trained: the network.
      files: of `predict_sources.find`.
      detect: "largest", "all", or "none": the whole picture is the face.
      every: which frames of a video: each `every`-th.
      folder: where pictures with what was found are drawn, as <name>_faces.jpg.

    Returns:
      Rows with `image` (its path), for videos `frame` (from 0) and `time` (seconds), and either
      `error`, or `box` ([x, y, width, height] in pixels; None for the whole picture), `label`,
      `confidence` and `probabilities` (name -> share).
    """
    predictor = Predictor(trained, detect, folder)
    looked: dict[str, list[int]] = {}
    for shot in shots(files, every):
        has_face = predictor.add(shot)
        if shot.frame is not None:
            counts = looked.setdefault(shot.path, [0, 0])
            counts[0] += 1
            counts[1] += has_face
    rows = predictor.finish()
    for path, (frames, with_face) in looked.items():
        log.info("%s: a face in %d of %d frames", path, with_face, frames)
        if not with_face:
            rows.append({"image": path, "error": NO_FACE})
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows for a terminal."""
    names = [_name(row) for row in rows]
    width = min(48, max(map(len, names)))
    lines = [f"{'picture':<{width}}  {'label':<10}{'confidence':>11}  face (x, y, width, height)"]
    for row, name in zip(rows, names, strict=True):
        name = name if len(name) <= width else "..." + name[3 - width :]
        if "error" in row:
            lines.append(f"{name:<{width}}  -  {row['error']}")
            continue
        box = ", ".join(map(str, row["box"])) if row["box"] else "whole picture"
        share = f"{100 * row['confidence']:.1f} %"
        lines.append(f"{name:<{width}}  {row['label']:<10}{share:>11}  {box}")
    return "\n".join(lines)


def write(rows: Sequence[dict[str, Any]], path: Path, classes: Sequence[str]) -> None:
    """Writes the rows as .json (a list), .jsonl (a row a line) or .csv (a column a class)."""
    if path.suffix == ".json":
        configs.write_json(path, list(rows), indent=2)
    elif path.suffix == ".jsonl":
        text = "".join(json.dumps(row) + "\n" for row in rows)
        configs.write_whole(path, text.encode())
    else:
        file = io.StringIO(newline="")
        box_columns = ["box_x", "box_y", "box_width", "box_height"]
        columns = ["image", "frame", "time", *box_columns, "label", "confidence", *classes, "error"]
        writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore")
        writer.writeheader()
        for row in rows:
            box = dict(zip(box_columns, row.get("box") or (), strict=False))
            writer.writerow({**row, **box, **row.get("probabilities", {})})
        # A picture's name may hold bytes that are no text.
        configs.write_whole(path, file.getvalue().encode("utf-8", "surrogateescape"))


def _name(row: dict[str, Any]) -> str:
    return row["image"] + (f" @ {row['time']:.2f} s" if "time" in row else "")


def _named(arguments: Sequence[str]) -> list[str]:
    """Arguments without a flag's name are pictures; --no-detect is --detect=none."""
    named: list[str] = []
    value_follows = False
    for text in arguments:
        if value_follows or text.startswith("-"):
            named.append("--detect=none" if text == "--no-detect" else text)
        else:
            named.append(f"--image={text}")
        name = text.lstrip("-")
        takes_value = name in FLAGS and not FLAGS[name].boolean
        value_follows = not value_follows and text.startswith("-") and takes_value
    return named


if __name__ == "__main__":
    define_flags()
    sys.argv[1:] = _named(sys.argv[1:])
    run(main)
