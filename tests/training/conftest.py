import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))  # the counter of live bytes


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """Return the folder of a tiny random Llama with a tokenizer of single characters."""
    from training_cases import save_model

    return save_model(tmp_path_factory.mktemp("model") / "tiny")
