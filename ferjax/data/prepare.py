"""`python -m ferjax.data.prepare`: prepares a data set and prints what it holds."""

import logging
import shlex

from absl import flags

from ferjax.command import run
from ferjax.data import arrays

log = logging.getLogger("ferjax")


def define_flags() -> None:
    """Defines the command's flags; not at import, which happens to modules that are looked up."""
    flags.DEFINE_string(
        "dataset",
        "fer2013",
        "Module of ferjax.data, or module/config: fer2013, synthetic_faces; image_folder:DIR for "
        "your own pictures, image_folder/96_rgb:DIR for another size, in colour.",
    )
    flags.DEFINE_string(
        "data.source",
        "",
        "fer2013: a folder or zip of the JPEG files, fer2013.csv or icml_face_data.csv; empty: "
        "FER2013_SOURCE, else the archive is downloaded. image_folder: a folder with "
        "train/<class>/, or a CSV path,label[,split].",
    )
    flags.DEFINE_bool(
        "detect",
        False,
        "image_folder: cut out the largest face of each picture; the same as image_folder/detect.",
    )
    flags.DEFINE_string(
        "data.data_dir",
        "",
        "Where prepared data is kept; empty: TFDS_DATA_DIR, else ~/tensorflow_datasets.",
    )


def main() -> None:
    """Prepares the set where it is not prepared, reads all of it, and prints the class table."""
    given = flags.FLAGS
    name, colon, rest = str(given["dataset"].value).partition(":")
    if given["detect"].value:
        name += "_detect" if "/" in name else "/detect"
    made = arrays.builder(
        name + colon + rest,
        source=str(given["data.source"].value),
        data_dir=str(given["data.data_dir"].value),
    )
    known = made.is_prepared()
    made.download_and_prepare()
    # Reading everything back proves that what lies on disk is what was prepared.
    data = arrays.read(made, tuple(made.info.splits))
    log.info("%s: %s", made.info.full_name, "was already prepared" if known else "prepared")
    log.info("%s", class_table(data))
    log.info("digest     %s\nstored in  %s", data.digest, made.data_path)
    if name.partition("/")[0] == "image_folder":
        source = given["data.source"].value or rest
        if "train" in data.splits:
            keys = {"name": name, "source": source}
        else:
            kind = "image_folder/detect" if made.builder_config.detect else "image_folder"
            keys = {"unlabeled_source": f"{kind}:{source}" if source else ""}
        keys["data_dir"] = str(given["data.data_dir"].value)
        words = [f"--config.data.{key}={shlex.quote(v)}" for key, v in keys.items() if v]
        if "train" in data.splits or source:
            log.info("to train   %s", " ".join(words))


def class_table(data: arrays.Dataset) -> str:
    """Images of each class in each split, aligned for the terminal."""
    head = ["split", *data.class_names, "all"]
    rows = [
        [
            name,
            *(f"{int((split.labels == label).sum()):,}" for label in range(len(data.class_names))),
            f"{len(split):,}",
        ]
        for name, split in data.splits.items()
    ]
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in [head, *rows]
    )


if __name__ == "__main__":
    define_flags()
    run(main)
