"""From rows to the prompts that are sampled from."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lowmem_rlhf.data.bad_rows import RowReport
from lowmem_rlhf.data.columns import check_answer_part, used_columns
from lowmem_rlhf.data.messages import Message
from lowmem_rlhf.data.prompt_writer import Prompt, PromptWriter
from lowmem_rlhf.data.rendered import short
from lowmem_rlhf.data.values import Row, value_at
from lowmem_rlhf.recipe.sections import DataConfig

# What a reward function is given under these names is not a column of the row (TRL drops the same ones).
RESERVED = ("prompt", "prompts", "completion", "completions", "completion_ids")
_CONTINUED = (
    "the prompt ends in an assistant's message, which is taken as a begun answer and continued; where it is a finished "
    "one, end the prompt with the user's message"
)

_NO_HEADER = (
    "the chat template lets no prompt end in {}, which it writes before answers (it does not look at "
    "add_generation_prompt), so a completion has to begin with that"
)


@dataclass(frozen=True)
class Example:
    """One prompt: what rewards see, what the model reads, the columns that rewards are given, its task and its row."""

    prompt: str | list[Message]  # chat messages for a chat prompt, otherwise the plain text
    prompt_ids: list[int]
    columns: dict[str, Any]  # the row's other columns, with the reference under `answer` too
    text: str = ""  # the prompt as the model reads it, special tokens written out
    task: str = ""
    number: int = field(default=0, compare=False)  # of its row in the source


def build_examples(
    rows: Iterable[Mapping[str, Any]],
    data: DataConfig,
    tokenizer: Any,
    stop_ids: frozenset[int] = frozenset(),
    report: RowReport | None = None,
) -> list[Example]:
    """Turn rows into prompts.

    A prompt is a chat when `data.chat` is true, or auto and the tokenizer has a chat template; a prompt column that
    holds messages is used as it is, with the system message put first when it has none. The prompt of a conversation
    (`data.messages`) is all that comes before its last message, the assistant's. A plain prompt is the system text, an
    empty line and the text, tokenized as the tokenizer does by default (with its BOS if it has one), and without what
    the tokenizer puts behind it.

    Args:
        stop_ids: tokens that end a completion; a prompt must not end in one.
        report: collects what is wrong with rows and what is said of them; absent: one of this call's own.

    Returns:
        One example a row. Rows that cannot be used are left out with `data.bad_rows: drop`, those above
        `data.max_prompt_length` tokens with `data.long_prompts: drop` too; how many is logged as a warning.

    Raises:
        UserError: no chat template for a chat, a row without a usable prompt (by number), a prompt that is too long, or
            no prompt left after dropping.
    """
    report = report or RowReport(data)
    writer = PromptWriter(data, tokenizer, stop_ids, report)
    numbered_rows = report.each(rows)
    check_answer_part(numbered_rows, data)
    names = dict.fromkeys(name for row in numbered_rows for name in row)
    examples: list[Example] = []
    for chunk in report.chunks(numbered_rows):
        examples += _examples(chunk, names, writer, report)
    report.finish(len(examples))
    return examples


def _examples(rows: Sequence[Row], names: Iterable[str], writer: PromptWriter, report: RowReport) -> list[Example]:
    data = writer.data
    prompts: list[Prompt] = []
    for row in rows:
        with report.row(row.number):
            prompts.append(writer.prompt(row))
    examples = []
    for prompt, ids in zip(prompts, writer.prompt_ids(prompts), strict=True):
        number = prompt.row.number
        with report.row(number):
            writer.check_end(ids)
            if not report.fits(number, len(ids), data.max_prompt_length, "data.max_prompt_length", "prompt"):
                continue
            columns = _columns(prompt.row, data, names)
            examples.append(Example(prompt.prompt, ids, columns, prompt.text, number=number))
            if not isinstance(prompt.prompt, str) and prompt.prompt[-1]["role"] == "assistant":
                report.note(_CONTINUED, number)
            elif writer.template is not None and (header := writer.template.renderer.header_left_out):
                report.note(_NO_HEADER.format(short(header)), number)
    return examples


def _columns(row: Row, data: DataConfig, names: Iterable[str]) -> dict[str, Any]:
    """Return what rewards are given of a row: every column that any row has, None where this one lacks it."""
    # A column that a template quotes is not the prompt itself: rewards may want it.
    left_out = RESERVED if data.template is not None else (*RESERVED, *used_columns(data))
    columns = {name: row.get(name) for name in names if name not in left_out}
    return columns if data.answer is None else {**columns, "answer": value_at(row, data.answer)}
