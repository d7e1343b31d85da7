"""The tiny runs of the integration tests, for the Python API."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "integration"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """Return the folder of a random two-layer model."""
    from tiny_runs import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def recipe(tiny_model, tmp_path, monkeypatch) -> dict:
    """Return the keys of a recipe of three steps, to be run in a folder of its own."""
    from tiny_runs import tiny_values

    monkeypatch.chdir(tmp_path)
    return tiny_values(tiny_model)


@pytest.fixture(scope="session")
def rows() -> list[dict]:
    """Return rows of the columns that recipes have by default."""
    return [{"question": f"{a}+{b}", "answer": str(a + b)} for a in range(6) for b in range(4)]
