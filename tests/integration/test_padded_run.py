"""A whole run of a model that cannot be packed."""

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import save_tiny_model, tiny_recipe

from lowmem_rlhf.session import train

UNPACKABLE = {
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "bloom": {"n_head": 4, "n_layer": 2},
}


@pytest.mark.parametrize("model_type", UNPACKABLE)
def test_a_model_that_cannot_be_packed_trains_and_the_run_says_how(model_type, tmp_path, capsys):
    model = save_tiny_model(tmp_path / "model", 0, model_type, **UNPACKABLE[model_type])
    run = train(tiny_recipe(model), tmp_path / "run")
    printed = capsys.readouterr().out
    assert "cannot be packed" in printed
    assert "rows are padded" in printed
    assert "cannot be packed" in run.plan()["reasons"]["micro_batch_tokens"]
    metrics = run.metrics()
    assert len(metrics) == 3
    assert max(row["sampling/logp_difference"] for row in metrics) < 1e-4
    assert all(row["tokens/trained"] > 0 for row in metrics)
    weights = load_file(run.path / "adapter" / "adapter_model.safetensors")
    assert any(torch.any(w) for name, w in weights.items() if "lora_B" in name)
