"""What a person needs to know before using a trained network, as Markdown.

`gather` reads it from a workdir; `text` writes it. In between it is plain data, which a file of
weights carries with it (after Mitchell et al. 2019, "Model cards for model reporting").
"""

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ferjax.analysis import scores
from ferjax.data import splits
from ferjax.engine.metrics import read_rows
from ferjax.weights import Weights
from ferjax.workdir import json_or_nothing

TITLE = "# Model card: "
SELECTION, TEST = "public_test", "private_test"

_FER2013 = """\
FER2013 (Goodfellow et al. 2013): 35,887 grey faces of 48x48 pixels, found by web searches for
words of emotion, and cut out by a face detector.

- **Label noise.** A label says what the search and its reviewers took the face for, not what the
  person felt. People agree with these labels on about 65 % of the images (65 +- 5 % in the
  paper). The ten votes an image of FER+ agree with the label on 66 % of the training images:
  happy 92 %, neutral 87 %, surprise 79 %, angry 47 %, sad 40 %, disgust 31 %, fear 13 %. Errors
  on the last four are often errors of the label.
- **Copies.** 280 images of public_test and 288 of private_test (8 %) have an exact copy in the
  official training images, {copies}
- **Few of some classes.** Disgust is 1.5 % of the images, happy 25 %.
- **Who is missing.** Nothing is recorded of age, gender, skin colour or origin, so nobody can say
  how the error is spread over groups of people, and this card does not. The pictures are those
  that the web showed for English words by 2013; many are stock photographs and posed. Missing or
  rare are faces that the detector of that time did not find (in profile, covered, in poor light),
  everyday expressions that nobody photographs, and whoever was not pictured on the web. None of
  the people was asked.
"""
_SYNTHETIC = """\
synthetic_faces: drawings that code makes. They are no people. What was trained on them is a test
of the software, and says nothing about photographs.
"""
_OTHER = """\
{name}: pictures that whoever trained this network provided. ferjax knows nothing of who is in
them, who is missing, or who labelled them: add it here before you pass the network on.
"""
_LIMITS = """\
- It names the expression that a picture of a face looks like to people who labelled such
  pictures. It does **not** tell what a person feels, thinks or will do: expressions vary too much
  between people, cultures and situations for that (Barrett et al. 2019, Psychological Science in
  the Public Interest 20 (1)).
- **Not for decisions about people**: hiring, work, school, credit, insurance, policing, borders,
  health, advertising to a person, or watching anyone without their consent. In the European
  Union, inferring emotions of people at work or in education is prohibited, but for medical and
  safety reasons (Regulation (EU) 2024/1689, Article 5 (1) (f)).
- One frontal face that fills the picture is what it was trained on. Other poses, covered faces,
  other cameras, drawings and pictures without a face get an answer, too, and no warning.
- {confidence}
- Fit for: research on learning from few labels, teaching, demonstrations, tests of software.
"""


def gather(
    workdir: Path,
    weights: Weights,
    *,
    checkpoint: str,
    kind: str,
    public: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The facts about a checkpoint that its workdir holds.

    Args:
      workdir: of the run; an `epath.Path` will do.
      weights: of the checkpoint.
      checkpoint: how it was chosen: "best", "latest" or a step.
      kind: "ema" or "raw".
      public: its scores on public_test (`scores.summarize`), where they have just been computed.

    Returns:
      JSON content; keys of what is not known are left out.
    """
    c = weights.config
    rows = [r for r in read_rows(workdir / "metrics.jsonl") if r.get("kind") == "eval"]
    recorded = splits.recorded(workdir / "split.json")
    keys = ("labeled_count", "unlabeled_count", "labeled_per_class", "digest", "data_digest")
    public = public or _public(workdir, weights.step, kind, rows)
    facts: dict[str, Any] = {
        "name": c.name,
        "algorithm": c.algorithm.name,
        "model": c.model.name,
        "parameters": sum(np.size(x) for x in jax.tree.leaves(weights.variables["params"])),
        "data": c.data.name,
        "seed": c.seed,
        "split_seed": c.data.split_seed,
        "epochs": c.epochs,
        "checkpoint": checkpoint,
        "weights": kind,
        "step": weights.step,
        "evaluations": len(rows),
        "split": {key: recorded[key] for key in keys if key in recorded},
        "scores": {SELECTION: _kept(public)} if public else {},
    }
    private = json_or_nothing(workdir / "eval" / f"{TEST}.json")
    if private and (private["step"], private["weights"]) == (weights.step, kind):
        log = workdir / "eval" / f"{TEST}_readings.jsonl"
        readings = len(log.read_text().splitlines()) if log.exists() else 1
        facts["scores"][TEST] = {**_kept(private), "readings": readings}
    return facts


def text(weights: Weights) -> str:
    """The card, from `weights.facts`."""
    f, c = weights.facts, weights.config
    title = f"{TITLE}{f['name'] or f['model']}"
    height, width, channels = weights.image_shape
    what = (
        f"A {f['model']} network of {f['parameters']:,} parameters, trained by {f['algorithm']} "
        f"with ferjax. It takes {'grey' if channels == 1 else 'colour'} faces of {height}x{width} "
        f"pixels and tells apart {', '.join(weights.classes)}."
    )
    kind = c.data.name.partition("/")[0]
    clean = f["scores"].get(TEST, {}).get("clean") or {}
    copies = "which flatters every score a little."
    if c.data.clean != "none":
        copies = "without which this network was trained."
    if clean.get("accuracy") is not None:
        copies += f" Without those images: {_share(clean)}."
    about = {"fer2013": _FER2013.format(copies=copies), "synthetic_faces": _SYNTHETIC}
    unsaid = "not said: whoever trained them has to (`ferjax.export --licence=`)"
    licence = f"These weights: {f.get('licence', unsaid)}. ferjax itself is under Apache-2.0. " + (
        "FER2013 came out under the terms of a Kaggle competition, for research and education; its "
        "pictures belong to their owners, and none is in this file. Whether weights trained on "
        "such pictures may be used for other ends is not settled."
        if kind == "fer2013"
        else "The rights in the training pictures are those of their owners."
        if kind != "synthetic_faces"
        else ""
    )
    sections = {
        "Training": _training(weights),
        "Scores": _scores(f, weights.classes),
        "Data": about.get(kind, _OTHER.format(name=c.data.name)),
        "Limits and misuse": _LIMITS.format(confidence=_confidence(f)),
        "Licence": licence,
        "Use": _use(c.data.illumination),
    }
    body = "\n\n".join(f"## {name}\n\n{content.strip()}" for name, content in sections.items())
    return f"{title}\n\n{what}\n\n{body}\n"


def _training(weights: Weights) -> str:
    f, data = weights.facts, weights.config.data
    split, lines = f["split"], []
    if "labeled_count" in split:
        per_class = zip(weights.classes, split.get("labeled_per_class", ()), strict=False)
        counts = ", ".join(f"{name} {count:,}" for name, count in per_class)
        unlabeled = split.get("unlabeled_count", 0)
        lines.append(
            f"- Split: {split['labeled_count']:,} labelled images of `{f['data']}` ({counts}) and "
            f"{unlabeled:,} unlabelled ones, of which `{f['algorithm']}` may make use; drawn with "
            f"split_seed {f['split_seed']}, digest {str(split.get('digest'))[:12]}, data "
            f"{str(split.get('data_digest'))[:12]}."
        )
    others = {
        "Weights to start from": weights.config.init_from,
        "Pictures without label, from elsewhere": data.unlabeled_source,
        "Targets made by another network": weights.config.algorithm.get("predictions", ""),
    }
    lines += [f"- {what}: {where}." for what, where in others.items() if where]
    if data.labels != "hard" or data.clean != "none":
        lines.append(f"- Labels: {data.labels}; cleaning of the training images: {data.clean}.")
    lines.append(
        f"- Protocol: {SELECTION} is there for choices (recipe, length, checkpoint), so its labels "
        f"count as used; {TEST} is meant for the final score alone. Seed {f['seed']}, "
        f"{f['epochs']} epochs."
    )
    how = {
        "best": f"the best of {f['evaluations']} evaluations on {SELECTION} among those kept",
        "latest": "the last one saved, whatever its score",
    }.get(f["checkpoint"], "named by its step")
    averaged = "averaged (EMA)" if f["weights"] == "ema" else "raw"
    lines.append(f"- Checkpoint: step {f['step']:,}, {how}; {averaged} weights.")
    return "\n".join(lines)


def _scores(f: dict[str, Any], classes: tuple[str, ...]) -> str:
    found = f["scores"]
    if not found:
        return "Not scored yet."
    lines = ["| split | images | accuracy (95 % interval) | balanced | macro-F1 | ECE |"]
    lines.append("|---|---|---|---|---|---|")
    for name, s in found.items():
        rest = (s.get("balanced_accuracy"), s.get("macro_f1"))
        cells = [name, f"{s['images']:,}", _share(s), *map(_percent, rest), _number(s.get("ece"))]
        lines.append(f"| {' | '.join(cells)} |")
    notes = []
    if f["checkpoint"] == "best" and SELECTION in found:
        notes.append(f"{SELECTION} chose the checkpoint: its score is somewhat too good.")
    if TEST in found:
        n = found[TEST]["readings"]
        notes.append(f"{TEST} was read {'once' if n == 1 else f'{n} times'} for this run.")
    else:
        notes.append(f"{TEST} has not been scored with this checkpoint.")
    notes.append("The interval (Wilson) covers the choice of images, not that of the seed.")
    lines += ["", " ".join(notes)]
    per_class = found.get(TEST, found.get(SELECTION, {})).get("per_class")
    if per_class:
        lines += ["", f"On {TEST if TEST in found else SELECTION}, by class:", ""]
        lines += ["| class | images | recall | precision |", "|---|---|---|---|"]
        for name, row in per_class.items():
            share = f"{_percent(row['recall'])} | {_percent(row['precision'])}"
            lines.append(f"| {name} | {row['images']:,} | {share} |")
    return "\n".join(lines)


def _confidence(f: dict[str, Any]) -> str:
    s = f["scores"].get(TEST) or f["scores"].get(SELECTION) or {}
    if s.get("ece") is None:
        return "Its confidence is not a probability of being right."
    return (
        f"Its confidence is not a probability of being right: on average the two differ by "
        f"{100 * s['ece']:.0f} points (`ferjax.evaluate --calibrate` fits a temperature)."
    )


def _use(illumination: str) -> str:
    lines = [
        "```py",
        "import ferjax",
        "",
        'model = ferjax.load("PATH")  # the run\'s directory, or the .safetensors file',
        "model.predict(face).labels  # [H, W], [H, W, 3] or several; uint8, or floats in [0, 1]",
        "```",
        "",
        "`python -m ferjax.predict --workdir=PATH photo.jpg` finds the faces first.",
    ]
    if illumination in ("none", "standardize"):
        lines.append("An ONNX or StableHLO file holds the normalisation: give it uint8 faces.")
    return "\n".join(lines)


def _public(
    workdir: Path, step: int, kind: str, rows: list[dict[str, Any]]
) -> dict[str, Any] | None:
    """What the workdir knows of this checkpoint's scores on public_test."""
    final = json_or_nothing(workdir / "eval" / "final.json")
    for found in (json_or_nothing(workdir / "eval" / f"{SELECTION}.json"), final):
        if found and (found["step"], found["weights"]) == (step, kind):
            return found
    share = next((r.get(f"{kind}_accuracy") for r in rows if r["step"] == step), None)
    if share is None or "images" not in final:
        return None
    interval = list(scores.wilson_interval(share, final["images"]))
    return {"images": final["images"], "accuracy": share, "accuracy_interval": interval}


def _kept(summary: dict[str, Any]) -> dict[str, Any]:
    keys = (
        "images",
        "accuracy",
        "accuracy_interval",
        "balanced_accuracy",
        "macro_f1",
        "nll",
        "ece",
    )
    return {key: summary[key] for key in (*keys, "per_class", "clean") if key in summary}


def _share(s: dict[str, Any]) -> str:
    low, high = s["accuracy_interval"]
    return f"{_percent(s['accuracy'])} ({100 * low:.2f} to {100 * high:.2f})"


def _percent(share: float | None) -> str:
    return "" if share is None or math.isnan(share) else f"{100 * share:.2f} %"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
