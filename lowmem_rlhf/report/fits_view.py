"""What fits, as tables: models against cards, or for a single card with the longest completion of each model."""

from collections.abc import Iterable, Iterator
from math import floor

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lowmem_rlhf.algorithms.registry import spec_of
from lowmem_rlhf.display.format import format_bytes, format_number
from lowmem_rlhf.display.tables import plain_table
from lowmem_rlhf.planning.fits import Fit, WhatFits
from lowmem_rlhf.planning.inputs import budget_bytes

GIB = 1024**3
_CELL, _GAP = 20, 2  # characters of the widest cell, such as "16-bit 131072 9,900/s", and between columns
_DETAILS = 74  # the fewest columns of the table of a single card: with fewer, numbers would be folded
_WIDE = 500  # columns where nothing is folded, outside a terminal


def print_fits(fits: WhatFits, console: Console | None = None) -> None:
    """Print a table for each algorithm, what stands in the way, and which cards a column is."""
    console = console or Console()
    if not console.is_terminal:
        console.width = _WIDE
    single = len(fits.cards) == 1
    details = single and console.width >= _DETAILS
    if single:
        device = fits.cards[0].device
        facts = [device.name, f"{format_bytes(device.total_bytes)} total", f"{format_bytes(device.free_bytes)} free"]
        console.print(Text(", ".join([*facts, f"budget {format_bytes(budget_bytes(device))}"]), style="bold"))
        console.print()
    for algorithm in fits.cells:
        console.print(Text(title(fits, algorithm), style="bold"))
        (_print_card if details else _print_cards)(fits, algorithm, console)
        console.print()
    if not single:
        for card in fits.cards:
            console.print(Text(f"{card.label}: {', '.join(card.profiles)}"))
        console.print()
    legend = (
        "tokens: of a micro-batch; rows: completions written at once; peak: GiB; longest: tokens of the longest "
        "completion (SFT: example) that fits"
        if details
        else "a cell: weights, tokens of the longest completion (SFT: example) that fits, tokens a second; -: does not "
        "fit, but up to this length, or so much is missing"
    )
    cells = [cell for by_model in fits.cells.values() for row in by_model.values() for cell in row]
    unknown = "; ?, unknown: only estimated" if any(cell.verdict == "unknown" for cell in cells) else ""
    console.print(Text(f"{legend}; {SPEED}; *: {PRICE}{unknown}", style="dim"))
    console.print(Text("predicted by the plan, not measured on these cards", style="dim"))


SPEED = "tokens a second (/s): of a step's completions (SFT: examples), over all of its time"
PRICE = "only with 8-bit moments, host memory or a lower rank"


def title(fits: WhatFits, algorithm: str) -> str:
    """Return what a table is about: ``GRPO, prompts of 512 and 8 completions of 512 tokens, 8 prompts a step``."""
    *prompt, length = fits.lengths[algorithm].values()
    step = fits.prompts_per_step
    spec = spec_of(algorithm)
    if not spec.samples:
        return f"{spec.title}, examples of {length} tokens, {step} a step"
    count = fits.generations[algorithm]
    completions = f"{count} completions of {length} tokens" if count > 1 else f"a completion of {length} tokens"
    return f"{spec.title}, prompts of {prompt[0]} and {completions}, {step} prompts a step"


def short_name(model: str) -> str:
    """Return a model's name without its organisation or folder."""
    return model.rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1]


def cell_text(cell: Fit) -> str:
    """Return a cell in few words, after a question mark where it is unknown.

    Those are ``nf4 16384 310/s``, or of what does not fit ``- up to 192`` tokens, or ``- 1.9G short``.
    """
    if cell.room_bytes is None:
        return "- refused"
    mark = "? " if cell.verdict == "unknown" else ""
    if not cell.fits:
        return f"{mark or '- '}" + (f"up to {cell.longest}" if cell.longest else f"{gigabytes(cell.room_bytes)} short")
    return f"{mark}{precision_text(cell)} {cell.longest} {speed_text(cell)}"


def precision_text(cell: Fit) -> str:
    """Return the weights' precision, with a star where the run fits only at a price."""
    return (cell.precision or "-") + ("*" if cell.fits and cell.savings else "")


def length_text(cell: Fit) -> str:
    """Return the tokens of the longest that fits."""
    return f"{cell.longest:,}" if cell.longest else "none"


def speed_text(cell: Fit) -> str:
    """Return the tokens a second in two digits, as they are predicted, or a dash where nobody tells."""
    speed = cell.tokens_per_second
    return "-/s" if speed is None else f"{float(f'{speed:.2g}'):,.0f}/s" if speed >= 10 else f"{speed:.2g}/s"


def gigabytes(count: int) -> str:
    """Return GiB with one digit, rounded down: room is not to be overstated, nor is a shortage (negative) hidden."""
    return f"{abs(floor(10 * count / GIB)) / 10:.1f}G"


def _print_cards(fits: WhatFits, algorithm: str, console: Console) -> None:
    """Print the table of all cards in blocks of as many as the console has room for."""
    rows = fits.cells[algorithm]
    names = {model: short_name(model) for model in rows}
    at_once = max(1, (console.width - max(map(len, names.values())) - _GAP) // (_CELL + _GAP))
    for start in range(0, len(fits.cards), at_once):
        part = slice(start, start + at_once)
        labels = [card.label for card in fits.cards[part]]
        cells = ((names[model], *map(cell_text, row[part])) for model, row in rows.items())
        console.print(_table(("model", *labels), cells))
    for line in _refusals(fits, algorithm):
        console.print(Text(line))


def _print_card(fits: WhatFits, algorithm: str, console: Console) -> None:
    sampled = spec_of(algorithm).samples
    rows = [
        (
            short_name(model),
            cell.verdict,
            precision_text(cell),
            format_number(cell.micro_batch_tokens),
            *((format_number(cell.rollout_rows),) if sampled else ()),
            "-" if cell.peak_bytes is None else f"{cell.peak_bytes / GIB:.2f}",
            speed_text(cell),
            length_text(cell),
        )
        for model, (cell,) in fits.cells[algorithm].items()
    ]
    columns = ("model", "fits", "weights", "tokens", *(("rows",) if sampled else ()), "peak", "speed")
    console.print(_table((*columns, "longest"), rows))
    for model, (cell,) in fits.cells[algorithm].items():
        if said := cell.lacks or ", ".join(cell.savings):
            console.print(Text(f"{short_name(model)}{'' if cell.lacks else '*'}: {said}"))


def _table(columns: Iterable[str], rows: Iterable[tuple[str, ...]]) -> Table:
    table = plain_table(columns, rows)
    table.padding = (0, _GAP, 0, 0)
    return table


def _refusals(fits: WhatFits, algorithm: str) -> Iterator[str]:
    """Yield why runs are refused that have no plan, each sentence once."""
    cells = (cell for row in fits.cells[algorithm].values() for cell in row)
    yield from dict.fromkeys(cell.lacks for cell in cells if cell.room_bytes is None)
