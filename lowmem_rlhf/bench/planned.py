"""What the plan predicts of a step, against the step itself: the part ``plan``.

The recipe is ``grpo_gsm8k`` with the model that is measured; its own trainer takes steps on prompts and completions of
exactly the lengths that the plan was made for (`trainer_step`).
"""

from collections.abc import Mapping
from typing import Any

import torch

from lowmem_rlhf.bench.meter import AllocatedBytes, Counter, counter_for
from lowmem_rlhf.bench.trainer_step import Measured
from lowmem_rlhf.bench.work import Work
from lowmem_rlhf.errors import RunError
from lowmem_rlhf.hardware.capabilities import capabilities
from lowmem_rlhf.hardware.memory import release
from lowmem_rlhf.planning.plan import Plan
from lowmem_rlhf.planning.run_plan import running_plan
from lowmem_rlhf.progress import ProgressCallback
from lowmem_rlhf.recipe.loading import load_recipe
from lowmem_rlhf.recipe.schema import Recipe

PREDICTED = {"rollout": ("rollout",), "score": ("scoring",), "update": ("update", "optimizer")}  # by trainer's phase
SETTINGS = (
    *("quantization", "compute_dtype", "gradient_checkpointing", "micro_batch_tokens", "score_batch_tokens"),
    *("rollout_batch_size", "rollout_weights", "logits_tile_tokens", "keep_graphs"),
)


def step_against_plan(work: Work, progress: ProgressCallback) -> dict[str, Any]:
    """Return predicted and measured bytes and seconds by phase, and their ratios (measured over predicted).

    ``time`` is None where the plan predicts none.

    Raises:
        RunError: the step does not fit by the plan.
    """
    device, recipe = torch.device(work.device), _recipe(work)
    plan = running_plan(recipe)
    if not plan.fits:
        raise RunError("the step does not fit in the memory that is free, by the plan; close what else uses it")
    progress(1, 3)
    release(device)
    others = AllocatedBytes(device).current if capabilities(device).counts_memory else None

    def counter() -> Counter:
        progress(2, 3)
        return counter_for(device)

    measured = Measured(recipe, plan, counter, others, timed=True)
    settings = plan.to_dict()["settings"]
    found = {
        "prompts": recipe.training.prompts_per_step,
        "generations": recipe.generation.num_generations,
        "prompt_length": recipe.data.max_prompt_length,
        "completion_length": recipe.generation.max_completion_length,
        "settings": {key: settings[key] for key in SETTINGS if key in settings},
        "memory": _memory(plan, measured.peaks),
        "time": _time(plan.to_dict().get("time"), measured.seconds),
        "seconds": measured.seconds,
    }
    if isinstance(measured.counter, AllocatedBytes) and measured.counter.reserved:
        found["reserved"] = _both(plan.memory["peak_bytes"], measured.counter.reserved)
    return found


def _recipe(work: Work) -> Recipe:
    sizes = work.sizes
    values = {
        "model": work.model,
        "data.eval_size": 0,
        "data.chat": "false",
        "data.system": "null",
        "data.max_prompt_length": sizes.plan_prompt_length,
        "generation.num_generations": sizes.generations,
        "generation.max_completion_length": sizes.plan_completion_length,
        "training.prompts_per_step": sizes.plan_prompts,
        "hardware.device": work.device,
        **({"hardware.compute_dtype": work.compute_dtype} if work.compute_dtype == "float32" else {}),
    }
    return load_recipe("grpo_gsm8k", [f"{key}={value}" for key, value in values.items()])


def _both(predicted: float, measured: float) -> dict[str, Any]:
    return {"predicted": predicted, "measured": measured, "ratio": measured / predicted if predicted else None}


def _memory(plan: Plan, peaks: Mapping[str, int]) -> dict[str, Any]:
    """Compare live tensors, without what the plan adds for the allocator."""
    live = {
        phase: sum(components.values()) - components.get("allocator", 0)
        for phase, components in plan.memory["phases"].items()
    }
    found = {name: _both(max(live[part] for part in PREDICTED[name]), peak) for name, peak in peaks.items()}
    predicted, measured = (max(one[kind] for one in found.values()) for kind in ("predicted", "measured"))
    return {**found, "step": _both(predicted, measured)}


def _time(predicted: Mapping[str, Any] | None, seconds: Mapping[str, float]) -> dict[str, Any] | None:
    """Compare the seconds of the phases that both have, and of the step."""
    if not predicted:
        return None
    phases = predicted.get("phases") or {}
    found = {name: _both(phases[name], own) for name, own in seconds.items() if name in phases}
    step = _both(predicted["step_seconds"], sum(seconds.values()))
    return {**found, "step": {**step, "range": predicted.get("step_seconds_range")}}
