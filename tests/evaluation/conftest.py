"""Tiny runs to evaluate: the makers stand in tests/integration."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "integration"))


@pytest.fixture(scope="session")
def eval_model(tmp_path_factory) -> Path:
    """Return the folder of a random two-layer Llama with its tokenizer."""
    from tiny_runs import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("eval-model"))


@pytest.fixture(scope="module")
def no_report() -> Iterator[None]:
    """Runs without report.html, which is not what is tested here."""
    from lowmem_rlhf.report import html

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(html, "write_report", lambda run: None)
        yield
