"""The texts of a proof: token sequences like those that the run trained on, a few hundred tokens in all."""

from collections.abc import Iterable, Iterator
from typing import Any

from lowmem_rlhf.architecture.stops import text_ids
from lowmem_rlhf.data.chat_template import ChatTemplate
from lowmem_rlhf.data.prompts import build_examples
from lowmem_rlhf.data.values import Row
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.planning.memory.resident import COMPARED_LENGTH, COMPARED_TOKENS
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.run.directory import RunDirectory

ROWS = 16  # of data that are looked at
SENTENCES = (
    "The capital of France is Paris, and the river that runs through it is the Seine.",
    "Water boils at 100 degrees Celsius at sea level; on a mountain it boils at a lower temperature.",
    "To add 27 and 15, first add 20 and 10, then 7 and 5, and put both results together: 42.",
    "def mean(numbers):\n    return sum(numbers) / len(numbers)\n",
)


def sample_sequences(
    run: RunDirectory, recipe: Recipe, tokenizer: Any, stop_ids: frozenset[int]
) -> tuple[list[list[int]], str]:
    """Return token sequences, and where they are from.

    They are the run's latest samples; if it drew none, held-out data; if that is out of reach, some sentences.
    """
    for source, read in (("samples of the run", _samples), ("held-out data", _held_out)):
        try:
            cut = _cut(read(run, recipe, tokenizer, stop_ids))
        except (UserError, OSError):
            continue  # data that is gone is no reason to refuse an export
        if sum(map(len, cut)) >= COMPARED_TOKENS // 4:
            return cut, source
    texts = (tokenizer(text)["input_ids"] for text in SENTENCES)
    return _cut(texts), "built-in sentences"


def _samples(run: RunDirectory, recipe: Recipe, tokenizer: Any, stop_ids: frozenset[int]) -> Iterator[list[int]]:
    data = recipe.data
    template = ChatTemplate(tokenizer, data.chat_template_kwargs) if tokenizer.chat_template else None
    for row in reversed(run.samples()):
        prompt, completion = row.get("prompt"), row.get("completion")
        if not isinstance(completion, str) or not isinstance(prompt, str | list):
            continue
        if isinstance(prompt, list):
            if template is None:
                continue
            ids = tokenizer(template.prompt(prompt), add_special_tokens=False)["input_ids"]
        else:
            ids = text_ids(tokenizer, prompt, stop_ids)
        yield [*ids, *tokenizer(completion, add_special_tokens=False)["input_ids"]]


def _held_out(run: RunDirectory, recipe: Recipe, tokenizer: Any, stop_ids: frozenset[int]) -> Iterator[list[int]]:
    from lowmem_rlhf.data.sources import load_rows

    for own in recipe.by_task.values():
        yield from _held_out_of(own, load_rows(own.data, "eval", recipe.training.seed)[:ROWS], tokenizer, stop_ids)


def _held_out_of(recipe: Recipe, rows: list[Row], tokenizer: Any, stop_ids: frozenset[int]) -> Iterator[list[int]]:
    from lowmem_rlhf.data.supervised import build_pairs, build_supervised

    spec = recipe.spec
    if spec.rows == "completions":
        for example in build_supervised(rows, recipe.data, spec.own(recipe), tokenizer, stop_ids):
            yield [*example.prompt_ids, *example.completion_ids]
    elif spec.output == "scores":
        ((key, length),) = spec.lengths(recipe).items()
        for pair in build_pairs(rows, recipe.data, length, tokenizer, stop_ids, key):
            yield [*pair.prompt_ids, *pair.chosen_ids]
    else:
        for prompt in build_examples(rows, recipe.data, tokenizer, stop_ids):
            yield prompt.prompt_ids


def _cut(texts: Iterable[list[int]]) -> list[list[int]]:
    """Return sequences of 2 to `COMPARED_LENGTH` tokens, `COMPARED_TOKENS` in all; of a longer one its end."""
    sequences: list[list[int]] = []
    room = COMPARED_TOKENS
    for ids in texts:
        end = list(ids)[-min(COMPARED_LENGTH, room) :]
        if len(end) > 1 and end not in sequences:
            sequences.append(end)
            room -= len(end)
        if room < 2:
            break
    return sequences
