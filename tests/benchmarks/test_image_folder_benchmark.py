"""`benchmarks/image_folder.py` as a user runs it, on few pictures."""

import json
import subprocess
import sys

import pytest
from test_end_to_end import ROOT, environment


@pytest.mark.slow
def test_a_run_with_a_kill(tmp_path):
    args = ["--images=60", "--kills=1", f"--folder={tmp_path}"]
    done = subprocess.run(
        [sys.executable, "benchmarks/image_folder.py", *args],
        cwd=ROOT, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(done.stdout)
    assert record["images"] == 60
    assert record["same_digest"]
    assert not list(tmp_path.iterdir())
