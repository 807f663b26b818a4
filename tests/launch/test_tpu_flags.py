"""What the TPU scripts take and print; what the fake gcloud refuses."""

import os
import re
import shutil
import subprocess

import fake_gcloud
import pytest
from cloud_harness import ARGS, PLACE, ROOT, WORKDIR, commands_of

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
    commands = commands_of(done.stdout)
    gcloud = [c for c in commands if c[0] == "gcloud"]
    assert [c[4] for c in gcloud] == ["list", *changes]
    for command in gcloud:
        flags, _ = fake_gcloud.parse(" ".join(command[1:5]), command[5:])
        assert flags["--project"] == "proj-1"
        assert flags["--zone"] == "zone-b"
        if command[4] in ("ssh", "scp"):
            assert flags["--worker"] == "all"
    if words[0] == "run":  # quoted twice: for this shell and for the workers'
        remote = commands_of(flags["--command"])[0]
        assert remote == [
            *["bash", "ferjax/launch/tpu_worker.sh", "run", "gs://bucket/run 1"],
            *[*ARGS, WORKDIR],
        ]


def test_dry_run_of_a_worker_writes_nothing_and_quotes_its_words(tmp_path):
    systemctl = tmp_path / "bin" / "systemctl"
    systemctl.parent.mkdir()
    systemctl.write_text("#!/bin/sh\n")
    systemctl.chmod(0o755)
    home = tmp_path / "home"
    home.mkdir()
    env = {"HOME": str(home), "PATH": f"{systemctl.parent}:{os.environ['PATH']}"}
    words = ["--dry-run", "run", "gs://bucket/run 1", "KEY=a b", *ARGS]
    command = ["bash", str(ROOT / "launch" / "tpu_worker.sh"), *words]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done
    commands = commands_of(done.stdout.replace("#!/usr/bin/env bash\n", ""))
    assert ["export", "KEY=a b"] in commands
    assert ["exec", f"{home}/ferjax-venv/bin/python", *ARGS[1:]] in commands
    assert commands[-1][-2:] == ["/bin/bash", f"{home}/ferjax-run.sh"]
    assert not list(home.iterdir())


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
    gcloud = [c for c in commands_of(done.stdout) if c[0] == "gcloud"]
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
