"""Classifies pictures: `python -m ferjax.predict --workdir=DIR photo.jpg folder 'more/*.png'`.

In each picture the largest face is found (OpenCV's Haar cascade), or all (--detect=all); pictures
that are faces already are taken whole with --detect=none. Prints a table; --output=x.json, x.jsonl
or x.csv writes it with all probabilities. What can't be read or shows no face has a row saying so.
"""

import csv
import glob
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import jax
import numpy as np
from absl import flags

from ferjax import config as configs
from ferjax import runtime
from ferjax.command import run
from ferjax.config import UserError
from ferjax.load import Trained, fit, load

FLAGS = flags.FLAGS
log = logging.getLogger("ferjax")
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".pgm", ".ppm"}
DETECT = ("largest", "all", "none")
OUTPUTS = (".json", ".jsonl", ".csv")
SEARCH_SIDE = 800  # pixels; larger pictures are searched for faces at this size


def define_flags() -> None:
    """The command's flags; the same names may be defined by other commands in one process."""
    flags.DEFINE_string("workdir", "", "The run's directory.")
    flags.DEFINE_multi_string(
        "image", [], "A picture, a folder or a pattern; the flag's name may be left out."
    )
    flags.DEFINE_string("detect", "largest", f"Which faces of a picture: {', '.join(DETECT)}.")
    flags.DEFINE_string("output", "", f"A file to write: {', '.join(OUTPUTS)}.")
    flags.DEFINE_string("checkpoint", "best", "best (on public_test), latest, or a step.")
    flags.DEFINE_string("weights", "ema", "ema or raw.")
    flags.DEFINE_string("data.data_dir", "", "Where prepared data is, if not as recorded.")
    runtime.define_flags()


def main() -> int:
    """Predicts, prints and writes."""
    if not FLAGS.workdir:
        raise UserError("--workdir is missing: give the directory of a run")
    if FLAGS.detect not in DETECT:
        raise UserError(f"--detect={FLAGS.detect}: use {', '.join(DETECT)}")
    output = Path(FLAGS.output) if FLAGS.output else None
    if output and output.suffix not in OUTPUTS:
        raise UserError(f"--output={output}: the name must end with {', '.join(OUTPUTS)}")
    if not FLAGS.image:
        raise UserError("no picture is given: for example python -m ferjax.predict photo.jpg")
    paths = find(FLAGS.image)
    config = configs.load(Path(FLAGS.workdir) / "config.json")
    runtime.start(config.evaluate.batch_size, float64=config.dtype == "float64")
    trained = load(
        FLAGS.workdir,
        checkpoint=FLAGS.checkpoint,
        weights=FLAGS.weights,
        data_dir=FLAGS["data.data_dir"].value or "",
    )
    rows = predict(trained, paths, FLAGS.detect)
    if jax.process_index():
        return configs.EXIT_OK
    log.info("%s", table(rows))
    if output:
        try:
            write(rows, output, trained.classes)
        except OSError as error:
            raise UserError(f"{output} can't be written: {error.strerror}") from None
        log.info("written to %s", output)
    if all("error" in row for row in rows):
        raise UserError("none of the pictures gave a prediction: see the table")
    return configs.EXIT_OK


def find(given: Sequence[str]) -> list[str]:
    """The files that names, folders (with theirs below) and patterns stand for, each once.

    Raises:
      UserError: a folder or pattern without pictures.
    """
    found: list[str] = []
    for name in given:
        if os.path.isdir(name):
            below = sorted(str(p) for p in Path(name).rglob("*") if p.suffix.lower() in SUFFIXES)
            if not below:
                raise UserError(f"{name} holds no picture ({', '.join(sorted(SUFFIXES))})")
        elif glob.has_magic(name) and not os.path.exists(name):
            below = sorted(p for p in glob.glob(name, recursive=True) if os.path.isfile(p))
            if not below:
                raise UserError(f"{name} matches no file")
        else:
            below = [name]  # one that is missing gets its row
        found += below
    return list(dict.fromkeys(found))


def predict(
    trained: Trained, paths: Sequence[str], detect: str = "largest"
) -> list[dict[str, Any]]:
    """One row for each face, or for each picture that gave none.

    Args:
      trained: the network.
      paths: picture files.
      detect: "largest", "all", or "none": the whole picture is the face.

    Returns:
      Rows with `image` (its path) and either `error`, or `box` ([x, y, width, height] in pixels;
      None for the whole picture), `label`, `confidence` and `probabilities` (name -> share).
    """
    cascade = cv2.CascadeClassifier(
        os.path.join(os.path.dirname(cv2.__file__), "data", "haarcascade_frontalface_default.xml")
    )
    rows: list[dict[str, Any]] = []
    crops: list[np.ndarray] = []
    for path in paths:
        picture = _read(path)
        if isinstance(picture, str):
            rows.append({"image": path, "error": picture})
            continue
        boxes: list[Any] = [None] if detect == "none" else faces(picture, cascade)
        if not boxes:
            why = "no face found; for pictures that are faces already: --detect=none"
            rows.append({"image": path, "error": why})
        for box in boxes if detect == "all" else boxes[:1]:
            x, y, w, h = box or (0, 0, picture.shape[1], picture.shape[0])
            crops.append(fit(picture[y : y + h, x : x + w], trained.image_shape, path))
            rows.append({"image": path, "box": box})
    found = trained.predict(crops)
    results = iter(zip(found.labels, found.probabilities, strict=True))
    for row in rows:
        if "error" not in row:
            row["label"], p = next(results)
            row["confidence"] = float(p.max())
            row["probabilities"] = dict(zip(found.classes, map(float, p), strict=True))
    return rows


def faces(picture: np.ndarray, cascade: cv2.CascadeClassifier) -> list[list[int]]:
    """Boxes [x, y, width, height] of the faces in an RGB picture, the largest first."""
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    shrink = min(1.0, SEARCH_SIDE / max(grey.shape))
    if shrink < 1:
        grey = cv2.resize(grey, None, fx=shrink, fy=shrink, interpolation=cv2.INTER_AREA)
    boxes = cascade.detectMultiScale(grey, scaleFactor=1.1, minNeighbors=5, minSize=(24, 24))
    ordered = sorted(boxes, key=lambda box: -int(box[2]) * int(box[3]))
    return [[int(value / shrink) for value in box] for box in ordered]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows for a terminal."""
    width = min(48, max(len(row["image"]) for row in rows))
    lines = [f"{'picture':<{width}}  {'label':<10}{'confidence':>11}  face (x, y, width, height)"]
    for row in rows:
        name = row["image"] if len(row["image"]) <= width else "..." + row["image"][3 - width :]
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
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with path.open("w", newline="") as file:
            columns = [
                "image",
                "box_x",
                "box_y",
                "box_width",
                "box_height",
                "label",
                "confidence",
                *classes,
            ]
            writer = csv.DictWriter(file, [*columns, "error"], restval="", extrasaction="ignore")
            writer.writeheader()
            for row in rows:
                box = dict(zip(columns[1:5], row.get("box") or (), strict=False))
                writer.writerow({**row, **box, **row.get("probabilities", {})})


def _read(path: str) -> np.ndarray | str:
    """An RGB picture uint8 [H, W, 3] turned upright by its EXIF data, or why there is none."""
    try:
        content = np.fromfile(path, np.uint8)
    except OSError as error:
        return error.strerror or "can't be read"
    try:
        picture = cv2.imdecode(content, cv2.IMREAD_COLOR_RGB) if content.size else None
    except cv2.error:
        picture = None  # more pixels than OpenCV reads (2^30)
    return "not a picture that OpenCV reads" if picture is None else np.asarray(picture)


def _named(arguments: Sequence[str]) -> list[str]:
    """Arguments without a flag's name are pictures."""
    return [a if a.startswith("-") else f"--image={a}" for a in arguments]


if __name__ == "__main__":
    define_flags()
    sys.argv[1:] = _named(sys.argv[1:])
    run(main)
