"""The plan of a run: every memory setting with its reason, made before anything is loaded. No torch here.

The rule, in this order (a value that the recipe pins is kept, and the others adapt to it):

1. Budget: free memory, less 4 % and the CUDA context (on the CPU: RAM, less the libraries).
2. Precision: the most exact that fits and costs little time (`precision.at_most`). On a CPU, and where nobody tells how
   fast the card is: 16-bit weights when the smallest working set (checkpointing, one row in a micro-batch, one
   completion at a time) takes at most 60 % of the budget; else int8 by the same test; else NF4.
3. Compute dtype: bfloat16 where the device has it, else float16 with loss scaling; int8 on a GPU computes in float16.
4. What saves memory at a price, each only when the smallest working set does not fit otherwise, in this order: 8-bit
   optimizer moments, checkpoints in host memory, the token embedding in host memory, a lower rank than 16.
5. Gradient checkpointing and micro-batch: the fastest update of what fits (`batching.fastest_update`). Without a known
   speed: the fewest layers with which the update of a whole group (at most the cap) fits, then the most tokens that
   fit with that, up to a whole step or the cap (16384; CPU 4096).
6. Passes without gradients take a whole group where that fits.
7. Rollout: all completions of a step at once if their key-value cache fits, else fewer whole groups, else fewer rows;
   of the ways to read NF4 weights the fastest that fits.

More memory never gives a lower precision. The memory model stands in `memory`; its figures are predictions.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from lowmem_rlhf.algorithms.spec import sampled_lengths
from lowmem_rlhf.architecture.dimensions import ModelDimensions
from lowmem_rlhf.architecture.lookup import model_dimensions
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.hardware.cpu_process import process_bytes
from lowmem_rlhf.hardware.device import Device
from lowmem_rlhf.planning import batching, precision
from lowmem_rlhf.planning.inputs import PlanInputs, budget_bytes, gib
from lowmem_rlhf.planning.memory.phases import peak_phase
from lowmem_rlhf.planning.memory.resident import ALLOCATOR_HIGH, Components, Memory, Settings, expert_bytes, total
from lowmem_rlhf.planning.shapes import (
    adapters_of,
    length_keys,
    samples_completions,
)
from lowmem_rlhf.planning.sharing import check_sharing, sharing_reasons
from lowmem_rlhf.planning.time.estimate import RunTime, run_time
from lowmem_rlhf.planning.time.links import Ring
from lowmem_rlhf.planning.verdicts import Verdict, verdict_of
from lowmem_rlhf.recipe.schema import Recipe

__all__ = ["Plan", "Settings", "check_positions", "make_plan", "plan_for", "shortage"]

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
        verdict: ``yes`` or ``no``, as ``fits``; ``unknown`` where the peak is only an estimate, as the model's type has
            no terms here, and the weights alone do not decide it.
        peak_bytes_range: between which numbers of bytes the largest phase will show (see `verdicts`).
        profile: the name of the profile that the device was matched with.
        reasons: one sentence for every setting, under the setting's name.
        memory: ``budget_bytes``, ``peak_bytes`` (of the largest phase, as expected), ``low_bytes`` (its live tensors
            alone), ``high_bytes`` (with the allocator at the 90th percentile), ``phases`` (bytes by component); on a
            CPU ``process`` (bytes by component of what the process will show), elsewhere ``host`` (bytes by component
            of what lies in host memory: the state of the last finished step).
        time: how long a step and the run take; None where nobody tells how fast the device is.
    """

    fits: bool
    verdict: Verdict
    peak_bytes_range: tuple[int, int]
    device: Device
    profile: str
    settings: Settings
    reasons: dict[str, str]
    memory: dict[str, Any]
    time: RunTime | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values: what ``plan --json`` prints and ``plan.json`` holds."""
        return {
            "fits": self.fits,
            "verdict": self.verdict,
            "peak_bytes_range": list(self.peak_bytes_range),
            "device": self.device.to_dict(),
            "profile": self.profile,
            "settings": _shown_settings(self.settings),
            "reasons": dict(self.reasons),
            "memory": dict(self.memory),
            "time": self.time.to_dict() if self.time else None,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Plan":
        """Return the plan that `to_dict` gave, or that an earlier version wrote; keys of others are left out.

        Raises:
            ValueError: it is no plan of a policy: a part is missing that every version writes.
        """
        try:
            memory: dict[str, Any] = dict(values["memory"])
            peak: int = memory["peak_bytes"]
            low, high = values.get("peak_bytes_range", (memory.get("low_bytes", peak), memory.get("high_bytes", peak)))
            return cls(
                fits=values["fits"],
                verdict=values.get("verdict") or ("yes" if values["fits"] else "no"),
                peak_bytes_range=(low, high),
                device=Device.from_dict(values["device"]),
                profile=values["profile"],
                settings=_saved_settings(values["settings"]),
                reasons=dict(values["reasons"]),
                memory=memory,
                time=_saved_time(values.get("time")),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"no plan of a run: {type(error).__name__} {error}") from error


SHARING = ("base_shards", "offload_base")  # settings that are there where processes share a base


def _shown_settings(settings: Settings) -> dict[str, Any]:
    alone = settings.base_shards == 1
    return {key: value for key, value in asdict(settings).items() if not (alone and key in SHARING)}


def _saved_time(values: Any) -> RunTime | None:
    """Return the time of a saved plan; None where it has none, or one that cannot be read, as nothing depends on it."""
    try:
        return RunTime.from_dict(values) if values else None
    except (KeyError, TypeError, ValueError):
        return None


def _saved_settings(values: Mapping[str, Any]) -> Settings:
    """Return settings from plain values; those that earlier versions did not have are what these versions did."""
    earlier = {
        "offload_checkpoints": False,
        "score_batch_tokens": values["micro_batch_tokens"],
        "rollout_weights": "quantized",
    }
    known = {one.name: values[one.name] for one in fields(Settings) if one.name in values}
    return Settings(**{**earlier, **known})


def make_plan(recipe: Recipe, device: Device, profile: str, ring: Ring | None = None) -> Plan:
    """Choose every memory setting of a run for a device.

    A plan that does not fit is returned too, with ``fits`` False; `advice.why_not` says what to change.

    Args:
        ring: the processes of which this device is one's, where there are several.

    Raises:
        UserError: the model cannot be read, or the recipe asks for what the model or the device cannot do; or it
            trains what nothing is chosen for, such as a classifier.
    """
    if why := recipe.spec.no_plan(recipe):
        raise UserError(why)
    dims = model_dimensions(recipe.model, recipe.revision, recipe.trust_remote_code)
    return plan_for(recipe, device, profile, dims, ring=ring)


def plan_for(
    recipe: Recipe,
    device: Device,
    profile: str,
    dims: ModelDimensions,
    timed: bool = True,
    ring: Ring | None = None,
) -> Plan:
    """Return the plan of a recipe for a model of these sizes, which the recipe's own model need not have.

    Args:
        timed: settings are chosen by predicted time; without it by memory alone, which tells sooner whether a run fits.
        ring: the processes of which this device is one's, where there are several.

    Raises:
        UserError: as `make_plan`.
    """
    check_positions(recipe, dims.max_positions, f"has only {dims.max_positions} positions")
    inputs = PlanInputs(recipe, device, dims, budget_bytes(device), timed, ring)
    if inputs.shards > 1:
        check_sharing(inputs)
    settings, reasons = _settings(inputs)
    if dims.note:
        reasons["quantization"] = f"{reasons['quantization']}; {dims.note}"
    by_phase = inputs.phases(settings)
    phase, peak = peak_phase(by_phase)
    if peak > inputs.budget:
        key = _SETTING_OF_PHASE[phase]
        reasons[key] = f"{reasons[key]}; {shortage(phase, by_phase[phase], inputs.budget)}"
    live = max(total(components) - components["allocator"] for components in by_phase.values())
    memory: dict[str, Any] = {
        "budget_bytes": inputs.budget,
        "peak_bytes": peak,
        "low_bytes": live,
        "high_bytes": live if inputs.on_cpu else round(live * ALLOCATOR_HIGH),
        "phases": by_phase,
    }
    if inputs.on_cpu:
        memory["process"] = process_bytes(live)
    else:
        memory["host"] = {"trained_state": Memory(dims, recipe, settings, device).trained_state()}
        if settings.offload_experts:
            memory["host"]["experts"] = expert_bytes(dims)
        if settings.offload_base:
            memory["host"]["base"] = Memory(dims, recipe, settings, device).shard()
    verdict, between = verdict_of(dims, memory, inputs.on_cpu)
    time = run_time(dims, recipe, settings, device, ring) if timed else None
    return Plan(peak <= inputs.budget, verdict, between, device, profile, settings, reasons, memory, time)


def _settings(inputs: PlanInputs) -> tuple[Settings, dict[str, str]]:
    """Choose all settings: by memory, or by predicted time among what fits where the card's speed is known.

    Then the most exact weights are taken that cost little time (see `precision.at_most`), else NF4.
    """
    if inputs.rates is None or inputs.pinned("quantization") or not precision.more_exact(inputs):
        return _settings_at(inputs, *precision.quantization(inputs))
    limit, why_not = precision.at_most(inputs), []
    for one in precision.more_exact(inputs):
        name = precision.name_of(inputs, one)
        if precision.least_time(inputs, one) > limit.seconds:
            why_not.append(f"with {name} weights it takes {precision.least_time(inputs, one):.3g} s at least")
            continue
        settings, reasons = _settings_at(inputs, one, "")
        seconds = inputs.time(settings).step()
        if price := precision.price(inputs, settings):
            why_not.append(f"{name} weights would take {price}")
        elif inputs.peak(settings) > inputs.budget:
            why_not.append(f"{name} weights do not fit")
        elif seconds > limit.seconds:
            why_not.append(f"with {name} weights it takes {seconds:.3g} s in this memory")
        else:
            said = f"by prediction a step takes {seconds:.3g} s with {name} weights, {limit.text}"
            return settings, {**reasons, "quantization": said + precision.advice(inputs)}
    settings, reasons = _settings_at(inputs, "nf4", "")
    if inputs.peak(settings) > inputs.budget:
        return _settings_at(inputs, *precision.quantization(inputs))
    seconds = inputs.time(settings).step()
    said = f"by prediction a step takes {seconds:.3g} s with NF4 weights; {', '.join(why_not)}"
    said += f"; more exact ones may take {limit.text}"
    return settings, {**reasons, "quantization": said + precision.advice(inputs)}


def _settings_at(inputs: PlanInputs, quantization: str, reason: str) -> tuple[Settings, dict[str, str]]:
    """Choose all other settings, the first ones for the smallest working set, then how passes are cut."""
    settings, reasons = _working_set(inputs, quantization, reason)
    chosen = batching.fastest_update(inputs, settings) if inputs.rates else {}
    for key in (
        "gradient_checkpointing",
        "micro_batch_tokens",
        "score_batch_tokens",
        "rollout_batch_size",
        "rollout_weights",
        "keep_graphs",
    ):
        value, reasons[key] = chosen[key] if key in chosen else getattr(batching, key)(inputs, settings)
        settings = replace(settings, **{key: value})
    reasons["logits_tile_tokens"] = batching.logits_tile_tokens(inputs)[1]
    return settings, reasons


def _working_set(inputs: PlanInputs, quantization: str, reason: str) -> tuple[Settings, dict[str, str]]:
    """Choose what saves memory at a price, for the smallest working set; the rest of its settings are the smallest."""
    reasons = {"quantization": reason}
    settings = precision.smallest(inputs, quantization)
    reasons["compute_dtype"] = precision.compute_dtype(inputs, quantization)[1]
    if inputs.shards > 1:
        reasons |= sharing_reasons(inputs, settings)
    for key in ("offload_experts", "optim", "offload_checkpoints", "offload_embeddings"):
        value, reasons[key] = getattr(precision, key)(inputs, settings)
        settings = replace(settings, **{key: value})
    rank, reason = precision.rank(inputs, settings)
    settings = precision.with_rank(inputs, settings, rank)
    reasons["lora"] = _lora_reason(inputs, rank, reason)
    return settings, reasons


def can_fit(recipe: Recipe, device: Device, dims: ModelDimensions) -> bool:
    """Return whether the plan of `plan_for`, made by memory alone, fits: it does where its smallest working set does.

    So how passes are cut is not chosen, which takes most of a plan's time, but where the recipe says a part of it.

    Raises:
        UserError: as `make_plan`.
    """
    check_positions(recipe, dims.max_positions, f"has only {dims.max_positions} positions")
    inputs = PlanInputs(recipe, device, dims, budget_bytes(device), timed=False)
    if any(inputs.pinned(key) is not None for key in ("rollout_batch_size", "rollout_weights", "keep_graphs")):
        return plan_for(recipe, device, "", dims, timed=False).fits
    batching.check_pinned(inputs)
    settings, _ = _working_set(inputs, *precision.quantization(inputs))
    return inputs.peak(settings) <= inputs.budget


def shortage(phase: str, components: Components, budget: int) -> str:
    """Return what a phase lacks and what of it is largest, in a clause."""
    largest = max(components, key=lambda name: components[name])
    need = total(components)
    return (
        f"the {phase} phase needs {gib(need)} and the budget is {gib(budget)} ({gib(need - budget)} short), of which "
        f"{largest.replace('_', ' ')} take {gib(components[largest])}"
    )


def _lora_reason(inputs: PlanInputs, rank: int, reason: str) -> str:
    trained, frozen = adapters_of(inputs.recipe)
    millions = inputs.dims.adapted(inputs.recipe.lora.shape(rank)).parameters / 1e6
    share = 100e6 * millions / inputs.dims.num_parameters
    more = f"; {trained} adapters train and {frozen} are frozen" if trained + frozen > 1 else ""
    if follows := inputs.recipe.spec.follows(inputs.recipe):
        more += f"; the reference follows the policy in an adapter of rank {follows.rank * rank}"
    return f"rank {rank}: {reason}; {millions:.2f} million adapter parameters, {share:.2g} % of the model's{more}"


def check_positions(recipe: Recipe, limit: int | None, why: str) -> None:
    """Check that no text of a run is longer than a model takes.

    Args:
        limit: in tokens; None: any length.
        why: what there is of them only, as the end of a sentence about the model.

    Raises:
        UserError: one is longer.
    """
    rows = [length_keys(recipe), *([sampled_lengths(recipe)] if samples_completions(recipe) else [])]
    for keys in rows:
        tokens = sum(keys.values())
        if limit is not None and tokens > limit:
            verb, which = ("makes", "it") if len(keys) == 1 else ("make", "one of them")
            raise UserError(
                f"{' and '.join(f'{key} {value}' for key, value in keys.items())} {verb} {tokens} tokens, but "
                f"{recipe.model!r} {why}; lower {which}"
            )
