"""The choice of precision and of what saves memory: every function returns ``(value, reason)``.

How passes are cut stands in `batching`, the rule as a whole in `plan`.
"""

from dataclasses import dataclass, replace

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.planning.inputs import PINNED, PlanInputs, gib
from lowmem_rlhf.planning.memory.resident import Settings, expert_bytes
from lowmem_rlhf.planning.shapes import all_rows, row_tokens

COMFORTABLE = 0.6  # share of the budget that the smallest working set may take at a higher precision
NEARLY_ALL = 0.9  # the same where 4-bit weights are advised against
SLOWER_AT_MOST = 1.25  # times what NF4 takes, which more exact weights may take; a 4-bit model answers worse
SLOWER_WITHOUT_FOUR_BITS = 4.0  # the same where 4-bit weights are advised against
RANK = 16  # for RL a low rank is enough (LoRA Without Regret, Thinking Machines 2025)
LOWER_RANKS = (8, 4)
WORTH_MOVING = 0.1  # share of the budget that embeddings of each layer may take before they lie in host memory


def compute_dtype(inputs: PlanInputs, quantization: str) -> tuple[str, str]:
    """Choose the compute dtype for a quantization.

    Raises:
        UserError: the device or the quantization cannot compute in the pinned dtype, or the model overflows float16.
    """
    pinned, device, family = inputs.pinned("compute_dtype"), inputs.device, inputs.dims.model_type
    has_bf16 = device.half_dtype == "bfloat16"
    if pinned == "bfloat16" and not has_bf16:
        raise UserError(
            f"hardware.compute_dtype: got bfloat16, which {device.name} does not compute; take float16 or auto"
        )
    if pinned == "float32" and quantization == "int8":
        raise UserError("hardware.compute_dtype: got float32 with int8 weights, which compute in 16 bits; take nf4")
    int8_in_float16 = quantization == "int8" and device.int8_dtype == "float16"
    if pinned is None and device.slow_half and quantization != "int8" and _single_fits(inputs, quantization):
        return "float32", "this CPU has no AVX-512: a product in 16 bits takes many times as long as one in fp32"
    chosen = pinned or (device.int8_dtype if quantization == "int8" else device.half_dtype)
    narrow = inputs.dims.overflows_float16 and (chosen == "float16" or int8_in_float16)
    if narrow and (int8_in_float16 or not inputs.dims.wide_stream):
        raise UserError(
            f"model {inputs.recipe.model!r} ({family}) overflows float16"
            + ("" if has_bf16 else f" and {device.name} has no bfloat16")
            + "; take another model, or hardware.compute_dtype=float32 with hardware.quantization=nf4 (slower)"
        )
    if pinned:
        return pinned, PINNED
    if int8_in_float16:
        return chosen, "int8 weights (LLM.int8) are multiplied in float16"
    if chosen == "float16" and narrow:
        return chosen, f"{device.name} has no bfloat16; {family}'s residual stream overflows float16 and is in float32"
    if chosen == "float16":
        return chosen, f"{device.name} has no bfloat16; the update scales the loss"
    if inputs.on_cpu:
        return chosen, "16 bits; on a CPU float16 is 10 to 30 times slower than bfloat16"
    return chosen, f"{device.name} computes bfloat16, which needs no loss scaling"


def _single_fits(inputs: PlanInputs, quantization: str) -> bool:
    """Whether the smallest working set in fp32 leaves as much of the budget as a higher precision must."""
    return inputs.peak(_smallest(inputs, quantization, "float32")) <= COMFORTABLE * inputs.budget


def smallest(inputs: PlanInputs, quantization: str) -> Settings:
    """Return the settings of the smallest working set at a quantization, with pinned values kept."""
    return _smallest(inputs, quantization, compute_dtype(inputs, quantization)[0])


def _smallest(inputs: PlanInputs, quantization: str, dtype: str) -> Settings:
    from lowmem_rlhf.planning.batching import logits_tile_tokens

    lora = inputs.recipe.lora
    rank = RANK if lora.r == "auto" else lora.r
    checkpointing = inputs.pinned("gradient_checkpointing")
    tokens = inputs.pinned("micro_batch_tokens") or row_tokens(inputs.recipe)
    return Settings(
        quantization=quantization,
        compute_dtype=dtype,
        gradient_checkpointing=True if checkpointing is None else checkpointing,
        offload_checkpoints=bool(inputs.pinned("offload_checkpoints")) and not inputs.on_cpu,
        micro_batch_tokens=tokens,
        score_batch_tokens=inputs.pinned("score_batch_tokens") or tokens,
        rollout_batch_size=inputs.pinned("rollout_batch_size") or 1,
        rollout_weights=inputs.pinned("rollout_weights") or "quantized",
        keep_graphs=bool(inputs.pinned("keep_graphs")),
        logits_tile_tokens=logits_tile_tokens(inputs)[0],
        optim=inputs.pinned("optim") or "adamw",
        lora=lora.shape(rank).values,
        offload_embeddings=bool(inputs.pinned("offload_embeddings")) and _embeddings_can_leave(inputs),
        offload_experts=bool(inputs.pinned("offload_experts")) and _experts_can_leave(inputs, quantization),
        base_shards=inputs.shards,
        offload_base=inputs.shards > 1 and inputs.recipe.hardware.offload_base,
    )


def quantization(inputs: PlanInputs) -> tuple[str, str]:
    """Choose the highest precision whose smallest working set takes at most 60 % of the budget, else NF4."""
    if pinned := inputs.pinned("quantization"):
        compute_dtype(inputs, pinned)  # refuses a combination that cannot be
        return pinned, PINNED
    if inputs.shards > 1:
        return "nf4", f"every pass gathers the layers, which are the fewest bytes in NF4{advice(inputs)}"
    if not more_exact(inputs):
        return "nf4", "experts that wait in host memory are in NF4"
    passed, share_allowed = [], COMFORTABLE
    if inputs.dims.avoids_four_bits:
        share_allowed = NEARLY_ALL
    for candidate in more_exact(inputs):
        name = name_of(inputs, candidate)
        need = inputs.peak(smallest(inputs, candidate))
        share = f"{gib(need)} of the {gib(inputs.budget)} budget"
        if need <= share_allowed * inputs.budget:
            return (
                candidate,
                f"with {name} weights the smallest working set takes {share}, at most {share_allowed * 100:.0f} %"
                + advice(inputs),
            )
        passed.append(f"{gib(need)} with {name}")
    need = inputs.peak(smallest(inputs, "nf4"))
    return "nf4", (
        f"the smallest working set takes {gib(need)} against {' and '.join(passed)} weights, which is more than "
        f"{share_allowed * 100:.0f} % of the {gib(inputs.budget)} budget{advice(inputs)}"
    )


@dataclass(frozen=True)
class TimeLimit:
    """The seconds that a step may take with weights more exact than NF4's, and why, as the end of a sentence."""

    seconds: float
    text: str


def at_most(inputs: PlanInputs) -> TimeLimit:
    """Return the time that a step may take with more exact weights than NF4.

    It is a multiple of what a step takes with NF4 where memory is no limit. As that is the same in every memory, and
    steps only get faster with more of it, more memory never gives a lower precision.
    """
    factor = SLOWER_WITHOUT_FOUR_BITS if inputs.dims.avoids_four_bits else SLOWER_AT_MOST
    least = least_time(inputs, "nf4")
    return TimeLimit(factor * least, f"at most {factor:g} times the {least:.3g} s of NF4 without a limit of memory")


def least_time(inputs: PlanInputs, quantization: str) -> float:
    """Return the predicted seconds of a step in any memory: no layer recomputed, all rows and tokens at once."""
    from lowmem_rlhf.planning.batching import micro_batch_limits

    recipe, settings = inputs.recipe, smallest(inputs, quantization)
    most = micro_batch_limits(inputs)[1]
    pinned = inputs.pinned("gradient_checkpointing")
    settings = replace(
        settings,
        gradient_checkpointing=False if pinned is None else pinned,
        micro_batch_tokens=inputs.pinned("micro_batch_tokens") or most,
        score_batch_tokens=inputs.pinned("score_batch_tokens") or most,
        rollout_batch_size=inputs.pinned("rollout_batch_size") or max(1, all_rows(recipe)),
        keep_graphs=True,
    )
    return inputs.time(settings).step()


def more_exact(inputs: PlanInputs) -> list[str]:
    """Return the quantizations that are more exact than NF4 and possible, the most exact first."""
    if inputs.shards > 1 or (inputs.pinned("offload_experts") and inputs.dims.expert_parameters and not inputs.on_cpu):
        return []
    no_int8 = inputs.pinned("compute_dtype") == "float32" or inputs.dims.overflows_float16
    return ["none"] if no_int8 else ["none", "int8"]


def name_of(inputs: PlanInputs, quantization: str) -> str:
    """Return what sentences call weights: 16-bit, 32-bit, int8."""
    return f"{8 * smallest(inputs, quantization).width}-bit" if quantization == "none" else quantization


def price(inputs: PlanInputs, settings: Settings) -> str:
    """Return what the plan would give up of what is learned, or of speed, to make room for weights; mostly nothing."""
    if settings.optim == "adamw_8bit" and not inputs.pinned("optim"):
        return "8-bit moments"
    if settings.lora["r"] < RANK and inputs.recipe.lora.r == "auto":
        return f"a rank of {settings.lora['r']}"
    away = settings.offload_checkpoints and not inputs.pinned("offload_checkpoints")
    return "checkpoints in host memory" if away else ""


def advice(inputs: PlanInputs) -> str:
    """Return what is to be said of 4-bit weights, as the end of a sentence; mostly nothing."""
    dims = inputs.dims
    return f"; 4-bit weights are advised against for {dims.model_type}" if dims.avoids_four_bits else ""


def optim(inputs: PlanInputs, settings: Settings) -> tuple[str, str]:
    """Choose AdamW, in 8 bits only when the smallest working set does not fit otherwise.

    Raises:
        UserError: the pinned optimizer has no kernel for the device.
    """
    has_eight_bits = inputs.device.capabilities.eight_bit_adamw
    if pinned := inputs.pinned("optim"):
        if pinned == "adamw_8bit" and not has_eight_bits:
            raise UserError(
                f"hardware.optim: got adamw_8bit, which bitsandbytes does not have for {inputs.device.name}; "
                "take adamw or auto"
            )
        return pinned, PINNED
    need = inputs.peak(settings)
    if need <= inputs.budget:
        return "adamw", f"fp32 moments fit: the smallest working set takes {gib(need)} of {gib(inputs.budget)}"
    if not has_eight_bits:
        return "adamw", f"memory is short, and bitsandbytes has no 8-bit AdamW for {inputs.device.name}"
    short = inputs.peak(replace(settings, optim="adamw_8bit"))
    return "adamw_8bit", f"memory is short: {gib(short)} with 8-bit moments against {gib(need)} with fp32 ones"


def offload_checkpoints(inputs: PlanInputs, settings: Settings) -> tuple[bool, str]:
    """Choose to keep checkpoints in host memory only when the smallest working set does not fit with 8-bit moments."""
    pinned = inputs.pinned("offload_checkpoints")
    if inputs.on_cpu:
        return False, "a CPU's checkpoints are in host memory anyway"
    if pinned is not None:
        return pinned, PINNED
    if not settings.gradient_checkpointing:
        return False, "no layer is recomputed, so there are no checkpoints"
    need = inputs.peak(settings)
    if need <= inputs.budget:
        return False, f"checkpoints fit: the smallest working set takes {gib(need)} of {gib(inputs.budget)} with them"
    away = inputs.peak(replace(settings, offload_checkpoints=True))
    if away == need:
        return False, f"it would not help: another phase than the update needs {gib(need)}"
    return True, f"memory is short: {gib(away)} without checkpoints on the device against {gib(need)} with them"


def offload_embeddings(inputs: PlanInputs, settings: Settings) -> tuple[bool, str]:
    """Choose to keep the token embedding in host memory only when the smallest working set fits in no other way.

    Raises:
        UserError: it is pinned, and the embedding is the output head as well.
    """
    pinned = inputs.pinned("offload_embeddings")
    if inputs.on_cpu:
        return False, "a CPU's embeddings are in host memory anyway"
    if not _embeddings_can_leave(inputs):
        if pinned:
            raise UserError(
                f"hardware.offload_embeddings: the embedding of {inputs.recipe.model!r} is its output head as well, "
                "with which the device multiplies; leave it out"
            )
        return False, "the embedding is the output head as well, which the device multiplies with"
    if pinned is not None:
        return pinned, PINNED
    tables = inputs.dims.layer_embeddings * settings.width
    if tables > WORTH_MOVING * inputs.budget:
        return True, f"the embeddings of each layer, {gib(tables)}, are only looked up, a few kB a token"
    need = inputs.peak(settings)
    if need <= inputs.budget:
        return False, f"they fit: the smallest working set takes {gib(need)} of {gib(inputs.budget)} with them"
    away = inputs.peak(replace(settings, offload_embeddings=True))
    return True, f"memory is short: {gib(away)} without the token embedding on the device against {gib(need)} with it"


def offload_experts(inputs: PlanInputs, settings: Settings) -> tuple[bool, str]:
    """Choose to keep experts in host memory only when the smallest working set fits in no other way.

    It is the most of what a mixture takes, so what else saves memory is chosen after it.

    Raises:
        UserError: it is pinned, and there are no experts, or they are not in NF4.
    """
    pinned = inputs.pinned("offload_experts")
    if not inputs.dims.expert_parameters:
        if pinned:
            raise UserError(f"hardware.offload_experts: {inputs.recipe.model!r} has no experts; leave it out")
        return False, "the model has no experts"
    if inputs.shards > 1:
        return False, "the processes share them"
    if not _experts_can_leave(inputs, settings.quantization):
        if pinned and not inputs.on_cpu:
            raise UserError(
                f"hardware.offload_experts: only experts in NF4 can wait in host memory, and hardware.quantization is "
                f"{settings.quantization}; set it to nf4"
            )
        return False, "a CPU's experts are in host memory anyway" if inputs.on_cpu else "only those in NF4 can leave"
    if pinned is not None:
        return pinned, PINNED
    need = inputs.peak(settings)
    if need <= inputs.budget:
        return False, f"they fit: the smallest working set takes {gib(need)} of {gib(inputs.budget)} with them"
    saving = replace(settings, optim="adamw_8bit", offload_checkpoints=True, offload_embeddings=True)
    least = inputs.peak(with_rank(inputs, saving, LOWER_RANKS[-1]))
    if least <= inputs.budget:
        return False, f"what else saves memory makes them fit: {gib(least)} of {gib(inputs.budget)} at least"
    away = inputs.peak(replace(settings, offload_experts=True))
    return True, (
        f"memory is short: {gib(away)} without the experts on the device against {gib(least)} at least with them; "
        f"{gib(expert_bytes(inputs.dims))} of host memory, from which each is fetched for its product, which is slow"
    )


def _experts_can_leave(inputs: PlanInputs, quantization: str) -> bool:
    return quantization == "nf4" and not inputs.on_cpu and bool(inputs.dims.expert_parameters)


def _embeddings_can_leave(inputs: PlanInputs) -> bool:
    return not inputs.on_cpu and bool(inputs.dims.movable_embeddings)


def rank(inputs: PlanInputs, settings: Settings) -> tuple[int, str]:
    """Choose the adapters' rank: 16, less only when the smallest working set does not fit otherwise."""
    if inputs.recipe.lora.r != "auto":
        return int(inputs.recipe.lora.r), PINNED
    need = inputs.peak(settings)
    if need <= inputs.budget:
        return RANK, "enough for RL, where low ranks learn as well as high ones"
    for lower in LOWER_RANKS:
        less = inputs.peak(with_rank(inputs, settings, lower))
        if less <= inputs.budget:
            return lower, f"memory is short: {gib(less)} at this rank against {gib(need)} at {RANK}"
    return LOWER_RANKS[-1], f"memory is short, and would be at any rank: {gib(less)} at this one"


def with_rank(inputs: PlanInputs, settings: Settings, r: int) -> Settings:
    """Return the settings with another rank, and the alpha that goes with it."""
    return replace(settings, lora=inputs.recipe.lora.shape(r).values)
