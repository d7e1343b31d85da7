"""Rows of token ids for TRL's collators, from the pairs and labelled answers that a recipe's data holds."""

from collections.abc import Sequence
from typing import Any

from lowmem_rlhf.algorithms.trl.model import IGNORED
from lowmem_rlhf.algorithms.trl.spec import TRLTrainer
from lowmem_rlhf.data.labelled import Answer, Example
from lowmem_rlhf.data.supervised import Pair


def pairs_among(examples: Sequence[Example]) -> list[Pair]:
    """Return the pairs among examples; a good and a bad answer to the same prompt are one as well."""
    bad = {tuple(one.prompt_ids): one for one in examples if isinstance(one, Answer) and not one.good}
    found: list[Pair] = []
    for one in examples:
        if isinstance(one, Pair):
            found.append(one)
        elif one.good and (other := bad.get(tuple(one.prompt_ids))) is not None:
            found.append(Pair(one.prompt_ids, one.completion_ids, other.completion_ids, 0.0))
    return found


def tokens_of(example: Example) -> tuple[int, int, int]:
    """Return the tokens of an example's prompt and answers when the prompt is fed once, its rows, and the longest."""
    prompt = len(example.prompt_ids)
    if isinstance(example, Answer):
        return prompt + len(example.completion_ids), 1, prompt + len(example.completion_ids)
    answers = [len(example.chosen_ids), len(example.rejected_ids)]
    return prompt + sum(answers), 2, prompt + max(answers)


def answer_tokens(example: Example) -> int:
    """Return the tokens of an example that are answers'."""
    return tokens_of(example)[0] - len(example.prompt_ids)


def batch_rows(examples: Sequence[Example], kind: TRLTrainer) -> list[dict[str, Any]]:
    """Return the examples of a step as rows for the trainer's collator.

    For KTO, which estimates a KL from answers to other prompts, each row also has the answer of the one before it: so
    these are the step's own answers, as its paper wants it.
    """
    found = []
    for number, one in enumerate(examples):
        if isinstance(one, Answer):
            before = examples[number - 1]
            assert isinstance(before, Answer)
            row = {"prompt_ids": one.prompt_ids, "completion_ids": one.completion_ids, "label": one.good}
            found.append({**row, "KL_completion_ids": before.completion_ids})
        elif kind.full_logits:
            found.append({**_sequence("chosen", one, one.chosen_ids), **_sequence("rejected", one, one.rejected_ids)})
        else:
            row = {"prompt_ids": one.prompt_ids, "chosen_ids": one.chosen_ids, "rejected_ids": one.rejected_ids}
            found.append(row)
    return found


def _sequence(name: str, pair: Pair, answer: list[int]) -> dict[str, list[int]]:
    """Return a prompt with an answer as TRL's older collator has it: whole, with labels where the answer is."""
    ids = pair.prompt_ids + answer
    labels = [IGNORED] * len(pair.prompt_ids) + answer
    return {f"{name}_input_ids": ids, f"{name}_attention_mask": [1] * len(ids), f"{name}_labels": labels}
