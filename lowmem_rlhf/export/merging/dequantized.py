"""The numbers that a quantized base computes with, recomputed from its 16-bit weights one tensor at a time.

A tensor is quantized as the loader does it (bitsandbytes, with the same settings, dtype and device) and dequantized as
the forward pass does it, so the result is the live model's, bit for bit. It is done in pieces, since quantizing a whole
tensor takes bitsandbytes ten times its size on a CPU. Blocks of NF4 and rows of int8 are independent of each other;
only the double quantization of the blocks' scales depends on all of them.
"""

from collections.abc import Iterator
from typing import Any

import torch

PIECE = 2**20  # elements that are quantized at once


@torch.no_grad()
def dense(weight: torch.Tensor, settings: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return what the loaded layer's codes stand for, (out, in) on the CPU.

    Args:
        weight: (out, in), as stored.
        settings: bitsandbytes' parameter of the layer, without data: how it is quantized.
        dtype: the base's compute dtype, to which the loader casts the weights first.
        device: where the base was quantized.

    Returns:
        NF4: in the compute dtype, as it is multiplied. int8: the codes times their row's scale, fp32.
    """
    from bitsandbytes.nn import Params4bit

    return (_nf4 if isinstance(settings, Params4bit) else _int8)(weight, settings, dtype, device)


def _nf4(weight: torch.Tensor, settings: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit, dequantize_blockwise, quantize_4bit, quantize_blockwise

    flat = weight.reshape(-1)
    pieces = list(_pieces(flat.numel(), PIECE))  # PIECE is a multiple of every block size, and of two codes a byte
    how = {"blocksize": settings.blocksize, "quant_type": settings.quant_type, "quant_storage": torch.uint8}
    quantized = [quantize_4bit(flat[piece].to(dtype).to(device), compress_statistics=False, **how) for piece in pieces]
    scales = torch.cat([state.absmax for _, state in quantized])
    if settings.compress_statistics:  # as in quantize_4bit and dequantize_4bit
        offset = scales.mean()
        codes, state2 = quantize_blockwise(scales - offset, blocksize=256)
        scales = (dequantize_blockwise(codes, state2) + offset).float()
    result = torch.empty(flat.numel(), dtype=dtype, device="cpu")
    start = 0
    for piece, (codes, state) in zip(pieces, quantized, strict=True):
        state.absmax = scales[start : start + state.absmax.numel()]
        start += state.absmax.numel()
        result[piece] = dequantize_4bit(codes, state).reshape(-1).cpu()
    return result.view(weight.shape)


def _int8(weight: torch.Tensor, settings: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    from bitsandbytes.nn import Int8Params

    result = torch.empty(weight.shape, dtype=torch.float32, device="cpu")
    for rows in _pieces(weight.shape[0], max(1, PIECE // weight.shape[1])):
        quantized = Int8Params(weight[rows].to(dtype), requires_grad=False).to(device)  # type: ignore[misc]
        assert quantized.CB is not None and quantized.SCB is not None
        result[rows] = (quantized.CB.float() * quantized.SCB.view(-1, 1).mul(1 / 127)).cpu()
    return result


def _pieces(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))
