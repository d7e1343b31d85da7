"""llama.cpp's K-quants Q4_K, Q5_K and Q6_K, which the gguf library reads but does not write.

A row is cut into super-blocks of 256 weights. The search for the scales is the one of ggml's reference
(`quantize_row_q4_K_ref`, `quantize_row_q5_K_ref` and `quantize_row_q6_K_ref` in ggml-quants.c), for many blocks at
once; the blocks differ from ggml's only where a sum in another order tips a rounding. Layouts: `block_q4_K` and so on
in ggml-common.h.
"""

from collections.abc import Callable

import torch

SUPER = 256  # weights a super-block
PIECE = 2**18  # weights at once, so that what is calculated on stays in the processor's cache
_TINY = 1e-15  # ggml's GROUP_MAX_EPS: a block below it is all zero


def quantize_q4_k(x: torch.Tensor) -> torch.Tensor:
    """Return Q4_K blocks: of each 32 weights a 6-bit scale and minimum, of each weight 4 bits.

    Args:
        x: (..., C), fp32, C a multiple of 256.

    Returns:
        (..., C / 256 * 144), uint8.
    """
    return _by_pieces(x, _q4_k)


def quantize_q5_k(x: torch.Tensor) -> torch.Tensor:
    """Return Q5_K blocks: of each 32 weights a 6-bit scale and minimum, of each weight 5 bits.

    Args:
        x: (..., C), fp32, C a multiple of 256.

    Returns:
        (..., C / 256 * 176), uint8.
    """
    return _by_pieces(x, _q5_k)


def quantize_q6_k(x: torch.Tensor) -> torch.Tensor:
    """Return Q6_K blocks: of each 16 weights an 8-bit scale, of each weight 6 bits.

    Args:
        x: (..., C), fp32, C a multiple of 256.

    Returns:
        (..., C / 256 * 210), uint8.
    """
    return _by_pieces(x, _q6_k)


def _by_pieces(x: torch.Tensor, quantize: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    blocks = x.contiguous().view(-1, SUPER)
    done = [quantize(piece) for piece in blocks.split(PIECE // SUPER)]
    return torch.cat(done).view(*x.shape[:-1], -1)


def _q4_k(blocks: torch.Tensor) -> torch.Tensor:
    head, codes = _with_minima(blocks, 15, 14.0, 21)
    pairs = codes.view(-1, 4, 2, 32)
    nibbles = (pairs[:, :, 0] | pairs[:, :, 1] << 4).flatten(1)
    return torch.cat((head, nibbles), dim=1)


def _q5_k(blocks: torch.Tensor) -> torch.Tensor:
    head, codes = _with_minima(blocks, 31, 30.5, 16)
    pairs = codes.view(-1, 4, 2, 32)
    low, high = pairs & 15, pairs >> 4  # the fifth bits lie apart: of pair k in bits 2k and 2k + 1 of 32 bytes
    bits = high[:, 0, 0] | high[:, 0, 1] << 1
    for k in range(1, 4):
        bits = bits | (high[:, k, 0] | high[:, k, 1] << 1) << 2 * k
    return torch.cat((head, bits, (low[:, :, 0] | low[:, :, 1] << 4).flatten(1)), dim=1)


def _with_minima(blocks: torch.Tensor, top: int, first: float, scalings: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scales and minima (N, 16) as bytes, and codes (N, 8, 32) of 0 to ``top``, uint8.

    Args:
        blocks: (N, 256), fp32.
        first, scalings: see `_scales_and_minima`.
    """
    x = blocks.view(-1, 8, 32)  # (N, 8, 32)
    scales, minima = _scales_and_minima(x, top, first, scalings)  # (N, 8)
    d, d_codes = _six_bits(scales)
    m, m_codes = _six_bits(minima)
    step = (d.float()[:, None] * d_codes)[..., None]
    offset = (m.float()[:, None] * m_codes)[..., None]
    codes = torch.where(step > 0, ((x + offset) / step).round_().clamp_(0, top), 0).to(torch.uint8)
    s, t = d_codes.to(torch.uint8), m_codes.to(torch.uint8)
    packed = torch.cat(  # 8 scales and 8 minima of 6 bits in 12 bytes
        (
            s[:, :4] | (s[:, 4:] >> 4) << 6,
            t[:, :4] | (t[:, 4:] >> 4) << 6,
            (s[:, 4:] & 15) | (t[:, 4:] & 15) << 4,
        ),
        dim=1,
    )
    return torch.cat((_bytes(d), _bytes(m), packed), dim=1), codes


def _scales_and_minima(
    x: torch.Tensor, top_code: int, first: float, scalings: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return for each block the scale s and minimum m >= 0 of the least weighted error of ``s * code - m``.

    Args:
        x: (..., 32), fp32.
        top_code: the largest code.
        first: codes that the whole range stands for in the first scaling; each further one has 0.1 more.

    Returns:
        two tensors (...). Each of ``scalings`` rounds to codes, and a least-squares fit on the codes gives s and m.
    """
    w = x.abs() + x.square().mean(-1, keepdim=True).sqrt()
    offset = x.amin(-1, keepdim=True).clamp_(max=0)
    top = x.amax(-1, keepdim=True)
    flat = top == offset
    sum_w, sum_x = w.sum(-1, keepdim=True), (w * x).sum(-1, keepdim=True)
    scale = (top - offset) / top_code
    codes = ((x - offset) * (1 / scale)).round_().clamp_(0, top_code)
    error = _error(codes, scale, offset, x, w)
    for index in range(scalings):
        inverse = (first + 0.1 * index) / (top - offset)  # of the best offset so far, as ggml has it
        torch.sub(x, offset, out=codes).mul_(inverse).round_().clamp_(0, top_code)
        weighted = w * codes
        sum_l = weighted.sum(-1, keepdim=True)
        sum_xl = (weighted * x).sum(-1, keepdim=True)
        sum_l2 = weighted.mul_(codes).sum(-1, keepdim=True)
        determinant = sum_w * sum_l2 - sum_l * sum_l
        s = (sum_w * sum_xl - sum_x * sum_l) / determinant
        o = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        s, o = torch.where(o > 0, sum_xl / sum_l2, s), o.clamp(max=0)
        e = _error(codes, s, o, x, w)
        better = (determinant > 0) & (e < error)
        scale, offset = torch.where(better, s, scale), torch.where(better, o, offset)
        error = torch.where(better, e, error)
    return torch.where(flat, 0, scale).squeeze(-1), -offset.squeeze(-1)


def _error(
    codes: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, x: torch.Tensor, w: torch.Tensor
) -> torch.Tensor:
    return (codes * scale).add_(offset).sub_(x).square_().mul_(w).sum(-1, keepdim=True)


def _six_bits(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a float16 unit (N,) and codes of 0 to 63 (N, 8), fp32, for values (N, 8) that are not negative."""
    largest = values.amax(-1, keepdim=True)
    inverse = torch.where(largest > 0, 63 / largest, 0)
    return (largest / 63).to(torch.float16).squeeze(-1), (values * inverse).round_().clamp_(0, 63)


def _q6_k(blocks: torch.Tensor) -> torch.Tensor:
    x = blocks.view(-1, 16, 16)
    scales = _symmetric_scales(x)  # (N, 16)
    at = scales.abs().argmax(-1, keepdim=True)
    largest = scales.gather(-1, at)
    empty = largest.abs() < _TINY
    d = torch.where(empty, 0, largest / -128).to(torch.float16)
    inverse = torch.where(empty, 0, -128 / largest)
    codes_of_scales = (scales * inverse).round_().clamp_(-128, 127)
    step = (d.float() * codes_of_scales)[..., None]
    codes = torch.where(step != 0, (x / step).round_().clamp_(-32, 31), 0).add_(32).to(torch.uint8)
    q = codes.masked_fill_(empty[..., None], 0).view(-1, 2, 4, 32)  # (N, half, quarter, 32)
    low, high = q & 15, q >> 4
    ql = torch.cat((low[:, :, 0] | low[:, :, 2] << 4, low[:, :, 1] | low[:, :, 3] << 4), dim=-1)
    qh = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
    signed = codes_of_scales.to(torch.int8).view(torch.uint8)
    return torch.cat((ql.flatten(1), qh.flatten(1), signed, _bytes(d.squeeze(-1))), dim=1)


def _symmetric_scales(x: torch.Tensor) -> torch.Tensor:
    """Return for blocks (..., 16) the scale (...) of codes -32 to 31 with the least error, weighted by x squared."""
    peak = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    inverse = torch.where(peak.abs() < _TINY, 0, -1 / peak)
    w = x.square()
    wx = w * x
    scale = best = torch.zeros_like(peak)
    codes = torch.empty_like(x)
    for index in (0, *range(-9, 0), *range(1, 10)):
        torch.mul(x, (32 + 0.1 * index) * inverse, out=codes).round_().clamp_(-32, 31)
        sum_xl = (wx * codes).sum(-1, keepdim=True)
        sum_l2 = (w * codes).mul_(codes).sum(-1, keepdim=True)
        better = (sum_l2 > 0) & (sum_xl * sum_xl > best * sum_l2)
        fit = sum_xl / sum_l2
        scale, best = torch.where(better, fit, scale), torch.where(better, fit * sum_xl, best)
    return scale.squeeze(-1)


def _bytes(halves: torch.Tensor) -> torch.Tensor:
    """Return float16 numbers (N,) as bytes (N, 2)."""
    return halves.contiguous().view(-1, 1).view(torch.uint8)
