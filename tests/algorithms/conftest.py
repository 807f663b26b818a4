"""Compiles without optimisation."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def _quick(quick_compilation: None) -> None:
    pass
