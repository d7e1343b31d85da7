"""One tiny model for all whole runs."""

import os
from pathlib import Path

import pytest
from tiny_runs import save_tiny_model

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a random two-layer Llama with its tokenizer."""
    return save_tiny_model(tmp_path_factory.mktemp("model"))
