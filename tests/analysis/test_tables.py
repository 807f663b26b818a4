"""Means, deviations and what a table says of runs that are not finished, against plain NumPy."""

import csv
import io

import numpy as np
import pytest

from ferjax.analysis import figures, sweep_plot, tables
from ferjax.analysis.tables import Line


def run(best, final=None, state="done", private=None, **more):
    scores = {} if private is None else {"private_test": {"accuracy": private, **more}}
    return {
        "state": state,
        "reason": "exit status 1: a | b" if state == "failed" else "",
        "public_test": {"best": best, "final": final},
        "scores": scores,
        "minutes": 2.0,
        "epochs_done": 3.0,
    }


BESTS = (0.5012, 0.5234, 0.4951)
RUNS = {i: run(best, best - 0.01) for i, best in enumerate(BESTS)}


def cells(lines):
    header, _, *body = tables.readable(lines).markdown().splitlines()
    split = [[c.strip() for c in x.strip("|").split(" | ")] for x in (header, *body)]
    return [dict(zip(split[0], row, strict=True)) for row in split[1:]]


def test_mean_and_sample_deviation():
    values = 100 * np.array(BESTS)
    (row,) = cells([Line("a", RUNS, (0, 1, 2))])
    assert row["public_test, best"] == f"{values.mean():.2f} ± {values.std(ddof=1):.2f}"
    assert row["public_test, final"] == f"{values.mean() - 1:.2f} ± {values.std(ddof=1):.2f}"
    assert row["seeds"] == "3"
    assert tables.spread([54.534]) == "54.53"
    assert tables.spread([]) == ""


def test_only_wanted_finished_runs_count():
    runs = {0: RUNS[0], 1: run(0.9, state="cut"), 7: run(0.9, 0.9)}
    (row,) = cells([Line("a", runs, (0, 1, 2))])
    assert row["public_test, best"] == "50.12"
    assert row["seeds"] == "1 of 3"
    assert row["notes"] == "seed 1 cut at epoch 3 (best so far 90.00)"


@pytest.mark.parametrize(
    ("runs", "text"),
    [
        ({}, "not run"),
        ({0: run(None, state="failed")}, "failed"),
        ({0: run(0.3, state="cut"), 1: run(None, state="failed")}, "not finished"),
    ],
)
def test_nothing_finished(runs, text):
    (row,) = cells([Line("a", runs, (0, 1), published=40.5, reach=40.0)])
    assert row["public_test, best"] == text
    assert (row["published"], row["to reach"]) == ("40.50", "40")
    assert row.get("reached", "") == ""


def test_reached_compares_the_seeds_whose_score_both_have():
    base = Line("b", {s: run(0.5, private=p) for s, p in enumerate((0.50, 0.58, 0.60))}, (0, 1, 2))
    runs = {0: run(0.5, private=0.52), 1: run(0.5), 2: run(0.5, state="cut")}
    assert Line("a", runs, (0, 1, 2), beats=base).reached is True


def test_reached_is_judged_on_private_test_once_it_was_read():
    base = Line("base", {0: run(0.50, private=0.52)}, (0,))
    for best, private, reach, margin, wanted in (
        (0.60, None, 60.0, 0.0, True),
        (0.60, 0.59, 60.0, 0.0, False),
        (0.40, 0.60, 60.0, 0.0, True),
        (0.60, 0.53, None, 0.0, True),
        (0.60, 0.52, None, 0.0, False),
        (0.60, 0.53, None, 3.0, False),
        (0.53, None, None, 3.0, True),  # both on public_test then
        (0.60, 0.60, 61.0, 3.0, False),
    ):
        line = Line(
            "a",
            {0: run(best, private=private)},
            (0,),
            reach=reach,
            beats=base if margin or reach is None else None,
            margin=margin,
        )
        assert line.reached is wanted, line
    assert Line("a", {0: run(0.6)}, (0,)).reached is None
    assert Line("a", {0: run(0.6)}, (0,), beats=Line("b", {}, (0,))).reached is None
    assert Line("a", {}, (0,), reach=52.0, beats=base, margin=3.0).target == "52, >= base + 3"


def test_two_rows_are_compared_on_the_seeds_that_both_have():
    """Seed 1 has easier labelled images, which only the row to be beaten was run on."""
    base = Line("base", {0: run(0.50), 1: run(0.60)}, (0, 1))
    assert Line("a", {0: run(0.54)}, (0, 1), beats=base, margin=3.0).reached is True
    assert Line("a", {2: run(0.9)}, (0, 1, 2), beats=base).reached is None


def test_private_figures_of_fewer_seeds_say_so():
    runs = {0: run(0.5, private=0.6), 1: run(0.5), 2: run(0.5)}
    (row,) = cells([Line("a", runs, (0, 1, 2))])
    assert row["private_test"] == "60.00 (1 of 3)"
    assert row["seeds"] == "3"


def test_scores_of_views_and_ensembles_are_not_those_of_single_networks():
    ten = {"accuracy": 0.61, "members": 1, "clean_accuracy": 0.6}
    both = {"accuracy": 0.65, "members": 2}
    first = run(0.5, private=0.51) | {
        "scores": {
            "private_test": {"accuracy": 0.51},
            "private_test_ten_crop": ten,
            "public_test_ten_crop_ensemble": both,
        }
    }
    runs = {0: first, 1: run(0.4, private=0.41)}
    assert Line("a", runs, (0, 1)).values("private") == pytest.approx([51, 41])
    crops = Line("a", runs, (0, 1), scored="ten_crop")
    assert crops.values("private") == pytest.approx([61])
    assert crops.values("clean") == pytest.approx([60])
    assert crops.values("best") == []
    (row,) = cells([Line("a", runs, (0, 1), scored="ten_crop_ensemble")])
    assert row["public_test, best"] == "65.00"
    assert row["seeds"] == "2 together"
    assert row["minutes"] == "4.0"  # what both took
    (row,) = cells([Line("a", runs, (0, 1, 2), scored="ten_crop_ensemble")])
    assert row["public_test, best"] == "not scored"  # one of two is not one of three
    assert cells([crops])[0]["public_test, best"] == "not scored"


def test_csv_has_numbers_and_survives_commas():
    line = Line("a, b", RUNS, (0, 1, 2), published=40.0, x=10.0, series="s")
    failed = Line("c", {0: run(None, state="failed")}, (0,))
    first, second = csv.DictReader(io.StringIO(tables.exact([line, failed]).csv()))
    values = 100 * np.array(BESTS)
    assert first["row"] == "a, b"
    assert float(first["best_mean"]) == pytest.approx(values.mean(), abs=1e-5)
    assert float(first["best_sd"]) == pytest.approx(values.std(ddof=1), abs=1e-5)
    assert (first["best_n"], first["private_n"], first["state"]) == ("3", "0", "done")
    assert second["state"] == "seed 0 failed: exit status 1: a | b"


def test_markdown_keeps_its_columns_whatever_a_cell_holds():
    text = tables.Table(["", "empty", "b"], [["x|y", "", "1\n2"], ["z", "", ""]]).markdown()
    lines = ["|      | b   |", "|------|-----|", "| x\\|y | 1 2 |", "| z    |     |"]
    assert text.splitlines() == lines


def test_the_plot_shows_what_was_run_and_published():
    lines = [
        Line(f"{s}{x}", RUNS if s == "a" else {}, (0, 1, 2), published=40.0, series=s, x=x)
        for s in "ab"
        for x in (10, 30, 100)
    ]
    figure = sweep_plot.draw(lines, x_label="labels")
    (axes,) = figure.axes
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["10", "30", "100"]
    names = axes.get_legend_handles_labels()[1]
    assert sorted(names) == ["a", "a, published", "b, published"]
    (measured,) = [c for c in axes.containers if c.get_label() == "a"]
    assert measured[0].get_ydata() == pytest.approx([100 * np.mean(BESTS)] * 3)
    rows = sweep_plot.draw([Line("one", RUNS, (0, 1, 2)), Line("two", {}, (0,))])
    assert [t.get_text() for t in rows.axes[0].get_yticklabels()] == ["one", "two"]
    many = [Line(f"{i}", RUNS, (0,), series=f"s{i}", x=x) for i in range(6) for x in (1, 2)]
    titles = [a.get_title() for a in sweep_plot.draw(many).axes if a.get_visible()]
    assert titles == ["s1", "s2", "s3", "s4", "s5"]
    assert figures.png(figure).startswith(b"\x89PNG")
