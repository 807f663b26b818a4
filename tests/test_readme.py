"""README's method works as it is printed."""

import importlib.util
import re
import shlex
import sys
import tomllib
from pathlib import Path

import harness
import jax
import numpy as np
from options import read_config

import ferjax.algorithms
from ferjax import runtime
from ferjax.engine.parallel import Layout

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


def test_the_method_in_the_readme_trains(tmp_path, monkeypatch):
    code = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)[0]
    (tmp_path / "my_method.py").write_text(code)
    path = [*ferjax.algorithms.__path__, str(tmp_path)]
    monkeypatch.setattr(ferjax.algorithms, "__path__", path)
    config = harness.make_config(dtype="float32", algorithm={"name": "my_method", "mu": 2})
    _, metrics = harness.Small(config).run(Layout("pmap", jax.devices()[:1]), steps=2)
    entropy = np.divide(*metrics["entropy"])
    assert (entropy > 0).all()
    assert (entropy < np.log(7)).all()
    sys.modules.pop("ferjax.algorithms.my_method")


def commands():
    """What README's shell blocks run: continued lines joined, remarks left out."""
    for block in re.findall(r"```sh\n(.*?)```", README.read_text(), re.S):
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.split("&&"):
                words = shlex.split(part, comments=True)
                yield words
                if "--" in words:  # what a launcher starts
                    yield ["python", *words[words.index("--") + 1 :]]


def file_of(words):
    """The Python file that a command runs, or None."""
    if words[:2] == ["python", "-m"]:
        found = importlib.util.find_spec(words[2])  # of the package that is installed
        assert found, words
        return Path(found.origin)
    return ROOT / words[1] if words[:1] == ["python"] else None


def flags_of(path):
    """The flags that a command's file defines, or has a module beside it define."""
    source = "".join(p.read_text() for p in path.parent.glob(f"{path.stem}*.py"))
    if "runtime.define_flags()" in source:
        source += Path(runtime.__file__).read_text()
    if path.parent.name == "benchmarks":
        source += (path.parent / "options.py").read_text()
    defined = re.findall(r'DEFINE_\w+\(\s*"([\w.]+)"|add_argument\(\s*"--([\w-]+)', source)
    return {name for names in defined for name in names if name}


def test_every_command_has_its_file_its_flags_and_its_keys():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    seen = 0
    for words in commands():
        extras = re.findall(r"\.\[(.*)\]", " ".join(words))
        assert set(extras) <= project["optional-dependencies"].keys()
        if words and words[0].startswith("--config."):  # an option alone
            words = ["python", "-m", "ferjax.main", "--config=configs/fixmatch.py", *words]
        path = file_of(words)
        if path is None or "FILE" in " ".join(words):
            continue
        assert path.is_file(), words
        seen += 1
        own = words[: words.index("--")] if "--" in words else words  # the rest is another's
        given = dict(w[2:].split("=", 1) for w in own if w.startswith("--") and "=" in w)
        options = [w.removeprefix("--config.") for w in own if w.startswith("--config.")]
        names = {w[2:].split("=")[0] for w in own if w.startswith("--")} - {"no-detect"}
        names = {name for name in names if not name.startswith("config.")}
        assert names <= flags_of(path), words
        for name in {"config", "sweep"} & given.keys():
            assert (ROOT / given[name].split(":")[0]).is_file(), words
        if "config" in given:
            read_config(given["config"], options)  # keys and values are allowed
    assert seen > 30


def test_every_accuracy_is_one_of_the_results():
    results = (ROOT / "RESULTS.md").read_text().replace("\u00b1", "+-")
    card = Path(ferjax.__file__).with_name("small.md").read_text()  # of the network in the package
    text = re.sub(r"```text\n.*?```", "", README.read_text(), flags=re.DOTALL)  # a command's output
    figures = re.findall(r"\d\d\.\d\d(?: \+- \d\.\d\d)?(?= %)", text)
    assert len(figures) > 15
    for figure in figures:
        row = re.search(rf"\| {re.escape(figure)} +\|", results)
        assert row or f"| private_test | 3,589 | {figure} %" in card, figure
