"""tpu_vm.sh, tpu_queued.sh, tpu_worker.sh against a gcloud that plays a story (fake_gcloud.py)."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
PLACE = ("--project=proj-1", "--zone=zone-b", "--name=tpu-a")
WORKDIR = "--workdir=gs://bucket/run 1"
ARGS = (
    "--",
    "-m",
    "ferjax.main",
    "--config=configs/fixmatch.py:pod",
    "--config.name=it's $5 & more",
)

spec = importlib.util.spec_from_file_location("fake_gcloud", HERE / "fake_gcloud.py")
os.environ.setdefault("FAKE_CLOUD", "/nonexistent")
fake_gcloud = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fake_gcloud)


class Cloud:
    """The fake's directory, and the scripts run against it."""

    def __init__(self, path, clone):
        self.path, self.clone = path, clone
        for name, text in fake_gcloud.TOOLS.items():
            executable(path / "tools" / name, f"#!/bin/bash\n{text}\n")
        fake = shlex.join([sys.executable, str(HERE / "fake_gcloud.py")])
        executable(path / "bin" / "gcloud", f'#!/bin/sh\nexec {fake} "$@"\n')
        self.env = {
            **{k: v for k, v in os.environ.items() if not k.startswith("FERJAX_")},
            "PATH": f"{path / 'bin'}:{os.environ['PATH']}",
            "FAKE_CLOUD": str(path),
        }
        (path / "calls.jsonl").touch()
        self.story()

    def story(self, workers=2, node=None, request=None, **more):
        state = {"workers": workers, "node": node, "request": request, **more}
        (self.path / "state.json").write_text(json.dumps(state))
        for worker in range(workers):
            (self.path / f"worker{worker}").mkdir(exist_ok=True)
        (self.path / "started").touch()

    def run(self, script, *words, env=None):
        return subprocess.run(
            ["bash", str(self.clone / "launch" / script), *words],
            env={**self.env, **(env or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def vm(self, *words):
        command, *rest = words
        return self.run("tpu_vm.sh", command, *PLACE, *rest)

    def queued(self, *words):
        accelerator = "--accelerator=v5litepod-16"
        return self.run("tpu_queued.sh", *PLACE, accelerator, WORKDIR, "--poll=0", *words, *ARGS)

    def calls(self):
        lines = (self.path / "calls.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def verbs(self):
        """The calls that change something, in short: "create", "queued delete", "ssh run"."""
        short = []
        for call in self.calls():
            group, verb = call[2:4] if call[0] == "compute" else call[:2]
            if verb == "ssh":
                verb = "ssh " + re.search(r"tpu_worker\.sh (\w+)", " ".join(call))[1]
            if verb not in ("list", "ls", "ssh status"):
                short.append(f"queued {verb}" if group == "queued-resources" else verb)
        return short

    @property
    def state(self):
        return json.loads((self.path / "state.json").read_text())

    def worker(self, index, name):
        return (self.path / f"worker{index}" / name).read_text()


def executable(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A git clone with the scripts, as the user's."""
    path = tmp_path_factory.mktemp("clone")
    shutil.copytree(ROOT / "launch", path / "launch")
    git = ["git", "-C", str(path), "-c", "user.name=t", "-c", "user.email=t@localhost"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "Begin"]):
        subprocess.run([*git, *words], check=True, stdout=subprocess.DEVNULL)
    return path


@pytest.fixture
def cloud(tmp_path, clone):
    return Cloud(tmp_path, clone)


def commands_of(text):
    return [shlex.split(line) for line in text.splitlines()]


# --- the fake itself


@pytest.mark.parametrize(
    "words",
    [
        "compute tpus tpu-vm ssh tpu-a --worker=all --command=true --batch-size=4",  # alpha's only
        "compute tpus tpu-vm create tpu-a",  # --version is missing
        "compute tpus tpu-vm restart tpu-a",
        "compute tpus queued-resources create tpu-a --runtime-version=v --node-id=n",
        "compute tpus tpu-vm delete tpu-a --quiet=yes",
    ],
)
def test_the_fake_refuses_what_gcloud_would(cloud, words):
    command = [str(cloud.path / "bin" / "gcloud"), *words.split(), "--project=p", "--zone=z"]
    done = subprocess.run(command, env=cloud.env, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done
    assert "ERROR" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("gcloud"), reason="gcloud is not installed")
@pytest.mark.parametrize("name", fake_gcloud.GRAMMAR["commands"])
def test_the_grammar_is_what_gcloud_says(tmp_path, name):
    env = {**os.environ, "CLOUDSDK_CONFIG": str(tmp_path)}
    command = ["gcloud", *name.split(), "--help"]
    text = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    text = re.sub(r"\x1b?\[[0-9;]*m", "", text)
    synopsis = re.search(r"SYNOPSIS\n(.*?)\n\S*DESCRIPTION", text, re.DOTALL)[1]
    missing = [f for f in fake_gcloud.GRAMMAR["commands"][name]["flags"] if f not in synopsis]
    missing = [f for f in missing if f"--[no-]{f[2:]}" not in synopsis]
    assert not missing


# --- flags


@pytest.mark.parametrize("missing", range(3))
def test_what_is_missing_is_named(cloud, missing):
    flags = [flag for i, flag in enumerate(PLACE) if i != missing]
    done = cloud.run("tpu_vm.sh", "status", *flags)
    flag = PLACE[missing].split("=")[0]
    variable = {"--project": "FERJAX_PROJECT", "--zone": "FERJAX_ZONE", "--name": "FERJAX_TPU"}[
        flag
    ]
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert flag in done.stderr
    assert variable in done.stderr
    assert cloud.calls() == []


@pytest.mark.parametrize(
    ("script", "words", "said"),
    [
        ("tpu_vm.sh", ["create"], "--accelerator is missing"),
        ("tpu_vm.sh", ["create", "--accelerator=v9-8"], "--runtime"),
        ("tpu_vm.sh", ["create", "--accelerator=v5p-8", "--tier=cheap"], "--tier=cheap"),
        ("tpu_vm.sh", ["launch"], "create, setup, run"),
        ("tpu_vm.sh", ["create", "--zones=z"], "--zones=z"),
        ("tpu_vm.sh", ["create", "--name=Tpu_1"], "--name=Tpu_1"),
        ("tpu_vm.sh", ["run", WORKDIR], "nothing to run"),
        ("tpu_vm.sh", ["run", "--env=3x", *ARGS], "--env"),
        ("tpu_vm.sh", ["logs", "--lines=all"], "--lines=all"),
        ("tpu_queued.sh", [WORKDIR, *ARGS], "--accelerator is missing"),
        ("tpu_queued.sh", ["--accelerator=v5p-8", *ARGS], "--workdir is missing"),
        ("tpu_queued.sh", ["--accelerator=v5p-8", "--workdir=/home/me", *ARGS], "gs://"),
        (
            "tpu_queued.sh",
            ["--accelerator=v5p-8", "--workdir=gs://bucket", *ARGS],
            "gs://BUCKET/PATH",
        ),
        (
            "tpu_queued.sh",
            ["--accelerator=v5p-8", "--workdir=gs://Bu cket/x", *ARGS],
            "gs://BUCKET/PATH",
        ),
        ("tpu_queued.sh", ["--accelerator=v5p-8", "--workdir=gs://else/x", *ARGS], "gs://else"),
        ("tpu_queued.sh", ["--accelerator=v5p-8", WORKDIR, "--poll=soon", *ARGS], "--poll"),
    ],
)
def test_wrong_flags_end_with_2_and_create_nothing(cloud, script, words, said):
    first = words[:1] if script == "tpu_vm.sh" else []
    done = cloud.run(script, *first, *PLACE, *words[len(first) :])
    assert done.returncode == 2, done
    assert said in done.stderr
    assert cloud.verbs() == []


def test_places_may_come_from_the_environment(cloud):
    env = {"FERJAX_PROJECT": "proj-9", "FERJAX_ZONE": "zone-9", "FERJAX_TPU": "tpu-9"}
    done = cloud.run("tpu_vm.sh", "delete", "--dry-run", env=env)
    delete = commands_of(done.stdout)[-1]
    assert delete[5:] == ["tpu-9", "--quiet", "--project=proj-9", "--zone=zone-9"]


def test_nothing_in_launch_names_a_project_or_a_credential():
    text = "\n".join(p.read_text() for p in (ROOT / "launch").iterdir() if p.is_file())
    assert not re.search(
        r"iam\.gserviceaccount\.com|BEGIN .*PRIVATE KEY|GOOGLE_APPLICATION_CRED", text
    )
    assert not re.search(r"--project=[a-z][a-z0-9-]*", text)


# --- dry runs


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        (["create", "--accelerator=v6e-16", "--tier=spot"], ["create"]),
        (["setup"], ["scp", "ssh"]),
        (["run", WORKDIR, *ARGS], ["ssh", "ssh"]),
        (["status"], ["ssh"]),
        (["logs", "--follow"], ["ssh"]),
        (["stop", "--vm"], ["ssh", "stop"]),
        (["delete"], ["delete"]),
    ],
)
def test_dry_run_prints_what_gcloud_takes_and_runs_nothing(cloud, words, changes):
    done = cloud.run("tpu_vm.sh", words[0], *PLACE, "--dry-run", *words[1:])
    assert done.returncode == 0, done
    assert cloud.calls() == []
    commands = commands_of(join_lines(done.stdout))
    gcloud = [c for c in commands if c[0] == "gcloud"]
    assert [c[4] for c in gcloud] == ["list", *changes]
    for command in gcloud:
        flags, _ = fake_gcloud.parse(" ".join(command[1:5]), command[5:])
        assert flags["--project"] == "proj-1"
        assert flags["--zone"] == "zone-b"
        if command[4] in ("ssh", "scp"):
            assert flags["--worker"] == "all"


def join_lines(text):
    """Without bash's $'a\\nb', which shlex does not know."""

    def plain(match):
        return shlex.quote(match[1].encode().decode("unicode_escape"))

    return re.sub(r"\$'((?:[^'\\]|\\.)*)'", plain, text)


def test_dry_run_of_a_new_tpu_says_image_tier_and_scope(cloud):
    flags = ("--accelerator=v6e-16", "--tier=spot", "--service-account=sa@x", "--internal-ip")
    done = cloud.vm("create", "--dry-run", *flags)
    assert commands_of(done.stdout)[-1] == [
        *["gcloud", "compute", "tpus", "tpu-vm", "create", "tpu-a", "--version=v2-alpha-tpuv6e"],
        "--accelerator-type=v6e-16",
        "--scopes=https://www.googleapis.com/auth/cloud-platform",
        "--spot",
        "--service-account=sa@x",
        "--internal-ips",
        *PLACE[:2],
    ]


def test_dry_run_of_a_queued_run_is_its_undisturbed_course(cloud):
    done = cloud.queued("--dry-run")
    assert done.returncode == 0, done
    assert cloud.calls() == []
    gcloud = [c for c in commands_of(join_lines(done.stdout)) if c[0] == "gcloud"]
    for command in gcloud:
        name = " ".join(command[1:3] if command[1] == "storage" else command[1:5])
        fake_gcloud.parse(name, command[len(name.split()) + 1 :])
    changes = [" ".join(c[3:5]) for c in gcloud if c[1] == "compute" and c[4] != "list"]
    assert changes == [
        "queued-resources create",
        "tpu-vm ssh",  # status
        "tpu-vm scp",
        "tpu-vm ssh",  # setup
        "tpu-vm ssh",  # check
        "tpu-vm ssh",  # run
        "tpu-vm ssh",  # status
        "tpu-vm ssh",  # logs
        "queued-resources delete",
    ]
    assert "--spot" in gcloud[2]


# --- one TPU VM


def test_from_nothing_to_finished(cloud):
    cloud.story(runs=[["running", "done/running", "done"]])
    assert cloud.vm("status").returncode == 5
    assert cloud.vm("create", "--accelerator=v5litepod-16").returncode == 0
    assert cloud.vm("status").returncode == 4
    done = cloud.vm("run", WORKDIR, *ARGS)
    assert done.returncode == 1  # not set up: tpu_worker.sh is not there yet
    assert cloud.vm("setup").returncode == 0
    done = cloud.vm("run", WORKDIR, "--env=TFDS_DATA_DIR=/mnt/a b", *ARGS)
    assert done.returncode == 0, done
    for worker in range(2):
        script = cloud.worker(worker, "ferjax-run.sh").splitlines()
        assert shlex.split(script[1]) == ["export", "TFDS_DATA_DIR=/mnt/a b"]
        python = str(cloud.path / f"worker{worker}" / "ferjax-venv/bin/python")
        assert shlex.split(script[-1]) == ["exec", python, *ARGS[1:], WORKDIR]
        unit = cloud.worker(worker, "systemd-run").splitlines()
        for word in (
            "--unit=ferjax",
            "--property=RestartForceExitStatus=75",
            "--property=KillMode=mixed",
        ):
            assert word in unit
        assert "pip install --user" in cloud.worker(worker, "python3.calls")
        assert "-c constraints.txt .[tpu,gcs]" in cloud.worker(worker, "python3.calls")
    again = cloud.vm("run", WORKDIR, *ARGS)
    assert again.returncode == 1
    assert "a run is going on" in again.stderr
    assert [cloud.vm("status").returncode for _ in range(3)] == [3, 3, 0]
    assert cloud.vm("delete").returncode == 0
    assert cloud.state["node"] is None
    assert "no TPU VM" in cloud.vm("delete").stderr


def test_a_tpu_vm_of_several_hosts_wants_a_gs_workdir(cloud):
    cloud.story(node="READY")
    done = cloud.vm("run", "--workdir=/home/me/run", *ARGS)
    assert done.returncode == 2
    assert "gs://" in done.stderr
    assert cloud.verbs() == []


def test_one_host_may_use_its_own_disk(cloud):
    cloud.story(workers=1, node="READY")
    assert cloud.vm("setup").returncode == 0
    assert cloud.vm("run", "--workdir=/home/me/run", *ARGS).returncode == 0
    assert "--workdir=/home/me/run" in cloud.worker(0, "ferjax-run.sh")


def test_a_workdir_that_a_worker_cannot_write_starts_nothing(cloud):
    cloud.story(node="READY")
    cloud.vm("setup")
    (cloud.path / "worker1" / "read-only").touch()
    done = cloud.vm("run", WORKDIR, *ARGS)
    assert done.returncode == 1
    assert "[t1v-n-w-1]" in done.stderr
    assert "can't be written" in done.stderr
    assert (cloud.path / "started").read_text() == ""


def test_create_that_fails_says_so(cloud):
    cloud.story(faults=[{"call": "tpu-vm create"}])
    done = cloud.vm("create", "--accelerator=v5litepod-16")
    assert done.returncode == 1
    assert "was not created" in done.stderr


@pytest.mark.parametrize(
    ("node", "verbs"),
    [("READY", []), ("STOPPED", ["start"]), ("PREEMPTED", ["delete", "create"])],
)
def test_create_takes_what_it_finds(cloud, node, verbs):
    cloud.story(workers=1, node=node)
    assert cloud.vm("create", "--accelerator=v5litepod-1").returncode == 0
    assert cloud.verbs() == verbs
    assert cloud.state["node"] == "READY"


def test_ssh_that_fails_on_one_worker_ends_the_run_on_the_others(cloud):
    fault = {"call": "tpu-vm ssh", "has": "tpu_worker.sh run", "worker": 1}
    cloud.story(node="READY", faults=[fault])
    cloud.vm("setup")
    done = cloud.vm("run", WORKDIR, *ARGS)
    assert done.returncode == 1
    assert "did not start on every worker" in done.stderr
    assert cloud.worker(0, "unit") == "stopped\n"
    assert not (cloud.path / "worker1" / "unit").exists()


@pytest.mark.parametrize("call", ["tpu-vm scp", "tpu-vm ssh"])
def test_setup_that_fails_on_one_worker_fails(cloud, call):
    cloud.story(node="READY", faults=[{"call": call, "worker": 1}])
    assert cloud.vm("setup").returncode == 1


def test_setup_is_refused_while_a_run_goes_on(cloud):
    cloud.story(node="READY")
    cloud.vm("setup")
    cloud.vm("run", WORKDIR, *ARGS)
    done = cloud.vm("setup")
    assert done.returncode == 1
    assert "a run is going on" in done.stderr


@pytest.mark.parametrize(
    ("token", "status"),
    [
        ("running", 3),
        ("done", 0),
        ("stopped", 75),
        ("failed 2", 2),
        ("failed 1", 1),
        ("failed 134/running", 1),
        ("rebooted/running", 1),
        ("restarting", 3),
        ("preempted", 1),
    ],
)
def test_status_tells_the_run_by_its_exit_status(cloud, token, status):
    cloud.story(node="READY", runs=[[token]])
    cloud.vm("setup")
    cloud.vm("run", WORKDIR, *ARGS)
    done = cloud.vm("status")
    assert done.returncode == (6 if token == "preempted" else status), done


def test_status_of_a_preempted_node_and_of_silent_workers(cloud):
    cloud.story(node="PREEMPTED")
    done = cloud.vm("status")
    assert (done.returncode, done.stdout) == (5, "node PREEMPTED\n")
    cloud.story(node="READY", faults=[{"call": "tpu-vm ssh", "worker": 0}])
    assert cloud.vm("status").returncode == 6
    cloud.story(node="READY", faults=[{"call": "tpu-vm list"}])
    assert cloud.vm("status").returncode == 6


@pytest.mark.parametrize("command", ["setup", "logs", "stop"])
def test_a_preempted_node_is_named(cloud, command):
    cloud.story(node="PREEMPTED")
    done = cloud.vm(command)
    assert done.returncode == 1
    assert "preempted" in done.stderr


def test_stop_saves_and_leaves_the_status(cloud):
    cloud.story(node="READY")
    cloud.vm("setup")
    cloud.vm("run", WORKDIR, *ARGS)
    assert cloud.vm("stop").returncode == 0
    assert cloud.vm("status").returncode == 75


def test_only_a_single_host_can_be_stopped(cloud):
    cloud.story(node="READY")
    done = cloud.vm("stop", "--vm")
    assert done.returncode == 2
    assert "deleted" in done.stderr
    cloud.story(workers=1, node="READY")
    cloud.vm("setup")
    assert cloud.vm("stop", "--vm").returncode == 0
    assert cloud.state["node"] == "STOPPED"


def test_logs_name_the_worker(cloud):
    cloud.story(node="READY")
    cloud.vm("setup")
    for worker in range(2):
        (cloud.path / f"worker{worker}" / "ferjax.log").write_text(f"a\nstep {worker}\n")
    done = cloud.vm("logs", "--lines=1")
    assert done.stdout == "[t1v-n-w-0] step 0\n[t1v-n-w-1] step 1\n"


def test_a_leftover_process_and_its_lock_are_removed(cloud, tmp_path):
    """On the worker: the process ends before the lock goes, and a live run is left alone."""
    lock = tmp_path / "libtpu_lockfile"
    lock.touch()
    home = tmp_path / "worker0"
    leftover = subprocess.Popen(["sleep", "1000"])
    device = tmp_path / "accel0"
    device.touch()
    (home / "holders").write_text(f" {leftover.pid}\n")
    script = (ROOT / "launch" / "tpu_worker.sh").read_text()
    script = script.replace("/tmp/libtpu_lockfile", str(lock)).replace("/dev/accel*", str(device))
    (home / "worker.sh").write_text(script)
    env = {"HOME": str(home), "PATH": f"{tmp_path / 'tools'}:{os.environ['PATH']}", "WORKER": "0"}
    command = ["bash", str(home / "worker.sh"), "stop"]
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert leftover.wait(timeout=60) == -15
    finally:
        leftover.kill()
    assert done.returncode == 0, done
    assert f"hold the TPU: {leftover.pid}" in done.stderr
    assert not lock.exists()
    assert done.stdout == "ferjax-worker t1v-n-w-0 none 0 restarts=0\n"


# --- queued


def test_queued_waits_runs_and_deletes(cloud):
    states = ["ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING"]
    cloud.story(grants=[{"states": states, "runs": [["running", "running", "done"]]}])
    done = cloud.queued()
    assert done.returncode == 0, done
    assert cloud.verbs() == [
        *["queued create", "scp", "ssh setup", "ssh check", "ssh run", "ssh logs", "queued delete"]
    ]
    assert cloud.state["request"] is None


def test_queued_goes_on_after_preemption_with_the_same_command(cloud):
    cloud.story(
        grants=[
            {"states": [], "runs": [["running", "preempted"]]},
            {"states": ["WAITING_FOR_RESOURCES"], "runs": [["running", "done"]]},
        ]
    )
    done = cloud.queued("--keep")
    assert done.returncode == 0, done
    one = ["queued create", "scp", "ssh setup", "ssh check", "ssh run"]
    assert cloud.verbs() == [*one, "queued delete", *one]
    runs = [c for c in cloud.calls() if "tpu_worker.sh run" in " ".join(c)]
    assert runs[0] == runs[1]
    assert cloud.state["request"] == "ACTIVE"  # --keep


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
def test_queued_deletes_what_it_finds_dead_first(cloud, state):
    cloud.story(request=state, grants=[{"states": [], "runs": [["done"]]}])
    assert cloud.queued().returncode == 0
    assert cloud.verbs()[:2] == ["queued delete", "queued create"]


def test_queued_goes_on_with_what_it_finds_running(cloud):
    cloud.story(node="READY", runs=[["running", "done"]])
    cloud.vm("setup")
    cloud.vm("run", WORKDIR, *ARGS)
    before = len(cloud.verbs())
    state = cloud.state
    cloud.story(**{**state, "request": "ACTIVE"})
    assert cloud.queued().returncode == 0
    assert cloud.verbs()[before:] == ["ssh logs", "queued delete"]


def test_queued_gives_up_on_a_request_that_always_fails(cloud):
    cloud.story(grants=[{"states": ["FAILED"]}] * 5)
    done = cloud.queued("--max-refusals=2")
    assert done.returncode == 1
    assert cloud.verbs() == ["queued create", "queued delete"] * 2


def test_queued_ends_when_create_fails(cloud):
    cloud.story(grants=[], faults=[{"call": "queued-resources create"}])
    assert cloud.queued().returncode == 1
    assert cloud.verbs() == ["queued create"]


def test_queued_restarts_a_run_that_fails_some_times(cloud):
    runs = [["failed 134/running"], ["running", "rebooted/running"], ["done"]]
    cloud.story(grants=[{"states": [], "runs": runs}])
    done = cloud.queued()
    assert done.returncode == 0, done
    again = ["ssh stop", "ssh check", "ssh run"]
    first = ["queued create", "scp", "ssh setup", "ssh check", "ssh run"]
    assert cloud.verbs() == [*first, *again, *again, "ssh logs", "queued delete"]


def test_queued_gives_up_after_max_failures_and_deletes(cloud):
    cloud.story(grants=[{"states": [], "runs": [["failed 1"]] * 9}])
    done = cloud.queued("--max-failures=1")
    assert done.returncode == 1
    assert cloud.verbs().count("ssh run") == 2
    assert cloud.verbs()[-2:] == ["ssh logs", "queued delete"]


@pytest.mark.parametrize(("token", "status"), [("failed 2", 2), ("stopped", 75)])
def test_queued_does_not_repeat_what_is_wrong_or_was_stopped(cloud, token, status):
    cloud.story(grants=[{"states": [], "runs": [["running", token]]}])
    assert cloud.queued().returncode == status
    assert cloud.verbs().count("ssh run") == 1
    assert cloud.verbs()[-1] == "queued delete"


def test_queued_bears_gcloud_failing_now_and_then(cloud):
    faults = [
        {"call": "queued-resources list", "times": 2},
        {"call": "tpu-vm list", "times": 1},
        {"call": "tpu-vm ssh", "has": "tpu_worker.sh status", "worker": 1, "times": 3},
    ]
    cloud.story(grants=[{"states": [], "runs": [["running"] * 9 + ["done"]]}], faults=faults)
    done = cloud.queued()
    assert done.returncode == 0, done
    assert cloud.verbs().count("ssh run") == 1


def test_queued_leaves_a_tpu_whose_workers_stay_silent(cloud):
    fault = {"call": "tpu-vm ssh", "has": "tpu_worker.sh status", "worker": 1, "times": 99}
    cloud.story(grants=[{"states": []}], faults=[fault])
    done = cloud.queued()
    assert done.returncode == 1
    assert "costs money" in done.stderr
    assert cloud.verbs() == ["queued create"]


def test_queued_status_and_delete(cloud):
    cloud.story(request="SUSPENDED")
    done = cloud.run("tpu_queued.sh", "status", *PLACE)
    assert (done.returncode, done.stdout) == (5, "request SUSPENDED\n")
    assert cloud.run("tpu_queued.sh", "delete", *PLACE).returncode == 0
    assert cloud.state["request"] is None
    assert cloud.run("tpu_queued.sh", "delete", *PLACE).returncode == 0  # nothing left to delete
