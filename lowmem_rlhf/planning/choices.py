"""The choice of each setting: every function returns ``(value, reason)``. The rule as a whole stands in `plan`."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.hardware.device import Device
from lowmem_rlhf.planning.dimensions import ModelDimensions
from lowmem_rlhf.planning.memory import (
    CPU_PROCESS_BYTES,
    CUDA_CONTEXT_BYTES,
    GIB,
    MIB,
    Components,
    Settings,
    peak_phase,
    phases,
)
from lowmem_rlhf.planning.shapes import (
    group_tokens,
    length_keys,
    row_tokens,
    samples_completions,
    step_tokens,
)
from lowmem_rlhf.recipe import ONLINE, Recipe

PINNED = "set in the recipe"
COMFORTABLE = 0.6  # share of the budget that the smallest working set may take at a higher precision
MARGIN = 0.04  # share of free memory left alone
TILE_BYTES = 128 * MIB
MICRO_BATCH_CAP = {"cpu": 4096, "gpu": 16384}  # a CPU gains nothing from more: the activations fall out of its caches


@dataclass(frozen=True)
class Case:
    """What a plan is made from."""

    recipe: Recipe
    device: Device
    dims: ModelDimensions
    budget: int

    @property
    def on_cpu(self) -> bool:
        """Whether the run computes on the CPU, with the RAM as its budget."""
        return self.device.torch_device.startswith("cpu")

    def pinned(self, key: str) -> Any:
        """Return the recipe's value of a setting, or None when it is left to the plan."""
        value = getattr(self.recipe.hardware, key)
        return None if value == "auto" else value

    def phases(self, settings: Settings) -> dict[str, Components]:
        """Return the predicted bytes of every phase."""
        return phases(self.dims, self.recipe, settings, self.device)

    def peak(self, settings: Settings, *names: str) -> int:
        """Return the predicted bytes of the largest of the named phases (of all, when none is named)."""
        by_phase = self.phases(settings)
        return peak_phase({name: by_phase[name] for name in names or by_phase})[1]


def gib(count: float) -> str:
    """Return bytes as GiB with two digits."""
    return f"{count / GIB:.2f} GiB"


def budget_bytes(device: Device) -> int:
    """Return what a run may take: free memory less 4 % and what the process holds before its first tensor.

    That is the CUDA context (141 MiB; not when torch measured free memory, as it is open then), or on the CPU about
    768 MiB of Python and libraries.
    """
    if device.torch_device.startswith("cpu"):
        process = CPU_PROCESS_BYTES
    else:
        process = 0 if device.source == "torch" else CUDA_CONTEXT_BYTES
    return max(0, int(device.free_bytes * (1 - MARGIN)) - process)


def compute_dtype(case: Case, quantization: str) -> tuple[str, str]:
    """Choose the compute dtype for a quantization.

    Raises:
        UserError: the device or the quantization cannot compute in the pinned dtype, or the model overflows float16.
    """
    pinned, device, family = case.pinned("compute_dtype"), case.device, case.dims.model_type
    has_bf16 = device.bf16 or case.on_cpu
    if pinned == "bfloat16" and not has_bf16:
        raise UserError(
            f"hardware.compute_dtype: got bfloat16, which {device.name} does not compute; take float16 or auto"
        )
    if pinned == "float32" and quantization == "int8":
        raise UserError("hardware.compute_dtype: got float32 with int8 weights, which compute in 16 bits; take nf4")
    int8_on_gpu = quantization == "int8" and not case.on_cpu
    chosen = pinned or ("bfloat16" if has_bf16 and not int8_on_gpu else "float16")
    if case.dims.overflows_float16 and (chosen == "float16" or int8_on_gpu):
        raise UserError(
            f"model {case.recipe.model!r} ({family}) overflows float16"
            + ("" if has_bf16 else f" and {device.name} has no bfloat16")
            + "; take another model, or hardware.compute_dtype=float32 with hardware.quantization=nf4 (slower)"
        )
    if pinned:
        return pinned, PINNED
    if int8_on_gpu:
        return chosen, "int8 weights (LLM.int8) are multiplied in float16"
    if chosen == "float16":
        return chosen, f"{device.name} has no bfloat16; the update scales the loss"
    if case.on_cpu:
        return chosen, "16 bits; on a CPU float16 is 10 to 30 times slower than bfloat16"
    return chosen, f"{device.name} computes bfloat16, which needs no loss scaling"


def smallest(case: Case, quantization: str) -> Settings:
    """Return the settings of the smallest working set at a quantization, with pinned values kept."""
    lora = case.recipe.lora
    checkpointing = case.pinned("gradient_checkpointing")
    return Settings(
        quantization=quantization,
        compute_dtype=compute_dtype(case, quantization)[0],
        gradient_checkpointing=True if checkpointing is None else checkpointing,
        offload_checkpoints=bool(case.pinned("offload_checkpoints")) and not case.on_cpu,
        micro_batch_tokens=case.pinned("micro_batch_tokens") or row_tokens(case.recipe),
        rollout_batch_size=case.pinned("rollout_batch_size") or 1,
        rollout_weights=case.pinned("rollout_weights") or "quantized",
        logits_tile_tokens=logits_tile_tokens(case)[0],
        optim=case.pinned("optim") or "adamw",
        lora={"r": lora.r, "lora_alpha": lora.lora_alpha, "target_modules": lora.target_modules},
    )


def quantization(case: Case) -> tuple[str, str]:
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


def logits_tile_tokens(case: Case) -> tuple[int, str]:
    """Choose the power of two whose tile comes closest below 128 MiB; on the CPU between 256 and 512 positions."""
    if pinned := case.pinned("logits_tile_tokens"):
        return pinned, PINNED
    row = case.dims.vocab_size * 10
    tokens = 1 << max(4, min(10, (TILE_BYTES // row).bit_length() - 1))
    tokens = max(256, min(512, tokens)) if case.on_cpu else tokens
    return tokens, f"a tile over {case.dims.vocab_size:,} tokens of vocabulary takes about {tokens * row / MIB:.0f} MiB"


def optim(case: Case, settings: Settings) -> tuple[str, str]:
    """Choose AdamW, in 8 bits only when the smallest working set does not fit otherwise."""
    if pinned := case.pinned("optim"):
        return pinned, PINNED
    need = case.peak(settings)
    if need <= case.budget:
        return "adamw", f"fp32 moments fit: the smallest working set takes {gib(need)} of {gib(case.budget)}"
    short = case.peak(replace(settings, optim="adamw_8bit"))
    return "adamw_8bit", f"memory is short: {gib(short)} with 8-bit moments against {gib(need)} with fp32 ones"


def offload_checkpoints(case: Case, settings: Settings) -> tuple[bool, str]:
    """Choose to keep checkpoints in host memory only when the smallest working set fits in no other way."""
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
    if away > case.budget:
        return False, f"it would not help: {gib(away)} without checkpoints on the device, {gib(need)} with them"
    return True, f"memory is short: {gib(away)} without checkpoints on the device against {gib(need)} with them"


def gradient_checkpointing(case: Case, settings: Settings) -> tuple[bool | int, str]:
    """Choose the fewest recomputed layers for a whole group in a micro-batch, or as much of one as fits.

    Returns:
        False for no layer, True for all, else how many: the first ones.

    Raises:
        UserError: the model has fewer layers than the pinned number.
    """
    pinned, layers = case.pinned("gradient_checkpointing"), case.dims.num_layers
    if pinned is not None:
        if pinned > layers:
            raise UserError(
                f"hardware.gradient_checkpointing: got {pinned}, but {case.recipe.model!r} has {layers} layers; give "
                f"at most {layers}, or true for all of them"
            )
        return pinned, PINNED
    tokens = case.pinned("micro_batch_tokens") or _group_tokens(case, settings)

    def need(count: int) -> int:
        return case.peak(replace(settings, gradient_checkpointing=count, micro_batch_tokens=tokens), "update")

    count = _first(range(layers + 1), lambda count: need(count) <= case.budget)
    share = f"of {gib(case.budget)}"
    if count == 0:
        return False, f"the update keeps all activations of {tokens} tokens: {gib(need(0))} {share}"
    if count is None or count == layers:
        return True, f"with one layer less the update of {tokens} tokens would take {gib(need(layers - 1))} {share}"
    return count, f"the fewest of {layers} layers with which {tokens} tokens fit: {gib(need(count))} {share}"


def _group_tokens(case: Case, settings: Settings) -> int:
    """Return a group's tokens, at most the cap, or the most that fit with every layer recomputed.

    More comes before fewer recomputed layers, as a group that is split repeats its prompt; beyond a whole group a
    larger micro-batch computes nothing less.
    """
    least, top = _micro_batch_limits(case)
    group = min(group_tokens(case.recipe), top)

    def fits(tokens: int) -> bool:
        return case.peak(replace(settings, micro_batch_tokens=tokens), "scoring", "update") <= case.budget

    return _first(_token_steps(least, group), fits) or least


def micro_batch_tokens(case: Case, settings: Settings) -> tuple[int, str]:
    """Choose the most packed tokens of one pass that fit, at least the longest prompt with its completion.

    Raises:
        UserError: the pinned number is less than that.
    """
    least, top = _micro_batch_limits(case)
    if pinned := case.pinned("micro_batch_tokens"):
        if pinned < least:
            raise UserError(
                f"hardware.micro_batch_tokens: got {pinned}, but a prompt and its completion may have {least} tokens; "
                f"give at least {least}, or lower {' or '.join(length_keys(case.recipe))}"
            )
        return pinned, PINNED
    steps = sorted({*_token_steps(least, top), min(group_tokens(case.recipe), top)}, reverse=True)

    def need(tokens: int) -> int:
        return case.peak(replace(settings, micro_batch_tokens=tokens), "scoring", "update")

    tokens = _first(steps, lambda size: need(size) <= case.budget)
    if tokens is None:
        return least, f"the longest prompt and completion need {least} tokens: {gib(need(least))}"
    share = f"the update takes {gib(need(tokens))} of {gib(case.budget)}"
    if tokens < top:
        return tokens, f"the most that fits: {share}"
    what = "a whole step" if tokens == step_tokens(case.recipe) else "the cap for a CPU" if case.on_cpu else "the cap"
    return tokens, f"{what}: {share}"


def rollout_batch_size(case: Case, settings: Settings) -> tuple[int, str]:
    """Choose how many completions are written at once: a whole step, else whole groups, else fewer than a group.

    Where only held-out completions are sampled (SFT with rewards), the whole is the evaluation.
    """
    if pinned := case.pinned("rollout_batch_size"):
        return pinned, PINNED
    if not samples_completions(case.recipe):
        return 1, "nothing is sampled"
    group, prompts, whole = case.recipe.generation.num_generations, case.recipe.training.prompts_per_step, "a step"
    if case.recipe.algorithm not in ONLINE:
        group, prompts, whole = case.recipe.evaluation.num_samples, case.recipe.data.eval_size, "the evaluation"
    sizes = [group * count for count in range(prompts, 0, -1)] + list(range(group - 1, 0, -1))

    def need(rows: int) -> int:
        return case.peak(replace(settings, rollout_batch_size=rows), "rollout")

    rows = _first(sizes, lambda size: need(size) <= case.budget)
    if rows is None:
        return 1, f"even one completion at a time takes {gib(need(1))}"
    cache = case.phases(replace(settings, rollout_batch_size=rows))["rollout"]["kv_cache"]
    share = f"its key-value cache takes {gib(cache)}, the rollout {gib(need(rows))} of {gib(case.budget)}"
    return rows, f"{f'all of {whole}' if rows == sizes[0] else f'the most of {sizes[0]} that fits'}: {share}"


def rollout_weights(case: Case, settings: Settings) -> tuple[str, str]:
    """Choose whether sampling reads a 16-bit copy of NF4 weights, made anew for each rollout.

    The copy is the very numbers that NF4 stands for, and the adapter stays beside it, so the sampling policy is the
    trained one. On a CPU it saves dequantizing every weight for every token. On a GPU bitsandbytes multiplies 4-bit
    weights directly and which is faster was not measured: there it is left to the recipe.
    """
    if pinned := case.pinned("rollout_weights"):
        return pinned, PINNED
    if settings.quantization != "nf4" or not samples_completions(case.recipe):
        return "quantized", "the weights are not 4-bit" if settings.quantization != "nf4" else "nothing is sampled"
    if not case.on_cpu:
        return "quantized", "a GPU multiplies 4-bit weights directly"
    wanted = replace(settings, rollout_weights="dequantized")
    need = case.peak(wanted, "rollout")
    if need > case.budget:
        return "quantized", f"with a 16-bit copy the rollout would take {gib(need)} of {gib(case.budget)}"
    return "dequantized", f"a 16-bit copy saves dequantizing for every token; the rollout takes {gib(need)} with it"


def _micro_batch_limits(case: Case) -> tuple[int, int]:
    least = row_tokens(case.recipe)
    return least, max(least, min(step_tokens(case.recipe), MICRO_BATCH_CAP["cpu" if case.on_cpu else "gpu"]))


def _token_steps(least: int, most: int) -> list[int]:
    """Return numbers of tokens worth trying, from the most down: both ends, powers of two, and three times those."""
    steps = {least, most} | {base << shift for base in (2, 3) for shift in range(20)}
    return sorted((s for s in steps if least <= s <= most), reverse=True)


def _first(sizes: Iterable[int], fits: Callable[[int], bool]) -> int | None:
    return next((size for size in sizes if fits(size)), None)
