"""The JobSets as Kubernetes reads them."""

import itertools
import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).parents[2] / "launch"
ARGS = ["--", "-m", "ferjax.main", "--config=a.py", '--config.name=it\'s $5 & "more"']

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
        # Without it jaxlib does not find GKE's driver, and trains on the CPU.
        assert env["LD_LIBRARY_PATH"]["value"] == "/usr/local/nvidia/lib64"
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
        f'#!/bin/sh\n[ "$1" = apply ] || exit 1\n'
        f'echo "$@" > {tmp_path}/call\ncat > {tmp_path}/applied\nexit 7\n'
    )
    kubectl.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    assert jobset("tpu", WORKDIR, *ARGS, given=TPU, path=path).returncode == 7
    assert (tmp_path / "call").read_text() == "apply -f -\n"
    assert yaml.safe_load((tmp_path / "applied").read_text())["metadata"]["name"] == "run-1"


def test_jobset_is_not_applied_to_one_that_is_there(tmp_path):
    """`kubectl apply` would leave a finished one as it is, and end with 0."""
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(f'#!/bin/sh\n[ "$1" = get ] || touch {tmp_path}/applied\n')
    kubectl.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = jobset("tpu", WORKDIR, *ARGS, given=TPU, path=path)
    assert done.returncode == 2
    assert "kubectl delete jobset run-1" in done.stderr
    assert not (tmp_path / "applied").exists()
