"""How fast, and in how much memory, are a user's pictures prepared? And after a kill?

    python benchmarks/image_folder.py [--images=100000] [--kills=2] [--folder=DIR] [--table]

Draws JPEG files of 40 to 96 pixels, a third of them in colour, in seven classes; prepares them with
`ferjax.data.prepare` in a process of its own (with its imports, and reading all back at the end);
prepares them again elsewhere, killed at equally spaced moments and started again. Exit status 1 if
the digests differ or a killed start left anything but a folder that the next ones clear away.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
from common import emit, machine

from ferjax.data.image_folder import ImageFolder

ROOT = Path(__file__).parent.parent
VERSION = str(ImageFolder.VERSION)
CLASSES = ("angry", "disgust", "fear", "happy", "neutral", "sad", "surprise")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--folder", default="", help="where to work; empty: the system's")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder or None) as work:
        pictures = Path(work, "pictures")
        size = draw(pictures, args.images)
        whole = prepare(pictures, Path(work, "whole"))
        moments = [(k + 1) / (args.kills + 1) * whole["seconds"] for k in range(args.kills)]
        killed = [prepare(pictures, Path(work, "killed"), at) for at in moments]
        again = prepare(pictures, Path(work, "killed"))
        same = digest(Path(work, "whole")) == digest(Path(work, "killed"))
        left = [p.name for p in Path(work, "killed/image_folder").glob("48_*/*")]
    stray = [name for name in left if not name.startswith(("incomplete.", VERSION))]
    record = {
        "benchmark": "image_folder",
        "images": args.images,
        "bytes_each": round(size / args.images),
        **{key: round(value, 1) for key, value in whole.items() if key != "status"},
        "images_per_second": round(args.images / whole["seconds"]),
        "images_per_cpu_second": round(args.images / whole["cpu_seconds"]),
        "killed_after_s": [round(k["seconds"], 1) for k in killed if k["status"] < 0],
        "again_s": round(again["seconds"], 1),
        "same_digest": same,
        "left": left,
        **machine(),
    }
    emit(record, args.table)
    return 0 if same and not stray and not whole["status"] and not again["status"] else 1


def draw(folder: Path, count: int) -> int:
    """Writes the files; returns their bytes."""
    for split in ("train", "validation"):
        for name in CLASSES:
            (folder / split / name).mkdir(parents=True)

    def one(number: int) -> int:
        rng = np.random.default_rng(number)
        side = int(rng.integers(40, 97))
        shape = (12, 12, 3) if number % 3 == 0 else (12, 12)
        image = cv2.resize(rng.integers(0, 256, shape, np.uint8), (side, side))
        encoded = cv2.imencode(".jpg", image)[1].tobytes()
        split = "validation" if number % 10 == 0 else "train"
        (folder / split / CLASSES[number % 7] / f"{number}.jpg").write_bytes(encoded)
        return len(encoded)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return sum(pool.map(one, range(count), chunksize=256))


def prepare(pictures: Path, data_dir: Path, kill_after: float = 0.0) -> dict[str, float]:
    """One start of the command: its seconds, CPU seconds, peak memory in MiB and status."""
    began = time.monotonic()
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "ferjax.data.prepare"),
            *(f"--dataset=image_folder:{pictures}", f"--data.data_dir={data_dir}"),
        ],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
    )
    if kill_after:
        time.sleep(kill_after)
        process.send_signal(signal.SIGKILL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return {
        "seconds": time.monotonic() - began,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "peak_mib": used.ru_maxrss / 1024,
        "status": process.returncode,
    }


def digest(data_dir: Path) -> str:
    (found,) = data_dir.glob(f"image_folder/*/{VERSION}/metadata.json")
    return json.loads(found.read_text())["digest"]


if __name__ == "__main__":
    sys.exit(main())
