"""How layers with one input multiply while decoding: few rows, the same weights for every token, no gradient."""

from collections.abc import Callable, Sequence
from ctypes import c_int64, c_void_p
from typing import Any

import torch
import torch.nn.functional as F

from lowmem_rlhf.engine.decode.native import PARTS, NativeProduct, block_scales, library
from lowmem_rlhf.engine.grouped_lora import GroupedLoraLinear, Product, dense_weight
from lowmem_rlhf.engine.trial import within_rounding
from lowmem_rlhf.hardware.capabilities import capabilities
from lowmem_rlhf.planning.limits import FOUR_BIT_ROWS, KERNEL_ROWS

KERNEL = "gemv_4bit_inference_cpu_nf4_bf16"  # in bitsandbytes' library
BLOCK = 64  # weights that share a scale
SUM_ERROR = 16 * torch.finfo(torch.float32).eps
SCALE_ROUNDINGS = 3.0  # at most, of the root of the summed squares of what is added up
ANY_ROWS = 1 << 62


_RIGHT: dict[Any, bool] = {}  # by kind of product and shapes: whether it multiplies right


def set_decode_weights(group: GroupedLoraLinear, dtype: torch.dtype, dequantize: bool, join: bool = True) -> None:
    """Give a group of NF4 layers a faster product for decoding, where there is one.

    Args:
        dequantize: keep a 16-bit copy of the weights, the same numbers. Otherwise the 4-bit weights are multiplied
            directly; bitsandbytes' kernel for CPUs needs a copy of them in an order of its own.
        join: multiply weights at once that lie in one tensor (`join_codes`), for which scales are made.
    """
    bases: list[Any] = [layer.base_layer for layer in group.layers]
    if not all(getattr(getattr(base, "weight", None), "quant_state", None) is not None for base in bases):
        return
    if dequantize:
        group.set_decode_product(_dense_product(bases, dtype), ANY_ROWS, dtype)
    elif not capabilities(bases[0].weight.device).on_cpu:
        group.joined = (group.joined or _joined_product(bases, dtype)) if join else None
        group.set_decode_product(group.joined, KERNEL_ROWS if group.joined else 0, dtype)
    elif (product := _four_bit_product(bases, dtype)) is not None and _is_right(product, bases, dtype):
        group.set_decode_product(product, FOUR_BIT_ROWS if isinstance(product, NativeProduct) else KERNEL_ROWS, dtype)


def _dense_product(bases: Sequence[Any], dtype: torch.dtype) -> Product:
    weight = torch.cat([dense_weight(base, dtype) for base in bases])
    bias = _bias(bases, dtype, weight.device)
    return lambda x: F.linear(x, weight, bias)


@torch.no_grad()
def join_codes(group: GroupedLoraLinear) -> None:
    """Let the NF4 codes of a group's layers lie one after another in one tensor, of which each layer has its part.

    Nothing that a layer is or computes changes, and no second copy is made.
    """
    weights: list[Any] = [layer.base_layer.weight for layer in group.layers]
    if len(weights) < 2 or not all(_is_nf4(weight) for weight in weights):
        return
    codes = torch.cat([weight.data.reshape(-1) for weight in weights])
    parts = codes.split([weight.data.numel() for weight in weights])
    for weight, part in zip(weights, parts, strict=True):
        weight.data = part.view(weight.data.shape)


def _is_nf4(weight: Any) -> bool:
    state = getattr(weight, "quant_state", None)
    if state is None or (state.quant_type, state.blocksize) != ("nf4", BLOCK) or len(state.shape) != 2:
        return False
    return state.shape[1] % BLOCK == 0 and weight.data.dtype == torch.uint8


def _joined_product(bases: Sequence[Any], dtype: torch.dtype) -> Product | None:
    """Return bitsandbytes' 4-bit product of layers whose codes lie in one tensor (`join_codes`); else None.

    The scales are themselves quantized, each layer's by a mean of its own; here they are fp32, the same numbers.
    """
    weights = [base.weight for base in bases]
    if len(bases) < 2 or not all(_is_nf4(weight) for weight in weights):
        return None
    first, at = weights[0].data, 0
    for weight in weights:
        together = weight.data.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not together or weight.data.storage_offset() != first.storage_offset() + at:
            return None
        at += weight.data.numel()
    codes = first.as_strided((at, 1), (1, 1))
    states = [weight.quant_state for weight in weights]
    scales = torch.cat([block_scales(state) for state in states])
    shape = [sum(state.shape[0] for state in states), states[0].shape[1]]
    bias = _bias(bases, dtype, first.device)

    def product(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.bitsandbytes.gemm_4bit.default(x, codes, shape, scales, BLOCK, "nf4", bias=bias)  # type: ignore[no-any-return]

    return product


def _bias(bases: Sequence[Any], dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
    """Return the biases of all layers in a row, zeros for a layer that has none; None if no layer has one."""
    if all(base.bias is None for base in bases):
        return None
    none = (torch.zeros(base.out_features, dtype=dtype, device=device) for base in bases)
    return torch.cat([z if base.bias is None else base.bias.to(dtype) for z, base in zip(none, bases, strict=True)])


def _four_bit_product(bases: Sequence[Any], dtype: torch.dtype) -> Product | None:
    """Return a product that reads NF4 weights: ours where there is a compiler, else bitsandbytes'; None: neither."""
    from bitsandbytes.functional import has_avx512bf16

    weights, states = [base.weight for base in bases], [base.weight.quant_state for base in bases]
    fits = all((s.quant_type, s.blocksize) == ("nf4", BLOCK) and s.shape[1] % BLOCK == 0 for s in states)
    if not fits or not capabilities(weights[0].device).on_cpu or dtype != torch.bfloat16 or not has_avx512bf16():
        return None
    bias = _bias(bases, dtype, weights[0].device)
    if len(bases) <= PARTS and library() is not None:
        return NativeProduct(bases, bias)
    return _kernel_product(weights, states, bias) if all(s.shape[0] % 32 == 0 for s in states) else None


def _is_right(product: Product, bases: Sequence[Any], dtype: torch.dtype) -> bool:
    """Hold a product against the dense weights' in fp32, element by element, once for all layers of one shape."""
    key = (
        product.__class__,
        getattr(product, "__qualname__", ""),
        tuple((*b.weight.quant_state.shape, b.bias is not None) for b in bases),
        dtype,
    )
    if key not in _RIGHT:
        generator = torch.Generator(device="cpu").manual_seed(0)
        width = bases[0].weight.quant_state.shape[1]
        x = torch.randn((3, width), generator=generator, dtype=torch.float32, device="cpu").to(dtype)
        weight = torch.cat([dense_weight(base, dtype) for base in bases]).float()
        bias = _bias(bases, dtype, weight.device)
        exact = F.linear(x.float(), weight, None if bias is None else bias.float())
        inner_error = SUM_ERROR * (x.float().abs() @ weight.abs().t())  # of sums in fp32, in any order
        if not isinstance(product, NativeProduct):  # bitsandbytes rounds the scales of blocks as well
            spread = (x.float().square() @ weight.square().t()).sqrt()
            inner_error += SCALE_ROUNDINGS * torch.finfo(dtype).eps * spread
        _RIGHT[key] = within_rounding(product(x), exact, dtype, inner_error)
    return _RIGHT[key]


def _kernel_product(weights: Sequence[Any], states: Sequence[Any], bias: torch.Tensor | None) -> Product | None:
    """Return bitsandbytes' AVX-512 product; it needs the codes in an order of its own."""
    from bitsandbytes.cextension import lib

    kernel: Callable[..., None] | None = getattr(getattr(lib, "_lib", None), KERNEL, None)
    if kernel is None:
        return None
    packed = torch.cat([four_bit_layout(w.data, s.shape) for w, s in zip(weights, states, strict=True)])
    absmax = torch.cat([_block_scales(state) for state in states], dim=1)  # (in / 64, sum of out)
    out, width = packed.shape[0], 2 * packed.shape[1]

    def product(x: torch.Tensor) -> torch.Tensor:
        """Call the library itself: what bitsandbytes' operator does around it is a fifth of its time on 16 rows."""
        assert kernel is not None
        x = x.contiguous()
        y = torch.empty((x.shape[0], out), dtype=x.dtype, device=x.device)
        sizes, strides = [c_int64(n) for n in (x.shape[0], out, width)], (c_int64(width), c_int64(out))
        pointers = [c_void_p(tensor.data_ptr()) for tensor in (x, packed, absmax, y)]
        kernel(*sizes, *pointers, c_int64(BLOCK), *strides)
        return y if bias is None else y.add_(bias)

    return product


def four_bit_layout(codes: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Return NF4 codes in the order of bitsandbytes' CPU kernel, (out, in / 2) bytes.

    A block is 32 rows by 2 columns; a byte holds a code of its upper 16 rows in the high half and one of its lower 16
    rows in the low half.
    """
    out, width = shape
    blocks = codes.view(torch.uint8).reshape(out // 32, 2, 16, width // 2)  # a byte: even column high, odd one low
    lower, upper = blocks[:, 0], blocks[:, 1]
    packed = torch.empty((out // 32, width // 2, 16, 2), dtype=torch.uint8, device=codes.device)
    packed[..., 0] = ((upper & 0xF0) | (lower >> 4)).transpose(1, 2)
    packed[..., 1] = ((upper << 4) | (lower & 0xF)).transpose(1, 2)
    return packed.view(out, width // 2)


def _block_scales(state: Any) -> torch.Tensor:
    """Return the largest magnitude of each block of 64, (in / 64, out) bfloat16."""
    return block_scales(state).reshape(state.shape[0], -1).t().to(torch.bfloat16).contiguous()
