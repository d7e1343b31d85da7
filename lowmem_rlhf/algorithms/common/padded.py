"""Completions of unequal length as one padded matrix with their lengths; nothing here or after reads the padding.

Shapes: N completions, L tokens of the longest one. A length is the number of real tokens, the closing EOS included;
it is never found by comparing tokens with a pad id, which may be the EOS id or an ordinary sampled token.
"""

from collections.abc import Sequence

import torch


def pad_rows(rows: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return vectors of unequal length as a matrix (N, L), zeros behind each, and their lengths (N,).

    Raises:
        ValueError: there is no row.
    """
    if not rows:
        raise ValueError("pad_rows: got no rows; at least one completion is needed")
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.long, device=rows[0].device)
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True), lengths


def unpad_rows(matrix: torch.Tensor, lengths: torch.Tensor) -> list[torch.Tensor]:
    """Return the N rows of a matrix (N, L) without their padding."""
    return [row[:n] for row, n in zip(matrix, lengths.tolist(), strict=True)]


def token_mask(lengths: torch.Tensor, width: int) -> torch.Tensor:
    """Return (N, L) bool, True on real tokens.

    Args:
        lengths: (N,) integers.
        width: L.

    Raises:
        ValueError: a completion has no token, or more than L.
    """
    outside = lengths[(lengths < 1) | (lengths > width)]
    if len(outside):
        raise ValueError(f"lengths: got {outside.tolist()} tokens; allowed are 1 to {width}, the width of the batch")
    return torch.arange(width, dtype=torch.long, device=lengths.device) < lengths.unsqueeze(1)


def zero_padding(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return x (N, L) with zeros where the mask is False, whatever stood there, NaN included."""
    return torch.where(mask, x, 0.0)


def whiten(x: torch.Tensor, mask: torch.Tensor, shift_mean: bool = True) -> torch.Tensor:
    """Return ``(x - mean) / sqrt(variance + 1e-8)`` over all real tokens together, and zeros on the padding.

    The variance is unbiased; that of a single token counts as zero. TRL's ``masked_whiten``.

    Args:
        x: (N, L) fp32.
        mask: (N, L) bool.
        shift_mean: False adds the mean again after scaling (TRL whitens rewards so, to keep their sign and level).
    """
    count, exact = mask.sum(), x.double()  # so that equal numbers become zeros, and not rounding noise scaled up
    mean = zero_padding(exact, mask).sum() / count
    centered = zero_padding(exact - mean, mask)
    variance = centered.square().sum() / (count - 1).clamp(min=1)
    whitened = centered * (variance + 1e-8).rsqrt()
    return (whitened if shift_mean else zero_padding(whitened + mean, mask)).to(x.dtype)
