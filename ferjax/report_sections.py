"""The sections of a run's report: see `ferjax.report`, the command."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cv2
import jax
import numpy as np
from etils import epath
from matplotlib.figure import Figure
from ml_collections import FrozenConfigDict

from ferjax import report_facts
from ferjax.analysis import calibration, figures, page, scores, training_curves
from ferjax.analysis.reliability import Bin, reliability
from ferjax.augment import policies
from ferjax.config import section
from ferjax.data import illumination
from ferjax.data.arrays import Dataset
from ferjax.data.builder import encode_png
from ferjax.engine.metrics import read_rows
from ferjax.engine.state import build_view
from ferjax.load import Trained
from ferjax.workdir import json_or_nothing

SPLIT = "public_test"
FACES = 18  # on a sheet
POINTS = 1200  # of the feature map
ENOUGH = 10  # images that a bin needs to be drawn in the reliability diagram


@dataclass(frozen=True)
class Scored:
    """One checkpoint's results on public_test.

    Attributes:
      trained: the network.
      which: how the checkpoint was named.
      weights: ema or raw.
      data: with the split public_test.
      logits: float [N, C].
    """

    trained: Trained
    which: str
    weights: str
    data: Dataset
    logits: np.ndarray


class Report:
    """What goes into the page; each method that is a section returns its HTML.

    Args:
      workdir: of the run.
      config: of the run.
      scored: None before the first checkpoint.
    """

    def __init__(
        self, workdir: epath.Path, config: FrozenConfigDict, scored: Scored | None
    ) -> None:
        self.workdir, self.config, self.scored = workdir, config, scored
        self.rows = read_rows(workdir / "metrics.jsonl")
        self.evals = [row for row in self.rows if row.get("kind") == "eval"]
        self.drawn: dict[str, Figure] = {}
        if scored:
            labels = scored.data.splits[SPLIT].labels
            self.labels = labels
            self.probabilities = scores.softmax(scored.logits)
            self.summary = scores.summarize(scored.logits, labels, scored.data.class_names)

    def html(self) -> str:
        """The whole page."""
        c = self.config
        title = f"{c.name}: {c.algorithm.name}, {c.model.name}, {c.data.labeled} labels"
        made: list[tuple[str, str, Callable[[], str]]] = [("curves", "Training", self.curves)]
        if self.scored:
            made += [
                ("confusion", "Confusion", self.confusion),
                ("classes", "Classes", self.classes),
                ("calibration", "Confidence", self.calibration),
                ("predictions", "Predictions", self.predictions),
                ("views", "Views", self.views),
            ]
            if self.scored.trained.features:
                made.append(("gradcam", "What it looks at", self.gradcam))
                made.append(("features", "Feature map", self.features))
        facts = report_facts.Facts(self.workdir, c, self.rows, self._classes())
        made.append(("labels", "Labels used", facts.budget))
        if facts.audit:
            made.append(("audit", "The data", facts.data))
        made.append(("run", "The run", facts.run))
        parts = [(key, name, make()) for key, name, make in made]
        return page.page(title, [("score", "Score", self.score()), *parts], "")

    def score(self) -> str:
        """The headline and how its checkpoint was chosen."""
        private = json_or_nothing(self.workdir / "eval" / "private_test.json")
        tiles, first, notes = [], None, []
        if private:
            readings = self.workdir / "eval" / "private_test_readings.jsonl"
            times = len(readings.read_text().splitlines()) if readings.exists() else 1
            first = (_percent(private["accuracy"]), f"private_test, {_interval(private)}")
            notes.append(
                f"private_test has been read {times} time{'s' if times > 1 else ''}; the score "
                f"shown is of step {private['step']} ({private['weights']} weights)."
            )
        if self.scored:
            s = self.summary
            shown = (_percent(s["accuracy"]), f"public_test, {_interval(s)}")
            if first:
                tiles.append(shown)
            else:
                first = shown
            p = self.probabilities
            tiles += [
                (_percent(s["balanced_accuracy"]), "balanced accuracy, public_test"),
                (_percent(s["macro_f1"]), "macro-F1, public_test"),
                (f"{s['nll']:.3f}", "NLL in nats, public_test"),
                (f"{s['ece']:.3f}", "ECE of 15 bins, public_test"),
                (f"{calibration.brier(p, self.labels):.3f}", "Brier score (0 to 2), public_test"),
            ]
            step = self.scored.trained.step
            if self.scored.weights == "raw":
                notes.append(
                    f"The scores on public_test are those of step {step}'s raw weights; which step "
                    "is the best goes by the EMA weights."
                )
            elif self.scored.which == "best" and len(self.evals) > 1:
                notes.append(
                    f"Step {step} is the best of {len(self.evals)} evaluations on public_test "
                    "among the checkpoints kept: its public_test score is therefore somewhat too "
                    "good, and only private_test, read once, is free of that choice."
                )
            else:
                notes.append(f"The scores on public_test are those of step {step}.")
        else:
            notes.append("There is no checkpoint yet: sections that need one are left out.")
        done = self.rows[-1]["epoch"] if self.rows else 0
        if done < self.config.epochs:
            notes.append(f"The run has done {done:.1f} of {self.config.epochs} epochs.")
        return page.cards(tiles, first=first) + "".join(map(page.note, notes))

    def curves(self) -> str:
        """Whatever metrics.jsonl holds against the epoch."""
        drawn = training_curves.draw(self.rows)
        if not drawn:
            return page.note("Nothing has been logged yet.")
        return page.figures(self._figure(*each) for each in drawn)

    def confusion(self) -> str:
        """The matrix as counts and as shares, and the largest confusions in words."""
        counts, names = np.array(self.summary["confusion"]), self._classes()
        both = [
            self._figure(
                f"confusion_{'shares' if shares else 'counts'}",
                figures.confusion(counts.tolist(), names, shares=shares),
                caption,
            )
            for shares, caption in (
                (False, "Images of public_test."),
                (True, "Percent of each true class."),
            )
        ]
        wrong = counts - np.diag(np.diag(counts))
        largest = np.argsort(-wrong, axis=None, kind="stable")[:3]
        said = [
            f"{names[i]} taken for {names[j]} ({wrong[i, j]} images)"
            for i, j in zip(*np.unravel_index(largest, wrong.shape), strict=True)
            if wrong[i, j]
        ]
        text = f"Most frequent: {'; '.join(said)}." if said else "No image is confused."
        return page.figures(both) + page.note(text)

    def classes(self) -> str:
        """Bars and a table."""
        per_class = self.summary["per_class"]
        bars = self._figure("classes", figures.class_bars(per_class), "Scores of each class.")
        rows = [
            (name, *(f"{100 * row[k]:.1f}" for k in ("precision", "recall", "f1")), row["images"])
            for name, row in per_class.items()
        ]
        head = ("class", "precision, %", "recall, %", "F1, %", "images")
        return page.figures([bars]) + page.table(head, rows)

    def calibration(self) -> str:
        """Reliability as trained and after temperature scaling."""
        assert self.scored
        p, labels = self.probabilities, self.labels
        scaled = calibration.cross_fitted(self.scored.logits, labels)
        right = p.argmax(-1) == labels
        drawn = [
            self._figure(
                "reliability",
                figures.reliability(_bins(p, labels), _bins(scaled, labels)),
                "Below the diagonal the network is too sure of itself. Bins with fewer than "
                f"{ENOUGH} images are not drawn.",
            ),
            self._figure(
                "confidence",
                figures.histogram(
                    {"right": p.max(-1)[right], "wrong": p.max(-1)[~right]},
                    x_label="confidence, %",
                ),
                "How sure it is where it is right and where it is wrong.",
            ),
        ]
        kinds = {"as trained": p, "temperature-scaled": scaled}
        table = page.table(
            ("", "NLL", "Brier", "ECE", "ECE, equal mass"),
            [
                (name, *(f"{calibration.summarize_calibration(q, labels)[k]:.3f}" for k in keys))
                for keys in [("nll", "brier", "ece", "ece_equal_mass")]
                for name, q in kinds.items()
            ],
        )
        t = calibration.fit_temperature(self.scored.logits, labels)
        text = (
            f"All of public_test chooses the temperature {t:.2f}. To judge its effect, each half "
            "of public_test is scaled by the temperature that the other half chose."
        )
        return page.figures(drawn) + table + page.note(text)

    def predictions(self) -> str:
        """Sheets of faces: drawn at random, the surest errors, the least sure hits."""
        p = self.probabilities
        confidence, right = p.max(-1), p.argmax(-1) == self.labels
        order = np.argsort(confidence, kind="stable")
        random = np.random.default_rng(0).permutation(len(p))[:FACES]
        sheets = (
            ("Drawn at random", random),
            ("Most confident errors", order[~right[order]][::-1][:FACES]),
            ("Least confident hits", order[right[order]][:FACES]),
        )
        return "".join(
            f"<h3>{name}</h3>{self._sheet('faces_' + name.lower().replace(' ', '_'), rows)}"
            for name, rows in sheets
        )

    def views(self) -> str:
        """An image of each of a few classes, as it is and as training sees it."""
        assert self.scored
        split = self.scored.data.splits[SPLIT]
        chosen = [int(np.flatnonzero(split.labels == c)[0]) for c in np.unique(split.labels)[:3]]
        images, names, shown = split.images[chosen], self._classes(), ""
        made = {"original": images}
        data = self.config.data
        seen = illumination.apply(images, data.illumination)
        own = data.illumination == "standardize"  # then no mean and deviation leads back to levels
        std, mean = (0.25, 0.5) if own else (np.asarray(data.std), np.asarray(data.mean))
        for name in self.config.views:
            policy = policies.Policy(**section(self.config.views, name))
            view = jax.jit(build_view(self.config, policy))
            for i in range(2):
                keys = jax.random.split(jax.random.key(i), len(images))
                x = np.asarray(view(seen, keys), np.float64) * std + mean
                made[f"{name} {i + 1}"] = np.rint(255 * np.clip(x, 0, 1)).astype(np.uint8)
        for place, row in enumerate(chosen):
            true, line = names[split.labels[row]], []
            for name, view_images in made.items():
                text = f"{true}, {name}"
                line.append((_png(view_images[place]), text, page.escape(text)))
            shown += page.faces(line)
        return shown + page.note("Drawn from public_test; training draws anew each step.")

    def gradcam(self) -> str:
        """Grad-CAM on an image of each class that is drawn at random."""
        assert self.scored
        assert self.scored.trained.gradcam
        order = np.random.default_rng(1).permutation(len(self.labels))
        first = np.unique(self.labels[order], return_index=True)[1]
        rows = order[first[:FACES]]
        heat = self.scored.trained.gradcam(self.scored.data.splits[SPLIT].images[rows])
        text = (
            "Bright: what speaks for the predicted class (Grad-CAM on the last feature map, scaled "
            "to each image's greatest value). It is coarse, and no proof of what decides."
        )
        return self._sheet("gradcam", rows, heat) + page.note(text)

    def features(self) -> str:
        """The last layer's inputs in their two main directions."""
        assert self.scored
        assert self.scored.trained.features
        split = self.scored.data.splits[SPLIT]
        rows = np.sort(np.random.default_rng(0).permutation(len(split.images))[:POINTS])
        x = self.scored.trained.features(split.images[rows]).astype(np.float64)
        x -= x.mean(0)
        _, s, directions = np.linalg.svd(x, full_matrices=False)
        share = np.square(s[:2]).sum() / max(np.square(s).sum(), 1e-30)
        drawn = figures.scatter(x @ directions[:2].T, split.labels[rows], self._classes())
        caption = (
            f"The last layer's inputs of {len(rows):,} images of public_test, coloured by true "
            f"class: the first two principal components, which hold {100 * share:.0f} % of the "
            "variance."
        )
        return page.figures([self._figure("features", drawn, caption)])

    def _classes(self) -> tuple[str, ...]:
        return tuple(self.scored.data.class_names) if self.scored else ()

    def _figure(self, name: str, figure: Figure, caption: str) -> tuple[str, str]:
        self.drawn[name] = figure
        return figures.svg(figure, caption), caption

    def _sheet(self, name: str, rows: np.ndarray, heat: np.ndarray | None = None) -> str:
        assert self.scored
        names, images = self._classes(), self.scored.data.splits[SPLIT].images
        shown, drawn, lines = [], [], []
        for place, row in enumerate(rows):
            true, found = self.labels[row], self.probabilities[row].argmax()
            kind = "right" if true == found else "wrong"
            said = f"{names[found]} {100 * self.probabilities[row, found]:.0f}\N{NO-BREAK SPACE}%"
            shown_as = f'<span class="{kind}">{page.escape(said)}</span>'
            caption = f"true: {page.escape(names[true])}<br/>{shown_as}"
            text = f"a face labelled {names[true]}, predicted {said}"
            image = images[row] if heat is None else _lit(images[row], heat[place])
            shown.append((_png(image), text, caption))
            drawn.append(image)
            lines.append((names[true], said, bool(true == found)))
        if not shown:
            return page.note("There are none.")
        self.drawn[name] = figures.faces(drawn, lines)
        return page.faces(shown)


def _png(image: np.ndarray) -> bytes:
    """A PNG of a grey or RGB image."""
    return encode_png(np.ascontiguousarray(image[..., ::-1]) if image.shape[-1] == 3 else image)


def _lit(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """An image [H, W, C] at a quarter of its brightness where the map [h, w] is 0."""
    share = cv2.resize(heat.astype(np.float32) / max(float(heat.max()), 1e-12), image.shape[1::-1])
    return np.rint(image * (0.25 + 0.75 * np.clip(share, 0, 1))[..., None]).astype(np.uint8)


def _bins(probabilities: np.ndarray, labels: np.ndarray) -> list[Bin]:
    bins = reliability(probabilities, labels)
    return [each for each in bins if each.images >= ENOUGH]


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _interval(summary: dict[str, Any]) -> str:
    low, high = (100 * x for x in summary["accuracy_interval"])
    return f"{summary['images']:,} images, 95 % interval {low:.2f} to {high:.2f} %"
