"""ferjax: facial-emotion classifiers from few labels, in JAX.

`ferjax.load(workdir)` gives what a run trained; its `predict(images)` classifies faces. Importing
`ferjax` imports nothing else: JAX comes with the first use of `ferjax.load`.
"""

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["load"]


def __getattr__(name: str) -> Any:
    if name == "load":
        return importlib.import_module("ferjax.load")
    raise AttributeError(f"module 'ferjax' has no attribute {name!r}")
