"""Several real processes of one run, with real collectives between them."""

import json
import signal
import socket
import subprocess
import sys

import pytest
from children import wait_until
from test_end_to_end import ROOT, SMALL, environment, ferjax, rows, saved

from ferjax import machine
from ferjax.engine import checkpoint

# On one core XLA sums in another order in one process of two devices than in two of one.
two_cores = pytest.mark.skipif(machine.cores() < 2, reason="bit equality needs two cores")


def start(count, *args, devices=1, own=lambda k: []):
    """`count` processes of one run; `own(k)` are the arguments of process k alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "ferjax.main", *args, *own(k)),
                *(f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}"),
                f"--process_id={k}",
            ],
            cwd=ROOT,
            env=environment(devices),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for k in range(count)
    ]


def finish(processes):
    """[(status, stdout, stderr)] of each; none is left behind."""
    try:
        outputs = [p.communicate(timeout=280) for p in processes]
    finally:
        for p in processes:
            p.kill()
    return [(p.returncode, *output) for p, output in zip(processes, outputs, strict=True)]


@pytest.fixture(scope="module")
def alone(data_dir, tmp_path_factory):
    """One process with two devices."""
    workdir = tmp_path_factory.mktemp("alone")
    done = ferjax("main", *SMALL, f"--workdir={workdir}", devices=2)
    assert done.returncode == 0, done.stderr
    return workdir


@two_cores
def test_two_processes_train_what_one_does(alone, tmp_path):
    (first, second) = finish(start(2, *SMALL, f"--workdir={tmp_path}"))
    assert first[0] == second[0] == 0, first[2] + second[2]
    assert "distributed: 2 processes, found by flags" in first[1]
    assert "devices: 2 in 2 process(es)" in first[1]
    assert "public_test, final EMA weights" in first[1]
    assert "public_test" not in second[1]
    assert rows(tmp_path) == rows(alone)
    trees = [checkpoint.read(checkpoint.choose(w, "latest"))[0] for w in (tmp_path, alone)]
    assert checkpoint.checksums(trees[0]) == checkpoint.checksums(trees[1])
    assert {p.name for p in (tmp_path / "logs").iterdir()} == {"process_0.log", "process_1.log"}
    assert (tmp_path / "lock").read_text() == ""


@two_cores
def test_a_signal_to_one_process_stops_all_at_the_same_step(alone, tmp_path):
    args = [*SMALL, f"--workdir={tmp_path}", "--config.checkpoint.every_minutes=0"]
    # Each process reads its own part of the images, with a worker process of its own.
    streamed = ["--config.data.pipeline=stream", "--config.data.workers=1"]
    processes = start(2, *args, *streamed)
    wait_until(lambda: saved(tmp_path), *processes)
    processes[1].send_signal(signal.SIGUSR1)
    done = finish(processes)
    assert [status for status, *_ in done] == [75, 75], done[0][2] + done[1][2]
    assert 0 < max(saved(tmp_path)) < 64
    # One process goes on where two stopped, with the images on its devices.
    again = ferjax("main", *args, devices=2)
    assert "resumed at step" in again.stdout
    assert again.returncode == 0, again.stderr
    assert rows(tmp_path) == rows(alone)


def test_a_process_with_another_config_is_named(data_dir, tmp_path):
    # One that reads other data: the processes must not wait for each other at different places.
    other = "--config.data.unlabeled_source=image_folder:/nowhere"
    own = lambda k: [other] if k else []  # noqa: E731
    done = finish(start(2, *SMALL, f"--workdir={tmp_path}", own=own))
    for status, _, errors in done:
        assert status == 2, errors
        assert f"process 1 on {socket.gethostname()} has another config than process 0" in errors
    assert not list(tmp_path.glob("checkpoints/*"))


def test_an_error_of_process_0_ends_all(alone):
    args = [*SMALL, f"--workdir={alone}", "--config.seed=5"]
    for status, _, errors in finish(start(2, *args)):
        assert status == 2, errors
        assert "holds a run with another config (seed: 0 -> 5)" in errors
    assert json.loads((alone / "config.json").read_text())["seed"] == 0
