"""A cloud on this machine for the tests of the TPU scripts; its gcloud is fake_gcloud.py."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import fake_gcloud

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


class Cloud:
    """The fake's directory, and the scripts run against it."""

    def __init__(self, path, clone):
        self.path, self.clone = path, clone
        for name, text in fake_gcloud.TOOLS.items():
            executable(path / "tools" / name, f"#!/bin/bash\n{text}\n")
        fake = shlex.join([sys.executable, "-I", "-S", str(HERE / "fake_gcloud.py")])
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

    def set_up(self):
        """As `setup` leaves the workers, at no cost."""
        for worker in range(self.state["workers"]):
            home = self.path / f"worker{worker}"
            (home / "ferjax" / "launch").mkdir(parents=True)
            script = (self.clone / "launch" / "tpu_worker.sh").read_text()
            (home / "ferjax" / "launch" / "tpu_worker.sh").write_text(script)
            (home / "ferjax-venv").mkdir()
            executable(home / "ferjax-venv" / "bin" / "python", fake_gcloud.PYTHON)

    def going(self):
        """As `run` leaves them."""
        self.set_up()
        for worker in range(self.state["workers"]):
            (self.path / f"worker{worker}" / "unit").write_text("running\n")
        (self.path / "started").write_text("0\n" * self.state["workers"])

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


def commands_of(text):
    """The printed lines as a shell reads them: each a list of words."""
    script = "\n".join(f"printf '%s\\0' {line}; printf '\\1'" for line in text.splitlines())
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    return [line.split("\0")[:-1] for line in done.stdout.split("\1")[:-1]]
