"""`python -m ferjax.data.audit`: what is wrong with a data set, with the pictures.

Equal and nearly equal images within and across splits, blank images, padding, images that FER+'s
voters call not a face, the class table, brightness and contrast. Writes `audit/audit.json` and
`audit/audit.html` below the workdir, and prints a table. Nothing is changed.
"""

import logging
import time
from typing import Any

import numpy as np
from absl import flags

from ferjax.command import run
from ferjax.config import UserError, write_json, write_whole
from ferjax.data import arrays, audit_sheet, duplicates, ferplus
from ferjax.workdir import reason, workdir_path, write_errors

log = logging.getLogger("ferjax")

TRAIN = "train"
MIN_LINES = 4  # constant rows or columns from which an image counts as padded
QUANTILES = (0, 1, 25, 50, 75, 99, 100)
_CHUNK = 1024


def define_flags() -> None:
    """Defines the command's flags; not at import, which happens to modules that are looked up."""
    flags.DEFINE_string("dataset", "fer2013", "Module, module/config or module:source.")
    flags.DEFINE_string("data.source", "", "What the set is made from, as in ferjax.data.prepare.")
    flags.DEFINE_string("data.data_dir", "", "Where prepared data is kept.")
    flags.DEFINE_string(
        "data.ferplus_source",
        "",
        "fer2013new.csv, for votes on what is no face; empty: FERPLUS_SOURCE, else without.",
    )
    flags.DEFINE_string("workdir", "", "audit/ is written here; empty: the current directory.")
    flags.DEFINE_float("threshold", 0.95, "Correlation from which images are nearly equal.")
    flags.DEFINE_integer("pictures", 60, "Groups of pictures shown of each kind; all are counted.")


def main() -> None:
    """Audits a whole data set."""
    given = flags.FLAGS
    if given.pictures < 0:
        raise UserError(f"--pictures={given.pictures}: it must not be negative")
    name = str(given.dataset)
    made = arrays.builder(
        name,
        source=str(given["data.source"].value),
        data_dir=str(given["data.data_dir"].value),
    )
    made.download_and_prepare()
    data = arrays.read(made, tuple(made.info.splits), name)
    votes = None
    named = str(given["data.ferplus_source"].value)
    if made.name == "fer2013":
        votes = ferplus.read(source) if (source := ferplus.given(named)) else None
    elif named:  # FERPLUS_SOURCE, which serves all commands, may stay set
        raise UserError(f"--data.ferplus_source={named}: FER+ has votes on fer2013 only")
    started = time.monotonic()
    report = audit(data, given.threshold, votes)
    directory = workdir_path(given.workdir or ".") / "audit"
    page = audit_sheet.sheet(report, data, given.pictures)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / "audit.json", report)
        write_whole(directory / "audit.html", page.encode())
    except write_errors(directory) as error:
        raise UserError(f"{directory} can't be written: {reason(error)}") from None
    seconds = time.monotonic() - started
    written = f"{seconds:.1f} s; written to {directory / 'audit.json'} and audit.html"
    log.info("%s\n\n%s", table(report), written)


def audit(
    data: arrays.Dataset, threshold: float = 0.95, votes: ferplus.Votes | None = None
) -> dict[str, Any]:
    """Everything that the audit finds, ready for JSON.

    Images are named by their rows, which are unique over all splits.

    Args:
        data: all splits of a set.
        threshold: see `duplicates.near_pairs`.
        votes: FER+'s, if given.

    Raises:
        UserError: a threshold that is none, or too low.
    """
    names = list(data.splits)
    images = np.concatenate([split.images for split in data.splits.values()])
    labels = np.concatenate([split.labels for split in data.splits.values()])
    rows = np.concatenate([split.rows for split in data.splits.values()])
    places = np.repeat(np.arange(len(names)), [len(split) for split in data.splits.values()])
    ids = duplicates.exact_ids(images)
    exact = duplicates.groups(ids)
    near = duplicates.near_pairs(duplicates.thumbnails(images), threshold, members=np.unique(ids))
    lines = duplicates.constant_lines(images)
    blank = duplicates.is_blank(images)
    padded = (lines >= MIN_LINES) & ~blank
    present = np.zeros((len(images), len(names)), bool)  # [id, split]: is there such an image?
    present[ids, places] = True
    beside = np.zeros_like(present)  # ... one that is nearly equal to it?
    np.logical_or.at(beside, near.first, present[near.second])
    np.logical_or.at(beside, near.second, present[near.first])
    beside &= ~present
    sets = duplicates.groups(duplicates.connected(len(images), near.first, near.second))
    same = labels[near.first] == labels[near.second]
    report: dict[str, Any] = {
        "dataset": data.name,
        "digest": data.digest,
        "class_names": list(data.class_names),
        "splits": {name: _split(split, data.class_names) for name, split in data.splits.items()},
        "exact": {
            "whole set": _exact(exact, labels),
            **{
                name: _exact(duplicates.groups(np.where(places == k, ids, -1 - rows)), labels)
                for k, name in enumerate(names)
            },
        },
        "copies": _across(present, ids, places, names),
        "exact_groups": [
            {
                "rows": rows[group].tolist(),
                "splits": [names[k] for k in places[group]],
                "labels": labels[group].tolist(),
            }
            for group in exact
        ],
        "near": {
            "threshold": threshold,
            "thumbnail": duplicates.THUMBNAIL,
            "pairs": len(near),
            "pairs_with_one_label": int(same.sum()),
            "groups": len(sets),
            "images": sum(map(len, sets)),
            "copies": _across(beside, ids, places, names),
        },
        "near_pairs": [
            [int(rows[a]), int(rows[b]), round(float(r), 5)]
            for a, b, r in zip(near.first, near.second, near.correlation, strict=True)
        ],
        "blank": rows[blank].tolist(),
        "padded": {"least": MIN_LINES, "rows": rows[padded].tolist()},
    }
    if votes is not None:
        report["not_a_face"] = rows[votes.not_a_face[rows]].tolist()
    if TRAIN in data.splits:
        report["cleaning"] = _cleaning(data)
    return report


def _exact(found: list[np.ndarray], labels: np.ndarray) -> dict[str, int]:
    # Of an image without label (-1) no copy has another one.
    split = [group for group in found if len(set(labels[group].tolist()) - {-1}) > 1]
    return {
        "groups": len(found),
        "images": sum(map(len, found)),
        "one_label": len(found) - len(split),
        "conflicting": len(split),
        "conflicting_images": sum(map(len, split)),
    }


def _across(
    there: np.ndarray, ids: np.ndarray, places: np.ndarray, names: list[str]
) -> dict[str, dict[str, int]]:
    """Images of a split whose id is `there` [id, split] in another split: counts by both."""
    return {
        name: {
            other: int(there[ids[places == k], j].sum())
            for j, other in enumerate(names)
            if other != name
        }
        for k, name in enumerate(names)
    }


def _split(split: arrays.Split, class_names: tuple[str, ...]) -> dict[str, Any]:
    means, deviations = [], []
    for start in range(0, len(split), _CHUNK):  # a float copy of all images would be 660 MB
        chunk = split.images[start : start + _CHUNK]
        flat = chunk.reshape(len(chunk), -1).astype(np.float32)
        means.append(flat.mean(axis=1))
        deviations.append(flat.std(axis=1))
    return {
        "images": len(split),
        "classes": _counts(split.labels, class_names),
        "brightness": _distribution(means, 256),
        "contrast": _distribution(deviations, 128),
    }


def _counts(labels: np.ndarray, class_names: tuple[str, ...]) -> list[int]:
    """Images of each class."""
    return np.bincount(labels[labels >= 0], minlength=len(class_names)).tolist()


def _distribution(parts: list[np.ndarray], end: int) -> dict[str, Any]:
    """Quantiles and a histogram of 32 bins over [0, end], in grey levels."""
    values = np.concatenate(parts) if parts else np.zeros(0, np.float32)
    quantiles = np.percentile(values, QUANTILES) if len(values) else np.zeros(len(QUANTILES))
    return {
        "mean": round(float(values.mean()), 2) if len(values) else 0.0,
        "quantiles": {
            f"{q}%": round(float(v), 2) for q, v in zip(QUANTILES, quantiles, strict=True)
        },
        "histogram": np.histogram(values, bins=32, range=(0, end))[0].tolist(),
        "histogram_end": end,
    }


def _cleaning(data: arrays.Dataset) -> dict[str, Any]:
    train = data.splits[TRAIN]
    others = {name: split for name, split in data.splits.items() if name != TRAIN}
    tests = [split.images for name, split in others.items() if name != "unlabeled"]
    result = {}
    for mode in duplicates.CLEAN:
        dropped = duplicates.to_drop(mode, train.images, train.labels, tests)
        kept = np.ones(len(train), bool)
        for positions in dropped.values():
            kept[positions] = False
        result[mode] = {
            "images": int(kept.sum()),
            "classes": _counts(train.labels[kept], data.class_names),
            "dropped": {reason: len(positions) for reason, positions in dropped.items()},
        }
    return result


def table(report: dict[str, Any]) -> str:
    """The report's counts for the terminal."""
    parts = [f"{report['dataset']}  {report['digest'][:12]}"]
    head = ["images of a class", *report["class_names"], "all"]
    body = [[n, *s["classes"], s["images"]] for n, s in report["splits"].items()]
    body += [
        [f"{TRAIN}, clean={mode}", *c["classes"], c["images"]]
        for mode, c in report.get("cleaning", {}).items()
        if mode != "none"
    ]
    parts.append(_align([head, *body]))
    head = ["equal pixels", "groups", "images", "one label", "conflicting", "(images)"]
    parts.append(_align([head, *([n, *e.values()] for n, e in report["exact"].items())]))
    names = list(report["splits"])
    head = ["images with a copy in", *names]
    body = [[n, *(row.get(o, "") for o in names)] for n, row in report["copies"].items()]
    near = report["near"]
    body += [
        [f"{n} (nearly equal)", *(r.get(o, "") for o in names)] for n, r in near["copies"].items()
    ]
    parts.append(_align([head, *body]))
    percent = ["", *(f"{q}%" for q in QUANTILES), "mean"]
    body = [
        [f"{what}, {n}", *(f"{v:.1f}" for v in s[what]["quantiles"].values()), s[what]["mean"]]
        for what in ("brightness", "contrast")
        for n, s in report["splits"].items()
    ]
    parts.append(_align([percent, *body]))
    lines = [
        ["nearly equal pairs", near["pairs"], f"r >= {near['threshold']:g}"],
        ["  with one label", near["pairs_with_one_label"], ""],
        ["  images in them", near["images"], f"in {near['groups']:,} groups"],
        ["blank", len(report["blank"]), "one grey level"],
        ["padded", len(report["padded"]["rows"]), f"{MIN_LINES} or more constant lines"],
    ]
    if "not_a_face" in report:
        lines.append(["not a face", len(report["not_a_face"]), "most of FER+'s votes"])
    parts.append(_align(lines, notes=True))
    return "\n\n".join(parts)


def _align(rows: list[list[Any]], notes: bool = False) -> str:
    """Columns of equal width: the first, and the last if these are notes, to the left."""
    cells = [[f"{c:,}" if isinstance(c, int) else str(c) for c in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    left = {0, len(widths) - 1} if notes else {0}
    return "\n".join(
        "  ".join(
            cell.ljust(width) if k in left else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )


if __name__ == "__main__":
    define_flags()
    run(main)
