"""The notebooks run as they are, on small settings; what is kept of their outputs names no folder of a machine."""

import re
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

sys.path.append(str(Path(__file__).parent / "integration"))
from tiny_runs import save_tiny_chat_model

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
SMALLER = [
    "training.prompts_per_step=4",
    "generation.num_generations=8",
    "generation.max_completion_length=12",
    "data.eval_size=2",
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_chat_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, smollm2, tiny, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    assert re.findall(r"^(\w+) = ", parameters.source, re.MULTILINE) == ["STEPS", "SMALLER"]
    more: dict[str, list[str]] = {
        "quickstart": [],  # with the real model
        "your_reward_and_data": [f"model={tiny}", "data.max_prompt_length=128"],
        "export_and_chat": [f"model={tiny}", "rewards=[{function: length, options: {target: 9}}]"],
    }
    parameters.source = f"STEPS = 1\nSMALLER = {[*SMALLER, *more[path.stem]]!r}"
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    assert list((tmp_path / "runs").iterdir())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_keeps_its_outputs_and_no_folder(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert sum(bool(cell.outputs) for cell in code) >= len(code) // 2
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    text = path.read_text(encoding="utf-8")
    assert not re.findall(r"(?:/home/|/root/|/tmp/|/Users/|/work/|[A-Z]:\\\\\\\\)[^\"]*", text)
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)
