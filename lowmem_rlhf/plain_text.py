"""Texts of models, data and files of others as plain text: nothing in them acts on a terminal. No torch here."""

import re
import unicodedata

# all but tab and line feed: ESC and C1 begin a terminal's sequences, a carriage return overwrites what stands before it
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
# formats (directions, joiners) and halves of characters; of selectors that change a character's width there are two
_UNSEEN, _SELECTORS = ("Cf", "Cs"), "\ufe0e\ufe0f"


def harmless(text: str) -> str:
    r"""Return a text with its control characters written out, as ``\u001b``, which JSON reads as the same character."""
    return _CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def on_one_line(text: str) -> str:
    """Return a text as a line of known width: single spaces for all white space, without characters that are not seen.

    Those are what turns a line's direction or joins characters, of which terminals disagree how wide the result is.
    """
    line = harmless(" ".join(text.split()))
    if line.isascii():
        return line
    return "".join(one for one in line if one not in _SELECTORS and unicodedata.category(one) not in _UNSEEN)
