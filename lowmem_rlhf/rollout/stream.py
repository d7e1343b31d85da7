"""One completion of one prompt, token by token as it is drawn: for those who read along."""

from collections.abc import Iterator, Sequence

import torch

from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.rollout.draws import Draws
from lowmem_rlhf.rollout.ends import Ends
from lowmem_rlhf.rollout.engine import wave_engine
from lowmem_rlhf.rollout.sampling import Sampling
from lowmem_rlhf.rollout.wave import check_finite, drawn_ahead


@torch.no_grad()
def stream(
    base: SharedBase, prompt_ids: Sequence[int], max_tokens: int, sampling: Sampling, seed: int, tile: int
) -> Iterator[int]:
    """Yield the tokens that an engine gives for one prompt, one completion and the same seed, less the stop token.

    What completes a stop string is given, as it is a part of the text.

    A token is computed when it is asked for, in the role that ``base`` is in then; the prompt runs before the first.

    Args:
        prompt_ids: token ids, at least one.
        max_tokens: the most tokens drawn, at least one; the same as ``max_completion_length`` of `Engine.generate`.
        tile: rows in one logits tile.

    Raises:
        RunError: the logits are not finite.
    """
    uniforms, stops = drawn_ahead(1, max_tokens, seed), base.stop_ids
    draws, ended = Draws(base, sampling, [prompt_ids], [0], tile), Ends(base, sampling).of_one()
    state, hidden = wave_engine(base).start([prompt_ids], [0], max_tokens - 1, len(prompt_ids))
    tokens, logp = draws.first(hidden, uniforms[:, :1])
    for t in range(max_tokens):
        check_finite(base, logp.tolist(), t)
        token = int(tokens)
        if token in stops:
            return
        done = ended(token)
        yield token
        if done or t + 1 == max_tokens:
            return
        hidden = state.next_states(base, tokens)
        tokens, logp = draws.next(hidden, uniforms[:, t + 1], tokens)
