"""slurm.sbatch with srun and scontrol as small scripts."""

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
ARGS = ["--", "-m", "ferjax.main", "--config=a.py", '--config.name=it\'s $5 & "more"']


class Slurm:
    """A directory with srun, scontrol and the environment's python as small scripts."""

    def __init__(self, path):
        self.path = path
        (path / "venv" / "bin").mkdir(parents=True)
        # Options are --name=value, then the command, as the only task. SIGUSR1 is passed on; at
        # SIGTERM the real one kills its tasks.
        self.tool(
            "srun",
            """while [[ $1 == --* ]]; do shift; done
            "$@" & task=$!
            trap 'interrupted=yes; kill -USR1 $task' USR1
            trap 'kill -KILL $task; exit 137' TERM
            interrupted=yes status=0
            while [[ -n $interrupted ]]; do
              interrupted= now=0
              wait $task || now=$?
              ((now == 127)) || status=$now  # 127: it had been waited for already
            done
            exit $status""",
        )
        self.tool("scontrol", f'echo "$@" >> {path}/scontrol.calls')
        self.python("exit 0")
        self.env = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "FERJAX"))},
            "PATH": f"{path}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "77",
            "SLURM_JOB_NUM_NODES": "2",
        }
        self.workdir = path / "shared" / "run 1"
        self.command = ["bash", str(LAUNCH / "slurm.sbatch"), f"--venv={path}/venv"]
        self.command += [f"--workdir={self.workdir}"]

    def tool(self, name, text):
        (self.path / name).write_text(f"#!/bin/bash\n{text}\n")
        (self.path / name).chmod(0o755)

    def python(self, text):
        self.tool("venv/bin/python", f'printf "%s\\n" "$@" > {self.path}/python.args\n{text}')

    def run(self, *words, **env):
        return subprocess.run(
            [*self.command, *words, *ARGS],
            env={**self.env, **env},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    @property
    def requeued(self):
        calls = self.path / "scontrol.calls"
        return calls.read_text().splitlines() if calls.exists() else []


@pytest.fixture
def slurm(tmp_path):
    return Slurm(tmp_path)


def test_slurm_runs_and_ends(slurm):
    done = slurm.run()
    assert done.returncode == 0, done
    words = (slurm.path / "python.args").read_text().splitlines()
    assert words == [*ARGS[1:], f"--workdir={slurm.workdir}"]
    assert slurm.requeued == []
    assert list(slurm.workdir.iterdir()) == []  # no probe is left


@pytest.mark.parametrize("status", [1, 2, 134])
def test_slurm_does_not_requeue_a_failure(slurm, status):
    slurm.python(f"exit {status}")
    assert slurm.run().returncode == status
    assert slurm.requeued == []


def test_slurm_requeues_what_stopped_after_saving(slurm):
    slurm.python("exit 75")
    assert slurm.run(SLURM_RESTART_COUNT="4").returncode == 0
    assert slurm.requeued == ["requeue 77"]
    done = slurm.run("--max-restarts=4", SLURM_RESTART_COUNT="4")
    assert done.returncode == 75
    assert slurm.requeued == ["requeue 77"]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_slurm_waits_for_the_save(slurm, number):
    """The run takes as long as it likes to save: it waits for a word on its input.

    After SIGUSR1, at the time limit, the job goes back into the queue; after SIGTERM, which is
    `scancel --batch --signal=TERM`, it does not.
    """
    os.mkfifo(slurm.path / "word")
    slurm.python(
        f"""save() {{ kill $!; echo saving; read -r < {slurm.path}/word; echo saved; exit 75; }}
        trap save USR1
        echo ready
        while true; do sleep 1000 & wait $!; done"""
    )
    command = [*slurm.command, *ARGS]
    with subprocess.Popen(command, env=slurm.env, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout.readline() == "ready\n"
        job.send_signal(number)
        assert job.stdout.readline() == "saving\n"
        assert job.poll() is None
        with (slurm.path / "word").open("w") as word:
            word.write("go\n")
        assert job.stdout.readline() == "saved\n"
        limit = number == signal.SIGUSR1
        assert job.wait(timeout=60) == (0 if limit else 75)
    assert slurm.requeued == (["requeue 77"] if limit else [])


def test_slurm_refuses_a_workdir_that_a_node_does_not_see(slurm):
    slurm.tool("srun", "while [[ $1 == --* ]]; do shift; done; [[ $1 != test ]]")
    done = slurm.run()
    assert done.returncode == 2
    assert "not the same folder" in done.stderr
    assert not (slurm.path / "python.args").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--workdir=", *ARGS], "--workdir is missing"),
        (["--workdir=runs/a", *ARGS], "FULL/PATH"),
        (["--workdir=/shared/a"], "nothing to run"),
        (["--workdir=/shared/a", "--nodes=2", *ARGS], "--nodes=2"),
        (["--workdir=/shared/a", "--venv=/none", *ARGS], "/none/bin/python"),
        (["--workdir=/shared/a", "--max-restarts=x", *ARGS], "--max-restarts"),
    ],
)
def test_slurm_flags(slurm, words, said):
    command = [*slurm.command, *words]
    done = subprocess.run(command, env=slurm.env, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_slurm_dry_run_and_headers(slurm):
    done = slurm.run("--dry-run", SLURM_CPUS_PER_TASK="8")
    assert done.returncode == 0
    assert not slurm.workdir.exists()
    flags = "--kill-on-bad-exit=0 --wait=120 --gpu-bind=none --cpus-per-task=8"
    assert flags in done.stdout
    assert done.stdout.splitlines()[-1] == "scontrol requeue 77"
    text = (LAUNCH / "slurm.sbatch").read_text()
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", text, re.MULTILINE))
    assert "requeue" in options
    assert options["open-mode"] == "append"
    assert re.fullmatch(r"B:USR1@\d+", options["signal"])
    assert int(options["signal"].split("@")[1]) >= 120
    # jax takes one GPU a task, by SLURM_LOCALID.
    assert options["ntasks-per-node"] == options["gpus-per-node"]
