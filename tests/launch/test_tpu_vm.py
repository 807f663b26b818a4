"""tpu_vm.sh and tpu_worker.sh against a gcloud that plays a story."""

import os
import shlex
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
from cloud_harness import ARGS, ROOT, WORKDIR


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
    # A run that has finished is in nobody's way.
    assert cloud.vm("setup").returncode == 0
    done = cloud.vm("run", WORKDIR, "--", "-m", "ferjax.evaluate")
    assert done.returncode == 0, done
    assert "ferjax.evaluate" in cloud.worker(1, "ferjax-run.sh")
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
    # A path below the code would go with the next setup.
    done = cloud.vm("run", "--workdir=runs/x", *ARGS)
    assert done.returncode == 2
    assert "give gs://BUCKET/PATH, or a full path" in done.stderr


def test_a_workdir_that_a_worker_cannot_write_starts_nothing(cloud):
    cloud.story(node="READY")
    cloud.set_up()
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
    cloud.set_up()
    done = cloud.vm("run", WORKDIR, *ARGS)
    assert done.returncode == 1
    assert "did not start on every worker" in done.stderr
    assert cloud.worker(0, "unit") == "stopped\n"
    assert not (cloud.path / "worker1" / "unit").exists()


@pytest.mark.parametrize("call", ["tpu-vm scp", "tpu-vm ssh"])
def test_setup_that_fails_on_one_worker_fails(cloud, call):
    cloud.story(node="READY", faults=[{"call": call, "worker": 1}])
    assert cloud.vm("setup").returncode == 1


@pytest.mark.parametrize("state", ["running", "restarting"])
def test_setup_is_refused_while_a_run_goes_on(cloud, state):
    cloud.story(node="READY")
    cloud.going()
    for worker in range(2):
        (cloud.path / f"worker{worker}" / "unit").write_text(f"{state}\n")
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
    cloud.going()
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
    cloud.going()
    assert cloud.vm("stop").returncode == 0
    assert cloud.vm("status").returncode == 75


def test_only_a_single_host_can_be_stopped(cloud):
    cloud.story(node="READY")
    done = cloud.vm("stop", "--vm")
    assert done.returncode == 2
    assert "deleted" in done.stderr
    cloud.story(workers=1, node="READY")
    cloud.set_up()
    assert cloud.vm("stop", "--vm").returncode == 0
    assert cloud.state["node"] == "STOPPED"


def test_logs_name_the_worker(cloud):
    cloud.story(node="READY")
    cloud.set_up()
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
    with ThreadPoolExecutor() as pool:  # reaped at once, as the system does with an orphan
        end = pool.submit(leftover.wait)
        try:
            done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        finally:
            leftover.send_signal(signal.SIGKILL)
    assert end.result() == -signal.SIGTERM
    assert done.returncode == 0, done
    assert f"hold the TPU: {leftover.pid}" in done.stderr
    assert not lock.exists()
    assert done.stdout == "ferjax-worker t1v-n-w-0 none 0 restarts=0\n"
