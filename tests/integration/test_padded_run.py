"""A whole run of a model that cannot be packed."""

import sys

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import save_tiny_model, tiny_recipe

from lowmem_rlhf.display.lines import Lines
from lowmem_rlhf.display.run_display import ConsoleDisplay
from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.progress import shown_by
from lowmem_rlhf.session.train import train

UNPACKABLE = {
    "bloom": {"n_head": 4, "n_layer": 2},
}


@pytest.mark.parametrize("model_type", UNPACKABLE)
def test_a_model_that_cannot_be_packed_trains_and_the_run_says_how(model_type, tmp_path, capsys):
    model = save_tiny_model(tmp_path / "model", 0, model_type, **UNPACKABLE[model_type])
    with shown_by(Lines(sys.stderr)):
        run = train(tiny_recipe(model), tmp_path / "run", display=ConsoleDisplay())
    printed, said = capsys.readouterr()
    assert "cannot be packed" in printed
    assert "rows are padded" in printed
    assert "cannot be packed" in run.plan()["reasons"]["micro_batch_tokens"]
    found = run.plan()["check"]
    assert found["exact"] and found["way"] == "padded" and found["said"] in said
    assert found["decoded"]["largest"] < 1e-3
    metrics = run.metrics()
    assert len(metrics) == 3
    assert max(row["sampling/logp_difference"] for row in metrics) < 1e-4
    assert all(row["tokens/trained"] > 0 for row in metrics)
    weights = load_file(run.path / "adapter" / "adapter_model.safetensors")
    assert any(torch.any(w) for name, w in weights.items() if "lora_B" in name)


def test_a_tested_type_is_checked_on_request_only(tmp_path, capsys):
    model = save_tiny_model(tmp_path / "model")
    run = train(tiny_recipe(model), tmp_path / "run")
    assert "by this package's tests" in run.plan()["check"]["said"]
    asked = tiny_recipe(model, hardware={"device": "cpu", "compute_dtype": "float32", "check": "always"})
    with shown_by(Lines(sys.stderr)):
        run = train(asked, tmp_path / "asked")
    assert run.plan()["check"]["exact"] and run.plan()["check"]["said"] in capsys.readouterr().err


def test_a_model_that_computes_something_else_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    model = save_tiny_model(tmp_path / "model", 0, "bloom", **UNPACKABLE["bloom"])
    right = SharedBase.stock_states
    monkeypatch.setattr(SharedBase, "stock_states", lambda self, *given: right(self, *given).roll(1, -1))
    with pytest.raises(UserError, match="differ from stock transformers'"):
        train(tiny_recipe(model), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_texts_that_would_change_the_rotary_factors_of_others_are_refused(tmp_path):
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, **factors}
    model = save_tiny_model(tmp_path / "model", 0, "phi3", rope_parameters=rope, original_max_position_embeddings=4)
    with pytest.raises(
        UserError, match="other rotary factors for all texts of a pass once one has over 4 tokens; lower"
    ):
        train(tiny_recipe(model), tmp_path / "run")
    assert not (tmp_path / "run").exists()
