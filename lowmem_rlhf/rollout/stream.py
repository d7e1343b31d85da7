"""One completion of one prompt, token by token as it is drawn: for those who read along."""

from collections.abc import Iterator, Sequence

import torch

from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.rollout.engine import wave_engine
from lowmem_rlhf.rollout.sampling import Sampling
from lowmem_rlhf.rollout.wave import check_finite, draw_tiled, drawn_ahead


@torch.no_grad()
def stream(
    base: SharedBase, prompt_ids: Sequence[int], max_tokens: int, sampling: Sampling, seed: int, tile: int
) -> Iterator[int]:
    """Yield the tokens that an engine gives for one prompt, one completion and the same seed, less the stop token.

    A token is computed when it is asked for, in the role that ``base`` is in then; the prompt runs before the first.

    Args:
        prompt_ids: token ids, at least one.
        max_tokens: the most tokens drawn, at least one; the same as ``max_completion_length`` of `Engine.generate`.
        tile: rows in one logits tile.

    Raises:
        RunError: the logits are not finite.
    """
    uniforms, stops = drawn_ahead(1, max_tokens, seed), base.stop_ids
    state, hidden = wave_engine(base).start([prompt_ids], [0], max_tokens - 1, len(prompt_ids))
    for t in range(max_tokens):
        tokens, logp = draw_tiled(base, hidden, uniforms[:, t : t + 1], sampling, tile)
        check_finite(base, logp.tolist(), t)
        token = int(tokens)
        if token in stops:
            return
        yield token
        if t + 1 < max_tokens:
            hidden = state.next_states(base, tokens)
