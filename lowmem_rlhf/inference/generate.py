"""Answers of a trained policy to prompts, all at once; beside them those of the reference."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lowmem_rlhf.architecture.stops import written_text
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.recipe.schema import Recipe

if TYPE_CHECKING:
    from lowmem_rlhf.engine.base import SharedBase


def answer_prompts(
    base: "SharedBase",
    recipe: Recipe,
    prompts: Sequence[str],
    n: int,
    compare: bool,
    max_tokens: int | None,
    temperature: float | None,
    seed: int,
) -> dict[str, list[list[str]]]:
    """Return by role the completions of each prompt, as texts.

    Args:
        base: of the run, with its policy.
        prompts: what a user would type.
        n: completions of a prompt.
        compare: the reference answers too.
        max_tokens: of a completion; None: as many as in training.
        temperature: None: 0 for one completion, as in training for several.
        seed: of all draws.

    Raises:
        UserError: there is no prompt, one is empty or too long, or ``n`` is less than 1.
        RunError: the device's memory ran out.
    """
    from lowmem_rlhf.engine.roles import POLICY, REFERENCE
    from lowmem_rlhf.inference.chat.talk import Prompts
    from lowmem_rlhf.inference.opening import memory_explained
    from lowmem_rlhf.progress import current
    from lowmem_rlhf.rollout.sampling import Sampling
    from lowmem_rlhf.rollout.shared_prompt import Limits, generate

    if n < 1 or (max_tokens is not None and max_tokens < 1):
        raise UserError(f"generate: got n={n}, max_tokens={max_tokens}; both are at least 1")
    if not prompts or any(not isinstance(one, str) or not one.strip() for one in prompts):
        raise UserError("generate: got no prompt, or an empty one; give a text to answer")
    if temperature is not None and temperature < 0:
        raise UserError(f"generate: got temperature={temperature:g}; it is at least 0 (the likeliest tokens)")
    generation = recipe.generation
    writer = Prompts(recipe.data, base.tokenizer, base.stop_ids)
    ids = [writer.ids(writer.turn(one), []) for one in prompts]
    warm = generation.temperature if n > 1 else 0.0
    heat = warm if temperature is None else temperature
    sampling = Sampling(heat, generation.top_p, generation.top_k, generation.min_p) if heat else Sampling(0.0)
    most = max_tokens or generation.max_completion_length
    answers: dict[str, list[list[str]]] = {}
    for role in (POLICY, REFERENCE) if compare else (POLICY,):
        with memory_explained(recipe), base.role(role):
            groups = generate(
                base,
                ids,
                n,
                most,
                sampling,
                Limits(rows=max(n, 8), prefill_tokens=2048, tile=64),
                seed,
                lambda done, total: current().phase("completions", done, total),
            )
        answers[role] = [[written_text(base.tokenizer, one.ids, base.stop_ids) for one in group] for group in groups]
    return answers
