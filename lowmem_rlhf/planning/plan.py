"""The plan of a run: every memory setting with its reason, made before anything is loaded. No torch here.

The rule, in this order (a value that the recipe pins is kept, and the others adapt to it):

1. Budget: free memory, less 4 % and the CUDA context (on the CPU: RAM, less the libraries).
2. Precision: 16-bit weights when the smallest working set (checkpointing, one row in a micro-batch, one completion at
   a time) takes at most 60 % of the budget; else int8 by the same test; else NF4. What is left buys larger batches.
3. Compute dtype: bfloat16 where the device has it, else float16 with loss scaling; int8 on a GPU computes in float16.
4. Optimizer: AdamW with fp32 moments; 8-bit ones only when the smallest working set does not fit otherwise.
5. Checkpoints in host memory only when the smallest working set does not fit otherwise.
6. Gradient checkpointing of the fewest layers with which the update of a whole group (at most the cap) fits; where it
   does not fit with all layers recomputed, of the fewest for the most tokens that do.
7. Micro-batch: the most packed tokens that fit with that, up to a whole step or the cap (16384; CPU 4096).
8. Rollout: all completions of a step at once if their key-value cache fits, else fewer whole groups, else fewer rows.

More memory never gives a lower precision. The memory model stands in `memory`; its figures are predictions.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.hardware.device import Device
from lowmem_rlhf.planning import choices
from lowmem_rlhf.planning.choices import PINNED, Case, gib
from lowmem_rlhf.planning.dimensions import ModelDimensions, model_dimensions
from lowmem_rlhf.planning.memory import (
    Components,
    Settings,
    peak_phase,
)
from lowmem_rlhf.planning.shapes import (
    adapters_of,
    length_keys,
    sampled_keys,
    samples_completions,
)
from lowmem_rlhf.recipe import Recipe

__all__ = ["Plan", "Settings", "make_plan", "why_not"]

_SETTING_OF_PHASE = {
    "rollout": "rollout_batch_size",
    "scoring": "micro_batch_tokens",
    "update": "micro_batch_tokens",
    "optimizer": "optim",
    "export": "quantization",
}


@dataclass(frozen=True)
class Plan:
    """What a run will do with the device's memory.

    Attributes:
        fits: whether the predicted peak is within the budget.
        profile: the name of the profile that the device was matched with.
        reasons: one sentence for every setting, under the setting's name.
        memory: ``budget_bytes``, ``peak_bytes`` (of the largest phase), ``phases`` (bytes by component).
        lengths: the recipe's keys that bound a row's tokens.
    """

    fits: bool
    device: Device
    profile: str
    settings: Settings
    reasons: dict[str, str]
    memory: dict[str, Any]
    lengths: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values: what ``plan --json`` prints and ``plan.json`` holds."""
        return {
            "fits": self.fits,
            "device": self.device.to_dict(),
            "profile": self.profile,
            "settings": asdict(self.settings),
            "reasons": dict(self.reasons),
            "memory": dict(self.memory),
        }


def make_plan(recipe: Recipe, device: Device, profile: str) -> Plan:
    """Choose every memory setting of a run for a device.

    A plan that does not fit is returned too, with ``fits`` False; `why_not` says what to change.

    Raises:
        UserError: the model cannot be read, or the recipe asks for what the model or the device cannot do; or it
            trains a classifier, for which there is nothing to choose.
    """
    if recipe.algorithm == "classifier":
        raise UserError(
            "algorithm: a classifier has no plan, as nothing is chosen for it: all of it trains in float32 (16 bytes a "
            f"parameter), and a pass has at most classifier.batch_tokens ({recipe.classifier.batch_tokens}) tokens; "
            "start it with train"
        )
    dims = model_dimensions(recipe.model, recipe.revision)
    _check_positions(recipe, dims)
    case = Case(recipe, device, dims, choices.budget_bytes(device))
    reasons: dict[str, str] = {}
    quantization, reasons["quantization"] = choices.quantization(case)
    settings = choices.smallest(case, quantization)
    reasons["compute_dtype"] = choices.compute_dtype(case, quantization)[1]
    optim, optim_reason = choices.optim(case, settings)
    settings = replace(settings, optim=optim)
    offload, reasons["offload_checkpoints"] = choices.offload_checkpoints(case, settings)
    settings = replace(settings, offload_checkpoints=offload)
    checkpointing, reasons["gradient_checkpointing"] = choices.gradient_checkpointing(case, settings)
    settings = replace(settings, gradient_checkpointing=checkpointing)
    tokens, reasons["micro_batch_tokens"] = choices.micro_batch_tokens(case, settings)
    settings = replace(settings, micro_batch_tokens=tokens)
    rows, reasons["rollout_batch_size"] = choices.rollout_batch_size(case, settings)
    settings = replace(settings, rollout_batch_size=rows)
    weights, reasons["rollout_weights"] = choices.rollout_weights(case, settings)
    settings = replace(settings, rollout_weights=weights)
    reasons["logits_tile_tokens"] = choices.logits_tile_tokens(case)[1]
    reasons["optim"] = optim_reason
    reasons["lora"] = _lora_reason(case)
    by_phase = case.phases(settings)
    phase, peak = peak_phase(by_phase)
    if peak > case.budget:
        key = _SETTING_OF_PHASE[phase]
        reasons[key] = f"{reasons[key]}; {_shortage(phase, by_phase[phase], case.budget)}"
    memory = {"budget_bytes": case.budget, "peak_bytes": peak, "phases": by_phase}
    return Plan(peak <= case.budget, device, profile, settings, reasons, memory, tuple(length_keys(recipe)))


def why_not(plan: Plan) -> str:
    """Return what stands in the way of a plan that does not fit and what to change; an empty string if it fits."""
    if plan.fits:
        return ""
    phase, _ = peak_phase(plan.memory["phases"])
    components = plan.memory["phases"][phase]
    shortage = _shortage(phase, components, plan.memory["budget_bytes"])
    return f"the plan does not fit on {plan.device.name}: {shortage}; try {', or '.join(_changes(plan, components))}"


def _shortage(phase: str, components: Components, budget: int) -> str:
    largest = max(components, key=lambda name: components[name])
    total = sum(components.values())
    return (
        f"the {phase} phase needs {gib(total)} and the budget is {gib(budget)} ({gib(total - budget)} short), of which "
        f"{largest.replace('_', ' ')} take {gib(components[largest])}"
    )


def _changes(plan: Plan, components: Components) -> list[str]:
    """Return the changes that help, the least painful first; at most three."""
    settings, pinned = plan.settings, {key for key, reason in plan.reasons.items() if reason.startswith(PINNED)}
    activations = sum(size for name, size in components.items() if "activations" in name)
    cache = components.get("kv_cache", 0) + components.get("attention_scores", 0)
    weights = components["weights"] + components["embeddings"]
    changes = [
        (settings.quantization != "nf4", "hardware.quantization=nf4"),
        (settings.gradient_checkpointing is not True and activations > 0, "hardware.gradient_checkpointing=true"),
        ("offload_checkpoints" in pinned and not settings.offload_checkpoints, "hardware.offload_checkpoints=auto"),
        ("micro_batch_tokens" in pinned and activations > 0, "hardware.micro_batch_tokens=auto"),
        ("rollout_batch_size" in pinned and cache > 0, "hardware.rollout_batch_size=auto"),
        (settings.compute_dtype == "float32", "hardware.compute_dtype=auto"),
        (settings.optim == "adamw", "hardware.optim=adamw_8bit"),
        (max(activations, cache) > weights / 4, f"a smaller {' or '.join(reversed(plan.lengths))}"),
        (True, "a smaller model, or a card with more free memory"),
    ]
    return [text for helps, text in changes if helps][:3]


def _lora_reason(case: Case) -> str:
    lora = case.recipe.lora
    trained, frozen = adapters_of(case.recipe)
    millions = case.dims.lora_parameters(lora.r, lora.target_modules) / 1e6
    share = 100e6 * millions / case.dims.num_parameters
    more = f"; {trained} adapters train and {frozen} are frozen" if trained + frozen > 1 else ""
    return f"{PINNED}: {millions:.2f} million adapter parameters, {share:.2g} % of the model's{more}"


def _check_positions(recipe: Recipe, dims: ModelDimensions) -> None:
    rows = [length_keys(recipe), *([sampled_keys(recipe)] if samples_completions(recipe) else [])]
    for keys in rows:
        tokens = sum(keys.values())
        if dims.max_positions is not None and tokens > dims.max_positions:
            verb, which = ("makes", "it") if len(keys) == 1 else ("make", "one of them")
            raise UserError(
                f"{' and '.join(f'{key} {value}' for key, value in keys.items())} {verb} {tokens} tokens, but "
                f"{recipe.model!r} has only {dims.max_positions} positions; lower {which}"
            )
