"""Pictures for TensorBoard: the confusion matrix, and faces with what was said of them."""

import io
from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ferjax.analysis import figures, scores

COLUMNS, ROWS, FACE, LINE = 6, 3, 112, 15  # faces on the board; pixels of a face and of a text line
_RIGHT, _WRONG, _PAPER = (31, 127, 71), (184, 80, 15), (255, 255, 255)


def draw(
    logits: np.ndarray, images: np.ndarray, labels: np.ndarray, names: Sequence[str]
) -> dict[str, np.ndarray]:
    """What an evaluation shows.

    Args:
      logits: [N, C]; images: uint8 [N, H, W, 1 or 3]; labels: int [N]; names: of the C classes.

    Returns:
      `confusion` (percent of each true class) and `faces` (the same ones each time, drawn at
      random, with the true and the predicted class): uint8 [1, H, W, 3].
    """
    probabilities = scores.softmax(logits)
    predicted = probabilities.argmax(-1)
    counts = scores.rates(predicted, labels, len(names))["confusion"]
    encoded = figures.png(figures.confusion(counts, names, shares=True))
    matrix = Image.open(io.BytesIO(encoded)).convert("RGB")
    faces = _faces(probabilities, images, labels, names)
    return {"confusion": np.asarray(matrix)[None], "faces": faces}


def _faces(
    probabilities: np.ndarray, images: np.ndarray, labels: np.ndarray, names: Sequence[str]
) -> np.ndarray:
    chosen = np.random.default_rng(0).permutation(len(images))[: COLUMNS * ROWS]
    high = FACE + 2 * LINE + 8
    board = Image.new("RGB", (COLUMNS * (FACE + 8), ROWS * high), _PAPER)
    write = ImageDraw.Draw(board)
    font = ImageFont.truetype(f"{mpl.get_data_path()}/fonts/ttf/DejaVuSans.ttf", LINE - 3)
    for place, row in enumerate(chosen):
        left, top = place % COLUMNS * (FACE + 8), place // COLUMNS * high
        rgb = np.broadcast_to(images[row], (*images.shape[1:3], 3))
        face = Image.fromarray(np.ascontiguousarray(rgb)).resize((FACE, FACE))
        board.paste(face, (left, top))
        found = probabilities[row].argmax()
        said = f"{names[found]} {100 * probabilities[row, found]:.0f} %"
        write.text((left, top + FACE), f"label {names[labels[row]]}", fill=(0, 0, 0), font=font)
        colour = _RIGHT if found == labels[row] else _WRONG
        write.text((left, top + FACE + LINE), said, fill=colour, font=font)
    return np.asarray(board)[None]
