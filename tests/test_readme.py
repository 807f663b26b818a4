"""README's method works as it is printed."""

import re
import sys
from pathlib import Path

import harness
import jax
import numpy as np

import ferjax.algorithms
from ferjax.engine.parallel import Layout

README = Path(__file__).parent.parent / "README.md"


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
