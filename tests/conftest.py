"""Four virtual CPU devices for every test; one data directory and cache for all workers."""

import os

# Before anything imports jax.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import logging
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest


def shared(tmp_path_factory: pytest.TempPathFactory, name: str) -> Path:
    """A directory of this session: xdist's workers have theirs beside each other in one."""
    base = tmp_path_factory.getbasetemp()
    directory = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    directory.mkdir(exist_ok=True)
    return directory


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where data sets are prepared, once for all tests; subprocesses find it too."""
    directory = shared(tmp_path_factory, "tfds")
    os.environ["TFDS_DATA_DIR"] = str(directory)
    return directory


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Programs that many subprocesses compile are compiled once, and as fast as can be."""
    os.environ.setdefault("MALLOC_PERTURB_", "0")  # see runtime.recycle_memory
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(shared(tmp_path_factory, "xla"))
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"


@pytest.fixture(scope="module")
def quick_compilation() -> Iterator[None]:
    """For modules where compiling takes most of the time and its optimisation changes no result."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


# Files that take longest come first, so that both workers end at about the same time.
LONGEST = (
    "tests/test_end_to_end.py",
    "tests/algorithms/test_methods.py",
    "tests/engine/test_parallel.py",
    "tests/test_distributed.py",
    "tests/engine/test_step.py",
    "tests/test_evaluate.py",
    "tests/test_sweep.py",
    "tests/algorithms/test_ladder_network.py",
    "tests/test_report.py",
    "tests/test_predict.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Orders the files as `LONGEST` says; the others stay as they are."""

    def place(item: pytest.Item) -> int:
        name = item.nodeid.partition("::")[0]
        return LONGEST.index(name) if name in LONGEST else len(LONGEST)

    items.sort(key=place)


@pytest.fixture
def caplog_ferjax(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> pytest.LogCaptureFixture:
    """What ferjax logs."""
    monkeypatch.setattr(logging.getLogger("ferjax"), "propagate", True)
    caplog.set_level(logging.INFO, "ferjax")
    return caplog
