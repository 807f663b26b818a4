"""The facts of a run in its report: labels used, what the data are like, what it ran on."""

import json
import math
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath
from ml_collections import FrozenConfigDict

from ferjax import config as configs
from ferjax.analysis import page
from ferjax.data import splits
from ferjax.engine import flops, starts
from ferjax.engine.metrics import training_seconds
from ferjax.workdir import json_or_nothing


class Facts:
    """Each method that is a section returns its HTML.

    Args:
      workdir: of the run.
      config: of the run.
      rows: of its metrics.
      classes: the data set's, () before it is read.

    Attributes:
      audit: what `ferjax.data.audit` found in the run's data, {} where it was not asked.
    """

    def __init__(
        self,
        workdir: epath.Path,
        config: FrozenConfigDict,
        rows: Sequence[dict[str, Any]],
        classes: tuple[str, ...],
    ) -> None:
        self._workdir, self._config, self._rows, self._classes = workdir, config, rows, classes
        self._split = splits.recorded(workdir / "split.json")
        audit = json_or_nothing(workdir / "audit" / "audit.json")
        self.audit = audit if audit.get("digest", "") == self._split.get("data_digest") else {}

    def budget(self) -> str:
        """How many images were labelled, in all and of each class."""
        split = self._split
        if not split:
            return page.note("split.json is not there yet.")
        labeled, unlabeled = (split.get(f"{k}_count", 0) for k in ("labeled", "unlabeled"))
        per_class = split.get("labeled_per_class", [])
        names = tuple(split.get("class_names", ())) or self._classes
        names = names or tuple(f"class {i}" for i in range(len(per_class)))
        digests = (str(split.get(key))[:12] for key in ("digest", "data_digest"))
        text = (
            f"{labeled:,} labelled and {unlabeled:,} unlabelled training images. Digest of the "
            f"split {', of the data '.join(digests)}. "
            "The choice of checkpoint used the labels of public_test as well."
        )
        counts = (f"{count:,}" for count in per_class)
        return page.note(text) + page.table(
            ("class", "labelled images"), zip(names, counts, strict=True)
        )

    def data(self) -> str:
        """What `ferjax.data.audit --workdir=` of this run found in the whole data set."""
        audit, clean = self.audit, self._config.data.clean
        near, whole = audit["near"], audit["exact"]["whole set"]
        values: dict[str, object] = {
            f"images of {name}": f"{split['images']:,}" for name, split in audit["splits"].items()
        }
        values["equal pixels"] = f"{whole['images']:,} images in {whole['groups']:,} groups"
        values["of these with conflicting labels"] = (
            f"{whole['conflicting_images']:,} in {whole['conflicting']:,} groups"
        )
        for name, others in audit["copies"].items():
            if count := others.get("train"):
                values[f"images of {name} with a copy in train"] = f"{count:,}"
        values[f"nearly equal pairs (r of {near['thumbnail']} x {near['thumbnail']} pixels)"] = (
            f"{near['pairs']:,} with {near['threshold']:g} or more"
        )
        values["blank"] = f"{len(audit['blank']):,}"
        values["padded"] = f"{len(audit['padded']['rows']):,}"
        if "not_a_face" in audit:
            values["no face, by FER+'s voters"] = f"{len(audit['not_a_face']):,}"
        text = (
            f"This run was trained with data.clean={clean}. The pictures are in audit/audit.html."
        )
        return page.pairs(values) + page.note(text)

    def run(self) -> str:
        """Time, versions, devices, operations, the whole config."""
        seconds = training_seconds(self._rows)
        step = self._rows[-1]["step"] if self._rows else 0
        last = starts.last(self._workdir)
        versions = ", ".join(f"{n} {last[n]}" for n in ("python", *starts.PACKAGES) if n in last)
        values = {
            "step": f"{step:,}",
            "training time": f"{seconds / 60:,.1f} minutes" if seconds else "not known",
            "operations": self._operations(step),
            "devices": _devices(last),
            "CPU": last.get("cpu", "not known"),
            "code": _code(last) or "not known",
            "versions": versions or "not known",
            "this report: code": configs.code_version(),
            "this report: devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        }
        text = json.dumps(self._config.to_dict(), indent=2)
        return (
            page.pairs(values)
            + self._starts()
            + f"<details><summary>config.json</summary><pre>{page.escape(text)}</pre></details>"
        )

    def _operations(self, steps: int) -> str:
        """Floating-point operations of the training so far."""
        names, shape = self._split.get("class_names"), self._split.get("image_shape")
        if not names or not shape:
            return "not known"
        each = flops.of_step(self._config, len(names), tuple(shape))
        if each is None:
            return "not counted: JAX_PLATFORMS leaves out cpu, which counts them"
        return f"{_flop(each)} a step, {_flop(each * steps)} in all steps (without scoring)"

    def _starts(self) -> str:
        """Each start, if there were several: what it went on from, and what it ran on."""
        rows = starts.read(self._workdir)
        if len(rows) < 2:
            return ""
        head = ("start (UTC)", "from step", "devices", "jax", "code")
        body = [(r["time"], f"{r['step']:,}", _devices(r), r["jax"], _code(r)) for r in rows]
        summary = f"<summary>{len(rows)} starts</summary>"
        return f"<details>{summary}{page.table(head, body)}</details>"


def _devices(start: dict[str, Any]) -> str:
    """Those of a start."""
    if not start:
        return "not known"
    return f"{start['devices']} x {start['device']}, {start['processes']} process(es)"


def _code(start: dict[str, Any]) -> str:
    """ferjax's digest alone: the versions of what it uses are named beside it."""
    return start.get("code", "").split(",")[0]


def _flop(count: float) -> str:
    """A number of operations with the prefix that leaves one to three digits before the point."""
    power = min(max(int(math.log10(max(float(f"{count:.2e}"), 1)) // 3), 2), 7)
    return f"{count / 1000**power:.3g} {'MGTPEZ'[power - 2]}FLOP"
