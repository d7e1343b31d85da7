"""What a chat template has written, compared with the messages that it was given. No torch here."""

from lowmem_rlhf.data.bad_rows import RowError
from lowmem_rlhf.data.messages import Message

THINK = ("<think>", "</think>")  # the tags of reasoning, as most templates write them


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


def holds(turn: str, answer: Message, content: str, notes: list[str]) -> bool:
    """Return whether a turn holds an answer's content, as far as it is not begun; what else differs is noted."""
    check_calls(answer, turn)
    for key in ("reasoning_content", "reasoning", "thinking"):
        if isinstance(value := answer.get(key), str) and squeezed(value) not in squeezed(turn):
            raise RowError(
                "reasoning that the chat template leaves out",
                f"the model's chat template does not write the answer's {key}; put it into its content",
            )
    if not content.strip():
        return True
    before, found, _ = turn.partition(content)
    if not found:
        before, found, _ = turn.partition(content.strip())
        if found:
            notes.append("the chat template trims white space of the answer")
    if not found:
        if squeezed(content) not in squeezed(turn):
            return False
        notes.append("the chat template changes white space within the answer")
    elif before.strip() and not answer.get("tool_calls"):
        notes.append(f"the chat template writes {short(before)} before the answer, which is learned with it")
    return True


def squeezed(text: str) -> str:
    """Return a text without its white space."""
    return "".join(text.split())


def short(text: str, most: int = 60) -> str:
    """Return a text as Python writes it, cut where it is long."""
    return repr(text if len(text) <= most else text[: most - 3] + "...")
