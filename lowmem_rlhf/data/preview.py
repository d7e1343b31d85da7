"""What a recipe's rows become: read, formatted and tokenized as for training, before any weights are loaded."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from lowmem_rlhf.architecture.vocabulary import check_ids
from lowmem_rlhf.data.bad_rows import RowReport
from lowmem_rlhf.data.curriculum import check_difficulties
from lowmem_rlhf.data.examples import examples_of, ids_of
from lowmem_rlhf.data.formats import detect_format
from lowmem_rlhf.data.labelled import check_both_kinds
from lowmem_rlhf.data.prompts import Example
from lowmem_rlhf.data.sources import peek, split_source
from lowmem_rlhf.data.supervised import Pair, Supervised
from lowmem_rlhf.data.tasks import Split
from lowmem_rlhf.data.values import Row
from lowmem_rlhf.engine.tokenizer import Tokens
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.progress import ProgressCallback
from lowmem_rlhf.recipe.data_sources import is_generated
from lowmem_rlhf.recipe.schema import Recipe

_BINS = 10


@dataclass(frozen=True)
class Piece:
    """A part of an example as the model sees it: its name, its text with special tokens written out, its tokens."""

    name: str  # prompt, learned, read, chosen, rejected, text, class
    text: str
    tokens: int


@dataclass
class SplitPreview:
    """What the rows of one split become.

    Attributes:
        source: the file or data set.
        rows: how many there are.
        kept: how many examples are made of them.
        shown: the first examples, each as pieces.
        lengths: tokens of every example that is made or too long.
        kept_lengths: those of them that are not too long.
        classes: those of a classifier's texts.
        fault: why nothing can be learned from these examples together; empty: something can.
        learned: tokens of every example that something is learned from.
        left_out: reasons, with their number of rows and the first (see `RowReport.left_out`).
        dropped: the same in sentences.
        said: what else is worth saying.
    """

    source: str
    rows: int
    kept: int = 0
    shown: list[list[Piece]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    kept_lengths: list[int] = field(default_factory=list)
    learned: list[int] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    fault: str = ""
    left_out: list[dict[str, Any]] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values; lengths as their quantiles and a histogram."""
        return {
            "source": self.source,
            "rows": self.rows,
            "examples": self.kept,
            "shown": [[{"part": p.name, "text": p.text, "tokens": p.tokens} for p in one] for one in self.shown],
            "lengths": {**quantiles(self.lengths), "histogram": histogram(self.lengths)},
            "learned_tokens": sum(self.learned),
            "left_out": self.left_out,
            "said": self.said,
        }


def with_format(recipe: Recipe, split: Split = "train") -> tuple[Recipe, str]:
    """Return the recipe with the columns of the format that its data have (see `detect_format`), and a line on it.

    Args:
        split: whose rows are looked at; a model that is evaluated by itself needs no training data.

    Raises:
        UserError: the data cannot be read.
    """
    lines: list[str] = []

    def with_columns(task: str, own: Recipe) -> Recipe:
        if is_generated(split_source(own.data, split)):  # with the columns that recipes have by default
            return own
        own, line = detect_format(own, *peek(own.data, split))
        if line:
            lines.append(f"{task}: {line}" if task else line)
        return own

    return recipe.with_each(with_columns), "; ".join(lines)


def preview_split(
    recipe: Recipe,
    split: Split,
    rows: Sequence[Row],
    tokens: Tokens | None,
    shown: int,
    progress: ProgressCallback | None = None,
    before: RowReport | None = None,
) -> tuple[SplitPreview, RowReport]:
    """Return what the rows of one split become, bad ones left out, and the report on them.

    Args:
        tokens: the model's; None: nothing is tokenized.
        shown: how many examples are kept as texts.
        progress: called with (rows done, rows in all).
        before: the report on the training rows, whose notes are not repeated.

    Raises:
        UserError: no chat can be made of the rows, or they use tokens that the model has no embedding for.
    """
    data = recipe.data
    found = SplitPreview(split_source(data, split), len(rows))
    report = RowReport(data, (data.eval or "") if split == "eval" else "", collect=True, before=before)
    report.progress = progress
    if tokens is None:
        return found, report
    made = examples_of(recipe, rows, tokens, report)
    found.kept = len(made)
    found.shown = [_pieces(one, tokens.tokenizer) for one in made[:shown]]
    found.lengths = [length for _, length in report.long.lengths] if report.long else _text_lengths(made, tokens)
    found.kept_lengths = [one for one in found.lengths if report.long is None or one <= report.long.limit]
    found.learned = [_learned(one) for one in made]
    found.left_out, found.dropped, found.said = report.left_out(), report.left_out_lines(), report.said()
    if recipe.spec.rows == "texts":
        found.classes = sorted({label for _, label in made})
    if tokens.rows is not None:
        check_ids(tokens.tokenizer, tokens.rows, (ids for one in made for ids in ids_of(one)))
    if split == "train":
        check_difficulties(made, data)
        try:
            check_both_kinds(made)
        except UserError as error:
            found.fault = str(error)
    return found, report


def _pieces(example: Any, tokenizer: Any) -> list[Piece]:
    def piece(name: str, ids: Sequence[int]) -> Piece:
        return Piece(name, tokenizer.decode(list(ids), clean_up_tokenization_spaces=False), len(ids))

    if isinstance(example, tuple):
        text, label = example
        return [Piece("text", text, len(tokenizer(text)["input_ids"])), Piece("class", label, 0)]
    if isinstance(example, Supervised):
        return [piece("prompt", example.prompt_ids), *_runs(example, piece)]
    if isinstance(example, Pair):
        names = (("prompt", example.prompt_ids), ("chosen", example.chosen_ids), ("rejected", example.rejected_ids))
        return [piece(name, ids) for name, ids in names]
    if isinstance(example, Example):
        return [piece("prompt", example.prompt_ids)]
    kind = "good answer" if example.good else "bad answer"
    return [piece("prompt", example.prompt_ids), piece(kind, example.completion_ids)]


def _runs(example: Supervised, piece: Callable[[str, Sequence[int]], Piece]) -> list[Piece]:
    """Return the completion cut where tokens begin or cease to be learned."""
    ids, learned = example.completion_ids, example.learned or (True,) * len(example.completion_ids)
    cuts = [0, *(place for place in range(1, len(ids)) if learned[place] != learned[place - 1]), len(ids)]
    return [piece("learned" if learned[start] else "read", ids[start:end]) for start, end in pairwise(cuts)]


def _text_lengths(examples: Sequence[Any], tokens: Tokens) -> list[int]:
    """Return the tokens of a classifier's texts, the only examples that no limit is held against."""
    texts = [text for text, _ in examples]
    return [len(ids) for ids in tokens.tokenizer(texts)["input_ids"]] if texts else []


def _learned(example: Any) -> int:
    if isinstance(example, Supervised):
        return example.learned_tokens
    return sum(map(len, ids_of(example)[1:]))


def quantiles(lengths: Sequence[int]) -> dict[str, int | None]:
    """Return the least, the middle, the 95th percentile and the most of lengths."""
    if not lengths:
        return dict.fromkeys(("min", "median", "p95", "max"))
    ordered = sorted(lengths)
    p95 = ordered[min(len(ordered) - 1, round(0.95 * (len(ordered) - 1)))]
    return {"min": ordered[0], "median": round(statistics.median(ordered)), "p95": p95, "max": ordered[-1]}


def histogram(lengths: Sequence[int]) -> list[dict[str, int]]:
    """Return up to ten bins of equal width: the lengths from ``from`` to ``to``, both included, and their ``count``."""
    if not lengths:
        return []
    low, high = min(lengths), max(lengths)
    width = -(-(high - low + 1) // _BINS)
    counts = [0] * -(-(high - low + 1) // width)
    for length in lengths:
        counts[(length - low) // width] += 1
    return [
        {"from": low + place * width, "to": min(low + (place + 1) * width - 1, high), "count": count}
        for place, count in enumerate(counts)
    ]
