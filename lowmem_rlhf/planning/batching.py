"""How passes and rollouts are cut: tokens, rows and tiles at once. Every function returns ``(value, reason)``."""

from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.planning.inputs import PINNED, PlanInputs, gib
from lowmem_rlhf.planning.memory.resident import MIB, Memory, Settings
from lowmem_rlhf.planning.memory.rollout import decodes_by_graphs
from lowmem_rlhf.planning.shapes import (
    all_rows,
    group_tokens,
    length_keys,
    row_tokens,
    samples_completions,
    step_tokens,
)
from lowmem_rlhf.recipe.server import SERVERS

MICRO_BATCH_CAP = {"cpu": 4096, "gpu": 16384}  # a CPU gains nothing from more: the activations fall out of its caches
TILE_BYTES = 128 * MIB
FASTER_ROWS = 32  # up to so many a CPU's 4-bit product is faster than the product with a 16-bit copy


def logits_tile_tokens(inputs: PlanInputs) -> tuple[int, str]:
    """Choose the power of two whose tile comes closest below 128 MiB; on the CPU between 256 and 512 positions."""
    if pinned := inputs.pinned("logits_tile_tokens"):
        return pinned, PINNED
    row = inputs.dims.vocab_size * 10
    tokens = 1 << max(4, min(10, (TILE_BYTES // row).bit_length() - 1))
    tokens = max(256, min(512, tokens)) if inputs.on_cpu else tokens
    vocabulary = inputs.dims.vocab_size
    return tokens, f"a tile over {vocabulary:,} tokens of vocabulary takes about {tokens * row / MIB:.0f} MiB"


def gradient_checkpointing(inputs: PlanInputs, settings: Settings) -> tuple[bool | int, str]:
    """Choose the fewest recomputed layers for a whole group in a micro-batch, or as much of one as fits.

    Returns:
        False for no layer, True for all, else how many: the first ones.

    Raises:
        UserError: the model has fewer layers than the pinned number.
    """
    pinned, layers = _pinned_layers(inputs), inputs.dims.num_layers
    if pinned is not None:
        return pinned, PINNED
    tokens = inputs.pinned("micro_batch_tokens") or _group_tokens(inputs, settings)

    def need(count: int) -> int:
        return inputs.peak(replace(settings, gradient_checkpointing=count, micro_batch_tokens=tokens), "update")

    count = _first(range(layers + 1), lambda count: need(count) <= inputs.budget)
    share = f"of {gib(inputs.budget)}"
    if count == 0:
        return False, f"the update keeps all activations of {tokens} tokens: {gib(need(0))} {share}"
    if count is None or count == layers:
        return True, f"with one layer less the update of {tokens} tokens would take {gib(need(layers - 1))} {share}"
    return count, f"the fewest of {layers} layers with which {tokens} tokens fit: {gib(need(count))} {share}"


def fastest_update(inputs: PlanInputs, settings: Settings) -> dict[str, tuple[Any, str]]:
    """Choose recomputed layers and micro-batch together, by the predicted time of the update among what fits.

    More tokens start fewer kernels and make quantized weights dense less often; fewer recomputed layers compute less.

    Returns:
        Value and reason of ``gradient_checkpointing`` and ``micro_batch_tokens``; nothing where no size fits.

    Raises:
        UserError: a pinned value is impossible (see `gradient_checkpointing` and `micro_batch_tokens`).
    """
    layers = inputs.dims.num_layers
    least, top = micro_batch_limits(inputs)
    pinned_tokens = _pinned_tokens(inputs, "micro_batch_tokens", least)
    pinned_layers = None
    if inputs.pinned("gradient_checkpointing") is not None:
        pinned_layers = gradient_checkpointing(inputs, settings)[0]
    sizes = (
        [pinned_tokens] if pinned_tokens else sorted({*_token_steps(least, top), min(group_tokens(inputs.recipe), top)})
    )

    def cut(tokens: int, count: bool | int) -> Settings:
        return replace(settings, micro_batch_tokens=tokens, score_batch_tokens=tokens, gradient_checkpointing=count)

    def fits(tokens: int, count: bool | int) -> bool:
        return inputs.peak(cut(tokens, count), "scoring", "update") <= inputs.budget

    found: list[tuple[int, bool | int]] = []
    fewest: bool | int = 0 if pinned_layers is None else pinned_layers  # more tokens need as many layers at least
    for tokens in sizes:
        if not fits(tokens, fewest):
            if pinned_layers is not None or not fits(tokens, layers):
                break
            fewest = bisect_left(range(layers), True, lo=fewest + 1, key=partial(fits, tokens))
        found.append((tokens, fewest))
    if not found:
        return {}
    seconds = {pair: inputs.time(cut(*pair)).update() for pair in found}
    tokens, count = min(found, key=lambda pair: (round(seconds[pair], 3), -pair[0]))
    best, share = seconds[tokens, count], f"{gib(inputs.peak(cut(tokens, count), 'update'))} of {gib(inputs.budget)}"
    why = f"of what fits the fastest by prediction, {best:.3g} s of update a step; it takes {share}"
    most = found[-1]
    why_tokens = f"{why}; with {most[0]} tokens {seconds[most]:.3g} s" if most[0] > tokens else why
    if tokens == top:
        why_tokens = f"a whole step, or the cap of {MICRO_BATCH_CAP['gpu']}: it takes {share}"
    value: bool | int = (True if count == layers else count or False) if pinned_layers is None else pinned_layers
    return {
        "gradient_checkpointing": (value, why if pinned_layers is None else PINNED),
        "micro_batch_tokens": (tokens, PINNED if pinned_tokens else why_tokens),
    }


def _group_tokens(inputs: PlanInputs, settings: Settings) -> int:
    """Return a group's tokens, at most the cap, or the most that fit with every layer recomputed.

    More comes before fewer recomputed layers, as a group that is split repeats its prompt; beyond a whole group a
    larger micro-batch computes nothing less.
    """
    least, top = micro_batch_limits(inputs)
    group = min(group_tokens(inputs.recipe), top)

    def fits(tokens: int) -> bool:
        cut = replace(settings, micro_batch_tokens=tokens, score_batch_tokens=tokens)
        return inputs.peak(cut, "scoring", "update") <= inputs.budget

    return _first(_token_steps(least, group), fits) or least


def micro_batch_tokens(inputs: PlanInputs, settings: Settings) -> tuple[int, str]:
    """Choose the most packed tokens of one pass that fit, at least the longest prompt with its completion.

    Raises:
        UserError: the pinned number is less than that.
    """
    least, top = micro_batch_limits(inputs)
    if pinned := _pinned_tokens(inputs, "micro_batch_tokens", least):
        return pinned, PINNED
    steps = sorted({*_token_steps(least, top), min(group_tokens(inputs.recipe), top)}, reverse=True)

    def need(tokens: int) -> int:
        return inputs.peak(replace(settings, micro_batch_tokens=tokens, score_batch_tokens=tokens), "scoring", "update")

    tokens = _first(steps, lambda size: need(size) <= inputs.budget)
    if tokens is None:
        return least, f"the longest prompt and completion need {least} tokens: {gib(need(least))}"
    share = f"the update takes {gib(need(tokens))} of {gib(inputs.budget)}"
    if tokens < top:
        return tokens, f"the most that fits: {share}"
    cap = "the cap for a CPU" if inputs.on_cpu else "the cap"
    what = "a whole step" if tokens == step_tokens(inputs.recipe) else cap
    return tokens, f"{what}: {share}"


def score_batch_tokens(inputs: PlanInputs, settings: Settings) -> tuple[int, str]:
    """Choose the packed tokens of a pass without gradients: those of the update, or more where a group is larger.

    Such a pass keeps nothing for a backward one, so a whole group often fits where the update must split it, and its
    prompt then runs once.

    Raises:
        UserError: the pinned number is less than the longest prompt with its completion.
    """
    least, top = micro_batch_limits(inputs)
    if pinned := _pinned_tokens(inputs, "score_batch_tokens", least):
        return pinned, PINNED
    update, group = settings.micro_batch_tokens, min(group_tokens(inputs.recipe), top)
    if update >= group:
        return update, "as in the update: a whole group goes into one pass"

    def need(tokens: int) -> int:
        return inputs.peak(replace(settings, score_batch_tokens=tokens), "scoring")

    tokens = _first(_token_steps(update, group), lambda size: need(size) <= inputs.budget) or update
    what = "a whole group" if tokens == group else f"the most of a group of {group} that fits"
    return tokens, f"{what}: passes without gradients take {gib(need(tokens))} of {gib(inputs.budget)}"


def rollout_batch_size(inputs: PlanInputs, settings: Settings) -> tuple[int, str]:
    """Choose how many completions are written at once: a whole step, else whole groups, else fewer than a group.

    Where only held-out completions are sampled (SFT with rewards), the whole is the evaluation.
    """
    if pinned := inputs.pinned("rollout_batch_size"):
        return pinned, PINNED
    if not samples_completions(inputs.recipe):
        return 1, "nothing is sampled"
    if inputs.recipe.generation.engine in SERVERS:
        return all_rows(inputs.recipe), _served(inputs, settings)
    group, prompts, whole = inputs.recipe.generation.num_generations, inputs.recipe.training.prompts_per_step, "a step"
    if not inputs.recipe.spec.samples:
        group, prompts, whole = inputs.recipe.evaluation.num_samples, inputs.recipe.data.eval_size, "the evaluation"
    sizes = [group * count for count in range(prompts, 0, -1)] + list(range(group - 1, 0, -1))

    def need(rows: int) -> int:
        return inputs.peak(replace(settings, rollout_batch_size=rows), "rollout")

    rows = _first(sizes, lambda size: need(size) <= inputs.budget)
    if rows is None:
        return 1, f"even one completion at a time takes {gib(need(1))}"
    cache = inputs.phases(replace(settings, rollout_batch_size=rows))["rollout"]["kv_cache"]
    share = f"its key-value cache takes {gib(cache)}, the rollout {gib(need(rows))} of {gib(inputs.budget)}"
    return rows, f"{f'all of {whole}' if rows == sizes[0] else f'the most of {sizes[0]} that fits'}: {share}"


def _served(inputs: PlanInputs, settings: Settings) -> str:
    """Return what a rollout takes of our card where a server samples."""
    recipe, memory = inputs.recipe, Memory(inputs.dims, inputs.recipe, settings, inputs.device)
    said = f"{SERVERS[recipe.generation.engine]} decides how many it writes at once; its cache and weights are "
    if not (taken := memory.server_bytes()):
        return (
            said + "not on this card" if not inputs.on_cpu else said + "in a process of its own, which is not counted"
        )
    kept = memory.server_between_rollouts()
    stays = f"while we train it keeps {gib(kept)}, which was not measured" if kept else "while we train it is not there"
    return f"{said}on this card too: {gib(taken)}; {stays if kept < taken else 'they stay there while we train'}"


def rollout_weights(inputs: PlanInputs, settings: Settings) -> tuple[str, str]:
    """Choose whether sampling reads a 16-bit copy of NF4 weights, made anew for each rollout.

    The copy is the very numbers that NF4 stands for, and the adapter stays beside it, so the sampling policy is the
    trained one. On a CPU it saves dequantizing every weight for every token, unless 4-bit weights are multiplied there
    (AVX-512 bf16): by our own product (a rollout of 16 rows took 0.83 of its time with a copy,
    `benchmarks/techniques.py`), or by bitsandbytes', at few rows. On a GPU bitsandbytes multiplies 4-bit weights
    directly, up to some 64 rows; q, k and v, and gate and up, are one product each where the scales that this takes
    fit. Of these ways the one of the shortest predicted rollout is taken.
    """
    if pinned := inputs.pinned("rollout_weights"):
        return pinned, PINNED
    if inputs.shards > 1:
        return "quantized", "layers are gathered as they lie, for each token anew"
    if settings.quantization != "nf4" or not samples_completions(inputs.recipe):
        return "quantized", "the weights are not 4-bit" if settings.quantization != "nf4" else "nothing is sampled"
    if inputs.recipe.generation.engine in SERVERS:
        return "quantized", f"{SERVERS[inputs.recipe.generation.engine]} samples with weights of its own"
    if not inputs.on_cpu:
        return _card_weights(inputs, settings)
    fast = inputs.device.multiplies_four_bit(settings.compute_dtype)
    if fast and inputs.device.compiler:
        return "quantized", "this CPU multiplies 4-bit weights as they lie, faster than a 16-bit copy"
    if fast and settings.rollout_batch_size <= FASTER_ROWS:
        return "quantized", f"this CPU multiplies 4-bit weights directly, faster at up to {FASTER_ROWS} rows"
    wanted = replace(settings, rollout_weights="dequantized")
    need = inputs.peak(wanted, "rollout")
    if need > inputs.budget:
        return "quantized", f"with a 16-bit copy the rollout would take {gib(need)} of {gib(inputs.budget)}"
    return "dequantized", f"a 16-bit copy saves dequantizing for every token; the rollout takes {gib(need)} with it"


def keep_graphs(inputs: PlanInputs, settings: Settings) -> tuple[bool, str]:
    """Choose whether a rollout begins with the graphs and caches of the one before: where the update leaves room."""
    memory = Memory(inputs.dims, inputs.recipe, settings, inputs.device)
    if not samples_completions(inputs.recipe) or not decodes_by_graphs(memory):
        return False, "tokens are not decoded by graphs"
    if settings.rollout_weights == "dequantized":
        return False, "graphs read the 16-bit copy of the weights, which is made anew for each rollout"
    if (pinned := inputs.pinned("keep_graphs")) is not None:
        return pinned, PINNED
    need = inputs.peak(replace(settings, keep_graphs=True), "scoring", "update", "optimizer")
    if need > inputs.budget:
        return False, f"beside them the update would take {gib(need)} of {gib(inputs.budget)}"
    return True, f"beside them the update takes {gib(need)} of {gib(inputs.budget)}"


def _card_weights(inputs: PlanInputs, settings: Settings) -> tuple[str, str]:
    """Choose how a card reads NF4 weights while sampling: by predicted time, where it is known how fast it is."""
    memory = Memory(inputs.dims, inputs.recipe, settings, inputs.device)
    graphs = decodes_by_graphs(memory)
    ways = ["joined", "quantized"] if graphs else ["quantized"]
    if inputs.rates:
        ways.insert(1, "dequantized")
    need = {way: inputs.peak(replace(settings, rollout_weights=way), "rollout") for way in ways}
    fitting = [way for way in ways if need[way] <= inputs.budget or way == "quantized"]
    how = "a GPU multiplies 4-bit weights directly"
    if not memory.capabilities.four_bit_rows:
        how = "4-bit weights are made dense for each product, and whether a 16-bit copy is faster is not predicted"
    if not inputs.rates:
        if fitting[0] == "joined":
            return "joined", f"{how}, and those of layers with one input at once"
        return (
            "quantized",
            f"joined, the rollout would take {gib(need['joined'])} of {gib(inputs.budget)}" if graphs else how,
        )
    seconds = {
        way: inputs.time(replace(settings, rollout_weights=way, keep_graphs=way != "dequantized")).rollout()
        for way in fitting
    }
    chosen = min(fitting, key=lambda way: round(seconds[way], 3))
    others = [f"{seconds[way]:.3g} s {_WEIGHTS[way]}" for way in fitting if way != chosen]
    others += [f"{_WEIGHTS[way]} {gib(need[way])} of {gib(inputs.budget)}" for way in ways if way not in fitting]
    return chosen, "; ".join(
        [
            f"by prediction a rollout takes {seconds[chosen]:.3g} s {_WEIGHTS[chosen]}",
            *([", ".join(others)] if others else []),
        ]
    )


_WEIGHTS = {
    "joined": "with 4-bit weights of layers with one input multiplied at once",
    "dequantized": "with a 16-bit copy",
    "quantized": "with 4-bit weights as they lie",
}


def _pinned_tokens(inputs: PlanInputs, key: str, least: int) -> int | None:
    pinned: int | None = inputs.pinned(key)
    if pinned is not None and pinned < least:
        raise UserError(
            f"hardware.{key}: got {pinned}, but a prompt and its completion may have {least} tokens; give at least "
            f"{least}, or lower {' or '.join(length_keys(inputs.recipe))}"
        )
    return pinned


def _pinned_layers(inputs: PlanInputs) -> bool | int | None:
    pinned: bool | int | None = inputs.pinned("gradient_checkpointing")
    layers = inputs.dims.num_layers
    if pinned is not None and pinned > layers:
        raise UserError(
            f"hardware.gradient_checkpointing: got {pinned}, but {inputs.recipe.model!r} has {layers} layers; give "
            f"at most {layers}, or true for all of them"
        )
    return pinned


def check_pinned(inputs: PlanInputs) -> None:
    """Check that pinned sizes and layers can be.

    Raises:
        UserError: they cannot (see `gradient_checkpointing` and `micro_batch_tokens`).
    """
    least, _ = micro_batch_limits(inputs)
    for key in ("micro_batch_tokens", "score_batch_tokens"):
        _pinned_tokens(inputs, key, least)
    _pinned_layers(inputs)


def micro_batch_limits(inputs: PlanInputs) -> tuple[int, int]:
    """Return the fewest and the most packed tokens of one pass: the longest row, and a step or the cap."""
    least = row_tokens(inputs.recipe)
    return least, max(least, min(step_tokens(inputs.recipe), MICRO_BATCH_CAP["cpu" if inputs.on_cpu else "gpu"]))


def _token_steps(least: int, most: int) -> list[int]:
    """Return numbers of tokens worth trying, from the most down: both ends, powers of two, and three times those."""
    steps = {least, most} | {base << shift for base in (2, 3) for shift in range(20)}
    return sorted((s for s in steps if least <= s <= most), reverse=True)


def _first(sizes: Iterable[int], fits: Callable[[int], bool]) -> int | None:
    return next((size for size in sizes if fits(size)), None)
