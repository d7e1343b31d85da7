"""The choice of precision and of what saves memory: every function returns ``(value, reason)``.

How passes are cut stands in `batching`, the rule as a whole in `plan`.
"""

from dataclasses import replace

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.planning.inputs import PINNED, PlanInputs, gib
from lowmem_rlhf.planning.memory.resident import Settings
from lowmem_rlhf.planning.shapes import row_tokens

COMFORTABLE = 0.6  # share of the budget that the smallest working set may take at a higher precision
RANK = 16  # for RL a low rank is enough (LoRA Without Regret, Thinking Machines 2025)
LOWER_RANKS = (8, 4)


def compute_dtype(case: PlanInputs, quantization: str) -> tuple[str, str]:
    """Choose the compute dtype for a quantization.

    Raises:
        UserError: the device or the quantization cannot compute in the pinned dtype, or the model overflows float16.
    """
    pinned, device, family = case.pinned("compute_dtype"), case.device, case.dims.model_type
    has_bf16 = device.half_dtype == "bfloat16"
    if pinned == "bfloat16" and not has_bf16:
        raise UserError(
            f"hardware.compute_dtype: got bfloat16, which {device.name} does not compute; take float16 or auto"
        )
    if pinned == "float32" and quantization == "int8":
        raise UserError("hardware.compute_dtype: got float32 with int8 weights, which compute in 16 bits; take nf4")
    int8_in_float16 = quantization == "int8" and device.int8_dtype == "float16"
    chosen = pinned or (device.int8_dtype if quantization == "int8" else device.half_dtype)
    if case.dims.overflows_float16 and (chosen == "float16" or int8_in_float16):
        raise UserError(
            f"model {case.recipe.model!r} ({family}) overflows float16"
            + ("" if has_bf16 else f" and {device.name} has no bfloat16")
            + "; take another model, or hardware.compute_dtype=float32 with hardware.quantization=nf4 (slower)"
        )
    if pinned:
        return pinned, PINNED
    if int8_in_float16:
        return chosen, "int8 weights (LLM.int8) are multiplied in float16"
    if chosen == "float16":
        return chosen, f"{device.name} has no bfloat16; the update scales the loss"
    if case.on_cpu:
        return chosen, "16 bits; on a CPU float16 is 10 to 30 times slower than bfloat16"
    return chosen, f"{device.name} computes bfloat16, which needs no loss scaling"


def smallest(case: PlanInputs, quantization: str) -> Settings:
    """Return the settings of the smallest working set at a quantization, with pinned values kept."""
    from lowmem_rlhf.planning.batching import logits_tile_tokens

    lora = case.recipe.lora
    rank = RANK if lora.r == "auto" else lora.r
    checkpointing = case.pinned("gradient_checkpointing")
    tokens = case.pinned("micro_batch_tokens") or row_tokens(case.recipe)
    return Settings(
        quantization=quantization,
        compute_dtype=compute_dtype(case, quantization)[0],
        gradient_checkpointing=True if checkpointing is None else checkpointing,
        offload_checkpoints=bool(case.pinned("offload_checkpoints")) and not case.on_cpu,
        micro_batch_tokens=tokens,
        score_batch_tokens=case.pinned("score_batch_tokens") or tokens,
        rollout_batch_size=case.pinned("rollout_batch_size") or 1,
        rollout_weights=case.pinned("rollout_weights") or "quantized",
        logits_tile_tokens=logits_tile_tokens(case)[0],
        optim=case.pinned("optim") or "adamw",
        lora={"r": rank, "lora_alpha": lora.alpha(rank), "target_modules": lora.target_modules},
        offload_embeddings=bool(case.pinned("offload_embeddings")) and _embeddings_can_leave(case),
    )


def quantization(case: PlanInputs) -> tuple[str, str]:
    """Choose the highest precision whose smallest working set takes at most 60 % of the budget, else NF4."""
    if pinned := case.pinned("quantization"):
        compute_dtype(case, pinned)  # refuses a combination that cannot be
        return pinned, PINNED
    passed = []
    for candidate, name in (("none", "16-bit"), ("int8", "int8")):
        if candidate == "int8" and (case.pinned("compute_dtype") == "float32" or case.dims.overflows_float16):
            continue
        settings = smallest(case, candidate)
        name = "32-bit" if settings.width == 4 else name
        need = case.peak(settings)
        share = f"{gib(need)} of the {gib(case.budget)} budget"
        if need <= COMFORTABLE * case.budget:
            return (
                candidate,
                f"with {name} weights the smallest working set takes {share}, at most {COMFORTABLE * 100:.0f} %",
            )
        passed.append(f"{gib(need)} with {name}")
    need = case.peak(smallest(case, "nf4"))
    return "nf4", (
        f"the smallest working set takes {gib(need)} against {' and '.join(passed)} weights, which is more than "
        f"{COMFORTABLE * 100:.0f} % of the {gib(case.budget)} budget"
    )


def optim(case: PlanInputs, settings: Settings) -> tuple[str, str]:
    """Choose AdamW, in 8 bits only when the smallest working set does not fit otherwise."""
    if pinned := case.pinned("optim"):
        return pinned, PINNED
    need = case.peak(settings)
    if need <= case.budget:
        return "adamw", f"fp32 moments fit: the smallest working set takes {gib(need)} of {gib(case.budget)}"
    short = case.peak(replace(settings, optim="adamw_8bit"))
    return "adamw_8bit", f"memory is short: {gib(short)} with 8-bit moments against {gib(need)} with fp32 ones"


def offload_checkpoints(case: PlanInputs, settings: Settings) -> tuple[bool, str]:
    """Choose to keep checkpoints in host memory only when the smallest working set does not fit with 8-bit moments."""
    pinned = case.pinned("offload_checkpoints")
    if case.on_cpu:
        return False, "a CPU's checkpoints are in host memory anyway"
    if pinned is not None:
        return pinned, PINNED
    if not settings.gradient_checkpointing:
        return False, "no layer is recomputed, so there are no checkpoints"
    need = case.peak(settings)
    if need <= case.budget:
        return False, f"checkpoints fit: the smallest working set takes {gib(need)} of {gib(case.budget)} with them"
    away = case.peak(replace(settings, offload_checkpoints=True))
    if away == need:
        return False, f"it would not help: another phase than the update needs {gib(need)}"
    return True, f"memory is short: {gib(away)} without checkpoints on the device against {gib(need)} with them"


def offload_embeddings(case: PlanInputs, settings: Settings) -> tuple[bool, str]:
    """Choose to keep the token embedding in host memory only when the smallest working set fits in no other way.

    Raises:
        UserError: it is pinned, and the embedding is the output head as well.
    """
    pinned = case.pinned("offload_embeddings")
    if case.on_cpu:
        return False, "a CPU's embeddings are in host memory anyway"
    if not _embeddings_can_leave(case):
        if pinned:
            raise UserError(
                f"hardware.offload_embeddings: the embedding of {case.recipe.model!r} is its output head as well, with "
                "which the device multiplies; leave it out"
            )
        return False, "the embedding is the output head as well, which the device multiplies with"
    if pinned is not None:
        return pinned, PINNED
    need = case.peak(settings)
    if need <= case.budget:
        return False, f"they fit: the smallest working set takes {gib(need)} of {gib(case.budget)} with them"
    away = case.peak(replace(settings, offload_embeddings=True))
    return True, f"memory is short: {gib(away)} without the token embedding on the device against {gib(need)} with it"


def _embeddings_can_leave(case: PlanInputs) -> bool:
    return not case.on_cpu and not case.dims.tied


def rank(case: PlanInputs, settings: Settings) -> tuple[int, str]:
    """Choose the adapters' rank: 16, less only when the smallest working set does not fit otherwise."""
    if case.recipe.lora.r != "auto":
        return int(case.recipe.lora.r), PINNED
    need = case.peak(settings)
    if need <= case.budget:
        return RANK, "enough for RL, where low ranks learn as well as high ones"
    for lower in LOWER_RANKS:
        less = case.peak(with_rank(case, settings, lower))
        if less <= case.budget:
            return lower, f"memory is short: {gib(less)} at this rank against {gib(need)} at {RANK}"
    return LOWER_RANKS[-1], f"memory is short, and would be at any rank: {gib(less)} at this one"


def with_rank(case: PlanInputs, settings: Settings, r: int) -> Settings:
    """Return the settings with another rank, and the alpha that goes with it."""
    return replace(settings, lora={**settings.lora, "r": r, "lora_alpha": case.recipe.lora.alpha(r)})
