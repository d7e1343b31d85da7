"""The numbers that a merge onto quantized weights adds to are the loaded base's, bit for bit."""

import pytest
import torch
from export_cases import CPU, make_run, save_model
from transformers import AutoModelForCausalLM

from lowmem_rlhf.engine.grouped_lora import dense_weight
from lowmem_rlhf.engine.load import DTYPES, load_base
from lowmem_rlhf.export.export import Export
from lowmem_rlhf.export.merging import dequantized
from lowmem_rlhf.export.merging.names import _kept_wide, skeleton, stored_names
from lowmem_rlhf.export.options import ExportOptions
from lowmem_rlhf.export.shards import SINGLE, read_shards


@pytest.mark.parametrize("piece", [2**10, 2**20])
@pytest.mark.parametrize("precision", [(q, dtype) for q in ("nf4", "int8") for dtype in ("bfloat16", "float16")])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_they_equal_the_loaded_model_s(family, precision, piece, tmp_path, monkeypatch):
    monkeypatch.setattr(dequantized, "PIECE", piece)
    quantization, compute_dtype = precision
    folder = save_model(family, tmp_path / "model")
    model, _ = load_base(str(folder), quantization, compute_dtype, CPU)
    modules = dict(model.named_modules())
    bones, tensors = skeleton(folder, quantization, compute_dtype), read_shards(folder)[SINGLE]
    names = {parameter: tensor for tensor, parameter in stored_names(bones.shapes, tensors).items()}
    assert len(bones.quantized) == {"llama": 14, "gpt2": 8}[family]
    for name, settings in bones.quantized.items():
        weight = tensors[names[name]].read()
        weight = weight.t().contiguous() if name in bones.transposed else weight
        got = dequantized.dense(weight, settings, DTYPES[compute_dtype], CPU)
        assert torch.equal(got, dense_weight(modules[name.removesuffix(".weight")], got.dtype))
        assert got.dtype == (torch.float32 if quantization == "int8" else DTYPES[compute_dtype])


def test_what_the_loader_leaves_alone_is_left_alone(tmp_path):
    bones = skeleton(save_model("llama", tmp_path / "model"), "nf4", "bfloat16")
    assert not {"lm_head.weight", "model.embed_tokens.weight"} & bones.quantized.keys()
    assert skeleton(tmp_path / "model", "none", "bfloat16").quantized == {}


@pytest.mark.parametrize(("family", "dtype"), [("llama", "bfloat16"), ("gpt_oss", "bfloat16"), ("gpt2", "float16")])
def test_a_merge_has_every_number_that_the_quantized_base_computes_with(family, dtype, tmp_path):
    own = {"head_dim": 16} if family == "gpt_oss" else {}
    folder = save_model(family, tmp_path / "model", **own)
    run = make_run(tmp_path / "run", folder, 0.0, "nf4", dtype)
    loaded, _ = load_base(str(folder), "nf4", dtype, CPU)
    target = Export(run, ExportOptions(dtype="float32")).make()["folder"]
    merged = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    plain = {name: p for name, p in loaded.named_parameters() if p.is_floating_point()}
    assert len(plain) > 5 and all(torch.equal(p.float(), merged.get_parameter(name)) for name, p in plain.items())


def test_what_a_class_keeps_in_fp32_is_known(tmp_path):
    class Model(torch.nn.Module):
        _keep_in_fp32_modules_strict = ("gate.weight",)
        _keep_in_fp32_modules = ("norm",)

        def __init__(self):
            super().__init__()
            self.gate, self.delegate, self.norm = (torch.nn.Linear(2, 2, bias=False) for _ in range(3))

    assert _kept_wide(Model(), torch.bfloat16) == {"gate.weight"}
    assert _kept_wide(Model(), torch.float16) == {"gate.weight", "norm.weight"}
