"""What tests of data share: rows made into examples, what was said of them, and what of them is learned."""

import logging
import re
from typing import Any

import pytest

from lowmem_rlhf.algorithms.sft.settings import SFTSettings
from lowmem_rlhf.data.prompts import Example, build_examples
from lowmem_rlhf.data.supervised import Pair, Supervised, build_pairs, build_supervised
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.recipe.sections import DataConfig

Messages = list[dict[str, Any]]


def turn(role: str, content: Any, **more: Any) -> dict[str, Any]:
    """Return one chat message."""
    return {"role": role, "content": content, **more}


def talk(*texts: str, system: str | None = None) -> Messages:
    """Return a conversation: texts of user and assistant by turns, a system message first where one is given."""
    first = [] if system is None else [turn("system", system)]
    return first + [turn(("user", "assistant")[place % 2], text) for place, text in enumerate(texts)]


def config(**data: Any) -> DataConfig:
    """Return the data section of a recipe without a reference answer."""
    return DataConfig(**{"train": "rows.jsonl", "answer": None, **data})


def stops_of(tokenizer: Any) -> frozenset[int]:
    """Return the stops of a model whose configurations name the tokenizer's end of sequence."""
    from transformers import LlamaConfig

    from lowmem_rlhf.architecture.stops import stop_ids_of

    return frozenset(stop_ids_of(tokenizer, LlamaConfig(eos_token_id=tokenizer.eos_token_id), None))


def sft(
    tokenizer: Any,
    rows: list[dict[str, Any]],
    learn: str = "last",
    stops: frozenset[int] | None = None,
    max_length: int = 4096,
    **data: Any,
) -> list[Supervised]:
    """Return the rows' examples for SFT; the columns are ``messages``, or else ``prompt`` and ``completion``."""
    if rows and "messages" in rows[0] and not {"completion", "messages"} & data.keys():
        data["messages"] = "messages"
    if "messages" not in data:
        data = {"prompt": "prompt", "completion": "completion", **data}
    settings = SFTSettings(max_length=max_length, learn=learn)
    return build_supervised(rows, config(**data), settings, tokenizer, stops_of(tokenizer) if stops is None else stops)


def prompts(tokenizer: Any, rows: list[dict[str, Any]], **data: Any) -> list[Example]:
    """Return the rows' prompts for rollouts; the column is ``messages`` or else ``prompt``."""
    if rows and "messages" in rows[0]:
        data = {"messages": "messages", **data}
    return build_examples(rows, config(**{"prompt": "prompt", "max_prompt_length": 4096, **data}), tokenizer)


def pairs(tokenizer: Any, rows: list[dict[str, Any]], max_length: int = 4096, **data: Any) -> list[Pair]:
    """Return the rows' preference pairs."""
    named = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected", **data}
    return build_pairs(rows, config(**named), max_length, tokenizer, stops_of(tokenizer))


def read(tokenizer: Any, example: Supervised) -> tuple[str, str]:
    """Return an example's prompt and completion as texts, special tokens written out."""
    return tokenizer.decode(example.prompt_ids), tokenizer.decode(example.completion_ids)


def learned_runs(example: Supervised) -> list[list[int]]:
    """Return the tokens that are learned, cut where tokens that are only read lie between them."""
    mask = example.learned if example.learned is not None else (True,) * len(example.completion_ids)
    assert len(mask) == len(example.completion_ids)
    runs: list[list[int]] = []
    before = False
    for token, learned in zip(example.completion_ids, mask, strict=True):
        if learned and not before:
            runs.append([])
        if learned:
            runs[-1].append(token)
        before = learned
    return runs


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what the package's data modules have warned of so far."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.name.startswith("lowmem_rlhf.data") and record.levelno >= logging.WARNING
    ]


def refusal(make: Any, *args: Any, **settings: Any) -> str:
    """Return the message of the user error that a call ends in; one or more plain lines."""
    with pytest.raises(UserError) as caught:
        make(*args, **settings)
    message = str(caught.value)
    assert "Traceback" not in message
    assert message.strip()
    return message


def names_row(message: str, number: int) -> bool:
    """Whether a message names a row by its number."""
    return re.search(rf"\brow {number}\b", message) is not None
