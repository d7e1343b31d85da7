"""Q4_K, Q5_K and Q6_K: what the gguf library unpacks of ours is as near as ggml's own; llama.cpp's mixture of types."""

import ctypes

import pytest
import torch
from gguf import GGMLQuantizationType, dequantize
from gguf_cases import NODE

from lowmem_rlhf.export.gguf.kquants import quantize_q4_k, quantize_q5_k, quantize_q6_k
from lowmem_rlhf.export.gguf.tensors import choose_type

Q4_K, Q5_K, Q6_K = GGMLQuantizationType.Q4_K, GGMLQuantizationType.Q5_K, GGMLQuantizationType.Q6_K
CASES = {Q4_K: (quantize_q4_k, 144), Q5_K: (quantize_q5_k, 176), Q6_K: (quantize_q6_k, 210)}


@pytest.fixture(scope="module")
def weights():
    """Return rows like a model's, with outliers, and blocks that are all zero, constant or tiny."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(96, 512, generator=generator) * 0.02
    x[torch.rand(x.shape, generator=generator) < 0.001] *= 20
    x[3, :256], x[4, :32], x[5, :64], x[7, :16] = 0, -1.0, 0.5, 0
    x[6] *= 1e-6
    return x


def unpacked(blocks, kind):
    return torch.from_numpy(dequantize(blocks.numpy(), kind))


@pytest.mark.parametrize(("kind", "most"), [(Q4_K, 0.12), (Q5_K, 0.08), (Q6_K, 0.05)])
def test_the_error_is_small_in_every_super_block(kind, most, weights):
    quantize, size = CASES[kind]
    blocks = quantize(weights)
    assert blocks.dtype == torch.uint8 and blocks.shape == (96, 2 * size)
    error = (unpacked(blocks, kind) - weights).view(-1, 256).norm(dim=1)
    norm = weights.view(-1, 256).norm(dim=1)
    assert (error[norm > 1e-3] < most * norm[norm > 1e-3]).all()
    assert (unpacked(blocks, kind)[3, :256] == 0).all()
    assert torch.isfinite(unpacked(blocks, kind)).all()


def test_pieces_change_nothing(weights):
    many = weights.repeat(8, 1)  # more than one piece
    for quantize, _ in CASES.values():
        assert torch.equal(quantize(many), quantize(weights).repeat(8, 1))


@pytest.mark.parametrize("kind", CASES)
def test_the_blocks_are_ggmls(kind, weights):
    found = sorted(NODE.glob("node_modules/@node-llama-cpp/linux-x64/bins/*/libggml-base.so"))
    if not found:
        pytest.skip(f"no libggml-base.so below {NODE} (or $NODE_LLAMA_CPP): see gguf_cases.llama_cpp")
    library = ctypes.CDLL(str(found[0]))
    numbers = [ctypes.c_int64] * 3
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *numbers, ctypes.c_void_p]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    quantize, size = CASES[kind]
    theirs = torch.empty((96, 2 * size), dtype=torch.uint8)
    library.ggml_quantize_chunk(int(kind), weights.data_ptr(), theirs.data_ptr(), 0, 96, 512, None)
    ours = quantize(weights)
    assert float((ours == theirs).float().mean()) > 0.975  # where a scale is 0 codes are free, and sums tip
    error, other = (float((unpacked(one, kind) - weights).norm()) for one in (ours, theirs))
    assert error < 1.01 * other


def test_the_mixture_is_llama_cpps():
    def kind(name, columns=512, tied=False):
        return choose_type(name, (8, columns), "q4_k_m", 16, tied).name

    assert [kind(f"blk.{layer}.ffn_down.weight") for layer in range(16)] == [
        *["Q6_K"] * 2, *["Q4_K", "Q4_K", "Q6_K"] * 4, *["Q6_K"] * 2,
    ]  # fmt: skip
    assert kind("blk.3.attn_v.weight") == "Q4_K" and kind("blk.4.attn_v.weight") == "Q6_K"
    assert kind("blk.0.attn_q.weight") == kind("blk.0.ffn_up.weight") == kind("token_embd.weight") == "Q4_K"
    assert kind("output.weight") == kind("token_embd.weight", tied=True) == "Q6_K"
    assert kind("token_embd.weight", 576, tied=True) == kind("blk.0.ffn_down.weight", 576) == "Q8_0"
    assert kind("blk.0.attn_q.weight", 576) == "Q5_0" and kind("blk.0.attn_q.weight", 40) == "F16"
    assert choose_type("blk.0.attn_norm.weight", (8,), "q4_k_m", 16, False).name == "F32"
    five = [choose_type(f"blk.{layer}.ffn_down.weight", (8, 512), "q5_k_m", 16, False).name for layer in range(16)]
    assert five == [*["Q6_K"] * 2, *["Q5_K", "Q5_K", "Q6_K"] * 4, *["Q6_K"] * 2]
    assert choose_type("blk.0.attn_q.weight", (8, 576), "q5_k_m", 16, False).name == "Q5_1"
    assert choose_type("blk.0.attn_q.weight", (8, 512), "q6_k", 16, False).name == "Q6_K"
    assert choose_type("blk.0.attn_q.weight", (8, 576), "q6_k", 16, False).name == "Q8_0"
    assert choose_type("blk.0.attn_q.weight", (8, 40), "q8_0", 16, False).name == "F16"
