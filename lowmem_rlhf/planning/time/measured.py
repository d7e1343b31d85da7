"""What a finished run took against what was predicted, with the lengths that its texts had. No torch here."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from lowmem_rlhf.architecture.dimensions import ModelDimensions
from lowmem_rlhf.hardware.device import Device
from lowmem_rlhf.planning.memory.resident import Settings
from lowmem_rlhf.planning.time.estimate import StepTime, device_rates
from lowmem_rlhf.recipe.schema import Recipe

PHASES = ("rollout", "score", "update")


def measured_time(
    dims: ModelDimensions,
    recipe: Recipe,
    settings: Settings,
    device: Device,
    metrics: Sequence[Mapping[str, Any]],
) -> dict[str, Any] | None:
    """Return the mean seconds of a step by phase, measured and predicted.

    The first step is left out where there are more: kernels are chosen and graphs captured in it.

    Args:
        metrics: the rows of metrics.jsonl.

    Returns:
        ``steps`` that were counted, ``phases`` and ``step_seconds`` as measured, the mean ``lengths`` of prompt and
        completion in tokens, ``predicted`` (phases and ``step_seconds`` for these lengths) and ``ratio``, measured over
        predicted; None where nothing was measured or nothing can be predicted.
    """
    rates = device_rates(device)
    rows = [row for row in metrics[min(1, len(metrics) - 1) :] if row.get("time/step")]
    if rates is None or not rows:
        return None
    phases = {name: _mean(rows, f"time/{name}") for name in PHASES}
    taken = {name: seconds for name, seconds in phases.items() if seconds is not None}
    lengths = {"prompt": _mean(rows, "prompt/mean_length"), "completion": _mean(rows, "completion/mean_length")}
    guessed = StepTime(dims, with_lengths(recipe, lengths), settings, device, rates).phases()
    step, predicted = statistics.mean(float(row["time/step"]) for row in rows), sum(guessed.values())
    return {
        "steps": len(rows),
        "phases": taken,
        "step_seconds": step,
        "lengths": lengths,
        "predicted": {"phases": guessed, "step_seconds": predicted},
        "ratio": step / predicted,
    }


def with_lengths(recipe: Recipe, lengths: Mapping[str, float | None]) -> Recipe:
    """Return a recipe whose prompts and sampled completions have these lengths, where they are known."""
    data, generation = recipe.data, recipe.generation
    if lengths["prompt"]:
        data = data.model_copy(update={"max_prompt_length": max(1, round(lengths["prompt"]))})
    if lengths["completion"]:
        generation = generation.model_copy(update={"max_completion_length": max(2, round(lengths["completion"]))})
    return recipe.model_copy(update={"data": data, "generation": generation})


def _mean(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values = [float(row[name]) for row in rows if row.get(name) is not None]
    return statistics.mean(values) if values else None
