"""Checkpoints in FP8 and MXFP4, built small: what is loaded are the numbers that their codes stand for."""

import json

import pytest
import torch
from architecture_measures import CPU
from architecture_runs import COMMON, RUNS, command
from safetensors.torch import load_file, save_file
from tiny_architectures import save_tiny

from lowmem_rlhf.engine.load import load_base
from lowmem_rlhf.errors import UserError

FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]  # OCP MX v1.0, E2M1


def rewrite(folder, tensors, method, **settings):
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, **settings}
    (folder / "config.json").write_text(json.dumps(config))


def in_fp8(folder, block=None):
    """Turn a folder's linear weights into float8, with one scale each or one a block; return their numbers."""
    tensors, numbers = {}, {}
    for name, value in load_file(folder / "model.safetensors").items():
        if "_proj.weight" not in name:
            tensors[name] = value
            continue
        value = value.float()
        if block is None:
            scale = value.abs().amax() / 448
            wide = scale
        else:
            parts = value.unflatten(0, (-1, block)).unflatten(2, (-1, block))  # (rows, block, columns, block)
            scale = parts.abs().amax((1, 3)) / 448
            wide = scale.repeat_interleave(block, 0).repeat_interleave(block, 1)
        codes = (value / wide).to(torch.float8_e4m3fn)
        tensors |= {name: codes, f"{name}_scale_inv": scale, name.replace("weight", "activation_scale"): scale.max()}
        numbers[name] = (codes.float() * wide).to(torch.bfloat16)
    rewrite(folder, tensors, "fp8", weight_block_size=None if block is None else [block, block])
    return numbers


@pytest.mark.parametrize("block", [None, 16])
def test_fp8_is_loaded_as_its_numbers(block, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("LOWMEM_RLHF_CACHE", str(tmp_path / "cache"))
    folder = save_tiny("ministral3", tmp_path / "model")
    numbers = in_fp8(folder, block)
    model, _ = load_base(str(folder), "none", "bfloat16", CPU)
    loaded = model.state_dict()
    assert numbers and all(torch.equal(loaded[name], value) for name, value in numbers.items())
    assert "is published in FP8: its 16-bit weights are made once" in caplog.text
    made = next((tmp_path / "cache" / "dequantized").iterdir())
    stamp = (made / "model.safetensors").stat().st_mtime_ns
    load_base(str(folder), "nf4", "bfloat16", CPU)
    assert (made / "model.safetensors").stat().st_mtime_ns == stamp


def test_mxfp4_is_loaded_as_its_numbers(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWMEM_RLHF_CACHE", str(tmp_path / "cache"))
    folder = save_tiny("gpt_oss", tmp_path / "model", hidden_size=64, intermediate_size=32)
    generator = torch.Generator().manual_seed(0)
    tensors, numbers = {}, {}
    for name, value in load_file(folder / "model.safetensors").items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[name] = value
            continue
        experts, inputs, outputs = value.shape
        codes = torch.randint(16, (experts, outputs, inputs // 32, 32), generator=generator)
        powers = torch.randint(120, 127, (experts, outputs, inputs // 32), generator=generator)
        tensors[f"{name}_blocks"] = (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)
        tensors[f"{name}_scales"] = powers.to(torch.uint8)
        wide = torch.tensor(FP4)[codes] * torch.exp2(powers.float() - 127)[..., None]
        numbers[name] = wide.flatten(2).transpose(1, 2).to(torch.bfloat16)
    rewrite(folder, tensors, "mxfp4")
    model, _ = load_base(str(folder), "none", "bfloat16", CPU)
    loaded = model.state_dict()
    assert len(numbers) == 2 * model.config.num_hidden_layers
    assert all(torch.equal(loaded[name], value) for name, value in numbers.items())


def test_a_run_on_fp8_leaves_in_16_bits(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWMEM_RLHF_CACHE", str(tmp_path / "cache"))
    in_fp8(save_tiny("ministral3", tmp_path / "model"))
    save_file({"other": torch.zeros(3)}, tmp_path / "model" / "consolidated.safetensors")  # Mistral's own form of them
    recipe = tmp_path / "sft.yaml"
    recipe.write_text(json.dumps({"name": "tiny", "model": str(tmp_path / "model"), **COMMON, **RUNS["sft"]}))
    code, _, error = command("train", recipe, "--output", tmp_path / "run")
    assert code == 0, error
    for options, message in (
        (("--for", "text"), "is no model for images or sound, so its files have one class's names only; leave it out"),
        (("--for", "wrapers"), "--for: got 'wrapers'; give wrapper, text; did you mean 'wrapper'?"),
        (("--for", "text", "--format", "gguf"), "--for has no meaning with --format gguf; leave it out"),
    ):
        code, _, error = command("export", tmp_path / "run", *options)
        assert code == 2 and message in " ".join(error.split())
    code, out, error = command("export", tmp_path / "run", "--dtype", "float32", "--json")
    assert code == 0, error
    assert json.loads(out)["proof"]["mean_kl"] < 1e-5
    written = json.loads((tmp_path / "run" / "export" / "merged" / "config.json").read_text())
    assert "quantization_config" not in written


def test_a_checkpoint_that_lacks_a_scale_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWMEM_RLHF_CACHE", str(tmp_path / "cache"))
    folder = save_tiny("ministral3", tmp_path / "model")
    in_fp8(folder)
    tensors = load_file(folder / "model.safetensors")
    gone = next(name for name in tensors if name.endswith("_scale_inv"))
    del tensors[gone]
    rewrite(folder, tensors, "fp8", weight_block_size=None)
    with pytest.raises(UserError, match=f"lacks {gone}"):
        load_base(str(folder), "none", "bfloat16", CPU)
    assert not list((tmp_path / "cache" / "dequantized").iterdir())
