"""The numbers that a merge onto quantized weights adds to are the loaded base's, bit for bit."""

import pytest
import torch
from export_cases import CPU, save_model

from lowmem_rlhf.export import dequantized
from lowmem_rlhf.export.names import skeleton, stored_names
from lowmem_rlhf.export.shards import SINGLE, read_shards
from lowmem_rlhf.model.load import DTYPES, load_base
from lowmem_rlhf.model.siblings import dense_weight


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
