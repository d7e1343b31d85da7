"""Showing replies as they are drawn: as text, two side by side in a terminal, as plain values; and the prompt line."""

import io
import sys
from collections.abc import Sequence
from contextlib import suppress
from itertools import islice
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.inference.chat.talk import Reply, Talk
from lowmem_rlhf.plain_text import harmless
from lowmem_rlhf.stopping import only_interrupted

WIDE = 100  # columns of a terminal from which two answers stand side by side
TURN = 8  # tokens that a role writes before it is the other's turn: its 16-bit adapter copies are made once a turn


def answer(talk: Talk, text: str) -> dict[str, Any]:
    """Return the answers to one prompt as plain values, for ``--json``."""
    replies = talk.ask(text)
    for reply in replies:
        for _ in reply.pieces():
            pass
    counts = {"prompt": replies[0].prompt_tokens, **{reply.role: reply.tokens for reply in replies[::-1]}}
    return {"prompt": text, **{reply.role: reply.text for reply in replies[::-1]}, "tokens": counts}


def show(replies: Sequence[Reply], console: Console | None = None) -> None:
    """Draw and print replies: two side by side on a wide terminal, else one below the other."""
    console = console or Console()
    if len(replies) > 1 and console.is_terminal and console.width >= WIDE:
        _show_columns(replies, console)
        return
    out = console.file  # written as it is: rich would fold the lines
    for number, reply in enumerate(replies):
        if len(replies) > 1:
            out.write(f"{chr(10) if number else ''}{reply.role}:\n")
        for piece in reply.pieces():
            out.write(harmless(piece))
            out.flush()
        out.write("\n")
    out.flush()


def _show_columns(replies: Sequence[Reply], console: Console) -> None:
    writing = [reply.pieces() for reply in replies]
    with Live(console=console, auto_refresh=False) as live:
        try:
            while writing:
                for pieces in list(writing):
                    drawn = 0
                    for _ in islice(pieces, TURN):
                        drawn += 1
                        live.update(_columns(replies, console, max(1, console.height - 2)), refresh=True)
                    if drawn < TURN:
                        writing.remove(pieces)
        finally:
            live.update(_columns(replies, console), refresh=True)


def _columns(replies: Sequence[Reply], console: Console, lines: int | None = None) -> RenderableType:
    """Return a table with a column for each reply, with the last so many lines of each."""
    gap = 4
    width = (console.width - gap * (len(replies) - 1)) // len(replies)
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, gap, 0, 0))
    cells = []
    for reply in replies:
        table.add_column(reply.role, width=width)
        wrapped = Text(harmless(reply.text)).wrap(console, width)
        cells.append(Text("\n").join(wrapped[-lines:] if lines else wrapped))
    table.add_row(*cells)
    return table


def interact(talk: Talk) -> None:
    """Answer line after line of the standard input until an empty line, its end, /quit or Ctrl-C.

    Ctrl-C while an answer is written ends that answer only.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    _say(_welcome(talk))
    while (line := _line()).strip() not in ("", "/quit"):
        if line.strip() == "/reset":
            talk.forget()
            _say("forgotten")
            continue
        try:
            replies = talk.ask(line)
        except UserError as error:
            _say(f"error: {error}")
            continue
        try:
            show(replies)
        except KeyboardInterrupt as stop:
            if not only_interrupted(stop):
                raise
            print(flush=True)
        talk.remember(line, replies)


def _welcome(talk: Talk) -> str:
    memory = "earlier turns are kept until /reset" if talk.prompts.keeps_messages else "each prompt stands alone"
    lines = [f"{memory}; an empty line or /quit ends"]
    if talk.prompts.template:
        lines.append(f"what you type goes into the recipe's template: {talk.prompts.template}")
    return "\n".join(lines)


def _line() -> str:
    """Return the next line that the user types; an empty one at the end of the input."""
    typed = sys.stdin.isatty()
    if typed:
        with suppress(ImportError):
            import readline  # noqa: F401  (`input` then edits lines and recalls them)
    try:
        return input("> " if typed else "")
    except (EOFError, KeyboardInterrupt) as end:
        if isinstance(end, KeyboardInterrupt) and not only_interrupted(end):
            raise
        if typed:
            _say("")
        return ""


def _say(text: str) -> None:
    print(harmless(text), file=sys.stderr, flush=True)
