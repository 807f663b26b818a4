"""Tables of runs: mean and standard deviation over seeds beside what others reached.

A run is what `ferjax.results.summarize` writes of it. Accuracies are fractions there and percent
here. Only finished runs enter a mean; the standard deviation is the sample's (n - 1).
"""

import csv
import dataclasses
import io
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Run = Mapping[str, Any]


@dataclass(frozen=True)
class Line:
    """One line of a table.

    Attributes:
      name: of the row.
      runs: their summaries, by seed.
      seeds: that are wanted.
      published: percent, or None.
      reach: percent that is to be reached, or None.
      beats: the line that is to be beaten, or None.
      margin: by so many points.
      on: "C", "G" or "".
      scored: "" for single networks, else what was put together (see `ferjax.rows.Row`).
      note: in the last column.
      series: of the plot.
      x: place in the plot.
    """

    name: str
    runs: Mapping[int, Run]
    seeds: Sequence[int]
    published: float | None = None
    reach: float | None = None
    beats: "Line | None" = None
    margin: float = 0.0
    on: str = ""
    scored: str = ""
    note: str = ""
    series: str = ""
    x: float | None = None

    @property
    def done(self) -> list[Run]:
        """The finished runs, by seed; of an ensemble the one that its scores lie with."""
        return self._trained[:1] if "ensemble" in self.scored else self._trained

    @property
    def _trained(self) -> list[Run]:
        runs = [self.runs[seed] for seed in sorted(self.runs) if seed in self.seeds]
        return [run for run in runs if run["state"] == "done"]

    def values(self, what: str) -> list[float]:
        """Percent or minutes of each finished run that has the value.

        Args:
          what: "best" and "final" of public_test; "private"; "clean"; "minutes", of an ensemble
            those of all its members together; "epochs".
        """
        runs = self.done
        if "ensemble" in self.scored and what == "minutes":
            members = [run["minutes"] for run in self._trained]
            return [sum(members)] if len(members) == len(self.seeds) else []
        if "ensemble" in self.scored and what in ("best", "private", "clean"):
            # One of other members is another ensemble.
            key = _key("public" if what == "best" else "private", self.scored)
            every = len(self.seeds)
            runs = [r for r in runs if r["scores"].get(key, {}).get("members") == every]
        values = [_value(run, what, self.scored) for run in runs]
        return [v for v in values if v is not None]

    @property
    def target(self) -> str:
        """What is to be reached, in words."""
        parts = [] if self.reach is None else [_percent(self.reach)]
        if self.beats:
            more = f" + {self.margin:g}" if self.margin else ""
            parts.append(f"{'>=' if more else '>'} {self.beats.name}{more}")
        return ", ".join(parts)

    @property
    def reached(self) -> bool | None:
        """Whether the mean is what it is to be; None: open.

        On private_test once that was read of this line (and of the one to be beaten), else on the
        best of public_test. Two lines are compared on the seeds that both have: a seed may have its
        own labelled images.
        """
        for what in ("private", "best"):
            line, other = self, self.beats
            if other and not (self.scored or other.scored):
                both = [s for s in self.seeds if self._has(s, what) and other._has(s, what)]
                line, other = (dataclasses.replace(each, seeds=both) for each in (line, other))
            mine = line.values(what)
            others = other.values(what) if other else []
            if not mine or (other and not others) or not self.target:
                continue
            mean = statistics.fmean(mine)
            enough = self.reach is None or mean >= self.reach
            if others:
                lead = mean - statistics.fmean(others)
                enough &= lead >= self.margin if self.margin else lead > 0
            return enough
        return None

    def _has(self, seed: int, what: str) -> bool:
        return bool(dataclasses.replace(self, seeds=[seed]).values(what))

    @property
    def state(self) -> str:
        """What is not finished: "seed 1 cut at epoch 3 of 16 (best 48.20)", or ""."""
        parts = []
        for seed in self.seeds:
            run = self.runs.get(seed)
            if run is None or run["state"] == "done":
                continue
            if run["state"] == "failed":
                reason = textwrap.shorten(run["reason"], 80, placeholder=" ...")
                parts.append(f"seed {seed} failed: {reason}")
            else:
                best = _value(run, "best", "")
                so_far = "" if best is None else f" (best so far {best:.2f})"
                parts.append(f"seed {seed} cut at epoch {run['epochs_done']:g}{so_far}")
        return "; ".join(parts)


@dataclass(frozen=True)
class Table:
    """Cells as text.

    Attributes:
      header: of the columns.
      rows: as long as the header each.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """A Markdown table without the columns that are empty throughout."""
        used = [i for i, _ in enumerate(self.header) if i == 0 or any(row[i] for row in self.rows)]
        cells = [[_escape(row[i]) for i in used] for row in [self.header, *self.rows]]
        widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(used))]
        lines = [
            "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
            for row in cells
        ]
        rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
        return "\n".join([lines[0], rule, *lines[1:]]) + "\n"

    def csv(self) -> str:
        """All columns, comma-separated."""
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerows([self.header, *self.rows])
        return buffer.getvalue()


def spread(values: Sequence[float], digits: int = 2) -> str:
    """The mean with its sample standard deviation, "54.53 ± 0.40"; of one value itself; or ""."""
    if not values:
        return ""
    text = f"{statistics.fmean(values):.{digits}f}"
    return text + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def _part(values: Sequence[float], done: int) -> str:
    """`spread`, with the number of runs where it is not that of all finished ones."""
    return spread(values) + (f" ({len(values)} of {done})" if 0 < len(values) < done else "")


def readable(lines: Sequence[Line]) -> Table:
    """The table for people: a line each, "not run" where nothing was."""
    header = ["", "on", "published", "to reach", "public_test, best", "public_test, final"]
    header += ["private_test", "private_test, clean", "reached", "seeds", "epochs", "minutes"]
    rows = []
    for line in lines:
        best, state, done = spread(line.values("best")), line.state, len(line.done)
        if not best:
            kinds = {run["state"] for run in line.runs.values()}
            best = "failed" if kinds == {"failed"} else "not finished" if kinds else "not run"
            if done:
                best = "not scored"  # its members are trained, but were not put together
        reached = {True: "yes", False: "no", None: ""}[line.reached]
        count = f"{done} of {len(line.seeds)}" if 0 < done < len(line.seeds) else str(done or "")
        if "ensemble" in line.scored:
            members = [r["scores"].get(_key("public", line.scored), {}) for r in line.done]
            count = "".join(f"{found['members']} together" for found in members if found)
        rows.append(
            [
                line.name,
                line.on,
                _percent(line.published),
                line.target,
                best,
                spread(line.values("final")),
                _part(line.values("private"), done),
                _part(line.values("clean"), done),
                reached,
                count,
                spread(line.values("epochs"), 0).partition(" ")[0],
                spread(line.values("minutes"), 1),
                "; ".join(x for x in (state, line.note) if x),
            ]
        )
    return Table([*header, "notes"], rows)


def exact(lines: Sequence[Line]) -> Table:
    """The table for programs: each mean, standard deviation and count in a column of its own."""
    names = ("best", "final", "private", "clean", "minutes")
    header = ["row", "series", "x", "published", "reach", "seeds_wanted", "seeds_done"]
    header += [f"{name}_{kind}" for name in names for kind in ("mean", "sd", "n")] + ["state"]
    rows = []
    for line in lines:
        cells = [line.name, line.series, *map(_exact, (line.x, line.published, line.reach))]
        cells += [str(len(line.seeds)), str(len(line.done))]
        for name in names:
            values = line.values(name)
            cells.append(_exact(statistics.fmean(values)) if values else "")
            cells.append(_exact(statistics.stdev(values)) if len(values) > 1 else "")
            cells.append(str(len(values)))
        rows.append([*cells, line.state or ("done" if line.done else "not run")])
    return Table(header, rows)


def _key(split: str, scored: str) -> str:
    return f"{split}_test" + (f"_{scored}" if scored else "")


def _value(run: Run, what: str, scored: str) -> float | None:
    """A percentage or the minutes of one run, None where it was not measured."""
    if what == "minutes":
        return run["minutes"]
    if what == "epochs":
        return run["epochs_done"]
    if what in ("best", "final") and not scored:
        share = run["public_test"][what]
    elif what == "final":
        share = None
    elif what == "best":
        share = run["scores"].get(_key("public", scored), {}).get("accuracy")
    else:
        found = run["scores"].get(_key("private", scored), {})
        share = found.get({"private": "accuracy", "clean": "clean_accuracy"}[what])
    return None if share is None else 100 * share


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}".removesuffix(".00")


def _exact(value: float | None) -> str:
    return "" if value is None else repr(round(value, 6))


def _escape(cell: str) -> str:
    return " ".join(cell.replace("|", "\\|").split())
