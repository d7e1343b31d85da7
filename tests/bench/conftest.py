"""A tiny model and little work for the parts of ``bench``, and ways to start them."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parents[1] / "integration"))
from card_fixtures import card_device, on_the_card  # noqa: F401

from lowmem_rlhf.bench.work import Sizes, Work
from lowmem_rlhf.hardware.cpu_device import cpu_device

TINY = Sizes("none", 2, 2, 6, 1, 512, 16, True, (1, 3), 5, 2, 24, 8)


@pytest.fixture(scope="session")
def sizes() -> Sizes:
    """Return work of which every part takes a second or two."""
    return TINY


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """Return the folder of a random two-layer model with a chat template."""
    from tiny_runs import save_tiny_chat_model

    return save_tiny_chat_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def work(sizes, model) -> Work:
    """Return the work of a part on the CPU."""
    return Work.on(cpu_device(), sizes, str(model))
