"""Tokenizers by name, and whole commands on tiny models that are made once."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from case_models import save_model, tokenizer_named, with_template

# A reward that always differs, so that something is learned.
JUDGE = "def by_turns(completions, **columns):\n    return [float(place % 2) for place, _ in enumerate(completions)]\n"


@pytest.fixture(scope="session")
def tokenizer():
    """Return what gives a tokenizer by its name in `case_models`, or by a template of its own."""
    return lambda name: with_template(name) if "{" in name else tokenizer_named(name)


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """Return what gives the folder of a tiny model by its name in `case_models`."""
    folder = tmp_path_factory.mktemp("case_models")

    def path(name):
        return folder / name if (folder / name).is_dir() else save_model(name, folder / name)

    return path


@pytest.fixture
def command(model, tmp_path, monkeypatch, lowmem_rlhf):
    """Return what writes a recipe and its rows into an empty folder and runs a command of the program on them."""
    monkeypatch.chdir(tmp_path)

    def run(verb, name, rows, *options, algorithm="sft", **sections):
        values = {
            "name": "case",
            "algorithm": algorithm,
            "model": str(model(name)),
            "hardware": {"device": "cpu", "quantization": "none", "compute_dtype": "float32"},
            "lora": {"r": 2},
            "training": {"max_steps": 1, "prompts_per_step": 2},
            **sections,
            "data": {"train": "rows.jsonl", "eval_size": 0, **sections.get("data", {})},
        }
        if algorithm == "grpo":
            values["generation"] = {"num_generations": 2, "max_completion_length": 4}
            values.setdefault("rewards", ["judge.py:by_turns"])
            Path("judge.py").write_text(JUDGE, encoding="utf-8")
        Path("recipe.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
        Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        done = lowmem_rlhf(verb, "recipe.yaml", *options, *(["--output", "run"] if verb == "train" else []))
        assert "Traceback" not in done.out + done.err
        return SimpleNamespace(code=done.code, out=done.out, err=done.err, run=tmp_path / "run")

    return run


@pytest.fixture
def said(caplog):
    """Return what gives the lines that the package has logged so far, of any level."""
    caplog.set_level("INFO", logger="lowmem_rlhf")
    return lambda: [one.getMessage() for one in caplog.records if one.name.startswith("lowmem_rlhf")]
