"""What a chat template has written, compared with the messages that it was given. No torch here."""

from collections.abc import Collection, Sequence

from lowmem_rlhf.data.bad_rows import RowError
from lowmem_rlhf.data.messages import Message

THINK = ("<think>", "</think>")  # the tags of reasoning, as most templates write them
_REASONING = ("reasoning_content", "reasoning", "thinking")  # the keys that messages have for it


def must_be_written(message: Message) -> str:
    """Return what of a message must be written; of an earlier answer, templates mean to leave reasoning out."""
    content = str(message.get("content") or "")
    reasons = message["role"] == "assistant" and any(tag in content for tag in THINK)
    return "" if reasons else content


def unopened(rendered: str, answer: str) -> str:
    """Return an answer without the tag of its reasoning where the prompt has opened that already."""
    if not rendered.rstrip().endswith(THINK[0]) or not answer.lstrip().startswith(THINK[0]):
        return answer
    answer = answer.lstrip().removeprefix(THINK[0])
    return answer.lstrip("\n") if rendered[-1].isspace() else answer


def check_calls(message: Message, text: str) -> None:
    """Check that a text names the functions that a message calls.

    Raises:
        RowError: it does not.
    """
    for call in message.get("tool_calls") or ():
        if call["function"]["name"] not in text:
            raise RowError(
                "a tool call that the chat template leaves out",
                f"the model's chat template does not write the call of {call['function']['name']}; take another model",
            )


def shows_mapping(messages: Sequence[Message], text: str) -> bool:
    """Return whether a text has the arguments of a call as Python writes a mapping, where they are meant as JSON."""
    calls = [call["function"]["arguments"] for one in messages for call in one.get("tool_calls") or ()]
    return any(str(arguments) in text for arguments in calls if isinstance(arguments, dict) and arguments)


def holds(turn: str, answer: Message, content: str, notes: list[str], special: Collection[str]) -> bool:
    """Return whether a turn holds an answer's content, as far as it is not begun; what else differs is noted.

    Args:
        special: the special tokens of the tokenizer, any of which ends what is looked at behind the content.
    """
    check_calls(answer, turn)
    if key := _lost_reasoning(answer, turn):
        raise RowError(
            "reasoning that the chat template leaves out",
            f"the model's chat template does not write the answer's {key}; put it into its content",
        )
    if not content.strip():
        return True
    before, found, behind = turn.partition(content)
    if not found:
        before, found, behind = turn.partition(content.strip())
        if found:
            notes.append("the chat template trims white space of the answer")
    if not found:
        if squeezed(content) not in squeezed(turn):
            return False
        notes.append("the chat template changes white space within the answer")
    elif before.strip() and not answer.get("tool_calls"):
        notes.append(f"the chat template writes {short(before)} before the answer, which is learned with it")
    if found and not answer.get("tool_calls"):
        behind = behind[: min((place for token in special if (place := behind.find(token)) >= 0), default=None)]
        if behind.strip():
            notes.append(f"the chat template writes {short(behind)} behind the answer, which is learned with it")
    return True


def is_written(answer: Message, turn: str) -> bool:
    """Return whether an earlier turn of a conversation has an answer's content, its reasoning and its calls."""
    calls = [call["function"]["name"] for call in answer.get("tool_calls") or ()]
    texts = [str(answer["content"]).strip(), *calls]
    return all(text in turn for text in texts) and not _lost_reasoning(answer, turn)


def _lost_reasoning(answer: Message, turn: str) -> str:
    """Return the key of an answer's reasoning that a turn does not hold; empty: none."""
    there = squeezed(turn)
    given = [key for key in _REASONING if isinstance(answer.get(key), str)]
    return next((key for key in given if squeezed(answer[key]) not in there), "")


def squeezed(text: str) -> str:
    """Return a text without its white space."""
    return "".join(text.split())


def short(text: str, most: int = 60) -> str:
    """Return a text as Python writes it, cut where it is long."""
    return repr(text if len(text) <= most else text[: most - 3] + "...")
