"""Fixtures of whole runs: one tiny model, and the card that device tests run on. Not a test module."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_runs import save_tiny_model

HERE = Path(__file__).resolve().parent
VCARD = HERE.parents[1] / "shared" / "vcard"


def own_cards() -> list[str]:
    """Return the device of this machine's own card, of whatever kind torch knows; empty where it has none."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return [f"{accelerator.type}:0"] if accelerator else []


CARDS = ["vcard:0", *own_cards()]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a random two-layer Llama with its tokenizer."""
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session", params=CARDS)
def card_device(request: pytest.FixtureRequest) -> str:
    """Return the device that card tests run on: the virtual card, and the machine's own where it has one."""
    return str(request.param)


@pytest.fixture(scope="session")
def on_the_card(card_device: str) -> Callable[..., None]:
    """Return what runs a script of the tests, told of the card by its first argument (`cards.card_of`), and waits."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    if card_device == "vcard:0":
        if not (VCARD / "vcard.py").is_file():
            pytest.skip(f"the virtual card is not here ({VCARD})")
        for tool in ("gcc", "ninja"):
            if not shutil.which(tool, path=path):
                pytest.skip(f"the virtual card is compiled with {tool}, which is not here")
    card = str(VCARD) if card_device == "vcard:0" else card_device.partition(":")[0]

    def run(script: str, *arguments: str, made: Path) -> None:
        done = subprocess.run(
            [sys.executable, str(HERE / script), card, *arguments],
            env={**os.environ, "PATH": path, "TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            cwd=HERE.parent,
            capture_output=True,
            text=True,
        )
        assert made.is_file(), done.stderr[-3000:]

    return run
