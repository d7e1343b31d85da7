"""One thread, and the fixtures of whole runs."""

from collections.abc import Iterator

import pytest
import torch
from card_fixtures import card_device, on_the_card, tiny_model  # noqa: F401


@pytest.fixture(autouse=True)
def one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tiny tensors gain nothing from threads, which on a busy machine wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if request.node.get_closest_marker("slow") else 1)
    yield
    torch.set_num_threads(before)
