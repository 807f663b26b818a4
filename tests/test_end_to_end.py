"""The commands as a user runs them: real subprocesses, real files, real kills."""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ferjax.engine import checkpoint, starts
from ferjax.engine.metrics import CLOCK_FIELDS

ROOT = Path(__file__).parent.parent
LAYERS = "('conv 8 3 nobias', 'bn', 'relu', 'maxpool 4', 'gap', 'dropout 0.2')"
SMALL = [
    f"--config={ROOT}/configs/quickstart.py",
    "--config.data.name=synthetic_faces/tiny",
    "--config.data.labeled=4/class",
    f"--config.model.layers={LAYERS}",
    "--config.views.strong.policy=weak",
    "--config.batch_size=8",
    "--config.algorithm.mu=1",
    "--config.epochs=2",
    "--config.log_every=5",
]


def environment(devices=1, **more):
    flags = f"--xla_force_host_platform_device_count={devices}"
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, **more}


def ferjax(command, *args, **how):
    return python("-m", f"ferjax.{command}", *args, **how)


def python(*args, cwd=ROOT, timeout=300, **env):
    return subprocess.run(
        [sys.executable, *args],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=cwd,
        env=environment(**env),
    )


def rows(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k not in CLOCK_FIELDS} for x in lines]


def saved(workdir):
    return {int(p.name) for p in (workdir / "checkpoints").glob("[0-9]*") if p.name.isdigit()}


@pytest.fixture(scope="module")
def finished(data_dir, tmp_path_factory):
    """An undisturbed run: 2 epochs of 32 steps."""
    workdir = tmp_path_factory.mktemp("finished")
    done = ferjax("main", *SMALL, f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    return workdir, done


def test_training_writes_everything_and_says_so(finished):
    workdir, done = finished
    names = {p.name for p in workdir.iterdir()}
    assert {"config.json", "split.json", "metrics.jsonl", "checkpoints", "eval", "logs"} <= names
    assert [row["step"] for row in starts.read(workdir)] == [0]
    assert "macro-F1" in done.stdout
    assert "python -m ferjax.main --config=configs/fixmatch.py:cpu" in done.stdout
    table = rows(workdir)
    train = [r for r in table if r["kind"] == "train"]
    scored = [r for r in table if r["kind"] == "eval"]
    assert [r["step"] for r in train] == [*range(5, 64, 5), 64]
    assert [(r["step"], r["epoch"]) for r in scored] == [(32, 1), (64, 2)]
    wanted = {"loss", "loss_labeled", "loss_unlabeled", "mask_rate", "pseudo_label_accuracy"}
    assert wanted | {"learning_rate", "epoch"} <= train[0].keys()
    assert {"ema_accuracy", "raw_accuracy"} <= scored[0].keys()
    assert json.loads((workdir / "eval" / "final.json").read_text())["images"] == 70
    assert len(json.loads((workdir / "split.json").read_text())["labeled_rows"]) == 28


def signalled(name, method, when, args):
    """`ferjax.main`, which sends itself a signal before a call `method(self, state, ...)`."""
    module, owner, attribute = method.rsplit(".", 2)
    code = f"""
import os, runpy, signal, sys
from ferjax.engine.{module} import {owner}
original = {owner}.{attribute}
def disturbed(self, state, *args, **options):
    if {when}:
        os.kill(os.getpid(), signal.{name})
    return original(self, state, *args, **options)
{owner}.{attribute} = disturbed
sys.argv = ["main", *{args!r}]
runpy.run_module("ferjax.main", run_name="__main__")
"""
    return python("-c", code)


def test_killed_in_mid_epoch_and_resumed_is_bit_equal(finished, tmp_path):
    workdir = tmp_path / "killed"
    args = [*SMALL, f"--workdir={workdir}", "--config.checkpoint.every_minutes=0"]
    first = ferjax("main", *args, "--config.stop_after_minutes=0.00001")
    assert first.returncode == 75, first.stderr
    assert "stopped at step 1 of 64" in first.stdout
    # The save of step 39 may have ended or not.
    killed = signalled("SIGKILL", "checkpoint.Checkpoints.save", "state.step == 40", args)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert 32 < max(saved(workdir)) < 40, "killed at an epoch's end, which proves too little"
    done = ferjax("main", *args)
    assert done.returncode == 0, done.stderr
    assert "resumed at step" in done.stdout
    whole = finished[0]
    assert rows(workdir) == rows(whole)
    for name in ("config.json", "split.json"):
        a, b = (json.loads((w / name).read_text()) for w in (workdir, whole))
        a.pop("checkpoint", None), b.pop("checkpoint", None)
        assert a == b
    trees = [checkpoint.read(checkpoint.choose(w, "latest"))[0] for w in (workdir, whole)]
    assert trees[0]["opt_state"]
    sums = [checkpoint.checksums(t) for t in trees]
    assert sums[0] == sums[1]  # parameters, EMA, statistics, optimizer


def test_a_signal_during_evaluation_saves_and_is_made_up_for(finished, tmp_path):
    workdir = tmp_path / "interrupted"
    args = [*SMALL, f"--workdir={workdir}"]
    done = signalled("SIGTERM", "experiment.Experiment.evaluate", "True", args)
    assert done.returncode == 75, done.stderr
    assert "stopped at step 32 of 64" in done.stdout
    assert saved(workdir) == {32}
    assert not [r for r in rows(workdir) if r["kind"] == "eval"]
    again = ferjax("main", *SMALL, f"--workdir={workdir}")
    assert again.returncode == 0, again.stderr
    assert sorted(map(str, rows(workdir))) == sorted(map(str, rows(finished[0])))
    assert saved(workdir) == {32, 64}
    assert checkpoint.read(workdir / "checkpoints" / "32")[1]["accuracy"] is not None


def test_a_profile_of_some_steps(tmp_path, data_dir):
    workdir = tmp_path / "run"
    args = [*SMALL, f"--workdir={workdir}", "--config.stop_after_steps=6"]
    done = ferjax("main", *args, "--config.profile=2:3")
    assert done.returncode == 75, done.stderr
    assert "profile written to" in done.stdout
    assert list(workdir.glob("profile/**/*.xplane.pb"))
    wrong = ferjax("main", *args, "--config.profile=2")
    assert wrong.returncode == 2
    assert "it is START:STEPS" in wrong.stderr


def test_stopping_early_saves_and_exits_with_75(finished, tmp_path):
    workdir = tmp_path / "stopped"
    args = [*SMALL, f"--workdir={workdir}"]
    advice = "--config.cpu_config=configs/fixmatch.py:cpu"
    first = ferjax("main", *args, "--config.stop_after_steps=7", advice)
    assert first.returncode == 75, first.stderr
    assert "hours; try --config=configs/fixmatch.py:cpu" in first.stdout
    assert saved(workdir) == {7}
    # Two virtual devices go on where one stopped, several steps a call: calls that end with the
    # epoch, too, and rows that begin within one. Same numbers to float tolerance.
    more = ["--config.parallel=shard_map", "--config.steps_per_call=3"]
    second = ferjax("main", *args, *more, devices=2)
    assert second.returncode == 0, second.stderr
    begun = [(row["step"], row["devices"]) for row in starts.read(workdir)]
    assert begun == [(0, 1), (7, 2)]
    for mine, other in zip(rows(workdir), rows(finished[0]), strict=True):
        assert mine.keys() == other.keys()
        for key, value in mine.items():
            if isinstance(value, float) and "accuracy" not in key and key != "mask_rate":
                assert value == pytest.approx(other[key], rel=2e-3, abs=1e-4), key


def test_a_finished_run_started_again_prints_its_table(finished):
    workdir, first = finished
    before = rows(workdir)
    again = ferjax("main", *SMALL, f"--workdir={workdir}")
    assert again.returncode == 0, again.stderr
    table = first.stdout[first.stdout.index("public_test, final") :]
    assert table in again.stdout
    assert rows(workdir) == before


def test_another_config_in_the_same_workdir_is_refused(finished):
    workdir, _ = finished
    before = (workdir / "config.json").read_text()
    args = [*SMALL, f"--workdir={workdir}", "--config.epochs=4", "--config.seed=5"]
    done = ferjax("main", *args)
    assert done.returncode == 2
    assert "epochs: 2 -> 4; seed: 0 -> 5" in done.stderr
    assert (workdir / "config.json").read_text() == before


@pytest.mark.slow
def test_another_method_on_the_command_line(tmp_path, data_dir):
    """What the file set for its own method does not stand in the way of another."""
    workdir = tmp_path / "run"
    args = [a for a in SMALL if "algorithm" not in a]
    args += [f"--workdir={workdir}", "--config.algorithm.name=supervised"]
    bad = ferjax("main", *args, "--config.algorithm.threshold=0.5")
    assert bad.returncode == 2
    assert "config.algorithm.threshold is not a key" in bad.stderr
    bad = ferjax("main", *args, "--config.model.layers=('conv 8 3', 'gup')")
    assert bad.returncode == 2
    assert "unknown word 'gup'" in bad.stderr
    # The workdir is not bound to what was refused.
    good = ferjax("main", *args, "--config.epochs=1")
    assert good.returncode == 0, good.stderr
    assert json.loads((workdir / "config.json").read_text())["algorithm"]["name"] == "supervised"


def test_two_trainers_in_one_workdir(tmp_path, data_dir):
    with (tmp_path / "lock").open("w") as file:
        file.write(json.dumps({"host": "elsewhere", "process": 1}))
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        done = ferjax("main", *SMALL, f"--workdir={tmp_path}")
    assert done.returncode == 2
    assert "is being trained by process 1 on elsewhere" in done.stderr


def test_resuming_with_other_data_is_refused(finished):
    workdir, _ = finished
    split = workdir / "split.json"
    content = split.read_text()
    split.write_text(json.dumps({**json.loads(content), "data_digest": "0" * 64}))
    try:
        done = ferjax("main", *SMALL, f"--workdir={workdir}")
        assert done.returncode == 2
        assert "other pixels or labels" in done.stderr
        warned = ferjax("evaluate", f"--workdir={workdir}")
        assert warned.returncode == 0, warned.stderr
        assert "warning: this data" in warned.stdout
        # Scores of other data do not take the place of the run's.
        name = f"public_test_of_{json.loads(content)['data_digest'][:12]}.json"
        (workdir / "eval" / name).unlink()
    finally:
        split.write_text(content)


def test_evaluate_needs_only_the_workdir_and_the_data(finished, tmp_path):
    workdir, _ = finished
    done = ferjax("evaluate", f"--workdir={workdir}", cwd=tmp_path, devices=2, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    scores = json.loads((workdir / "eval" / "public_test.json").read_text())
    best = max(r["ema_accuracy"] for r in rows(workdir) if r["kind"] == "eval")
    assert scores["accuracy"] == pytest.approx(best, abs=1e-9)
    assert np.sum(scores["confusion"]) == scores["images"] == 70
    wanted = {"accuracy_interval", "balanced_accuracy", "macro_f1", "nll", "ece", "per_class"}
    assert wanted <= scores.keys()
    done = ferjax("evaluate", f"--workdir={workdir}", "--split=private_test", "--checkpoint=latest")
    assert done.returncode == 0, done.stderr
    readings = (workdir / "eval" / "private_test_readings.jsonl").read_text().splitlines()
    assert len(readings) == 1
    assert json.loads(readings[0])["step"] == 64


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "--config is missing"),
        (["--config=nowhere.py"], "nowhere.py: no such file"),
        (["--config=configs/quickstart.py", "--workdirr=x"], "workdirr"),
        (["--config=configs/quickstart.py", "extra"], "unexpected argument 'extra'"),
        (["--config=configs/quickstart.py", "--config.epoch=3"], "did you mean epochs"),
        (["--config=configs/quickstart.py", "--config.epochs=x"], "epochs"),
        (["--config=configs/quickstart.py", "--config.algorithm.name=fixmatsh"], "fixmatch"),
        (["--config=configs/fixmatch.py:gpu"], "no variant 'gpu'"),
        (["--config=configs/recipe73.py:cpu"], "this config has no variants"),
        (["--config=nowhere.py", "--config.epochs=1"], "No such file or directory: 'nowhere.py'"),
        (["--config=configs/quickstart.py", "--config.epochs.x=1"], "--config.KEY=VALUE"),
        (["--config=configs/quickstart.py", "--config.data.labeled=5000"], "of 2800"),
        (["--config=configs/quickstart.py", "--config.data.labeled=all"], "no unlabelled image"),
        (["--config=configs/quickstart.py", "--config.batch_size=3"], "use 2 or 4"),
        (["--config=configs/quickstart.py", "--workdir=/dev/null/x"], "can't be written"),
        (["--config=configs/quickstart.py", "--config.data.data_dir=/dev/null/x"], "/dev/null/x"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_wrong_commands_get_one_line_and_status_2(args, message, tmp_path, data_dir):
    if not any(a.startswith("--workdir") for a in args):
        args = [*args, f"--workdir={tmp_path}/run"]
    args = [a.replace("configs/", f"{ROOT}/configs/") for a in args]
    done = ferjax("main", *args, cwd=tmp_path, devices=2, PYTHONPATH=str(ROOT))
    assert done.returncode == 2, done.stdout + done.stderr
    lines = [x for x in done.stderr.splitlines() if x.strip()]
    assert lines[-1].startswith("ferjax: ")
    assert message in lines[-1]
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("run/checkpoints/*"))


def test_evaluate_errors(tmp_path, finished):
    for args, message in (
        ([], "--workdir is missing"),
        ([f"--workdir={tmp_path}"], "a ferjax workdir"),
        ([f"--workdir={finished[0]}", "--checkpoint=99"], "use best, latest or one of"),
        ([f"--workdir={finished[0]}", "--split=test"], "use train, public_test, private_test"),
    ):
        done = ferjax("evaluate", *args)
        assert done.returncode == 2
        assert message in done.stderr


def test_nan_stops_with_the_step_and_saves_nothing_after(tmp_path, data_dir):
    workdir = tmp_path / "nan"
    args = [*SMALL, f"--workdir={workdir}", "--config.optimizer.learning_rate=1e30"]
    done = ferjax("main", *args)
    assert done.returncode == 1
    assert re.search(r"is (nan|inf) at step \d+; the last good checkpoint is none", done.stderr)
    assert "lower config.optimizer.learning_rate" in done.stderr
    assert not saved(workdir)


def test_too_little_memory_is_a_line_with_what_to_change(tmp_path, data_dir):
    code = f"""
import runpy, sys
import jax
from ferjax.engine import train
def train_nothing(config, workdir):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\\nmore")
train.train = train_nothing
sys.argv = ["main", *{SMALL!r}, "--workdir={tmp_path}/run"]
runpy.run_module("ferjax.main", run_name="__main__")
"""
    done = python("-c", code)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert "lower config.batch_size" in line
    assert line.endswith("(RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.)")


def test_no_tensorflow_without_the_extra(tmp_path, data_dir):
    """Everything runs while importing TensorFlow is impossible, as without [tensorboard]."""
    code = f"""
import sys
import importlib.machinery
find = importlib.machinery.PathFinder.find_spec
def without(name, path=None, target=None):
    return None if name.split(".")[0] in ("tensorflow", "tensorboard") else find(name, path, target)
importlib.machinery.PathFinder.find_spec = without
import runpy
sys.argv = ["main", *{SMALL!r}, "--workdir={tmp_path}/run", "--config.epochs=1"]
try:
    runpy.run_module("ferjax.main", run_name="__main__")
except SystemExit as status:
    assert not status.code, status.code
assert not [m for m in sys.modules if m.split(".")[0] in ("tensorflow", "tensorboard")]
print("no tensorflow")
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("no tensorflow\n")
