"""The plan of a run with one of TRL's trainers, made from that of supervised fine-tuning. No torch here."""

from dataclasses import replace
from typing import Any

from lowmem_rlhf.algorithms.trl.settings import max_length
from lowmem_rlhf.algorithms.trl.spec import TRL_TRAINERS
from lowmem_rlhf.architecture.lookup import model_dimensions
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.hardware.cpu_process import process_bytes
from lowmem_rlhf.hardware.device import Device
from lowmem_rlhf.planning.advice import longest_that_fits
from lowmem_rlhf.planning.inputs import MARGIN, budget_bytes, gib
from lowmem_rlhf.planning.memory.phases import peak_phase
from lowmem_rlhf.planning.plan import Plan, make_plan, shortage
from lowmem_rlhf.planning.precision import RANK
from lowmem_rlhf.recipe.field_roles import fields_with
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.recipe.sections import HardwareConfig

LOGITS_BYTES = 17  # of one logit: about four copies in fp32; live tensors of an ORPO step on SmolLM2-135M say 16.9


def plan_trl(recipe: Recipe, device: Device, profile: str) -> Plan:
    """Choose every memory setting of a run with TRL's trainer; see `make_plan`. Its time is not predicted.

    Raises:
        UserError: as `make_plan`; or the run does not fit.
    """
    made = replace(_chosen(recipe, device, profile), time=None)
    if made.fits:
        return made
    phase, _ = peak_phase(made.memory["phases"])
    lack = shortage(phase, made.memory["phases"][phase], made.memory["budget_bytes"])
    raise UserError(f"the plan does not fit on {device.name}: {lack}; try {_change(recipe, device, profile)}")


def _change(recipe: Recipe, device: Device, profile: str) -> str:
    """Return what to change so that the run fits: leave to the plan what is pinned, or shorten examples too."""

    def fits(changed: Recipe) -> bool:
        try:
            return _chosen(changed, device, profile).fits
        except UserError:
            return False

    advised = fields_with(HardwareConfig, trl_advises_auto=True)
    pinned = [key for key in advised if getattr(recipe.hardware, key) != "auto"]
    said = " ".join(f"hardware.{key}=auto" for key in pinned)
    free = recipe.model_copy(update={"hardware": recipe.hardware.model_copy(update=dict.fromkeys(pinned, "auto"))})
    if pinned and fits(free):
        return said
    length = longest_that_fits(
        max_length(recipe.trl),
        lambda tokens: fits(free.model_copy(update={"trl": {**recipe.trl, "max_length": tokens}})),
    )
    return f"{said} trl.max_length={length}".strip() if length else "a smaller model"


def _chosen(recipe: Recipe, device: Device, profile: str) -> Plan:
    kind, steps = TRL_TRAINERS[recipe.algorithm], recipe.training.prompts_per_step
    rows = 1 if kind.labelled else 2
    least = rows * max_length(recipe.trl)
    alike, pinned = _as_sft(recipe, rows), recipe.hardware.micro_batch_tokens
    if pinned != "auto" and pinned < least:
        raise UserError(
            f"hardware.micro_batch_tokens: got {pinned}, but an example may have {least} tokens ({rows} of "
            f"trl.max_length); give at least {least}, or lower trl.max_length"
        )
    made = _beside(alike, device, profile, _frozen_bytes(recipe))
    if not kind.full_logits and made.settings.micro_batch_tokens >= least:
        return made
    vocabulary = model_dimensions(recipe.model, recipe.revision).vocab_size
    most = max(1, min(made.settings.micro_batch_tokens // least, steps))
    sizes = [pinned] if pinned != "auto" else [least * count for count in range(most, 0, -1)]
    for tokens in sizes:
        logits = LOGITS_BYTES * tokens * vocabulary if kind.full_logits else 0
        made = _beside(_pinned(alike, tokens), device, profile, _frozen_bytes(recipe), logits)
        if made.fits:
            break
    if pinned == "auto":
        share = f"; {gib(logits)} of it are logits of all positions" if logits else ""
        reason = f"{tokens // least} of {steps} examples at once, of up to {least} tokens each{share}"
        made = replace(made, reasons={**made.reasons, "micro_batch_tokens": reason})
    return made


def _as_sft(recipe: Recipe, rows: int) -> Recipe:
    """Return the recipe of an SFT run with the same rows a step."""
    sft = recipe.sft.model_copy(update={"max_length": max_length(recipe.trl)})
    steps = recipe.training.model_copy(update={"prompts_per_step": rows * recipe.training.prompts_per_step})
    return recipe.model_copy(update={"algorithm": "sft", "sft": sft, "training": steps})


def _pinned(recipe: Recipe, tokens: int) -> Recipe:
    hardware = recipe.hardware.model_copy(update={"micro_batch_tokens": tokens})
    return recipe.model_copy(update={"hardware": hardware})


def _frozen_bytes(recipe: Recipe) -> int:
    """Return the bytes of the frozen adapter that is the reference, in 16 bits; 0 where there is none."""
    if not (recipe.adapter and TRL_TRAINERS[recipe.algorithm].reference):
        return 0
    rank = RANK if recipe.lora.r == "auto" else recipe.lora.r
    return 2 * model_dimensions(recipe.model, recipe.revision).adapted(recipe.lora.shape(rank)).parameters


def _beside(recipe: Recipe, device: Device, profile: str, frozen: int, logits: int = 0) -> Plan:
    """Plan for what is left of the device beside a frozen adapter and full logits, and put these into the result."""
    taken = frozen + logits
    left = replace(device, free_bytes=max(0, device.free_bytes - round(taken / (1 - MARGIN))))
    try:
        made = make_plan(recipe, left, profile)
    except UserError as error:
        raise UserError(_own_words(str(error))) from error
    if not taken:
        return made
    phases: dict[str, dict[str, int]] = {name: dict(parts) for name, parts in made.memory["phases"].items()}
    for name, components in phases.items():
        if frozen and name != "export":
            components["reference_adapter"] = frozen
        if logits and name == "update":
            components["full_logits"] = logits
    peak = max(sum(components.values()) for components in phases.values())
    grown: dict[str, Any] = {key: made.memory[key] + taken for key in ("low_bytes", "high_bytes") if key in made.memory}
    memory = {**made.memory, **grown, "budget_bytes": budget_bytes(device), "peak_bytes": peak, "phases": phases}
    if "process" in memory:
        memory["process"] = process_bytes(memory["low_bytes"])
    low, high = made.peak_bytes_range
    return replace(made, device=device, memory=memory, peak_bytes_range=(low + taken, high + taken))


def _own_words(text: str) -> str:
    """Name the recipe's own keys in what was said of the SFT run that the plan is made from."""
    return text.replace("sft.max_length", "trl.max_length")
