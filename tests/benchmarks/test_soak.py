"""The short form of `benchmarks/soak.py`: kills at random moments, nothing lost."""

import json
import subprocess
import sys

import pytest
from test_end_to_end import ROOT, environment


@pytest.mark.slow
def test_three_kills_at_random_moments(data_dir):
    done = subprocess.run(
        [sys.executable, "benchmarks/soak.py", "--kills=3"],
        cwd=ROOT, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(done.stdout)
    assert record["kills"] == 3
    assert record["problems"] == []
    assert record["steps"] > 90
