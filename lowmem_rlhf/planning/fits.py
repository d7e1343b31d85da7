"""What fits: models against cards for SFT, GRPO and PPO, every cell the plan of a run. No torch here.

A recipe gives the lengths and the group, and keeps what it pins. Cards that share their memory and their 16-bit dtype
are one column, planned for the one of them that leaves a process the least.
"""

from bisect import bisect_left, bisect_right
from dataclasses import asdict, dataclass, replace
from typing import Any

from lowmem_rlhf.algorithms.registry import specs
from lowmem_rlhf.algorithms.spec import sampled_lengths
from lowmem_rlhf.architecture import catalogue
from lowmem_rlhf.architecture.dimensions import ModelDimensions
from lowmem_rlhf.architecture.lookup import model_dimensions
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.hardware.device import Device
from lowmem_rlhf.hardware.profiles import load_profiles, profile_device
from lowmem_rlhf.planning.inputs import PINNED, budget_bytes
from lowmem_rlhf.planning.memory.phases import peak_phase
from lowmem_rlhf.planning.plan import Plan, can_fit, plan_for, shortage
from lowmem_rlhf.planning.precision import RANK
from lowmem_rlhf.planning.shapes import length_keys, samples_completions
from lowmem_rlhf.planning.verdicts import Verdict
from lowmem_rlhf.progress import reported_as
from lowmem_rlhf.recipe.schema import Recipe

MODELS = (
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    "Qwen/Qwen2.5-0.5B-Instruct",
    "meta-llama/Llama-3.2-1B-Instruct",
    "Qwen/Qwen2.5-1.5B-Instruct",
    "google/gemma-2-2b-it",
    "Qwen/Qwen2.5-3B-Instruct",
    "meta-llama/Llama-3.2-3B-Instruct",
    "Qwen/Qwen3-4B",
    "mistralai/Mistral-7B-Instruct-v0.3",
    "Qwen/Qwen2.5-7B-Instruct",
    "meta-llama/Llama-3.1-8B-Instruct",
    "Qwen/Qwen3-8B",
    "google/gemma-2-9b-it",
    "microsoft/phi-4",
)
# Tried for the longest: steps of 64 up to 4096 tokens, of 256 up to 16,384, of 1024 from there.
LENGTHS = (*range(64, 4096, 64), *range(4096, 16384, 256), *range(16384, 131072 + 1, 1024))


@dataclass(frozen=True)
class Card:
    """A column: a device to plan for, and the profiles that it stands for."""

    label: str
    profiles: tuple[str, ...]
    device: Device


@dataclass(frozen=True)
class Fit:
    """A cell: what the plan says of one algorithm with one model on one card.

    Attributes:
        precision: ``16-bit``, ``32-bit``, ``int8`` or ``nf4``; None (as all that follows from a plan) where the run is
            refused and has no plan.
        rollout_rows: completions at once; None where the run writes none.
        room_bytes: what the peak leaves of the budget; negative: what is missing.
        savings: what the plan does at a price, as it fits in no other way (8-bit moments, host memory, a low rank).
        lacks: why the run does not fit, as a clause; empty where it fits.
        longest: tokens of the longest completion that fits (SFT: of the longest example), 0 if not even the shortest
            does; None where it was not sought.
        verdict: ``yes``, ``no``, or ``unknown`` where ``fits`` is only an estimate (see `Plan`).
        tokens_per_second: of completions (SFT: of examples) at full length, over the predicted time of a whole step;
            None where the run does not fit or nobody tells.
    """

    fits: bool
    precision: str | None
    micro_batch_tokens: int | None
    rollout_rows: int | None
    peak_bytes: int | None
    room_bytes: int | None
    savings: tuple[str, ...]
    lacks: str
    longest: int | None = None
    verdict: Verdict = "no"
    tokens_per_second: float | None = None


@dataclass(frozen=True)
class WhatFits:
    """The tables.

    Attributes:
        cells: for every algorithm and model a cell for each card, in their order.
        lengths: of every algorithm, the recipe's keys that bound a row, in tokens.
        generations: of every algorithm, the completions of a prompt (SFT: 1).
    """

    recipe: str
    cards: tuple[Card, ...]
    models: dict[str, ModelDimensions]
    cells: dict[str, dict[str, list[Fit]]]
    lengths: dict[str, dict[str, int]]
    generations: dict[str, int]
    prompts_per_step: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain values: what ``plan --all-profiles --json`` prints. Cells are keyed by the card's label."""
        cards = {
            card.label: {
                "profiles": list(card.profiles),
                "total_bytes": card.device.total_bytes,
                "budget_bytes": budget_bytes(card.device),
                "bf16": card.device.bf16,
            }
            for card in self.cards
        }
        tables = {
            algorithm: {
                "lengths": self.lengths[algorithm],
                "num_generations": self.generations[algorithm],
                "cells": {
                    model: dict(zip(cards, map(asdict, cells), strict=True)) for model, cells in by_model.items()
                },
            }
            for algorithm, by_model in self.cells.items()
        }
        return {
            "recipe": self.recipe,
            "prompts_per_step": self.prompts_per_step,
            "cards": cards,
            "models": {name: {"parameters": dims.num_parameters} for name, dims in self.models.items()},
            "tables": tables,
        }


def shipped_cards() -> tuple[Card, ...]:
    """Return the shipped cards by memory, without the CPU and without cards that this package was never run on."""
    groups: dict[tuple[int, bool], list[tuple[str, Device]]] = {}
    for key, profile in load_profiles().items():
        if profile.memory_mib is not None and profile.tried:
            kind = (round(profile.memory_mib / 1024), profile.bf16)
            groups.setdefault(kind, []).append((key, profile_device(profile)))
    cards = []
    for (memory, bf16), group in sorted(groups.items()):
        least = min((device for _, device in group), key=lambda device: device.free_bytes)
        label = f"{memory} GB {'bf16' if bf16 else 'fp16'}"
        cards.append(Card(label, tuple(key for key, _ in group), least))
    return tuple(cards)


def one_card(device: Device, profile: str) -> tuple[Card, ...]:
    """Return a single column."""
    return (Card(profile, (profile,), device),)


def chosen_models(recipe: Recipe, names: str | None = None) -> dict[str, ModelDimensions]:
    """Return models and their sizes, the recipe's own first, then from small to large.

    Args:
        names: ``all`` of the catalogue, or names with commas between them (of the catalogue, also without their
            organisation, or whatever a recipe's ``model`` may be); None: a selection.

    Raises:
        UserError: a model cannot be read.
    """
    if names is None:
        others = {name: catalogue.catalogue()[name] for name in MODELS}
    elif names.strip() == "all":
        others = dict(catalogue.catalogue())
    else:
        full = {name.rsplit("/", 1)[-1].casefold(): name for name in reversed(catalogue.entries())}
        asked = [full.get(name.casefold(), name) for part in names.split(",") if (name := part.strip())]
        if not asked:
            raise UserError(f"--models: got {names!r}; give names with commas between them, or all")
        others = {name: catalogue.find(name) or model_dimensions(name) for name in asked}
    own = model_dimensions(recipe.model, recipe.revision, recipe.trust_remote_code)
    ordered = sorted(others.items(), key=lambda item: item[1].num_parameters)
    return {recipe.model: own} | {name: dims for name, dims in ordered if dims != own}


def what_fits(recipe: Recipe, cards: tuple[Card, ...], models: dict[str, ModelDimensions]) -> WhatFits:
    """Plan the recipe for every algorithm, model and card, and seek the longest that fits.

    A plan takes some milliseconds. What a plan refuses (a model that overflows float16, a pinned value that cannot be)
    is a cell that does not fit.
    """
    cells: dict[str, dict[str, list[Fit]]] = {}
    runs = {algorithm: with_algorithm(recipe, algorithm) for algorithm in _algorithms()}
    rows, shown = len(runs) * len(models), reported_as("what fits")
    for algorithm in runs:
        cells[algorithm] = {}
        for name, dims in models.items():
            shown(sum(map(len, cells.values())), rows)
            cells[algorithm][name] = _row(runs[algorithm].model_copy(update={"model": name}), cards, dims)
    shown(rows, rows)
    return WhatFits(
        recipe=recipe.name,
        cards=cards,
        models=models,
        cells=cells,
        lengths={algorithm: length_keys(run) for algorithm, run in runs.items()},
        generations={key: run.spec.completions(run) for key, run in runs.items()},
        prompts_per_step=recipe.training.prompts_per_step,
    )


def _row(recipe: Recipe, cards: tuple[Card, ...], dims: ModelDimensions) -> list[Fit]:
    """Return a cell for each card; what fits on a card fits on those of its kind with more memory."""
    row, known = [], dict[bool, tuple[int, int]]()
    for card in cards:
        device = card.device
        free, least = known.get(device.bf16, (0, 0))
        found = longest(recipe, device, dims, least if free <= device.free_bytes else 0)
        known[device.bf16] = (device.free_bytes, found)
        row.append(replace(fit(recipe, device, dims), longest=found))
    return row


def _algorithms() -> list[str]:
    """Return the algorithms that have a table, those that sample after the others."""
    return [spec.name for spec in sorted(specs(), key=lambda spec: spec.samples) if spec.in_fits]


def with_algorithm(recipe: Recipe, algorithm: str) -> Recipe:
    """Return the recipe for another algorithm on the same prompts and completions.

    For SFT an example is a prompt with one completion, and no rewards are asked: nothing is sampled. What compares
    completions, as GRPO does, has two of a prompt where the recipe has one.
    """
    if algorithm == recipe.algorithm:
        return recipe
    changed = recipe.model_copy(update={"algorithm": algorithm})
    if changed.spec.samples:
        least = 2 if changed.spec.compares(changed) else 1
        count = max(least, recipe.generation.num_generations)
        return changed.model_copy(
            update={"generation": recipe.generation.model_copy(update={"num_generations": count})}
        )
    return with_length(changed, sum(sampled_lengths(recipe).values())).model_copy(update={"rewards": []})


def with_length(recipe: Recipe, tokens: int) -> Recipe:
    """Return the recipe with completions (SFT: examples) of so many tokens."""
    section, _, key = list(length_keys(recipe))[-1].partition(".")
    return recipe.model_copy(update={section: getattr(recipe, section).model_copy(update={key: tokens})})


def fit(recipe: Recipe, device: Device, dims: ModelDimensions, timed: bool = True) -> Fit:
    """Return what the plan of a recipe for a device says, of a model of these sizes; ``timed`` as `plan_for` has it."""
    try:
        plan = plan_for(recipe, device, "", dims, timed)
    except UserError as error:
        return Fit(False, None, None, None, None, None, (), str(error))
    settings, memory = plan.settings, plan.memory
    phase, peak = peak_phase(memory["phases"])
    return Fit(
        fits=plan.fits,
        precision=f"{8 * settings.width}-bit" if settings.quantization == "none" else settings.quantization,
        micro_batch_tokens=settings.micro_batch_tokens,
        rollout_rows=settings.rollout_batch_size if samples_completions(recipe) else None,
        peak_bytes=peak,
        room_bytes=memory["budget_bytes"] - peak,
        savings=_savings(plan),
        lacks="" if plan.fits else shortage(phase, memory["phases"][phase], memory["budget_bytes"]),
        verdict=plan.verdict,
        tokens_per_second=_step_tokens(recipe) / plan.time.step if plan.fits and plan.time else None,
    )


def _step_tokens(recipe: Recipe) -> int:
    """Return the tokens of a step's completions (SFT: examples) at full length."""
    *_, length = length_keys(recipe).values()
    return length * recipe.training.prompts_per_step * recipe.spec.completions(recipe)


def _savings(plan: Plan) -> tuple[str, ...]:
    settings, rank = plan.settings, plan.settings.lora["r"]
    prices = {
        "optim": ("8-bit moments", settings.optim == "adamw_8bit"),
        "offload_checkpoints": ("checkpoints in host memory", settings.offload_checkpoints),
        "offload_embeddings": ("embedding in host memory", settings.offload_embeddings),
        "offload_experts": ("experts in host memory", settings.offload_experts),
        "lora": (f"rank {rank}", rank < RANK and PINNED not in plan.reasons["lora"]),
    }
    return tuple(name for key, (name, paid) in prices.items() if paid and plan.reasons[key] != PINNED)


def longest(recipe: Recipe, device: Device, dims: ModelDimensions, least: int = 0) -> int:
    """Return the tokens of the longest completion (SFT: example) of `LENGTHS` that fits; 0 if none does.

    The model's positions bound it. A length that the recipe has, and that fits, counts too.

    Args:
        least: a length that is known to fit.
    """
    *prompt, own = length_keys(recipe).values()
    most = (LENGTHS[-1] + sum(prompt) if dims.max_positions is None else dims.max_positions) - sum(prompt)
    lengths: list[int] = sorted({length for length in (*LENGTHS, own, most) if 0 < length <= most})

    def too_long(length: int) -> bool:
        try:
            return not can_fit(with_length(recipe, length), device, dims)
        except UserError:
            return True

    if lengths and not too_long(lengths[-1]):
        return lengths[-1]
    count = bisect_left(lengths, True, lo=bisect_right(lengths, least), key=too_long)
    return lengths[count - 1] if count else 0
