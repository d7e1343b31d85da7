"""Bytes of a rollout: prefill of the prompts, their cache, and decoding. Letters as in `memory`; R rows at once."""

import math
from collections.abc import Callable
from dataclasses import replace

from lowmem_rlhf.architecture.dimensions import ModelDimensions
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.planning.limits import COMPLETION_BLOCK, FOUR_BIT_ROWS, KERNEL_ROWS
from lowmem_rlhf.planning.memory.mixers import UPDATE, state_bytes
from lowmem_rlhf.planning.memory.resident import Components, Memory, total
from lowmem_rlhf.planning.shapes import prompts_at_once, prompts_shape, rollout_rows
from lowmem_rlhf.suggest import did_you_mean


def kv_bytes_per_token(dims: ModelDimensions, width: int) -> int:
    """Bytes of the keys and values of one token in all layers that have their own: ``2 * nkv * d * b`` of each."""
    return sum(_kv_bytes_of_layers(dims, width))


def _kv_bytes_of_layers(dims: ModelDimensions, width: int) -> list[int]:
    if dims.layer_sizes:
        return [2 * one.num_kv_heads * one.head_dim * width for one in dims.layer_sizes if not one.reuses_keys]
    return [2 * dims.num_kv_heads * dims.head_dim * width] * dims.attention_layers


def sampling_logits_bytes(dims: ModelDimensions, rows: int, width: int, temperature: float = 1.0) -> int:
    """Bytes of the last token's logits while sampling: the model's, log-probs and probabilities in fp32.

    At a temperature other than 1 the logits over the temperature are there in fp32 as well.
    """
    return rows * dims.vocab_size * (width + 8 + (4 if temperature != 1.0 else 0))


def decode_scores_bytes(dims: ModelDimensions, rows: int, keys: int, width: int) -> int:
    """Bytes of one layer's attention scores while decoding: ``R * nh * keys``, four times in the compute dtype.

    Of the prompt and of the completion, both side by side, their softmax, and its part for the prompt in one piece; in
    fp32 where scores have a soft cap.
    """
    return 4 * rows * dims.num_heads * keys * (4 if dims.attention_softcap else width)


def rollout_copy_bytes(memory: Memory) -> int:
    """Bytes of what NF4 weights beside adapters are read from while decoding, if not from the weights themselves.

    A copy in the compute dtype where the settings want one. On a CPU whose instructions suit, 4-bit weights are
    multiplied: our own product reads them as they lie and needs the scales, one for 64 weights, in fp32; bitsandbytes'
    kernel the codes in its order and 16-bit scales.
    """
    settings = memory.settings
    if settings.quantization != "nf4":
        return 0
    adapted = [(linear, many) for linear, many in memory.dims.adaptable if memory.has_adapter(linear)]
    if settings.rollout_weights == "dequantized":
        return memory.width * sum(x.inputs * x.outputs * many for x, many in adapted)
    if not (memory.on_cpu and memory.four_bit_product):
        return 0
    rows, each = (1, 4 / 64) if memory.four_bit_in_place else (32, 0.5 + 2 / 64)
    fits = sum(x.inputs * x.outputs * n for x, n in adapted if x.outputs % rows == 0 and x.inputs % 64 == 0)
    return round(fits * each)


def grouped_adapter_bytes(memory: Memory) -> int:
    """Bytes of each group of layers' B in one block matrix, ``(sum of ranks) * (sum of outputs)``.

    Made where the weights of such layers are multiplied at once: q, k and v; gate and up.
    """
    if not rollout_copy_bytes(memory):
        return 0
    together = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv") | dict.fromkeys(("gate_proj", "up_proj"), "gate")
    groups: dict[str, list[int]] = {}
    for place, linear in enumerate(memory.adapted):
        groups.setdefault(together.get(linear.name, str(place)), []).append(linear.outputs)
    rank: int = memory.settings.lora["r"]
    blocks = sum(rank * len(outs) * sum(outs) for outs in groups.values())
    return memory.dims.num_layers * memory.width * blocks


def shared_base_bytes(memory: Memory) -> Components:
    """Return the largest moment: the prefill of prompts, the making of their cache, or the last tokens of the wave."""
    recipe, dims, width = memory.recipe, memory.dims, memory.width
    length, prompt = recipe.generation.max_completion_length, recipe.data.max_prompt_length
    rows = rollout_rows(recipe, memory.settings.rollout_batch_size)
    prompts = prompts_at_once(recipe, rows)
    at_once = min(prompts, max(1, memory.settings.micro_batch_tokens // prompt))
    token = kv_bytes_per_token(dims, width)
    layers = memory.layers(prompts_shape(prompt, at_once * prompt))
    with_copy = _prefills_with_copy(memory, at_once * prompt)
    if with_copy and len(memory.adapted) == len(dims.linears):
        layers = [one if one.mixes else replace(one, dense=0) for one in layers]
    keys = sum(one.kept_keys(together=with_copy) for one in layers)
    earlier, cache = (prompts - at_once) * prompt * token, prompts * prompt * token
    own = rows * (length - 1) * token  # the last token of each is not fed
    peak = max(one.forward_peak(keeps_keys=True) for one in layers) + layers[0].common()
    state = state_bytes(dims.mixer, width) if dims.mixer else 0
    largest = max(_kv_bytes_of_layers(dims, width), default=0)  # of one layer
    moments: list[Components] = [
        {"kv_cache": earlier + keys + prompts * state, "prefill_activations": peak},
        {"kv_cache": keys + cache + prompts * state},
        {"kv_cache": cache + round(1.5 * prompts * prompt * largest) + prompts * state},
        {"kv_cache": cache + own + rows * state + rows * _room_before(length - 1) * largest},
        {"kv_cache": cache + own + rows * state} | _decoding(memory, rows, prompt + length),
    ]
    copies = {"rollout_copy": rollout_copy_bytes(memory) + grouped_adapter_bytes(memory)}
    return memory.adapter_copies() | copies | max(moments, key=total)


def _room_before(limit: int) -> int:
    """Return the completion tokens for which a layer had room before the last growth; old and new are there at once."""
    step = COMPLETION_BLOCK * max(1, limit // (8 * COMPLETION_BLOCK))
    return max(0, limit - 1) // step * step


def _prefills_with_copy(memory: Memory, rows: int) -> bool:
    """Whether a prefill pass with so many tokens multiplies with the copy: then q, k and v come from one product."""
    most = FOUR_BIT_ROWS if memory.four_bit_in_place else KERNEL_ROWS
    return bool(rollout_copy_bytes(memory)) and (memory.settings.rollout_weights == "dequantized" or rows <= most)


def _decoding(memory: Memory, rows: int, keys: int) -> Components:
    """Return one token's pass: the draw, or a layer's scores, or a quantized weight made dense."""
    dims, width = memory.dims, memory.width
    tile = memory.settings.logits_tile_tokens
    drawn = math.ceil(rows / math.ceil(rows / tile))
    temperature = memory.recipe.generation.temperature
    moments = [
        {"sampling_logits": sampling_logits_bytes(dims, drawn, width, temperature)},
        {"attention_scores": decode_scores_bytes(dims, rows, keys, width)},
    ]
    if dims.mixer:
        moments.append({"state_update": 4 * UPDATE[dims.mixer.kind] * rows * dims.mixer.state})
    if not rollout_copy_bytes(memory) or len(memory.adapted) < len(dims.linears):
        moments.append({"dequantized_weight": memory.dense})
    return max(moments, key=total)


RolloutBytes = Callable[[Memory], Components]

# by the engine that samples (`rollout.engine.ENGINES`)
ROLLOUT_BYTES: dict[str, RolloutBytes] = dict.fromkeys(("auto", "shared_prompt", "own_cache"), shared_base_bytes)


def check_engine(name: str) -> None:
    """Check that there is an engine of this name.

    Raises:
        UserError: there is none.
    """
    if name not in ROLLOUT_BYTES:
        raise UserError(
            f"generation.engine: got {name!r}; the engines are {', '.join(ROLLOUT_BYTES)}"
            f"{did_you_mean(name, ROLLOUT_BYTES)}"
        )


def rollout(memory: Memory) -> Components:
    """Return what a rollout takes with the recipe's engine, at its largest moment.

    Raises:
        UserError: there is no such engine.
    """
    engine = memory.recipe.generation.engine
    check_engine(engine)
    return ROLLOUT_BYTES[engine](memory)
