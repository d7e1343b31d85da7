"""Checkpoints of models for images or sound, built small with their towers: trained on text, exported whole."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from architecture_measures import CPU
from architecture_runs import COMMON, RUNS, command
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_architectures import draw_weights, shrunk, tokenizer

from lowmem_rlhf.architecture.families.wrappers import KEY_MAPPING, WRAPPERS, is_wrapper, text_name
from lowmem_rlhf.architecture.families.wrappers import text_config as text_part
from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.packing import Group

EVERY = sorted({*WRAPPERS} - {"gemma3n"})  # its towers need timm
WHOLE = ["gemma3", "mistral3", "qwen3_5"]  # names of three kinds, AutoModelForCausalLM of three kinds
IDS = [[7, 33, 120, 8, 9, 61, 200, 31]]


def tiny_wrapper(name: str, folder: Path) -> torch.nn.Module:
    config = shrunk(transformers.CONFIG_MAPPING[name], {})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForMultimodalLM.from_config(config, dtype=torch.float32)
    draw_weights(model, torch.Generator().manual_seed(1))
    model.tie_weights()
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return transformers.AutoModelForMultimodalLM.from_pretrained(folder, dtype=torch.float32).eval()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("name", EVERY)
def test_the_text_tower_alone_computes_what_the_whole_model_does(name, tmp_path):
    whole = tiny_wrapper(name, tmp_path)
    base = SharedBase.load(str(tmp_path), CPU, "none", "float32", r=4, lora_alpha=8)
    with torch.no_grad(), base.role("reference"):
        want = whole(input_ids=torch.tensor(IDS)).logits[0]
        states = base.states(base.layout.lay_out([Group(IDS[0], [[5]], [0])], CPU))
        found = base.head.logits(states)[: len(want)]
    assert torch.allclose(found, want, rtol=0, atol=5e-6 * float(want.abs().max()) + 1e-5)
    assert base.packable
    assert sum(p.numel() for p in base.model.parameters()) < sum(p.numel() for p in whole.parameters())


@pytest.mark.parametrize("name", sorted(WRAPPERS))
def test_the_table_says_what_transformers_says(name):
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    config = transformers.CONFIG_MAPPING[name]()
    text = config.get_text_config()
    assert WRAPPERS[name].text == text.model_type and WRAPPERS[name].tied == config.tie_word_embeddings
    assert (CAUSAL.get(name) == CAUSAL[text.model_type]) is WRAPPERS[name].causal_lm
    assert is_wrapper(config.to_dict())
    for key, value in WRAPPERS[name].defaults.items():
        assert getattr(text, key) == value
    assert text_part({"model_type": name, "text_config": {}})["model_type"] == text.model_type


def run(tmp_path: Path, model: Path, name: str) -> Path:
    recipe, folder = tmp_path / f"{name}.yaml", tmp_path / name
    recipe.write_text(json.dumps({"name": "tiny", "model": str(model), **COMMON, **RUNS[name]}))
    code, out, error = command("train", recipe, "--output", folder)
    assert code == 0, error
    assert f"of {model} the text tower alone is loaded; a merge writes the whole model back" in out + error
    return folder


def exported(folder: Path, *options: str) -> tuple[Path, dict]:
    target = folder / "out" / "-".join(options).strip("-")
    code, out, error = command("export", folder, *options, "--output", target, "--json")
    assert code == 0, error
    return target, json.loads(out)


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_model_is_trained_and_leaves_as_one(name, tmp_path):
    model = tmp_path / "model"
    tiny_wrapper(name, model)
    run(tmp_path, model, "grpo")
    folder = run(tmp_path, model, "sft")
    merged, _ = exported(folder, "--format", "merged", "--dtype", "float32")
    before, after = tensors(model), tensors(merged)
    assert before.keys() == after.keys()
    towers = {key for key in before if text_name(key) is None}
    assert towers and all(torch.equal(before[key], after[key]) for key in towers)
    loaded, report = transformers.AutoModelForMultimodalLM.from_pretrained(
        merged, output_loading_info=True, dtype=torch.float32
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    alone, _ = exported(folder, "--format", "merged", "--dtype", "float32", "--for", "text")
    text = transformers.AutoModelForCausalLM.from_pretrained(alone, dtype=torch.float32)
    assert "Conditional" not in type(text).__name__ and not towers & tensors(alone).keys()

    wrapper, facts = exported(folder, "--format", "adapter", "--for", "wrapper")
    assert facts["proof"]["loads_on"] == type(loaded).__name__
    default, facts = exported(folder, "--format", "adapter")
    assert facts["for"] == ("text" if WRAPPERS[name].causal_lm else "wrapper")
    plain, _ = exported(folder, "--format", "adapter", "--for", "text")
    stock = transformers.AutoModelForMultimodalLM.from_pretrained(model, dtype=torch.float32)
    on_whole = PeftModel.from_pretrained(stock, wrapper)
    text_config = stock.config.get_text_config()
    text_config.tie_word_embeddings = stock.config.tie_word_embeddings
    only_text = transformers.AutoModelForCausalLM.from_pretrained(
        model, config=text_config, dtype=torch.float32, key_mapping=KEY_MAPPING
    )
    on_text = PeftModel.from_pretrained(only_text, plain)
    ids = torch.tensor(IDS)
    with torch.no_grad():
        want = loaded.eval()(input_ids=ids).logits
        for one in (text, on_whole, on_text):
            assert torch.allclose(one.eval()(input_ids=ids).logits, want, atol=1e-4)
        with on_whole.disable_adapter():
            assert not torch.allclose(on_whole(input_ids=ids).logits, want, atol=1e-3)
    with safe_open(default / "adapter_model.safetensors", "pt") as file:
        assert all(("language_model" in key) is (facts["for"] == "wrapper") for key in file.keys())  # noqa: SIM118

    code, _, error = command("train", tmp_path / "sft.yaml", f"adapter={wrapper}", "--output", tmp_path / "again")
    assert code == 0, error
