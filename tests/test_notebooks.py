"""The notebooks run as they are, on small settings; what is kept of their outputs names no folder of a machine."""

import os
import re
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

sys.path.append(str(Path(__file__).parent / "integration"))
from tiny_runs import save_tiny_chat_model, write_jsonl

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
CARD = "t4"  # for a card that nobody here has: it keeps no outputs
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
def test_a_notebook_runs(path, smollm2, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = nbformat.read(path, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if "install" not in cell.metadata.get("tags", ())]
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    names = re.findall(r"^(\w+) = ", parameters.source, re.MULTILINE)
    assert names == ["STEPS", "SMALLER", *(["BENCH"] if path.stem == CARD else [])]
    rows = [{"question": f"{a} + 2 = ?", "answer": f"#### {a + 2}"} for a in range(8)]
    write_jsonl(tmp_path / "sums.jsonl", rows)
    more: dict[str, list[str]] = {
        "quickstart": [],  # with the real model
        "your_reward_and_data": [f"model={tiny}", "data.max_prompt_length=128"],
        "export_and_chat": [f"model={tiny}", "rewards=[{function: length, options: {target: 9}}]"],
        "t4": [
            *(f"model={tiny}", "data.train=sums.jsonl", "data.config=null", "data.system=null"),
            *("data.max_prompt_length=64", "rewards=[{function: length, options: {target: 9}}]"),
        ],
    }
    parameters.source = f"STEPS = 1\nSMALLER = {[*SMALLER, *more[path.stem]]!r}"
    parameters.source += f"\nBENCH = '--minutes 2 --only graphs --model {tiny}'"
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    assert list((tmp_path / "runs").iterdir())


def test_the_notebook_for_a_card_says_that_it_was_not_run():
    (path,) = [path for path in NOTEBOOKS if path.stem == CARD]
    notebook = nbformat.read(path, as_version=4)
    assert "never been run on a T4" in notebook.cells[0].source
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)


@pytest.mark.parametrize("path", [path for path in NOTEBOOKS if path.stem != CARD], ids=lambda path: path.stem)
def test_a_notebook_keeps_its_outputs_and_no_folder(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert sum(bool(cell.outputs) for cell in code) >= len(code) // 2
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    text = path.read_text(encoding="utf-8")
    assert not re.findall(r"(?:/home/|/root/|/tmp/|/Users/|/work/|[A-Z]:\\\\\\\\)[^\"]*", text)
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)
