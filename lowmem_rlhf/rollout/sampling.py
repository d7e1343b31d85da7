"""Draw tokens from logits by inverse transform of one uniform number a token.

Repetition penalty, temperature, top-k, top-p and min-p shape what is drawn from. One uniform for each (completion,
position), drawn ahead on the CPU, makes a completion the same whatever else is in the batch and on whatever device.
"""

from dataclasses import dataclass

import torch

from lowmem_rlhf.recipe.sections import GenerationConfig

LARGEST = 1 - 2**-23  # of the uniform numbers: times any fp32 number it is a smaller one


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn, and what ends a completion (see GenerationConfig); temperature 0 takes the likeliest one.

    The first six decide which token is drawn, `stop_strings` where a completion ends.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0
    stop_strings: tuple[str, ...] = ()

    @classmethod
    def of(cls, generation: GenerationConfig, temperature: float | None = None) -> "Sampling":
        """Return how a recipe samples, at its temperature or at another one."""
        g = generation
        heat = g.temperature if temperature is None else temperature
        kept = (g.top_p, g.top_k, g.min_p) if heat else (1.0, 0, 0.0)  # nothing is left out before the likeliest token
        return cls(heat, *kept, g.repetition_penalty, g.min_new_tokens, tuple(g.stop_strings))


def draw(
    logits: torch.Tensor,
    uniforms: torch.Tensor,
    sampling: Sampling,
    missing: torch.Tensor | None = None,
    into: tuple[torch.Tensor, torch.Tensor] | None = None,
    seen: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and their log-probs, fp32, shaped as the uniforms: (R,), or (R, U) for U draws of each row.

    The log-prob is that of the full distribution at this temperature, before the repetition penalty, top-k, top-p,
    min-p and the mask: it is what the training pass computes. With greedy drawing it is taken at temperature 1.

    Args:
        logits: (R, V) in the compute dtype or fp32. Where they are not finite the log-prob is not either.
        uniforms: (R,) or (R, U) from 0 to `LARGEST`.
        missing: (V,) or (R, V) bool, tokens that are not drawn: logits that belong to no token, or stops before their
            time.
        into: where ids and log-probs of (R, U) are written; they are what is returned then.
        seen: (R, V) bool, the tokens of each row's text, which the repetition penalty is for; None: there is none.
    """
    if uniforms.dim() == 1:
        token, chosen = draw(logits, uniforms[:, None], sampling, missing, seen=seen)
        return token[:, 0], chosen[:, 0]
    into_token, into_chosen = (None, None) if into is None else into
    scores = None if seen is None else _penalized(logits, seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        logp = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
        best, token = _allowed(logp if scores is None else scores, missing).max(dim=-1, keepdim=True)
        if scores is not None:
            best = logp.gather(-1, token)
        if into is None:
            return token.expand_as(uniforms), best.expand_as(uniforms)
        return into[0].copy_(token), into[1].copy_(best)
    scaled = logits if sampling.temperature == 1 else logits.float() / sampling.temperature
    logp = scaled.log_softmax(dim=-1, dtype=torch.float32)
    probs = _probabilities(logp, missing) if scores is None else _of_scores(scores, sampling.temperature, missing)
    if sampling.top_k or sampling.top_p < 1 or sampling.min_p:
        probs = _truncate(probs, sampling)
    total = probs.cumsum_(dim=-1)  # (R, V)
    # with `LARGEST` the goal is below the total, and side "right" never chooses a token of probability zero
    token = torch.searchsorted(total, uniforms * total[:, -1:], right=True)
    token = torch.clamp(token, max=total.shape[-1] - 1, out=into_token)  # NaN: V
    return token, torch.gather(logp, -1, token, out=into_chosen)


def _penalized(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Return scores (R, V), fp32 of their own: logits of tokens that were seen are divided, negative ones multiplied.

    As transformers' RepetitionPenaltyLogitsProcessor (Keskar et al. 2019, arXiv 1909.05858, section 4.1, which divides
    negative logits too and so makes such tokens likelier).
    """
    scores = logits.float()
    down, up = scores / penalty, scores * penalty
    torch.where(scores < 0, up, down, out=up)
    del down
    return torch.where(seen, up, scores, out=up)


def _of_scores(scores: torch.Tensor, temperature: float, missing: torch.Tensor | None) -> torch.Tensor:
    """Return what to draw by, (R, V), in place of the scores; only the ratios of a row's numbers count."""
    if temperature != 1:
        scores.div_(temperature)
    if missing is not None:
        scores.masked_fill_(missing, -torch.inf)
    return scores.sub_(scores.amax(dim=-1, keepdim=True)).exp_()


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
