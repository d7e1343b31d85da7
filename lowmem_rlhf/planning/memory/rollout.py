"""Bytes of a rollout: prefill of the prompts, their cache, and decoding. Letters as in `memory`; R rows at once."""

import math
from collections.abc import Callable
from dataclasses import replace

from lowmem_rlhf.architecture.dimensions import ModelDimensions
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.planning.limits import COMPLETION_BLOCK, FOUR_BIT_ROWS, KERNEL_ROWS, slot_room
from lowmem_rlhf.planning.memory.mixers import UPDATE, state_bytes
from lowmem_rlhf.planning.memory.resident import Components, Memory, total
from lowmem_rlhf.planning.shapes import all_rows, prompts_at_once, prompts_shape, rollout_rows
from lowmem_rlhf.recipe.sections import GenerationConfig
from lowmem_rlhf.recipe.server import SERVERS
from lowmem_rlhf.suggest import did_you_mean

# layers that are multiplied at once, by the group that they are in
JOINED = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv") | dict.fromkeys(("gate_proj", "up_proj"), "gate")


def kv_bytes_per_token(dims: ModelDimensions, width: int) -> int:
    """Bytes of the keys and values of one token in all layers that have their own: ``2 * nkv * d * b`` of each."""
    return sum(_kv_bytes_of_layers(dims, width))


def _kv_bytes_of_layers(dims: ModelDimensions, width: int) -> list[int]:
    if dims.layer_sizes:
        return [2 * one.num_kv_heads * one.head_dim * width for one in dims.layer_sizes if not one.reuses_keys]
    return [2 * dims.num_kv_heads * dims.head_dim * width] * dims.attention_layers


def sampling_logits_bytes(dims: ModelDimensions, rows: int, width: int, generation: GenerationConfig) -> int:
    """Bytes of the last token's logits while sampling: the model's, log-probs and probabilities in fp32.

    At a temperature other than 1 the logits over the temperature are there in fp32 as well. A repetition penalty has
    three copies of the logits in fp32 at first, and where they are negative; hidden stops are one byte a logit.
    """
    each = width + 8 + (4 if generation.temperature != 1.0 else 0)
    if generation.repetition_penalty != 1.0:
        each = max(each, width + 13)
    return rows * dims.vocab_size * (each + (generation.min_new_tokens > 0))


def seen_tokens_bytes(memory: Memory, rows: int) -> Components:
    """Return the mask of the tokens that each row has seen, one byte each, which a repetition penalty reads."""
    if memory.recipe.generation.repetition_penalty == 1.0:
        return {}
    return {"seen_tokens": rows * memory.dims.vocab_size}


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
    kernel the codes in its order and 16-bit scales. Layers that are multiplied at once need such scales too.
    """
    settings = memory.settings
    if settings.quantization != "nf4":
        return 0
    adapted = memory.beside.linears
    if settings.rollout_weights == "dequantized":
        return memory.width * sum(x.inputs * x.outputs * many for x, many in adapted)
    if settings.rollout_weights == "joined":
        return round(4 / 64 * sum(x.inputs * x.outputs * many for x, many in adapted if x.name in JOINED))
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
    every = memory.settings.rollout_weights != "joined"  # else layers alone have no product
    blocks = 0
    for ranks in memory.beside.ranks:
        groups: dict[str, list[tuple[int, int]]] = {}
        for place, (linear, rank) in enumerate(zip(memory.dims.linears, ranks, strict=True)):
            if rank:
                groups.setdefault(JOINED.get(linear.name, str(place)), []).append((rank, linear.outputs))
        sums = [(sum(r for r, _ in group), sum(outs for _, outs in group), len(group)) for group in groups.values()]
        blocks += sum(ranks * outs for ranks, outs, many in sums if every or many > 1)
    return memory.width * blocks


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
    if with_copy and memory.beside.everywhere:
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
        {"kv_cache": cache + own + rows * state}
        | _decoding(memory, rows, prompt + length)
        | seen_tokens_bytes(memory, rows),
    ]
    copies = {"rollout_copy": rollout_copy_bytes(memory) + grouped_adapter_bytes(memory)}
    return memory.adapter_copies() | copies | max(moments, key=total)


def decodes_by_graphs(memory: Memory) -> bool:
    """Whether tokens are decoded by graphs, as far as sizes and settings tell.

    A model that cannot be packed, or whose rotary factors depend on the longest text, is known when it is loaded only;
    it takes less memory than this says.

    What waits for the device cannot be captured: LLM.int8 looks for outliers, experts are looked up by the tokens that
    they get, embeddings in host memory are copied from there, and layers of a shared base are gathered.
    """
    settings = memory.settings
    named = memory.recipe.generation.engine in ("auto", "continuous")
    waits = settings.quantization == "int8" or memory.dims.experts is not None or settings.offload_embeddings
    return named and memory.capabilities.graphs and not waits and settings.base_shards == 1


def own_engine_bytes(memory: Memory) -> Components:
    """Return what a rollout takes with the engine that this package chooses."""
    return continuous_bytes(memory) if decodes_by_graphs(memory) else shared_base_bytes(memory)


def slots_bytes(memory: Memory, rows: int) -> int:
    """Bytes of so many slots: room for the longest prompt and completion in each, and what a pass reads and writes.

    That is the keys and values, states, a uniform number (4) and a record (16) for each token, and a table with the
    rotary factors and the mask of each position.
    """
    recipe, dims, width = memory.recipe, memory.dims, memory.width
    room = slot_room(recipe.data.max_prompt_length, recipe.generation.max_completion_length)
    state = state_bytes(dims.mixer, width) if dims.mixer else 0
    table = room * (2 * dims.head_dim + room) * width
    return rows * (room * (kv_bytes_per_token(dims, width) + 20) + state) + table


def continuous_bytes(memory: Memory) -> Components:
    """Return the largest moment of continuous batching: a prefill, before or beside the slots, or a decoding pass.

    A graph keeps the memory of a pass as long as it exists, also while further prompts run.
    """
    recipe, dims, width = memory.recipe, memory.dims, memory.width
    prompt = recipe.data.max_prompt_length
    rows = rollout_rows(recipe, memory.settings.rollout_batch_size)
    prompts = prompts_at_once(recipe, rows)
    at_once = min(prompts, max(1, memory.settings.micro_batch_tokens // prompt))
    layers = memory.layers(prompts_shape(prompt, at_once * prompt))
    keys = sum(one.kept_keys(together=False) for one in layers)
    peak = max(one.forward_peak(keeps_keys=True) for one in layers) + layers[0].common()
    state = state_bytes(dims.mixer, width) if dims.mixer else 0
    cut = at_once * (prompt * kv_bytes_per_token(dims, width) + state)  # of prompts that have just run
    slots, decoding, seen = slots_bytes(memory, rows), _graph(memory, rows), seen_tokens_bytes(memory, rows)
    graph = total(decoding) if memory.capabilities.graphs else 0
    moments: list[Components] = [
        {"kv_cache": keys, "prefill_activations": peak},
        {"kv_cache": keys + cut},
        {"kv_cache": slots + cut} | decoding | seen,
    ]
    if rows < all_rows(recipe):  # later prompts run beside what is being written
        moments += [
            {"kv_cache": slots + cut + keys, "prefill_activations": peak, "graphs": graph} | seen,
            {"kv_cache": slots + 2 * cut + keys, "graphs": graph} | seen,
        ]
    elif prompts > at_once:  # further prompts of the first filling
        moments += [
            {"kv_cache": slots + keys, "prefill_activations": peak} | seen,
            {"kv_cache": slots + keys + cut} | seen,
        ]
    copies = {"rollout_copy": rollout_copy_bytes(memory) + grouped_adapter_bytes(memory)}
    return memory.adapter_copies() | copies | max(moments, key=total)


def kept_bytes(memory: Memory) -> int:
    """Bytes of what stays after a rollout where graphs are kept: slots, the pass's own memory, scales and adapters."""
    rows = rollout_rows(memory.recipe, memory.settings.rollout_batch_size)
    again = rollout_copy_bytes(memory) + grouped_adapter_bytes(memory) + total(memory.adapter_copies())
    held = slots_bytes(memory, rows) + total(seen_tokens_bytes(memory, rows))
    return held + total(_graph(memory, rows)) + again


def _graph(memory: Memory, rows: int) -> Components:
    """Return what a decoding pass over slots takes of its own."""
    recipe, capped = memory.recipe, memory.dims.attention_softcap
    room = slot_room(recipe.data.max_prompt_length, recipe.generation.max_completion_length)
    return _decoding(memory, rows, room if capped else 0)


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
    moments = [
        {"sampling_logits": sampling_logits_bytes(dims, drawn, width, memory.recipe.generation)},
        {"attention_scores": decode_scores_bytes(dims, rows, keys, width)},
    ]
    if dims.mixer:
        moments.append({"state_update": 4 * UPDATE[dims.mixer.kind] * rows * dims.mixer.state})
    joined = memory.settings.rollout_weights == "joined"
    if joined or not rollout_copy_bytes(memory) or not memory.beside.everywhere:
        moments.append({"dequantized_weight": max(memory.dense, _joined_dense(memory))})
    return max(moments, key=total)


def _joined_dense(memory: Memory) -> int:
    """Bytes of the largest NF4 weights that are multiplied at once, made dense, as bitsandbytes does with many rows."""
    if memory.settings.rollout_weights != "joined":
        return 0
    groups: dict[str, int] = {}
    for place, linear in enumerate(memory.dims.linears):
        if linear.name in JOINED and any(ranks[place] for ranks in memory.beside.ranks):
            groups[JOINED[linear.name]] = groups.get(JOINED[linear.name], 0) + linear.inputs * linear.outputs
    return memory.width * max(groups.values(), default=0)


def served_bytes(memory: Memory) -> Components:
    """Return what a rollout takes of our card where a server samples: nothing, or the server's share of the card."""
    return {"server": memory.server_bytes()} if memory.server_bytes() else {}


RolloutBytes = Callable[[Memory], Components]

# by the engine that samples (`rollout.engine.ENGINES`)
ROLLOUT_BYTES: dict[str, RolloutBytes] = {
    "auto": own_engine_bytes,
    "continuous": continuous_bytes,
    "shared_prompt": shared_base_bytes,
    "own_cache": shared_base_bytes,
    **dict.fromkeys(SERVERS, served_bytes),
}


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
