"""The plan of several processes in a terminal: a column for each card, or for cards that do the same. No torch here."""

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.text import Text

from lowmem_rlhf.display.format import format_bytes, format_value
from lowmem_rlhf.display.tables import fitted, plain_table, print_plan, print_time, short_seconds
from lowmem_rlhf.plain_text import harmless

SETTINGS = {
    "quantization": "weights",
    "compute_dtype": "computed in",
    "gradient_checkpointing": "recomputed layers",
    "micro_batch_tokens": "tokens of a micro-batch",
    "rollout_batch_size": "completions at once",
    "rollout_weights": "weights while sampling",
    "optim": "optimizer",
}
HELD = {
    "weights, embeddings": ("weights", "embeddings"),
    "gathered layers": ("gathered_layers",),
    "adapters, optimizer": ("adapters", "optimizer_state"),
}


def print_plans(plan_dict: dict[str, Any], console: Console | None = None) -> None:
    """Print what ``plan --json`` gives: the plan of one process (`print_plan`), or of several."""
    console = fitted(console or Console())
    together = plan_dict.get("processes")
    if not together:
        print_plan(plan_dict, console)
        return
    columns = list(_columns(together["cards"]))
    count, machines = together["count"], together["machines"]
    where = f"in {machines} machines" if machines > 1 else "in one machine"
    console.print(Text(f"{count} processes {where}, one a card: {together['predicted']}", style="bold"))
    for note in {note: None for _, card in columns for note in card["device"].get("notes") or ()}:
        console.print(Text(harmless(note), style="dim"))
    console.print()
    names = [numbers if len(columns) > 1 else f"each of {count}" for numbers, _ in columns]
    console.print(plain_table(("process", *names), _rows([card for _, card in columns], together)))
    console.print()
    fits = plan_dict["fits"]
    verdict = "fits on every card" if fits else "does not fit on every card"
    if any(card["verdict"] == "unknown" for _, card in columns):
        verdict, style = f"unknown; by the estimate it {verdict}", "bold yellow"
    else:
        style = "bold green" if fits else "bold red"
    console.print(Text(verdict, style=style))
    print_time(plan_dict, console)
    for line in _lines(plan_dict):
        console.print(Text(harmless(line)))
    for line in together["warnings"]:
        console.print(Text(harmless(line), style="yellow"))
    for line in together["assumptions"]:
        console.print(Text(harmless(line), style="dim"))


def _columns(cards: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the numbers of processes that follow one another and do the same, with what they do."""
    first = 0
    for place in range(1, len(cards) + 1):
        if place == len(cards) or _alike(cards[place]) != _alike(cards[first]):
            yield (str(first) if place == first + 1 else f"{first} to {place - 1}"), cards[first]
            first = place


def _alike(card: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in card.items() if key != "machine"}


def _rows(cards: list[dict[str, Any]], together: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yield the rows: what each card takes of a step, its settings, its memory by part and its time by part."""
    prompts = sum(card["prompts"] for card in together["cards"])
    yield "card", *(str(card["device"]["name"]) for card in cards)
    yield "prompts of a step", *(f"{card['prompts']} of {prompts}" for card in cards)
    yield "tokens of the update", *(f"{100 * card['share']:.3g} %" for card in cards)
    for key, name in SETTINGS.items():
        yield name, *(format_value(card["settings"][key]) for card in cards)
    parts = [max(card["memory"]["phases"].values(), key=lambda phase: sum(phase.values())) for card in cards]
    for name, keys in HELD.items():
        sizes = [sum(part.get(key, 0) for key in keys) for part in parts]
        if any(sizes):
            yield f"memory: {name}", *map(format_bytes, sizes)
    for phase in cards[0]["memory"]["phases"]:
        if phase != "export":
            sizes = [sum(card["memory"]["phases"][phase].values()) for card in cards]
            yield f"memory: {phase}, with these", *map(format_bytes, sizes)
    yield "memory: peak of budget", *(_peak(card["memory"]) for card in cards)
    if any("base" in card["memory"].get("host", {}) for card in cards):
        yield "in host memory", *(format_bytes(card["memory"]["host"].get("base")) for card in cards)
    for phase in cards[0]["phases"]:
        yield f"time: {phase}", *(short_seconds(card["phases"][phase]) for card in cards)
    yield "sent a step", *([_sent(together["sent_bytes"]["total"])] * len(cards))


def _peak(memory: dict[str, Any]) -> str:
    peak, budget = memory["peak_bytes"], memory["budget_bytes"]
    return f"{format_bytes(peak)} of {format_bytes(budget)}{'' if peak <= budget else ': too much'}"


def _sent(size: int) -> str:
    return format_bytes(size) if size >= 2**20 else f"{size / 2**10:.0f} KiB"


def _lines(plan_dict: dict[str, Any]) -> Iterator[str]:
    """Yield what is sent, and how much faster it gets."""
    together = plan_dict["processes"]
    parts = {name: size for name, size in together["sent_bytes"].items() if size and name != "total"}
    named = ", ".join(f"{name} {_sent(size)}" for name, size in parts.items())
    sent = f"sent by each process in a step: {named}"
    if size := together["sent_to_next_machine_bytes"]:
        sent += f"; from each machine to the next: {_sent(size)}"
    yield sent
    if not plan_dict["fits"] or plan_dict["time"] is None:
        return
    if together["gathering_seconds"]:
        yield f"gathering layers takes {short_seconds(together['gathering_seconds'])} of a step, beside the computing"
    alone = together["alone"]
    if alone is None:
        yield "speed-up: no one card of these holds the run"
        return
    step = plan_dict["time"]["step_seconds"]
    yield (
        f"speed-up: {together['speed_up']:.2f} times as fast as one {alone['device']} ({short_seconds(alone['step'])} "
        f"a step, {short_seconds(step)} in {together['count']} processes)"
    )
