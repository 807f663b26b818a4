"""A fake cloud for each test, and a clone of the scripts."""

import shutil
import subprocess

import pytest
from cloud_harness import ROOT, Cloud


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
