"""What `rewards` prints."""

import json
from typing import Any

from lowmem_rlhf.plain_text import harmless

_SHOWN = 60  # characters of a text


def print_rewards(known: dict[str, dict[str, Any]]) -> None:
    """Print the rewards by name, each with a sentence, its options and the columns that it reads."""
    for name, one in known.items():
        print(f"{name:21} {one['description']}")
        options = [_option(key, value) for key, value in one["options"].items()]
        for label, words in (("options", options), ("columns", one["columns"])):
            if words:
                print(f"{'':21} {label}: {', '.join(words)}")
    print("TRL's own are named trl.rewards:NAME, a function of your own path.py:function.")


def _option(name: str, option: dict[str, Any]) -> str:
    default = option["default"]
    shown = _short(default) if isinstance(default, str) else json.dumps(default)
    return f"{name} ({option['type']})" if option["required"] else f"{name}={shown}"


def _short(text: str) -> str:
    """Return the beginning of a text on one line."""
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def print_trial(trial: dict[str, Any]) -> None:
    """Print a value and the beginning of its text on each line, then what the reward reported."""
    for one in trial["scored"]:
        value = "none" if one["value"] is None else f"{one['value']:g}"
        print(harmless(f"{value:>8}  {_short(one['text'])}"))
    for name, value in trial["metrics"].items():
        print(harmless(f"{name}: {value:g}"))
