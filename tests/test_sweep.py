"""A sweep as a user runs it: stopped, gone on with, one run failing; and all sweeps' files."""

import dataclasses
import json
import re
import signal
import subprocess
import sys
import time
import types

import pytest
from children import wait_until
from test_end_to_end import ROOT, environment

from ferjax import config as configs
from ferjax import results, rows, sweep
from ferjax.config import UserError
from ferjax.engine.metrics import training_seconds

SWEEPS = sorted((ROOT / "configs" / "sweeps").glob("*.py"))
SOUND: set = set()  # configs that were looked at
TEXT = """
from ferjax.rows import Row, Sweep

def get_sweep(cpu):
    base = "configs/supervised.py:cpu"
    every = {"checkpoint.every_minutes": 0}
    longer = {"batch_size": 4, "epochs": 3}
    return Sweep("Trial", [
        Row("few", base, {**every, "data.labeled": "10%"}, published=10.0, reach=0.5, x=10,
            quick=longer),
        Row("same", base, {"data.labeled": "10%"}, beats="few", x=11, quick=longer),
    ], x_label="labels")
"""


@pytest.fixture(scope="module")
def sweep_file(tmp_path_factory):
    """A file of its own beside copies of nothing: its configs are found from its root."""
    root = tmp_path_factory.mktemp("root")
    (root / "configs" / "sweeps").mkdir(parents=True)
    for path in ("supervised.py", "fixmatch.py"):
        (root / "configs" / path).write_text((ROOT / "configs" / path).read_text())
    path = root / "configs" / "sweeps" / "trial.py"
    path.write_text(TEXT)
    return path


def command(sweep_file, workdir, *more):
    args = [f"--sweep={sweep_file}", f"--workdir={workdir}", "--quick", *more]
    return [sys.executable, "-m", "ferjax.sweep", *args]


class Nobody:
    """Starts no process."""

    seen = False

    def call(self, command, arguments):
        raise AssertionError((command, arguments))


def test_stopped_gone_on_with_and_finished(sweep_file, tmp_path, data_dir, monkeypatch):
    workdir = tmp_path / "sweep"
    run = {"cwd": ROOT, "env": environment(), "text": True, "stderr": subprocess.PIPE}
    first = subprocess.Popen(command(sweep_file, workdir), stdout=subprocess.PIPE, **run)
    saved = "few/0/checkpoints/[0-9]*/commit_success.txt"
    wait_until(lambda: list(workdir.glob(saved)), first)
    first.send_signal(signal.SIGTERM)
    out, err = first.communicate(timeout=240)
    assert first.returncode == 75, out + err
    summary = json.loads((workdir / "few/0/summary.json").read_text())
    assert summary["state"] == "cut"
    assert "seed 0 cut at epoch" in (workdir / "table.md").read_text()

    place, plan = results.epath.Path(workdir), quick_rows(sweep_file)
    monkeypatch.setenv("XLA_FLAGS", environment()["XLA_FLAGS"])
    with sweep._Children() as children:
        assert sweep.Sweeper(plan, place, children).run(finish=True) == 0
    log = (workdir / "few/0/logs/process_0.log").read_text()
    assert re.search(r"resumed at step [1-9]", log)
    table = (workdir / "table.md").read_text()
    assert "| not run" not in table
    evaluated = [
        json.loads(line)
        for line in (workdir / "few/0/metrics.jsonl").read_text().splitlines()
        if json.loads(line)["kind"] == "eval"
    ]
    best = max(row["ema_accuracy"] for row in evaluated)
    cells = [[c.strip() for c in line.split("|")] for line in table.splitlines()]
    of = {line[1]: dict(zip(cells[2], line, strict=True)) for line in cells if len(line) > 3}
    assert of["few"]["public_test, best"] == f"{100 * best:.2f}"
    assert of["few"]["published"] == "10"
    # The second row trains what the first does: it shares its run, and can't beat itself.
    assert of["same"]["public_test, best"] == f"{100 * best:.2f}"
    assert of["same"]["reached"] == "no"
    private = json.loads((workdir / "few/0/eval/private_test.json").read_text())["accuracy"]
    assert of["few"]["private_test"] == f"{100 * private:.2f}"
    reach = next(row.reach for row in plan.rows if row.name == "few")
    assert of["few"]["reached"] == ("yes" if 100 * private >= reach else "no")
    assert {p.name for p in workdir.glob("*")} == {"few", "table.md", "table.csv", "plot.png"}
    assert (workdir / "plot.png").read_bytes().startswith(b"\x89PNG")
    finished_with_nothing_to_do(sweep_file, workdir)
    summary_has_no_path(workdir, tmp_path)
    collected(sweep_file, workdir, tmp_path)


def quick_rows(sweep_file):
    loaded = rows.load(sweep_file)
    chosen = [rows.shrink(row, loaded.root) for row in loaded.rows]
    out = [rows.dataclasses.replace(row, seeds=(0,)) for row in chosen]
    return rows.dataclasses.replace(loaded, rows=out)


def finished_with_nothing_to_do(sweep_file, workdir):
    """No process is started for what is there, and private_test is not read again."""
    place = results.epath.Path(workdir)
    before = (workdir / "few/0/eval/private_test_readings.jsonl").read_text()
    plan = quick_rows(sweep_file)
    assert sweep.Sweeper(plan, place, Nobody()).run(finish=True) == 0
    assert (workdir / "few/0/eval/private_test_readings.jsonl").read_text() == before
    assert len(before.splitlines()) == 1
    # Time that is up stops before a run, with its status; another seed was not run.
    other = rows.dataclasses.replace(
        plan, rows=[rows.dataclasses.replace(plan.rows[0], seeds=(0, 1))]
    )
    assert sweep.Sweeper(other, place, Nobody(), time.monotonic()).run(finish=False) == 75
    with pytest.raises(AssertionError, match="main"):
        sweep.Sweeper(other, place, Nobody()).run(finish=False)


def summary_has_no_path(workdir, tmp_path):
    text = (workdir / "few/0/summary.json").read_text()
    summary = json.loads(text)
    assert summary["state"] == "done"
    assert summary["epochs_done"] == summary["epochs"] == 3
    assert summary["machine"]["device"] == "cpu"
    assert summary["changed"]["data.labeled"] == "10%"
    assert "--config=configs/supervised.py:cpu" in summary["command"]
    assert str(tmp_path) not in text
    assert str(ROOT) not in text


def collected(sweep_file, workdir, tmp_path):
    """Runs count for the row that has their config, wherever they lie and whoever ran them."""
    plan = quick_rows(sweep_file)
    digests = results._digests(plan)
    directory = results.epath.Path(tmp_path / "results")
    (place,) = [w for w in results.workdirs(results.epath.Path(workdir)) if "few" in str(w)]
    results._collect(place, plan, digests, directory)
    assert [str(p.relative_to(directory)) for p in directory.glob("*/*")] == ["few/0.json"]
    text = results.render(plan, digests, results.read(directory))
    private = json.loads((workdir / "few/0/eval/private_test.json").read_text())["accuracy"]
    assert len(re.findall(rf"^\| (?:few|same) .*\| {100 * private:.2f} ", text, re.M)) == 2
    # Collected again, it still names the code and time of the first time.
    first = json.loads((directory / "few/0.json").read_text())
    marked = {**first, "code": "of its day", "time": "then"}
    (directory / "few/0.json").write_text(json.dumps(marked))
    (workdir / "few/0/summary.json").unlink()
    results._collect(place, plan, digests, directory)
    assert json.loads((directory / "few/0.json").read_text()) == marked
    # One whose scores are others does not take its place, nor does a shorter run.
    (directory / "few/0.json").write_text(
        json.dumps({**marked, "scores": {"public_test_flip": first["scores"]["private_test"]}})
    )
    kept = (directory / "few/0.json").read_text()
    results._collect(place, plan, digests, directory)
    assert (directory / "few/0.json").read_text() == kept
    # What an early version did not write down is kept, and so is what can't be told any more.
    (directory / "few/0.json").write_text(json.dumps({**marked, "minutes": 1.5}))
    begun = (workdir / "few/0/starts.jsonl").rename(workdir / "starts.jsonl")
    results._collect(place, plan, digests, directory)
    again = json.loads((directory / "few/0.json").read_text())
    assert again["minutes"] == first["minutes"]
    assert (again["machine"], again["code"]) == (first["machine"], "of its day")
    begun.rename(workdir / "few/0/starts.jsonl")
    (directory / "few/0.json").write_text(kept)
    (workdir / "few/0/eval/final.json").unlink()
    results._collect(place, plan, digests, directory)
    assert (directory / "few/0.json").read_text() == kept
    # Nor does one of another config, or with the labels of another seed.
    changed = json.loads((workdir / "few/0/config.json").read_text())
    changed["data"]["split_seed"] = 7
    (workdir / "few/0/config.json").write_text(json.dumps(changed))
    (directory / "few/0.json").unlink()
    results._collect(place, plan, digests, directory)
    assert not list(directory.glob("*/*"))
    assert results.render(plan, digests, results.read(directory)).count("not run") == 2


def test_the_table_of_collected_runs_is_written(sweep_file, tmp_path, monkeypatch):
    """A run of no row is passed over; without one the table says so."""
    (tmp_path / "runs" / "nested" / "run").mkdir(parents=True)
    config = configs.finalize(configs.from_file(sweep_file.parents[1] / "fixmatch.py", "cpu"))
    (tmp_path / "runs" / "nested" / "run" / "config.json").write_text(json.dumps(config.to_dict()))
    given = {"rows": str(sweep_file), "results": str(tmp_path / "results"), "collect": []}
    given |= {"collect": [str(tmp_path / "runs")], "output": str(tmp_path / "TABLE.md")}
    monkeypatch.setattr(results, "FLAGS", types.SimpleNamespace(**given))
    assert results.main() == 0
    table = (tmp_path / "TABLE.md").read_text()
    assert re.search(r"^\| few +\| +(\S+ +)?\|.* not run ", table, re.M)
    assert not (tmp_path / "results").exists()
    for flag, value, message in (
        ("collect", [str(tmp_path / "none")], "--collect=.*none: there is no such directory"),
        ("output", str(tmp_path / "no" / "x.md"), "--output=.* can't be written"),
    ):
        monkeypatch.setattr(results, "FLAGS", types.SimpleNamespace(**{**given, flag: value}))
        with pytest.raises(UserError, match=message):
            results.main()


def test_a_sweep_is_run_part_by_part(sweep_file, tmp_path, monkeypatch):
    """Rows that train the same share a run, whichever is chosen, and all runs are in the table."""
    place = results.epath.Path(tmp_path)
    given = {"sweep": str(sweep_file), "only": "same", "cpu": False, "quick": True, "seeds": ["1"]}
    done = {"state": "done", "public_test": {"best": 0.4321, "best_epoch": 1, "final": 0.4}}

    def sweeper():
        monkeypatch.setattr(sweep, "FLAGS", types.SimpleNamespace(**given))
        plan, chosen = sweep._chosen(rows.load(sweep_file))
        return plan, sweep.Sweeper(plan, place, Failing(1), chosen=chosen)

    plan, made = sweeper()
    assert made.run(finish=False) == 1
    (path,) = tmp_path.glob("*/*/summary.json")
    assert path == tmp_path / "few" / "1" / "summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **done}))
    assert made._write().count("43.21") == 2
    given |= {"only": "few", "seeds": ["0"]}
    assert sweeper()[1].run(finish=False) == 1
    table = (tmp_path / "table.md").read_text()
    assert table.count("43.21") == 2
    assert table.count("seed 0 failed") == 2
    given |= {"only": "few", "quick": False, "seeds": []}
    plan, made = sweeper()
    assert [row.name for row in plan.rows] == ["few", "same"]
    assert (made._seeds(plan.rows[0]), made._seeds(plan.rows[1])) == ((0, 1, 2), ())
    table = made._write()  # of other configs than the small ones'
    assert "few" in table
    assert "same" not in table


def test_one_of_several_processes_runs_no_sweep(monkeypatch):
    monkeypatch.setattr(sweep, "FLAGS", types.SimpleNamespace(sweep="configs/sweeps/results.py"))
    step = {"JOB_ID": "1", "STEP_NODELIST": "a,b", "PROCID": "0", "LOCALID": "0", "NTASKS": "2"}
    for name, value in step.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    with pytest.raises(UserError, match=r"one of several \(SLURM\): start it alone"):
        sweep.main()
    monkeypatch.delenv("SLURM_STEP_NODELIST")  # without srun
    with pytest.raises(UserError, match=r"start it alone \(under SLURM with srun --ntasks=1\)"):
        sweep.main()


def test_a_row_that_is_not_asked_for_may_be_wrong(sweep_file, tmp_path):
    plan = quick_rows(sweep_file)
    wrong = rows.dataclasses.replace(plan.rows[0], name="wrong", config="configs/nowhere.py")
    plan = rows.dataclasses.replace(plan, rows=[wrong, *plan.rows])
    asked = {plan.rows[1].name: (0,)}
    made = sweep.Sweeper(plan, results.epath.Path(tmp_path), Failing(0), chosen=asked)
    assert "wrong" not in made._write()
    with pytest.raises(UserError, match=r"row wrong: .*nowhere"):
        sweep.Sweeper(plan, results.epath.Path(tmp_path), Failing(0), chosen={"wrong": (0,)})


class Failing:
    """Every run ends with this status."""

    seen = False

    def __init__(self, status):
        self.status, self.calls = status, []

    def call(self, command, arguments):
        self.calls.append((command, arguments))
        return self.status, f"exit status {self.status}: too | bad"


def test_a_failed_run_is_marked_and_the_others_go_on(sweep_file, tmp_path):
    plan, place = quick_rows(sweep_file), results.epath.Path(tmp_path)
    plan = rows.dataclasses.replace(
        plan, rows=[plan.rows[0], rows.dataclasses.replace(plan.rows[1], changes={}, name="b")]
    )
    for status in (1, 134):
        children = Failing(status)
        assert sweep.Sweeper(plan, place, children).run(finish=True) == 1
        assert [command for command, _ in children.calls] == ["main", "main"]  # tried anew
    table = (tmp_path / "table.md").read_text()
    assert table.count("| failed ") == 2
    assert "seed 0 failed: exit status 134: too \\| bad" in table
    # One that was stopped from outside stops the sweep.
    children = Failing(75)
    assert sweep.Sweeper(plan, place, children, time.monotonic() + 90).run(finish=True) == 75
    assert len(children.calls) == 1
    assert children.calls[0][1][-1].startswith("--config.stop_after_minutes=1.")


def test_an_ensemble_of_one_is_not_scored(sweep_file, tmp_path, monkeypatch):
    """`ferjax.evaluate` would name its file otherwise, and private_test be read each time anew."""
    plan, place = quick_rows(sweep_file), results.epath.Path(tmp_path)
    monkeypatch.setattr(sweep.Sweeper, "_finished", lambda self, row, seed: True)
    row = rows.dataclasses.replace(plan.rows[0], scored="ten_crop_ensemble")
    for seeds, splits in (((0,), []), ((0, 1), ["public_test", "private_test"])):
        chosen = rows.dataclasses.replace(row, seeds=seeds)
        children = Failing(0)
        one = rows.dataclasses.replace(plan, rows=[chosen])
        sweep.Sweeper(one, place, children)._score(finish=True)
        read = [a.removeprefix("--split=") for _, args in children.calls for a in args]
        assert [split for split in read if split.endswith("_test")] == splits


def scored(workdir, name, **score):
    (workdir / "eval").mkdir(exist_ok=True)
    found = {"accuracy": 0.5, "step": 64, "checkpoint": "best", "workdirs": ["w"], **score}
    (workdir / "eval" / f"{name}.json").write_text(json.dumps(found))


def test_scores_of_other_members_checkpoints_or_pixels_do_not_count(
    sweep_file, tmp_path, monkeypatch
):
    plan, place = quick_rows(sweep_file), results.epath.Path(tmp_path)
    row = rows.dataclasses.replace(plan.rows[0], seeds=(0, 1), scored="ten_crop_ensemble")
    one = rows.dataclasses.replace(plan, rows=[row])
    workdir = tmp_path / row.name / "0"
    workdir.mkdir(parents=True)
    monkeypatch.setattr(sweep.Sweeper, "_finished", lambda self, row, seed: True)

    def asked():
        children = Failing(0)
        sweep.Sweeper(one, place, children)._score(finish=False)
        return len(children.calls)

    name = "public_test_ten_crop_ensemble"
    counted = ((["0"], 1), (["0", "1"], 0), (["0", "2"], 1), (["x/0", "x/1", "x/2"], 0))
    for members, wanted in counted:
        scored(workdir, name, workdirs=members)
        assert asked() == wanted
    # The best checkpoint is another one by now.
    monkeypatch.setattr(results.checkpoint, "saved", lambda workdir: [workdir])
    monkeypatch.setattr(results.checkpoint, "choose", lambda workdir, which: workdir / "96")
    assert asked() == 1
    assert results._scores(results.epath.Path(workdir)) == {}
    scored(workdir, name, step=96, workdirs=["0", "1"])
    assert asked() == 0
    (found,) = results._scores(results.epath.Path(workdir)).values()
    assert found["members"] == 2

    def damaged(workdir, which):
        raise UserError("which checkpoint is the best can't be told")

    monkeypatch.setattr(results.checkpoint, "choose", damaged)
    assert asked() == 0
    assert results._scores(results.epath.Path(workdir)).keys() == {name}
    # Other pixels than those that the run was trained on.
    (workdir / "split.json").write_text(json.dumps({"data_digest": "a"}))
    scored(workdir, "private_test", step=96, data_digest="b")
    assert results._scores(results.epath.Path(workdir)).keys() == {name}


def test_the_table_leaves_out_summaries_of_another_config(sweep_file, tmp_path):
    plan, place = quick_rows(sweep_file), results.epath.Path(tmp_path)
    made = sweep.Sweeper(plan, place, Nobody())
    row = plan.rows[0]
    made._summarize(row, 0)
    path = tmp_path / row.name / "0" / "summary.json"
    summary = json.loads(path.read_text())
    done = {"state": "done", "public_test": {"best": 0.4321, "best_epoch": 1, "final": 0.4}}
    path.write_text(json.dumps({**summary, **done}))
    assert "43.21" in made._write()
    path.write_text(json.dumps({**summary, **done, "config_digest": "of another"}))
    assert "43.21" not in made._write()


def test_the_line_that_says_why(monkeypatch, tmp_path, capfd):
    """A process's own line, and its status."""
    (tmp_path / "ferjax").mkdir()
    (tmp_path / "ferjax" / "__init__.py").touch()  # else the installed package comes first
    (tmp_path / "ferjax" / "broken.py").write_text(
        "import sys\nprint('10%\\r20%\\nferjax: no room\\nlast', file=sys.stderr)\nsys.exit(3)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "")
    with sweep._Children() as children:
        assert children.call("broken", []) == (3, "exit status 3: no room")
    assert "20%" in capfd.readouterr().err


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_sweep_is_sound(path):
    """Each row's config is valid, and has one seed for the labels of all rows."""
    for cpu in (True, False):
        loaded = rows.load(path, cpu=cpu)
        assert loaded.rows
        for row in loaded.rows:
            assert row.source or row.published is None, row.name
            # What differs from a row that was looked at in its labels alone is as sound.
            changes = {k: v for k, v in row.changes.items() if not k.startswith("data.lab")}
            key = (row.config, str(changes))
            if key not in SOUND:
                config = rows.configuration(row, 2, loaded.root)
                labels = 2 if row.split_seed is None else row.split_seed
                assert (config.seed, config.data.split_seed) == (2, labels)
                SOUND.add(key)


def test_a_rows_flags_make_its_config(monkeypatch):
    """What `ferjax.main` is given parses to what the sweep takes the run for."""
    from absl import flags
    from ml_collections import config_flags

    loaded = rows.load(ROOT / "configs/sweeps/labels_per_class.py")
    for row in (loaded.rows[0], rows.shrink(loaded.rows[-1], loaded.root)):
        values = flags.FlagValues()
        config_flags.DEFINE_config_file(
            "config", flag_values=values, lock_config=False, accept_new_attributes=True
        )
        monkeypatch.chdir(loaded.root)
        # These flags read what they override from there.
        monkeypatch.setattr(sys, "argv", ["main", *rows.arguments(row, 3, loaded.root)])
        values(sys.argv)
        path, _, variant = row.config.partition(":")
        original = configs.from_file(path, variant).to_dict()
        given = configs.switch_modules(values.config.to_dict(), original)
        assert configs.finalize(given) == rows.configuration(row, 3, loaded.root)


def test_steps_become_whole_epochs():
    """70 labels make 2 steps of 64; FixMatch's 28,639 others make 64 of 448."""
    loaded = rows.load(ROOT / "configs/sweeps/labels_per_class.py")
    of = {row.name: rows.configuration(row, 0, loaded.root) for row in loaded.rows}
    assert of["supervised_10_a_class"].epochs == 10_486
    assert of["supervised_10_a_class"].evaluate.every_epochs == 10_486 // 64
    assert of["fixmatch_10_a_class"].epochs == 328


def test_whose_labels_a_row_sees(monkeypatch):
    """Those of each run's seed, or the same for all; the flags and the configs agree."""
    own = rows.Row("own", "configs/supervised.py:cpu")
    same = dataclasses.replace(own, name="same", split_seed=5)
    for row, labels in ((own, 2), (same, 5)):
        config = rows.configuration(row, 2, ROOT)
        assert (config.seed, config.data.split_seed) == (2, labels)
        assert f"--config.data.split_seed={labels}" in rows.arguments(row, 2, ROOT)
        assert rows.has_split_of(row, config)
    assert not rows.has_split_of(same, rows.configuration(own, 2, ROOT))
    assert not rows.has_split_of(own, rows.configuration(same, 2, ROOT))
    with pytest.raises(UserError, match="row same trains what another one does"):
        results._digests(rows.Sweep("x", [own, same], root=ROOT))


def test_a_digest_names_what_is_trained():
    base = configs.base().to_dict()

    def digest(**changes):
        return rows.digest(configs.finalize(rows._updated(base, changes)))

    same = {"seed": 3, "data.split_seed": 3, "data.source": "x", "log_every": 3, "name": "y"}
    assert digest(**same) == digest()
    others = [{"epochs": 9}, {"algorithm.mu": 3}, {"views.weak.flip": 0.0}]
    assert len({digest(), *(digest(**other) for other in others)}) == 4
    # A default that is written down is the default.
    assert digest(**{"algorithm.mu": 7}) == digest()
    # Of a path its end: it is the same run on another machine.
    paths = [digest(**{"init_from": f"{place}/runs/a"}) for place in ("/home/x", "/root")]
    assert paths[0] == paths[1] != digest()
    # The runs of a sweep's rows are <row>/<seed>, and a run's predictions have one name.
    ends = ("", "/eval/train_predictions.npz")
    teachers = [f"/x/{row}/0{end}" for row in ("supervised_10", "fixmatch_10") for end in ends]
    assert len({digest(**{"init_from": teacher}) for teacher in teachers}) == 2
    # Those of several networks together are others.
    assert digest(**{"init_from": teachers[0]}) != digest(
        **{"init_from": teachers[0] + "/eval/train_ensemble_predictions.npz"}
    )
    folders = [f"image_folder{where}faces" for where in (":", ":/x/", "/detect:/x/")]
    folders = [digest(**{"data.unlabeled_source": folder}) for folder in folders]
    assert folders[0] == folders[1] != folders[2]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "--sweep is missing"),
        (["--sweep=nowhere.py"], "nowhere.py is not a sweep file"),
        (["--sweep=configs/quickstart.py"], "defines no get_sweep"),
        (["--sweep=configs/sweeps/seed_augmentation.py", "--only=x"], "no row has this name"),
        (["--sweep=configs/sweeps/seed_augmentation.py", "--only=("], "not a regular expression"),
        (["--sweep=configs/sweeps/seed_augmentation.py", "--seeds=a"], "--seeds=a: whole numbers"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_wrong_flags(args, message, monkeypatch):
    given = dict(arg.removeprefix("--").split("=") for arg in args)
    usual = {"sweep": "", "only": "", "cpu": False, "quick": False}
    given |= {"seeds": given.get("seeds", "").split(",") if "seeds" in given else []}
    monkeypatch.setattr(sweep, "FLAGS", types.SimpleNamespace(**usual | given))
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        sweep.main()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ('Row("a", "c.py"), Row("a", "c.py")', "names are unique"),
        ('Row("a/b", "c.py")', "names are unique"),
        ('Row("a", "c.py", seeds=())', "no seeds"),
        ('Row("a", "c.py", beats="b")', "which is no row"),
        ('Row(nam="a")', r"x.py, line 3: TypeError: .*'nam'"),
        ('Row("a", "c.py"', r"x.py, line 3: SyntaxError"),
    ],
)
def test_wrong_rows(changes, message, tmp_path):
    path = tmp_path / "x.py"
    path.write_text(
        f"from ferjax.rows import *\ndef get_sweep(cpu):\n    return Sweep('x', [{changes}])\n"
    )
    with pytest.raises(UserError, match=message):
        rows.load(path)


def test_a_row_whose_config_is_wrong_is_named(tmp_path):
    row = rows.Row("few", "configs/supervised.py:cpu", {"algorithm.treshold": 0.5})
    with pytest.raises(UserError, match=r"row few: config\.algorithm\.treshold is not a key"):
        rows.configuration(row, 0, ROOT)
    row = rows.Row("few", "configs/nothing.py")
    with pytest.raises(UserError, match=r"row few: .*nothing\.py is not a config file"):
        rows.configuration(row, 0, ROOT)


def test_minutes_over_several_starts():
    """A row's clock is that of its start."""
    clocks = [10.0, 60.0, 5.0, 35.0, 1.0]
    assert training_seconds([{"seconds": c} for c in clocks]) == 60 + 35 + 1


def test_the_committed_table_is_what_the_summaries_say():
    """RESULTS.md was not typed."""
    path = ROOT / "RESULTS.md"
    if not path.exists():
        pytest.skip("no RESULTS.md beside the tests")
    plan = rows.load(ROOT / "configs/sweeps/results.py")
    found = results.read(results.epath.Path(ROOT / "results"))
    assert path.read_text() == results.render(plan, results._digests(plan), found)


@pytest.mark.slow
@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_sweep_runs(path, tmp_path, data_dir):
    """All rows, each for seconds."""
    done = subprocess.run(
        command(path, tmp_path, "--cpu"), cwd=ROOT, env=environment(), capture_output=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "not run" not in (tmp_path / "table.md").read_text()
