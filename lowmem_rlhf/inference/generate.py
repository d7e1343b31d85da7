"""Answers of a trained policy to prompts, all at once; beside them those of the reference."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lowmem_rlhf.architecture.stops import written_text
from lowmem_rlhf.architecture.vocabulary import check_ids
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
    dequantize: bool = False,
    task: str | None = None,
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
        dequantize: NF4 weights are unpacked while sampling.
        task: of several, the one whose prompts are written; None: the first.

    Raises:
        UserError: there is no prompt, one is empty or too long, or ``n`` is less than 1.
        RunError: the device's memory ran out.
    """
    from lowmem_rlhf.engine.ladder import RolloutLimits
    from lowmem_rlhf.engine.roles import POLICY, REFERENCE
    from lowmem_rlhf.inference.chat.talk import Prompts, check_temperature, room_for
    from lowmem_rlhf.inference.opening import memory_explained
    from lowmem_rlhf.progress import reported_as
    from lowmem_rlhf.rollout.engine import engine_for
    from lowmem_rlhf.rollout.sampling import Sampling

    if any(type(one) is not int or one < 1 for one in (n, 1 if max_tokens is None else max_tokens)):
        raise UserError(f"generate: got n={n!r}, max_tokens={max_tokens!r}; both are whole numbers of at least 1")
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise UserError(f"generate: got seed={seed!r}; it is a whole number from 0 to 2**63 - 1")
    if wrong := [one for one in prompts if not isinstance(one, str)]:
        raise UserError(f"generate: got a {type(wrong[0]).__name__} as a prompt; a prompt is a text, what a user types")
    if not prompts or not all(one.strip() for one in prompts):
        raise UserError("generate: got no prompt, or an empty one; give a text to answer")
    if temperature is not None and not (isinstance(temperature, int | float) and 0 <= temperature < math.inf):
        raise UserError(f"generate: got temperature={temperature!r}; it is at least 0 (the likeliest tokens)")
    check_temperature(temperature or 0.0)
    recipe = recipe.of_task(task)
    generation = recipe.generation
    writer = Prompts(recipe.data, base.tokenizer, base.stop_ids)
    ids = [writer.ids(writer.turn(one), []) for one in prompts]
    check_ids(base.tokenizer, base.rows, ids)
    warm = generation.temperature if n > 1 else 0.0
    heat = warm if temperature is None else temperature
    sampling = Sampling.of(generation, heat)
    most = room_for(base, recipe.model, max(ids, key=len), max_tokens or generation.max_completion_length)
    engine, limits = engine_for(base, generation.engine, dequantize), RolloutLimits(max(n, 8), 2048, 64)
    answers: dict[str, list[list[str]]] = {}
    for role in (POLICY, REFERENCE) if compare else (POLICY,):
        with memory_explained(recipe), base.role(role):
            groups = engine.generate(ids, n, most, sampling, limits, seed, reported_as("completions"))
        answers[role] = [[written_text(base.tokenizer, one.ids, base.stop_ids) for one in group] for group in groups]
    return answers
