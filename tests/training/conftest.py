import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))  # the counter of live bytes


@pytest.fixture(autouse=True)
def every_base_stays_as_it_is(monkeypatch):
    """Hold the base at the end of every run here against that at its beginning."""
    from lowmem_rlhf.training.loop import Loop

    monkeypatch.setattr(Loop, "base_is_always_checked", True)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """Return the folder of a tiny random Llama with a tokenizer of single characters."""
    from training_cases import save_model

    return save_model(tmp_path_factory.mktemp("model") / "tiny")
