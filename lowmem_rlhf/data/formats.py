"""Formats that data sets have: recognised by their columns where the recipe does not name its own. No torch here."""

from collections.abc import Sequence
from typing import Any

from lowmem_rlhf.data.columns import used_columns
from lowmem_rlhf.data.messages import conversation_of, is_conversation, role_of
from lowmem_rlhf.data.values import Row
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.recipe.sections import DataConfig

_CONVERSATIONS = ("messages", "conversations", "conversation", "dialogue", "chat")
_PROMPTS = ("prompt", "question", "instruction", "problem", "query")
_ANSWERS = ("completion", "answer", "output", "response", "solution")


def detect_format(recipe: Recipe, names: Sequence[str], rows: Sequence[Row]) -> tuple[Recipe, str]:
    """Return the recipe with the columns of a known format, and a line that says which.

    Only what the recipe leaves at its default is set, and only where the data lack the default's columns. The recipe
    comes back as it is, with an empty line, where nothing is recognised.

    Args:
        names: the columns of the training data.
        rows: a few of its rows.
    """
    set_fields = recipe.data.model_fields_set
    changes, format_name = _changes(recipe, set(names), list(rows[:20]), set_fields)
    if not changes:
        return recipe, ""
    shown = ", ".join(f"data.{key}={'null' if value is None else repr(value)}" for key, value in changes.items())
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=changes)}), f"{format_name}: {shown}"


def _changes(recipe: Recipe, names: set[str], rows: list[Row], set_fields: set[str]) -> tuple[dict[str, Any], str]:
    data = recipe.data
    own = {"prompt", "template", "messages", "text"} & set_fields
    if own and all(name.split(".")[0] in names for name in used_columns(data)) and not _is_pair(recipe):
        return {}, ""
    if recipe.spec.rows == "answers" and _may_be_labelled(data, names):
        return _labelled(data, names, set_fields)
    if _is_pair(recipe):
        return _pair(data, names, rows, set_fields)
    if recipe.spec.rows == "completions" and not own:
        return _supervised(data, names, rows)
    return _online(data, names, rows, set_fields) if recipe.spec.samples and not own else ({}, "")


def _is_pair(recipe: Recipe) -> bool:
    return recipe.data.chosen is not None


_OPENAI_PAIR = {"prompt": "input.messages", "chosen": "preferred_output", "rejected": "non_preferred_output"}


def _pair(data: DataConfig, names: set[str], rows: list[Row], set_fields: set[str]) -> tuple[dict[str, Any], str]:
    usual = (data.chosen, data.rejected) == ("chosen", "rejected") and "prompt" not in set_fields
    if usual and {name.split(".")[0] for name in _OPENAI_PAIR.values()} <= names:
        return dict(_OPENAI_PAIR), "OpenAI's preference pairs"
    if data.prompt is None or data.template is not None or not {data.chosen, data.rejected} <= names:
        return {}, ""
    values = [row.get(str(data.chosen)) for row in rows]
    whole = bool(values) and all(is_conversation(value) and len(value) > 1 for value in values if value)
    dialogue = bool(values) and all(isinstance(v, str) and v.lstrip().startswith("Human:") for v in values if v)
    if data.prompt in names or not (whole or dialogue):
        if "prompt" not in set_fields and data.prompt not in names and (other := _first(_PROMPTS, names)):
            return _asked(other, names), "preference pairs"
        return {}, ""
    kind = "whole conversations" if whole else "dialogues of Human and Assistant"
    return {"prompt": None}, f"preference pairs that hold {kind}, whose common beginning is the prompt"


def _may_be_labelled(data: DataConfig, names: set[str]) -> bool:
    """Whether data hold answers with a label and no pairs, where the recipe names neither or just these."""
    named = {data.completion or "completion", data.label or "label"}
    return named <= names and data.chosen in (None, "chosen") and not {"chosen", "rejected"} & names


def _labelled(data: DataConfig, names: set[str], set_fields: set[str]) -> tuple[dict[str, Any], str]:
    changes: dict[str, Any] = {}
    if "prompt" not in set_fields and data.prompt not in names and "prompt" in names:
        changes = {"prompt": "prompt"}
    if data.label is None:
        changes |= {"completion": "completion", "label": "label", "chosen": None, "rejected": None}
    return changes, "labelled answers (KTO)"


def _supervised(data: DataConfig, names: set[str], rows: list[Row]) -> tuple[dict[str, Any], str]:
    if data.prompt in names and str(data.completion) in names:
        return {}, ""
    if data.completion not in (None, "answer") and str(data.completion).split(".")[0] not in names:
        return {}, ""  # the recipe names a column that is not there: an error, and no reason to take another one
    if column := _conversation_column(names, rows):
        kind = "ShareGPT's conversations" if "from" in _first_message(rows, column) else "conversations"
        return {"messages": column, "completion": None, "answer": None}, kind
    completion = data.completion if data.completion in names else _first(_ANSWERS, names)
    if completion is None:
        if "text" in names and not names & {*_PROMPTS}:
            return {"text": "text", "completion": None, "answer": None}, "plain texts"
        return {}, ""
    if {"instruction", "input"} <= names:
        asked = _asked("instruction", names)
        return {**asked, "completion": completion, "answer": None}, "Alpaca's instructions"
    prompt = data.prompt if data.prompt in names else _first([one for one in _PROMPTS if one != completion], names)
    if prompt is None:
        return {}, ""
    return {"prompt": prompt, "completion": completion, "answer": None}, "prompts with answers"


def _asked(prompt: str, names: set[str]) -> dict[str, Any]:
    """Return what a prompt is made of: Alpaca's instruction goes with its input."""
    if prompt == "instruction" and "input" in names:
        return {"template": "{instruction}\n\n{input?}"}
    return {"prompt": prompt}


def _online(data: DataConfig, names: set[str], rows: list[Row], set_fields: set[str]) -> tuple[dict[str, Any], str]:
    if data.prompt in names:
        return {}, ""
    answer: dict[str, Any] = {}
    if "answer" not in set_fields and data.answer not in names:
        answer = {"answer": None}
    if (column := _first(_PROMPTS, names)) is not None:
        return {**_asked(column, names), **answer}, "prompts"
    if column := _conversation_column(names, rows):
        if any(_last_role(row.get(column)) == "user" for row in rows):
            return {"prompt": column, **answer}, "conversations that end in a prompt"
        return {"messages": column, **answer}, "conversations, answered anew at their last message"
    return {}, ""


def _conversation_column(names: set[str], rows: list[Row]) -> str | None:
    for name in _CONVERSATIONS:
        if name in names and any(conversation_of(row.get(name)) for row in rows):
            return name
    return None


def _last_role(value: Any) -> str:
    """Return the role of a conversation's last message; empty: it is none."""
    last = (conversation_of(value) or [{}])[-1]
    return role_of(last.get("role", last.get("from")))


def _first_message(rows: list[Row], column: str) -> dict[str, Any]:
    return next((found[0] for row in rows if (found := conversation_of(row.get(column)))), {})


def _first(wanted: Sequence[str], names: set[str]) -> str | None:
    return next((name for name in wanted if name in names), None)
