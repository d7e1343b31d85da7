"""The examples that a recipe's algorithm learns from, of its rows. No torch here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lowmem_rlhf.architecture.vocabulary import check_ids
from lowmem_rlhf.data.bad_rows import RowReport
from lowmem_rlhf.data.curriculum import check_difficulties
from lowmem_rlhf.data.labelled import check_both_kinds, read_answers
from lowmem_rlhf.data.prompts import Example, build_examples
from lowmem_rlhf.data.sources import SplitRows
from lowmem_rlhf.data.streaming import Streamed, Windows, examples_in
from lowmem_rlhf.data.supervised import Rows, build_pairs, build_supervised, labelled_texts
from lowmem_rlhf.engine.tokenizer import Tokens
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.progress import ProgressCallback
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.recipe.tasks import of_task

_IDS = ("prompt_ids", "completion_ids", "chosen_ids", "rejected_ids")


@dataclass(frozen=True)
class TrainingData:
    """What is learned from and measured on, as the recipe's algorithm reads it.

    Attributes:
        train, held_out: examples (`Example` for what samples, else `Supervised`, `Pair` or `Answer`).
        prompts: held-out prompts, where an algorithm that does not sample has rewards to judge completions by.
    """

    train: Sequence[Any]
    held_out: Sequence[Any] = ()
    prompts: Sequence[Example] = ()


def read_tasks(
    recipe: Recipe, rows: Mapping[str, SplitRows], tokens: Tokens, progress: ProgressCallback | None = None
) -> TrainingData:
    """Return what a recipe learns from and measures on, of all of its tasks; each example has the name of its own.

    Args:
        rows: by task.
        progress: see `read_data`.

    Raises:
        UserError: see `read_data`; the name of the task stands before the message where there are several.
    """
    parts: list[TrainingData] = []
    for task, own in recipe.by_task.items():
        with of_task(task):
            data = read_data(own, rows[task].train, rows[task].held_out, tokens, progress)
        if own.data.streaming:
            data = replace(data, train=_streamed(own, rows[task], tokens, data.train))
        if not task:
            return data
        named = ([replace(one, task=task) for one in part] for part in (data.train, data.held_out, data.prompts))
        parts.append(TrainingData(*named))
    joined = ([one for part in parts for one in getattr(part, name)] for name in ("train", "held_out", "prompts"))
    return TrainingData(*joined)


def _streamed(recipe: Recipe, rows: SplitRows, tokens: Tokens, first: Sequence[Any]) -> Streamed[Any]:
    """Return the examples of the first window with what reads the others as they are needed."""

    def made(own: Rows, report: RowReport) -> list[Any]:
        examples = examples_of(recipe, own, tokens, report)
        if tokens.rows is not None:
            check_ids(tokens.tokenizer, tokens.rows, (ids for one in examples for ids in ids_of(one)))
        return examples

    return Streamed(first, examples_in(Windows(recipe.data, rows), recipe.data, made))


def read_data(
    recipe: Recipe, rows: Rows, held_out_rows: Rows, tokens: Tokens, progress: ProgressCallback | None = None
) -> TrainingData:
    """Return what a recipe learns from and measures on.

    Args:
        progress: called with (rows done, rows in all) of the rows to train on.

    Raises:
        UserError: rows cannot be learned from (see `build_examples` and its like), or use tokens that the model has no
            embedding for.
    """
    report = RowReport(recipe.data)
    report.progress = progress
    held, prompts = list(held_out_rows), []
    other = RowReport(recipe.data, recipe.data.eval or "", before=report)
    train = examples_of(recipe, rows, tokens, report)
    check_both_kinds(train)
    check_difficulties(train, recipe.data)
    held_out = examples_of(recipe, held, tokens, other) if held else []
    if held and recipe.rewards and not recipe.spec.samples:
        prompts = build_examples(held, recipe.data, tokens.tokenizer, tokens.stop_ids, other.again())
    if tokens.rows is not None:
        check_ids(tokens.tokenizer, tokens.rows, (ids for one in (*train, *held_out) for ids in ids_of(one)))
    return TrainingData(train, held_out, prompts)


def examples_of(recipe: Recipe, rows: Rows, tokens: Tokens, report: RowReport | None = None) -> list[Any]:
    """Return the examples that a recipe's algorithm learns from; a classifier's are (text, class).

    Raises:
        UserError: rows cannot be learned from.
    """
    data, tokenizer, stops = recipe.data, tokens.tokenizer, tokens.stop_ids
    report = report or RowReport(data)
    spec = recipe.spec
    if spec.rows == "prompts":
        return list(build_examples(rows, data, tokenizer, stops, report))
    if spec.rows == "texts":
        return list(zip(*labelled_texts(rows, data, report), strict=True))
    if spec.rows == "completions":
        (key,) = spec.lengths(recipe)
        return list(build_supervised(rows, data, spec.own(recipe), tokenizer, stops, report, key))
    if spec.rows == "answers":
        return list(read_answers(rows, recipe, tokenizer, stops, report))
    ((key, length),) = spec.lengths(recipe).items()
    return list(build_pairs(rows, data, length, tokenizer, stops, key, report))


def classes_of(train: Sequence[str], held_out: Sequence[str]) -> list[str]:
    """Return the classes that a classifier learns, in order, from the labels of its texts.

    Raises:
        UserError: there are fewer than two, or held-out texts have others.
    """
    labels = sorted(set(train))
    if len(labels) < 2:
        raise UserError(
            f"training data: {'every text has the label ' + repr(labels[0]) if labels else 'there are no texts'}; a "
            "classifier needs texts of at least two labels"
        )
    if unknown := sorted(set(held_out).difference(labels)):
        raise UserError(f"held-out data: label {unknown[0]!r} is not in the training data ({', '.join(labels)})")
    return labels


def ids_of(example: Any) -> list[list[int]]:
    """Return the token ids of an example's prompt and answers; none of a classifier's."""
    return [getattr(example, name) for name in _IDS if hasattr(example, name)]
