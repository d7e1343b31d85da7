"""From rows to what is learned without sampling: completions for SFT, preference pairs, labelled texts.

A prompt is the one that rollouts of the same recipe start from, token for token, so that a later online run goes on
from exactly what was learned here. Prompt and completion are therefore tokenized apart.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowmem_rlhf.algorithms.sft.settings import SFTSettings
from lowmem_rlhf.data.bad_rows import RowError, RowReport
from lowmem_rlhf.data.columns import cell
from lowmem_rlhf.data.messages import Message
from lowmem_rlhf.data.preferences import answer_of, filled, margin_of, pair_of
from lowmem_rlhf.data.prompt_writer import Prompt, PromptWriter
from lowmem_rlhf.data.turns import Segments, TurnWriter, ended, seams
from lowmem_rlhf.data.values import Row, text_of
from lowmem_rlhf.recipe.sections import DataConfig

Rows = Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class Supervised:
    """An example for SFT: tokens that are only read, of which there is always one, and tokens that are learned.

    Attributes:
        learned: which tokens of the completion are learned; None: all of them.
        task: the name of the task that it is of.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    learned: tuple[bool, ...] | None = None
    task: str = ""

    @property
    def learned_tokens(self) -> int:
        """The number of tokens that are learned."""
        return len(self.completion_ids) if self.learned is None else sum(self.learned)


@dataclass(frozen=True)
class Pair:
    """A prompt with a better and a worse answer, and by how much the scores should differ at least."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    margin: float


@dataclass(frozen=True)
class _Draft:
    """A row's prompt with its answers, before they are tokenized."""

    prompt: Prompt
    answers: Sequence[Message]
    turns: Sequence[str]


def build_supervised(
    rows: Rows,
    data: DataConfig,
    settings: SFTSettings,
    tokenizer: Any,
    stop_ids: frozenset[int],
    report: RowReport | None = None,
    length_key: str = "sft.max_length",
) -> list[Supervised]:
    """Turn rows into examples for SFT.

    With `data.text` all of a text is learned but its first token (the BOS, where the tokenizer puts one). Otherwise a
    prompt is that of `build_examples`, and what is learned is `data.completion` (a text, or a list of one assistant
    message), or of `data.messages` the last message or all of the assistant's (`sft.learn`). A chat's completion is
    the assistant's turn as the chat template writes it. A plain one begins with a newline unless there is whitespace
    already, in the text or at the prompt's end: the newline is learned, and the prompts are those of rollouts. Every
    answer ends with one stop token.

    Args:
        settings: with ``completion_only_loss`` false all of an example is learned but its first token.
        stop_ids: the tokens that end a completion when the model samples.
        report: collects what is wrong with rows and what is said of them; absent: one of this call's own.
        length_key: the recipe key of ``settings.max_length``, for messages.

    Returns:
        One example a row, or one an answer where the chat template writes earlier answers differently from the last.
        Rows that cannot be learned from, or have more than ``settings.max_length`` tokens, are left out where
        `data.bad_rows` or `data.long_prompts` says so.

    Raises:
        UserError: such rows where they are errors (all reasons in one message), or none left.
    """
    report = report or RowReport(data)
    candidates = [(row.number, one) for row, one in supervised_rows(rows, data, settings, tokenizer, stop_ids, report)]
    examples = []
    for number, one in candidates:
        length = len(one.prompt_ids) + len(one.completion_ids)
        if report.fits(number, length, settings.max_length, length_key, "example"):
            examples.append(one)
    report.finish(len(examples))
    return examples


def supervised_rows(
    rows: Rows,
    data: DataConfig,
    settings: SFTSettings,
    tokenizer: Any,
    stop_ids: frozenset[int],
    report: RowReport,
    check: Callable[[Row], Any] = lambda row: None,
) -> list[tuple[Row, Supervised]]:
    """Return the examples of `build_supervised` of any length with their rows; the report is left unfinished.

    Args:
        check: called with each row; a `RowError` in it counts for the row.
    """
    examples: list[tuple[Row, Supervised]] = []
    if data.text is not None:
        for chunk in report.chunks(report.each(rows)):
            examples += _whole_texts(chunk, data.text, tokenizer, stop_ids, report)
        return examples
    writer = TurnWriter(PromptWriter(data, tokenizer, stop_ids, report))
    for chunk in report.chunks(report.each(rows)):
        examples += _supervised(chunk, writer, settings, report, check)
    if not settings.completion_only_loss:
        examples = [
            (row, Supervised(one.prompt_ids[:1], one.prompt_ids[1:] + one.completion_ids)) for row, one in examples
        ]
    return examples


def _supervised(
    rows: Sequence[Row], writer: TurnWriter, settings: SFTSettings, report: RowReport, check: Callable[[Row], Any]
) -> list[tuple[Row, Supervised]]:
    data = writer.prompts.data
    drafts: list[_Draft] = []
    whole: list[Segments] = []
    for row in rows:
        with report.row(row.number):
            check(row)
            if data.messages is None:
                answer = answer_of(row, str(data.completion), writer.prompts)
                drafts.append(_draft(writer, writer.prompts.prompt(row), [answer]))
                continue
            one_text, parts = writer.conversation(row, settings.learn == "all")
            if one_text is not None:
                whole.append(one_text)
            drafts += [_draft(writer, prompt, [answer]) for prompt, answer in parts]
    examples = [(row, Supervised(prompt, answers[0])) for row, prompt, answers in _tokenized(drafts, writer, report)]
    writer.compare_seams([seam for one in whole for seam in seams(*one)])
    for prompt, segments in whole:
        with report.row(prompt.row.number):
            examples.append((prompt.row, Supervised(*writer.learned_segments(prompt, segments))))
    return sorted(examples, key=lambda item: item[0].number)


def build_pairs(
    rows: Rows,
    data: DataConfig,
    max_length: int,
    tokenizer: Any,
    stop_ids: frozenset[int],
    length_key: str = "reward_model.max_length",
    report: RowReport | None = None,
) -> list[Pair]:
    """Turn rows into preference pairs; prompts and answers are made as in `build_supervised`.

    Args:
        max_length: the most tokens that a prompt with the longer of its answers may have.
        stop_ids: the tokens that end a completion when the model samples.
        length_key: the recipe key of ``max_length``, for messages.
        report: as of `build_supervised`.

    Returns:
        One pair a row, less those that are left out. The margin is 0 without `data.margin`.

    Raises:
        UserError: as `build_supervised`; two answers that are the same, or a margin that is no finite number.
    """
    report = report or RowReport(data)
    writer = TurnWriter(PromptWriter(data, tokenizer, stop_ids, report))
    pairs = []
    for chunk in report.chunks(report.each(rows)):
        for number, pair in _pairs(chunk, writer, report):
            length = len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))
            if report.fits(number, length, max_length, length_key, "pair"):
                pairs.append(pair)
    report.finish(len(pairs))
    return pairs


def _pairs(rows: Sequence[Row], writer: TurnWriter, report: RowReport) -> list[tuple[int, Pair]]:
    """Return the pairs of rows that hold one, each with its row's number."""
    data = writer.prompts.data
    drafts, margins = [], {}
    for row in rows:
        with report.row(row.number):
            value, better, worse = pair_of(row, writer.prompts)
            margins[row.number] = margin_of(row, data.margin)
            drafts.append(_draft(writer, writer.prompts.prompt(row, value), [better, worse]))
    pairs = []
    for row, prompt_ids, (chosen, rejected) in _tokenized(drafts, writer, report):
        with report.row(row.number):
            if chosen == rejected:
                raise RowError(
                    "equal answers",
                    f"columns {data.chosen!r} and {data.rejected!r} hold the same answer, from which nothing can be "
                    "learned; remove the row",
                )
            pairs.append((row.number, Pair(prompt_ids, chosen, rejected, margins[row.number])))
    return pairs


def labelled_texts(rows: Rows, data: DataConfig, report: RowReport | None = None) -> tuple[list[str], list[str]]:
    """Return the texts of `data.text` and the class of each, from `data.label`; a whole number becomes its digits.

    Raises:
        UserError: rows (by number) with a missing column, an empty text, or a class that is neither a text nor a whole
            number, where they are errors; or none left.
    """
    assert data.text is not None and data.label is not None  # the recipe has seen to it
    report = report or RowReport(data)
    labelled: list[tuple[str, str]] = []
    for row in report.each(rows):
        with report.row(row.number):
            text, label = filled(cell(row, data.text, "data.text"), data.text), cell(row, data.label, "data.label")
            if not isinstance(label, str | int) or not str(label).strip():
                raise RowError(
                    "no class", f"column {data.label!r} must hold a class, a text or a whole number; got {label!r}"
                )
            labelled.append((text, text_of(label)))
    report.finish(len(labelled))
    return [text for text, _ in labelled], [label for _, label in labelled]


def _draft(writer: TurnWriter, prompt: Prompt, answers: Sequence[Message]) -> _Draft:
    return _Draft(prompt, answers, [writer.turn(prompt, answer) for answer in answers])


def _tokenized(
    drafts: Sequence[_Draft], writer: TurnWriter, report: RowReport
) -> list[tuple[Row, list[int], list[list[int]]]]:
    """Return row, prompt ids and the ids of each answer, of the drafts that are sound."""
    prompt_ids = writer.prompts.prompt_ids([draft.prompt for draft in drafts])
    turn_ids = iter(writer.turn_ids([turn for draft in drafts for turn in draft.turns]))
    tokenized = []
    for draft, ids in zip(drafts, prompt_ids, strict=True):
        raw = [next(turn_ids) for _ in draft.turns]
        with report.row(draft.prompt.row.number):
            writer.prompts.check_end(ids)
            tokenized.append((draft.prompt.row, ids, [writer.ended(one) for one in raw]))
    writer.compare_seams([(draft.prompt, turn) for draft in drafts for turn in draft.turns])
    return tokenized


def _whole_texts(
    rows: Sequence[Row], column: str, tokenizer: Any, stop_ids: frozenset[int], report: RowReport
) -> list[tuple[Row, Supervised]]:
    texts: list[tuple[Row, str]] = []
    for row in rows:
        with report.row(row.number):
            texts.append((row, filled(cell(row, column, "data.text"), column)))
    ids = tokenizer([text for _, text in texts])["input_ids"] if texts else []
    examples = []
    for (row, _), one in zip(texts, ids, strict=True):
        with report.row(row.number):
            if not one:
                raise RowError("a text without tokens", f"column {column!r} has no tokens; remove the row")
            examples.append((row, Supervised(one[:1], ended(one[1:], tokenizer, stop_ids))))
    return examples
