"""Merges from file to file, held against peft's merge in fp32 and against the base's own files."""

import json
import shutil

import pytest
import torch
from export_cases import CPU, change_tensors, save_model, shard, size_adapter
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lowmem_rlhf.architecture.adapters import saved_adapter
from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.export.merging import merge as merge_module
from lowmem_rlhf.export.merging.lora_file import LoraFile
from lowmem_rlhf.export.merging.merge import Merge
from lowmem_rlhf.export.merging.names import skeleton
from lowmem_rlhf.export.shards import INDEX, Stored, read_shards
from lowmem_rlhf.export.source import copy_side_files, write_config

# biases, fused layers (qkv_proj, gate_up_proj, c_attn), Conv1D, norms by head, a tied head
FAMILIES = ["llama", "llama-tied-biased", "qwen2", "qwen3", "gemma", "phi3", "gpt2", "gpt_neox"]
IDS = torch.tensor([[2, 5, 9, 11, 4, 7, 30, 8]])


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory):
    """Return a model folder and an adapter folder of a family."""
    folder = tmp_path_factory.mktemp(request.param)
    return save_model(request.param, folder / "model"), save_adapter(folder / "model", folder / "adapter")


def save_adapter(model, folder, **changes):
    base = SharedBase.load(str(model), CPU, "none", "float32", r=4, lora_alpha=8, **changes)
    size_adapter(base, 0.3)
    base.save_adapter(folder)
    return folder


def merge_of(model, adapter, bones=None) -> Merge:
    lora = LoraFile(saved_adapter(str(adapter), str(model)))
    return Merge(read_shards(model), bones or skeleton(model, "none", "float32"), lora, "float32", CPU)


def merged_folder(model, adapter, target, dtype="float32"):
    target.mkdir()
    kept = merge_of(model, adapter).write(target, dtype)
    write_config(model, target, dtype)
    copy_side_files(model, target)
    return kept


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def test_it_equals_peft_s_merge_and_rounds_once(case, tmp_path, monkeypatch):
    monkeypatch.setattr(merge_module, "PIECE", 500)  # several pieces, of uneven length
    model, adapter = case
    kept = merged_folder(model, adapter, tmp_path / "merged")
    stock = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    before = logits(stock)
    want = PeftModel.from_pretrained(stock, str(adapter)).merge_and_unload()
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert got.dtype == torch.float32
    assert torch.allclose(logits(got), logits(want), atol=2e-4, rtol=1e-4)
    assert (logits(got) - before).abs().max() > 0.05  # and something was merged
    assert kept.share == pytest.approx(1.0, abs=1e-5)
    assert kept.relative_change == pytest.approx(0.3, rel=1e-3)
    half = tmp_path / "half"
    merged_folder(model, adapter, half, "float16")
    whole, rounded = load_file(tmp_path / "merged" / "model.safetensors"), load_file(half / "model.safetensors")
    assert all(torch.equal(rounded[name], tensor.half()) for name, tensor in whole.items())


def test_what_the_adapter_leaves_alone_is_the_base_s(case, tmp_path):
    model, adapter = case
    merged_folder(model, adapter, tmp_path / "merged")
    changed = set(merge_of(model, adapter).changed)
    before, after = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "merged"))
    assert before.keys() == after.keys() and changed
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor) != (name in changed)


def test_no_more_than_some_rows_are_read_at_once(tmp_path, monkeypatch):
    model = save_model("llama", tmp_path / "model")
    adapter = save_adapter(model, tmp_path / "adapter")
    monkeypatch.setattr(merge_module, "PIECE", 256)
    sizes, read = [], Stored.read

    def spy(stored, rows=None):
        tensor = read(stored, rows)
        if stored.file.parent == model:
            sizes.append(tensor.numel())
        return tensor

    monkeypatch.setattr(Stored, "read", spy)
    merged_folder(model, adapter, tmp_path / "merged", "float16")
    assert max(sizes) == 256 and sum(sizes) == sum(t.numel() for t in load_file(model / "model.safetensors").values())


def test_a_tied_head_stays_tied(tmp_path):
    model = save_model("llama-tied-biased", tmp_path / "model")
    merged_folder(model, save_adapter(model, tmp_path / "adapter"), tmp_path / "merged", "float16")
    assert "lm_head.weight" not in load_file(tmp_path / "merged" / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


def test_shards_become_shards_with_an_index(tmp_path):
    whole = save_model("llama", tmp_path / "whole")
    model = shard(whole, tmp_path / "model")
    adapter = save_adapter(model, tmp_path / "adapter")
    merged_folder(model, adapter, tmp_path / "merged", "float16")
    merged_folder(whole, adapter_named(adapter, whole, tmp_path), tmp_path / "one", "float16")
    index = json.loads((tmp_path / "merged" / INDEX).read_text())
    assert index["weight_map"] == json.loads((model / INDEX).read_text())["weight_map"]
    files = sorted((tmp_path / "merged").glob("*.safetensors"))
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert len(files) == 3 and index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    want = load_file(tmp_path / "one" / "model.safetensors")
    assert all(torch.equal(tensors[name], tensor) for name, tensor in want.items())
    assert torch.isfinite(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32))).all()


def adapter_named(adapter, model, tmp_path):
    """Return a copy of an adapter that names another folder of the same base."""
    shutil.copytree(adapter, tmp_path / "renamed")
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(model)
    (tmp_path / "renamed" / "adapter_config.json").write_text(json.dumps(config))
    return tmp_path / "renamed"


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_files_without_the_models_prefix_are_understood(family, tmp_path):
    model = save_model(family, tmp_path / "model")
    adapter = save_adapter(model, tmp_path / "adapter")
    merged_folder(model, adapter, tmp_path / "want")
    prefix = {"gpt2": "transformer.", "llama": "model."}[family]
    change_tensors(model, lambda tensors: {name.removeprefix(prefix): t for name, t in tensors.items()})
    merged_folder(model, adapter, tmp_path / "got")
    want, got = (load_file(tmp_path / name / "model.safetensors") for name in ("want", "got"))
    assert all(torch.equal(got[name.removeprefix(prefix)], tensor) for name, tensor in want.items())


def test_renamed_tensors_and_another_revision_are_one_sentence(tmp_path):
    model = save_model("llama", tmp_path / "model")
    adapter = save_adapter(model, tmp_path / "adapter")
    kept = load_file(model / "model.safetensors")
    change_tensors(model, lambda tensors: {name.replace("q_proj", "query"): t for name, t in tensors.items()})
    with pytest.raises(UserError, match=r"no tensor for model.layers.0.self_attn.q_proj.weight \(2 of 14 are missing"):
        merge_of(model, adapter)
    change_tensors(model, lambda _: kept | {"model.layers.1.mlp.up_proj.weight": torch.zeros(96, 64)})
    with pytest.raises(UserError, match=r"up_proj.weight of shape \(96, 64\).*different revisions"):
        merge_of(model, adapter)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    wide = {n: torch.zeros(64, 96) if "down_proj" in n else torch.zeros(96, 64) for n in kept if ".mlp." in n}
    change_tensors(model, lambda _: kept | wide)
    with pytest.raises(UserError, match=r"not the base \(or its revision\) that the run was trained on"):
        merge_of(model, adapter)


def test_tensors_that_the_model_does_not_know_are_copied_as_they_are(tmp_path):
    model = save_model("gpt2", tmp_path / "model")
    adapter = save_adapter(model, tmp_path / "adapter")
    more = {"h.0.attn.masked_bias": torch.tensor(-1e9), "h.0.attn.bias": torch.ones(3, 3, dtype=torch.bool).tril()}
    change_tensors(model, lambda tensors: tensors | more)
    merged_folder(model, adapter, tmp_path / "merged", "float16")
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in more.items())


def test_config_says_the_dtype_and_no_quantization(tmp_path):
    model = save_model("llama", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    more = {"torch_dtype": "bfloat16", "quantization_config": {"a": 1}}
    (model / "config.json").write_text(json.dumps(config | more))
    write_config(model, tmp_path, "float16")
    got = json.loads((tmp_path / "config.json").read_text())
    assert (got["dtype"], got["torch_dtype"]) == ("float16", "float16") and "quantization_config" not in got


def test_tokenizer_and_chat_template_go_along_and_weights_do_not(tmp_path):
    model = save_model("llama", tmp_path / "model")
    for name in ("chat_template.jinja", "generation_config.json", "modeling_x.py", "README.md", "old.bin", "x.gguf"):
        (model / name).write_text("x")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tools.jinja").write_text("t")
    (tmp_path / "to").mkdir()
    copy_side_files(model, tmp_path / "to")
    found = {path.relative_to(tmp_path / "to").as_posix() for path in (tmp_path / "to").rglob("*") if path.is_file()}
    expected = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    assert found == expected | {"modeling_x.py", "additional_chat_templates/tools.jinja"}
