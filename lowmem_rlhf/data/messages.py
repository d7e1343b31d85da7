"""Chat messages as data sets hold them, as the list of ``{"role", "content"}`` that chat templates take.

Understood are OpenAI's (content in parts, tool calls whose arguments are JSON text, content null beside them) and
ShareGPT's (``from`` and ``value``). Role names that are the same role under another name are translated. No torch here.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lowmem_rlhf.data.bad_rows import RowError
from lowmem_rlhf.data.values import is_missing, text_of

Message = dict[str, Any]
ROLES = ("system", "user", "assistant", "tool")
_ALIASES = {
    **dict.fromkeys(("human", "user", "prompter", "customer"), "user"),
    **dict.fromkeys(("gpt", "assistant", "bot", "chatbot", "chatgpt", "model", "ai"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "function_response", "observation", "tool_response"), "tool"),
}
_PRINTED = re.compile(r"\s*\[\{'(role|content|from|value)':")
_CALLS = ("function_call", "tool_call", "tool_calls")  # roles of messages that hold an assistant's call as JSON text


def is_conversation(value: Any) -> bool:
    """Whether a value looks like a list of chat messages, whatever its keys are called."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(one, dict) and (_is_openai(one) or one.keys() >= _SHAREGPT) for one in value)
    )


_SHAREGPT = {"from", "value"}


def conversation_of(value: Any) -> list[Message]:
    """Return the chat messages that a value is, or holds as JSON text, as they are; empty: it is none."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        try:
            value = json.loads(value)
        except ValueError:
            return []
    return value if is_conversation(value) else []


def _is_openai(message: Message) -> bool:
    return "role" in message and any(key in message for key in ("content", "tool_calls", "function_call"))


def role_of(name: Any) -> str:
    """Return which of the usual roles a name is one for; empty: none."""
    return _ALIASES.get(str(name).strip().casefold(), "")


def is_written_out(text: str) -> bool:
    """Whether a text is a list of chat messages, as JSON or as Python prints it."""
    return _PRINTED.match(text) is not None or bool(conversation_of(text))


def chat_messages(
    value: Any, column: str, knows_role: Callable[[str], bool], note: Callable[[str], None]
) -> list[Message]:
    """Return a column's list of chat messages in the form that chat templates take.

    Args:
        value: what the column holds.
        column: its name, for messages.
        knows_role: whether the chat template names a role, which is then left as it is unless the template names the
            usual one too.
        note: called with what was translated.

    Raises:
        RowError: it is something else, or has a role that is none.
    """
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        value = _json_list(value, column)
    if value == []:
        raise RowError("no conversation", f"column {column!r} has no messages; remove the row or fill it")
    if not isinstance(value, list):
        kind = "nothing" if is_missing(value) else type(value).__name__
        raise RowError("no conversation", f"column {column!r} must hold a list of chat messages; got {kind}")
    if not is_conversation(value):
        raise RowError(
            "no conversation",
            f"column {column!r} is a list but not one of chat messages; each must be {{'role': ..., 'content': TEXT}}",
        )
    return [_message(one, place, column, knows_role, note) for place, one in enumerate(value, start=1)]


def _json_list(text: str, column: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise RowError(
            "no conversation",
            f"column {column!r} holds a list that is not JSON ({error}); write it with json.dumps, and not as Python "
            "prints it",
        ) from error


def _message(
    given: Message, place: int, column: str, knows_role: Callable[[str], bool], note: Callable[[str], None]
) -> Message:
    # Arrow fills the keys that only other messages have with None.
    message = {key: part for key, part in given.items() if part is not None}
    if "role" not in message and "from" in message:
        message = {"role": message.pop("from"), "content": message.pop("value", None), **message}
    where = f"message {place} of column {column!r}"
    if (role := message.get("role")) in _CALLS and not knows_role(role):  # ShareGPT's sets of tool calls
        note(f"role {role!r} is taken as an assistant's tool call")
        message |= {"role": "assistant", "tool_calls": _calls(message.get("content"), where), "content": ""}
    message["role"] = _role(message.get("role"), where, knows_role, note)
    if call := message.pop("function_call", None):  # OpenAI's older form
        message["tool_calls"] = [{"type": "function", "function": call}]
    if calls := message.get("tool_calls"):
        message["tool_calls"] = [_tool_call(one, where) for one in calls]
    elif "tool_calls" in message:
        del message["tool_calls"]
    message["content"] = _content(message.get("content"), where, bool(calls))
    return message


def _role(role: Any, where: str, knows_role: Callable[[str], bool], note: Callable[[str], None]) -> str:
    known = role_of(role)
    # Gemma's templates write "model" themselves, for messages of the assistant.
    if isinstance(role, str) and (role in ROLES or (knows_role(role) and not (known and knows_role(known)))):
        return role
    if not known:
        raise RowError(
            "an unknown role",
            f"{where} has the role {role!r}, which neither is one of {', '.join(ROLES)} nor stands in the model's chat "
            "template; give it one of these",
        )
    note(f"role {role!r} is taken as {known}")
    return known


def _content(content: Any, where: str, calls: bool) -> str:
    if isinstance(content, str):
        return content
    if content is None and calls:
        return ""
    if isinstance(content, Sequence):
        return "".join(_part(part, where) for part in content)
    if isinstance(content, dict) or is_missing(content):
        raise RowError("a message without text", f"{where} has no text as its content; got {type(content).__name__}")
    return text_of(content)


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise RowError("a part that is no text", f"{where} holds a part of type {kind!r}; only texts can be learned here")


def _calls(content: Any, where: str) -> list[Any]:
    """Return the calls that a message has as its content: an object or a list of them, as JSON text or not."""
    try:
        found = json.loads(content) if isinstance(content, str) else content
    except ValueError as error:
        raise RowError("a malformed tool call", f"{where} is a tool call that is not JSON ({error})") from error
    return found if isinstance(found, list) else [found]


def _tool_call(call: Any, where: str) -> Message:
    """Return a tool call with its arguments as a mapping, which is how chat templates read them."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError("a malformed tool call", f"{where} has a tool call without the name of a function")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except ValueError as error:
            raise RowError(
                "a malformed tool call", f"{where}: the arguments of {function['name']} are not JSON ({error})"
            ) from error
    elif isinstance(arguments, dict):  # Arrow fills what only other calls have
        arguments = {key: value for key, value in arguments.items() if value is not None}
    rest = {
        key: value for key, value in call.items() if key not in ("function", "name", "arguments") and value is not None
    }
    return {"type": "function", **rest, "function": {"name": function["name"], "arguments": arguments}}


def with_text_arguments(messages: Sequence[Message]) -> list[Message]:
    """Return messages with the arguments of their tool calls as JSON text, as OpenAI's have them."""
    return [
        {**message, "tool_calls": [_as_text(call) for call in calls]}
        if (calls := message.get("tool_calls"))
        else message
        for message in messages
    ]


def _as_text(call: Message) -> Message:
    function = call["function"]
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


def has_weight(message: Message) -> bool:
    """Whether a message may be learned; one of weight 0 is only read."""
    return message.get("weight") not in (0, "0")


def tools_of(row: Mapping[str, Any]) -> Any:
    """Return the tools that a row describes, as a list, or None; some sets hold them as JSON text."""
    tools = row.get("tools")
    if isinstance(tools, str) and tools.lstrip().startswith("[{"):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise RowError("malformed tools", f"column 'tools' is not JSON ({error})") from error
    described = isinstance(tools, list) and all(
        isinstance(one, dict) and ("function" in one or "name" in one) for one in tools
    )
    return tools if described and tools else None
