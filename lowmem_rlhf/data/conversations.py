"""What makes a conversation one that is learned from. No torch here."""

from collections.abc import Sequence

from lowmem_rlhf.data.bad_rows import RowError
from lowmem_rlhf.data.messages import Message, has_weight


def answered(messages: Sequence[Message], column: str, learn_all: bool = False) -> list[Message]:
    """Return a conversation up to its last answer that is learned, which is its end.

    Args:
        messages: in the form of `chat_messages`.
        column: that holds them, for messages.
        learn_all: each answer is learned; what follows the last one that has not weight 0 is left out.

    Raises:
        RowError: it does not end in an answer, or begins with one.
    """
    roles = [one["role"] for one in messages]
    if roles[-1] != "assistant":
        raise RowError(
            "a conversation that does not end with the assistant",
            f"the last message of column {column!r} must be the assistant's, which is learned; got a message of "
            f"{roles[-1]} (a column of prompts alone is named in data.prompt)",
        )
    if roles[-2:] == ["assistant", "assistant"]:
        raise RowError(
            "two answers at the end", f"column {column!r} ends in two messages of the assistant; join them into one"
        )
    if len(roles) > 1 and next(role for role in roles if role != "system") == "assistant" and "user" in roles:
        raise RowError(
            "a conversation that begins with the assistant",
            f"column {column!r} begins with the assistant's message; begin it with the user's",
        )
    if learn_all:
        weighed = [place for place, one in enumerate(messages) if one["role"] == "assistant" and has_weight(one)]
        messages = messages[: weighed[-1] + 1] if weighed else messages
    if not has_weight(messages[-1]):
        raise RowError(
            "an answer of weight 0",
            f"the last answer of column {column!r} has weight 0 and is not to be learned; remove the row"
            + ("" if learn_all or roles.count("assistant") == 1 else ", or set sft.learn=all to learn the others"),
        )
    content = messages[-1]["content"]
    if not content.strip() and not messages[-1].get("tool_calls"):
        raise RowError("an empty answer", f"the last answer of column {column!r} is empty; remove the row or fill it")
    return list(messages)


def places_learned(messages: Sequence[Message], column: str) -> list[int]:
    """Return the places of the answers that are learned where each is: all but those of weight 0.

    Raises:
        RowError: one is empty, or goes on with another answer.
    """
    places = [place for place, one in enumerate(messages) if one["role"] == "assistant" and has_weight(one)]
    for place in places if len(places) > 1 else ():
        if not str(messages[place]["content"]).strip() and not messages[place].get("tool_calls"):
            raise RowError(
                "an empty answer",
                f"message {place + 1} of column {column!r} is an empty answer; remove the row, fill it, or set "
                "sft.learn=last",
            )
        if place and messages[place - 1]["role"] == "assistant":
            raise RowError(
                "two answers in a row",
                f"messages {place} and {place + 1} of column {column!r} are both the assistant's; join them into "
                "one, or set sft.learn=last",
            )
    return places
