"""What `ferjax.predict` looks at: picture files, and frames of video files."""

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from ferjax.data import pictures

VIDEO_SUFFIXES = {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv"}


@dataclass(frozen=True)
class Shot:
    """A picture, or a frame of a video, or why there is none.

    Attributes:
      path: of the file.
      picture: RGB uint8 [H, W, 3], or the reason.
      frame: its place in the video, from 0; None of a picture.
      time: seconds from the video's start; None of a picture.
    """

    path: str
    picture: np.ndarray | str
    frame: int | None = None
    time: float | None = None


def find(given: Sequence[str]) -> list[tuple[str, str]]:
    """The files that names, folders (with theirs below) and patterns stand for, each once.

    Returns:
      (path, "") for each file; (name, reason) for a folder or a pattern that stands for none. A
      file that is missing has no reason yet.
    """
    found: list[tuple[str, str]] = []
    for name in given:
        if os.path.isdir(name):
            suffixes = pictures.SUFFIXES | VIDEO_SUFFIXES
            below = [str(path) for path in pictures.below(Path(name), suffixes)]
            why = f"holds no picture ({', '.join(sorted(pictures.SUFFIXES))}) and no video"
        elif glob.has_magic(name) and not os.path.exists(name):
            below = sorted(p for p in glob.glob(name, recursive=True) if os.path.isfile(p))
            why = "matches no file"
        else:
            below, why = [name], ""
        found += [(path, "") for path in below] or [(name, why)]
    return list(dict.fromkeys(found))


def is_video(path: str | os.PathLike[str]) -> bool:
    """Whether a file's name is that of a video."""
    return Path(path).suffix.lower() in VIDEO_SUFFIXES


def shots(files: Sequence[tuple[str, str]], every: int) -> Iterator[Shot]:
    """Reads one file after the other; of videos each `every`-th frame, from the first."""
    for path, why in files:
        if why:
            yield Shot(path, why)
        elif is_video(path):
            yield from _frames(path, every)
        else:
            yield Shot(path, pictures.read(path))


def _frames(path: str, every: int) -> Iterator[Shot]:
    if not os.path.isfile(path):  # reading a pipe would never end
        yield Shot(path, "not a file" if os.path.exists(path) else os.strerror(2))
        return
    # What OpenCV and FFmpeg say of a broken file is no line of ours.
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    level = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)
    video = cv2.VideoCapture(path, cv2.CAP_FFMPEG)
    cv2.utils.logging.setLogLevel(level)
    try:
        size = video.get(cv2.CAP_PROP_FRAME_WIDTH) * video.get(cv2.CAP_PROP_FRAME_HEIGHT)
        if size > pictures.MOST_PIXELS:
            yield Shot(path, f"frames of more than {pictures.MOST_PIXELS // 10**6} megapixels")
            return
        place, seen = 0, False
        while video.grab():
            if place % every == 0:
                time = video.get(cv2.CAP_PROP_POS_MSEC) / 1000
                read, frame = video.retrieve()
                if read:
                    seen = True
                    picture = cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
                    yield Shot(path, np.asarray(picture), place, round(time, 3))
            place += 1
        if not seen:
            yield Shot(path, "not a video that OpenCV reads")
    finally:
        video.release()
