"""Texts of models, data and files of others as plain text: nothing in them acts on a terminal. No torch here."""

import re

# all but tab and line feed: ESC and C1 begin a terminal's sequences, a carriage return overwrites what stands before it
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def harmless(text: str) -> str:
    r"""Return a text with its control characters written out, as ``\u001b``, which JSON reads as the same character."""
    return _CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
