"""Draw tokens from logits: temperature, top-k, top-p, min-p, by inverse transform of one uniform number a token.

One uniform for each (completion, position), drawn ahead on the CPU, makes a completion the same whatever else is in
the batch and on whatever device.
"""

from dataclasses import dataclass

import torch

LARGEST = 1 - 2**-23  # of the uniform numbers: times any fp32 number it is a smaller one


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn (see GenerationConfig). A temperature of 0 takes the likeliest token."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0


def draw(
    logits: torch.Tensor,
    uniforms: torch.Tensor,
    sampling: Sampling,
    missing: torch.Tensor | None = None,
    into: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and their log-probs, fp32, shaped as the uniforms: (R,), or (R, U) for U draws of each row.

    The log-prob is that of the full distribution at this temperature, before top-k, top-p, min-p and the mask: it is
    what the training pass computes. With greedy drawing it is taken at temperature 1.

    Args:
        logits: (R, V) in the compute dtype or fp32. Where they are not finite the log-prob is not either.
        uniforms: (R,) or (R, U) from 0 to `LARGEST`.
        missing: (V,) bool, logits that belong to no token and are never drawn.
        into: where ids and log-probs of (R, U) are written; they are what is returned then.
    """
    if uniforms.dim() == 1:
        token, chosen = draw(logits, uniforms[:, None], sampling, missing)
        return token[:, 0], chosen[:, 0]
    into_token, into_chosen = (None, None) if into is None else into
    if sampling.temperature == 0:
        logp = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
        best, token = _allowed(logp, missing).max(dim=-1, keepdim=True)
        if into is None:
            return token.expand_as(uniforms), best.expand_as(uniforms)
        return into[0].copy_(token), into[1].copy_(best)
    scaled = logits if sampling.temperature == 1 else logits.float() / sampling.temperature
    logp = scaled.log_softmax(dim=-1, dtype=torch.float32)
    probs = _probabilities(logp, missing)
    if sampling.top_k or sampling.top_p < 1 or sampling.min_p:
        probs = _truncate(probs, sampling)
    total = probs.cumsum_(dim=-1)  # (R, V)
    # with `LARGEST` the goal is below the total, and side "right" never chooses a token of probability zero
    token = torch.searchsorted(total, uniforms * total[:, -1:], right=True)
    token = torch.clamp(token, max=total.shape[-1] - 1, out=into_token)  # NaN: V
    return token, torch.gather(logp, -1, token, out=into_chosen)


def _allowed(logp: torch.Tensor, missing: torch.Tensor | None) -> torch.Tensor:
    return logp if missing is None else logp.masked_fill(missing, -torch.inf)


def _probabilities(logp: torch.Tensor, missing: torch.Tensor | None) -> torch.Tensor:
    """Return what to draw by, (R, V) in a tensor of its own; with a mask only the ratios of a row's numbers count.

    They are relative to the likeliest token: where rows without a token take all of the probability, the others would
    be 0 in fp32.
    """
    if missing is None:
        return logp.exp()
    allowed = logp.masked_fill(missing, -torch.inf)
    return allowed.sub_(allowed.amax(dim=-1, keepdim=True)).exp_()


def _truncate(probs: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Return probabilities (R, V), up to a factor, with the tokens that top-k, min-p and top-p exclude set to zero."""
    if sampling.min_p:
        probs = probs.masked_fill(probs < sampling.min_p * probs.amax(-1, keepdim=True), 0.0)
    if sampling.top_k and sampling.top_k < probs.shape[-1]:
        least = probs.topk(sampling.top_k, dim=-1).values[:, -1:]
        probs = probs.masked_fill(probs < least, 0.0)
    if sampling.top_p < 1:
        ordered, index = probs.sort(dim=-1, descending=True)
        before = ordered.cumsum(-1).sub_(ordered)  # probability of the likelier tokens
        drop = before >= sampling.top_p * ordered.sum(-1, keepdim=True)
        probs = probs.masked_fill(torch.zeros_like(drop).scatter_(-1, index, drop), 0.0)
    return probs
