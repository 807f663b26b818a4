"""slurm.sbatch with a fake srun, the JobSets as Kubernetes reads them, the image, shellcheck."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).parents[2] / "launch"
SCRIPTS = [*sorted(LAUNCH.glob("*.sh")), LAUNCH / "slurm.sbatch"]
ARGS = ["--", "-m", "ferjax.main", "--config=a.py", '--config.name=it\'s $5 & "more"']


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(path):
    command = ["shellcheck", "--external-sources", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_stop_at_the_first_error(path):
    text = path.read_text()
    assert text.startswith("#!/usr/bin/env bash\n") or "Sourced by" in text
    assert "set -euo pipefail\n" in text or "Sourced by" in text
    assert os.access(path, os.X_OK) or path.name in ("tpu_common.sh", "slurm.sbatch")


# --- SLURM


class Slurm:
    """A directory with srun, scontrol and the environment's python as small scripts."""

    def __init__(self, path):
        self.path = path
        (path / "venv" / "bin").mkdir(parents=True)
        # Options are --name=value, then the command, as the only task.
        self.tool("srun", 'while [[ $1 == --* ]]; do shift; done; exec "$@"')
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
def test_slurm_passes_the_signal_on_waits_for_the_save_and_requeues(slurm, number):
    """The run takes as long as it likes to save: it waits for a word on its input."""
    os.mkfifo(slurm.path / "word")
    name = signal.Signals(number).name.removeprefix("SIG")
    slurm.python(
        f"""save() {{ echo saving; read -r < {slurm.path}/word; echo saved; exit 75; }}
        trap save {name}
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
        # The script's own sleep holds the pipe, so only the status is waited for.
        assert job.wait(timeout=60) == 0
    assert slurm.requeued == ["requeue 77"]


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
    done = slurm.run("--dry-run")
    assert done.returncode == 0
    assert not slurm.workdir.exists()
    assert "--kill-on-bad-exit=0 --wait=120 --gpu-bind=none" in done.stdout
    assert done.stdout.splitlines()[-1] == "scontrol requeue 77"
    text = (LAUNCH / "slurm.sbatch").read_text()
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", text, re.MULTILINE))
    assert "requeue" in options
    assert options["open-mode"] == "append"
    assert re.fullmatch(r"B:USR1@\d+", options["signal"])
    assert int(options["signal"].split("@")[1]) >= 120
    # jax takes one GPU a task, by SLURM_LOCALID.
    assert options["ntasks-per-node"] == options["gpus-per-node"]


# --- GKE

GIVEN = {
    "NAME": "run-1",
    "IMAGE": "registry.example/x/ferjax:1",
    "SERVICE_ACCOUNT": "trainer",
    "HOSTS": "4",
    "ACCELERATOR": "tpu-v5-lite-podslice",
}
TPU = {**GIVEN, "TOPOLOGY": "4x4", "CHIPS_PER_HOST": "4"}
GPU = {**GIVEN, "ACCELERATOR": "nvidia-l4", "GPUS_PER_HOST": "8"}
WORKDIR = "--workdir=gs://bucket/run 1"


def jobset(kind, *words, given=None, path=os.environ["PATH"]):
    clean = {k: v for k, v in os.environ.items() if k not in TPU | GPU and "FERJAX" not in k}
    return subprocess.run(
        ["bash", str(LAUNCH / "jobset.sh"), kind, *words],
        env={**clean, **(given or {}), "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module", params=["tpu", "gpu"])
def manifest(request):
    done = jobset(
        request.param, "--dry-run", WORKDIR, *ARGS, given={"tpu": TPU, "gpu": GPU}[request.param]
    )
    assert done.returncode == 0, done
    documents = list(yaml.safe_load_all(done.stdout))
    assert len(documents) == 1
    return request.param, documents[0]


def job_of(manifest):
    (job,) = manifest["spec"]["replicatedJobs"]
    return job["template"]["spec"]


def container_of(manifest):
    (container,) = job_of(manifest)["template"]["spec"]["containers"]
    return container


def test_jobset_fills_everything_in(manifest):
    _, document = manifest
    assert "${" not in json.dumps(document)
    assert document["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    assert document["kind"] == "JobSet"
    assert document["metadata"]["name"] == "run-1"
    container = container_of(document)
    assert container["image"] == GIVEN["IMAGE"]
    # $$ is how Kubernetes writes $ in an argument.
    assert container["args"] == [a.replace("$", "$$") for a in [*ARGS[1:], WORKDIR]]


def test_jobset_is_one_indexed_job_of_all_hosts(manifest):
    _, document = manifest
    job = job_of(document)
    assert job["completionMode"] == "Indexed"
    assert job["completions"] == job["parallelism"] == 4
    assert job["backoffLimit"] == 0
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # what podFailurePolicy demands
    assert pod["serviceAccountName"] == "trainer"
    assert pod["terminationGracePeriodSeconds"] > 30


def kubernetes(job, exit_code=None, condition=None):
    """What the Job controller makes of a failed pod, by its first rule that fits: reason, message.

    As in kubernetes/pkg/controller/job/pod_failure_policy.go; without a rule the back-off limit of
    0 is reached.
    """
    for index, rule in enumerate(job["podFailurePolicy"]["rules"]):
        assert rule["action"] == "FailJob"
        codes = rule.get("onExitCodes")
        fits = exit_code is not None and codes and exit_code in codes["values"]
        conditions = [(c["type"], c["status"]) for c in rule.get("onPodConditions", [])]
        fits = fits or (condition, "True") in conditions
        if fits:
            what = f"exit code {exit_code}" if codes else f"condition {condition}"
            return (
                "PodFailurePolicy",
                f"Pod x failed with {what} matching FailJob rule at index {index}",
            )
    return "BackoffLimitExceeded", "Job has reached the specified backoff limit"


def jobset_action(policy, reason, message):
    """What the JobSet controller does about a failed Job: the first rule that fits, or restart."""
    for rule in policy["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [".*"])
        if reason in rule["onJobFailureReasons"] and any(re.search(p, message) for p in patterns):
            return rule["action"]
    return "RestartJobSet"


@pytest.mark.parametrize(
    ("failure", "action"),
    [
        ({"exit_code": 75}, "RestartJobSetAndIgnoreMaxRestarts"),
        ({"condition": "DisruptionTarget"}, "RestartJobSetAndIgnoreMaxRestarts"),
        ({"exit_code": 2}, "FailJobSet"),
        ({"exit_code": 1}, "RestartJobSet"),
        ({"exit_code": 134}, "RestartJobSet"),
    ],
)
def test_jobset_restarts_by_the_exit_status(manifest, failure, action):
    _, document = manifest
    job, policy = job_of(document), document["spec"]["failurePolicy"]
    assert 0 < policy["maxRestarts"] < 100
    assert jobset_action(policy, *kubernetes(job, **failure)) == action
    for rule in job["podFailurePolicy"]["rules"]:
        assert (
            rule.get("onExitCodes", {}).get("containerName", "ferjax")
            == container_of(document)["name"]
        )
    assert all(re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", rule["name"]) for rule in policy["rules"])


def test_jobset_selects_the_nodes(manifest):
    kind, document = manifest
    selector = job_of(document)["template"]["spec"]["nodeSelector"]
    resources = container_of(document)["resources"]
    if kind == "tpu":
        assert selector == {
            "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
            "cloud.google.com/gke-tpu-topology": "4x4",
        }
        wanted = {"google.com/tpu": 4}
        topology = document["metadata"]["annotations"]
        assert (
            topology["alpha.jobset.sigs.k8s.io/exclusive-topology"]
            == "cloud.google.com/gke-nodepool"
        )
    else:
        assert selector == {"cloud.google.com/gke-accelerator": "nvidia-l4"}
        wanted = {"nvidia.com/gpu": 8}
    assert resources == {"requests": wanted, "limits": wanted}


def started_by(container, tmp_path, env):
    """What `python` gets when the container's command runs with a fake one on PATH."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    args = [a.replace("$$", "$") for a in container["args"]]
    command = [c.replace("ulimit -l 68719476736", "true") for c in container["command"]]
    return subprocess.run(
        [*command, *args],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", **env},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()


def test_jobset_tells_jax_who_is_who(manifest, tmp_path):
    """GPU: by flags. TPU: GKE's TPU_WORKER_ID and TPU_WORKER_HOSTNAMES, which nothing may hide."""
    kind, document = manifest
    container = container_of(document)
    env = {e["name"]: e for e in container.get("env", [])}
    assert not {n for n in env if n.startswith(("TPU_", "JAX_"))}
    given = {}
    if kind == "gpu":
        index = env["PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
        assert index == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
        # <jobset>-<replicated job>-<job>-<pod>.<jobset>, as JobSet names the first pod.
        name = document["spec"]["replicatedJobs"][0]["name"]
        assert env["COORDINATOR"]["value"] == f"run-1-{name}-0-0.run-1:8476"
        assert document["spec"]["network"]["enableDNSHostnames"] is True
        given = {"COORDINATOR": "c:1", "PROCESS_ID": "3"}
    words = started_by(container, tmp_path, given)
    flags = ["--coordinator=c:1", "--num_processes=4", "--process_id=3"] if kind == "gpu" else []
    assert words == [*ARGS[1:], WORKDIR, *flags]


def test_jobset_raises_the_memory_lock_for_tpus_only(manifest):
    kind, document = manifest
    container = container_of(document)
    if kind == "tpu":
        assert container["securityContext"] == {
            "runAsUser": 0,
            "capabilities": {"add": ["SYS_RESOURCE"]},
        }
        assert "ulimit -l" in container["command"][2]
    else:
        assert "securityContext" not in container


@pytest.mark.parametrize(
    ("kind", "name"), [*itertools.product(["tpu"], TPU), *itertools.product(["gpu"], GPU)]
)
def test_jobset_names_what_is_missing(kind, name):
    given = {k: v for k, v in {"tpu": TPU, "gpu": GPU}[kind].items() if k != name}
    done = jobset(kind, "--dry-run", WORKDIR, *ARGS, given=given)
    assert done.returncode == 2
    assert f"--{name.lower().replace('_', '-')} is missing" in done.stderr
    assert done.stdout == ""
    flag = f"--{name.lower().replace('_', '-')}={TPU.get(name) or GPU[name]}"
    assert jobset(kind, "--dry-run", flag, WORKDIR, *ARGS, given=given).returncode == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--workdir=/mnt/x", *ARGS], "gs://"),
        ([WORKDIR], "nothing to run"),
        (["--hosts=0", WORKDIR, *ARGS], "--hosts=0"),
        (["--image=a: b", WORKDIR, *ARGS], "--image"),
        (["--zone=z", WORKDIR, *ARGS], "--zone"),
    ],
)
def test_jobset_flags(words, said):
    done = jobset("tpu", *words, given=TPU)
    assert done.returncode == 2
    assert said in done.stderr


def test_jobset_is_applied(tmp_path):
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(
        f'#!/bin/sh\necho "$@" > {tmp_path}/call\ncat > {tmp_path}/applied\nexit 7\n'
    )
    kubectl.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    assert jobset("tpu", WORKDIR, *ARGS, given=TPU, path=path).returncode == 7
    assert (tmp_path / "call").read_text() == "apply -f -\n"
    assert yaml.safe_load((tmp_path / "applied").read_text())["metadata"]["name"] == "run-1"


# --- the image


def test_dockerfile():
    text = re.sub(r"\\\n\s*", "", (LAUNCH / "Dockerfile").read_text())
    steps = [line.split(None, 1) for line in text.splitlines() if line and line[0] not in "#"]
    (base,) = [rest for word, rest in steps if word == "FROM"]
    assert re.fullmatch(r"python:3\.11\.\d+-slim-[a-z]+", base)  # the version of constraints.txt
    users = [rest for word, rest in steps if word == "USER"]
    assert users[-1] not in ("root", "0")
    for rest in (rest for word, rest in steps if word == "RUN" and "pip install" in rest):
        assert "-c constraints.txt" in rest or "--no-deps" in rest
    assert ["ENTRYPOINT", '["python"]'] in steps
    # Everything that the package is built from is there before it is built.
    copied = " ".join(rest for word, rest in steps if word == "COPY")
    for name in ("pyproject.toml", "constraints.txt", "README.md", "LICENSE", "ferjax", "configs"):
        assert name in copied.split()
