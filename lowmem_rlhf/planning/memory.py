"""How much memory a run takes, phase by phase: pure arithmetic in bytes, without torch.

Figures are predicted. The constants come from public measurements on NVIDIA cards and from reading the code; what each
term stands for is said where it is computed. Letters: T tokens, R completions at once, h hidden size, V vocabulary,
nh query heads, nkv key/value heads, dk head dimension, dff MLP size, b bytes of a compute-dtype number.
"""

import math
from dataclasses import dataclass
from typing import Any

from lowmem_rlhf.hardware.device import Device
from lowmem_rlhf.planning.dimensions import ModelDimensions
from lowmem_rlhf.recipe import ONLINE, REWARD_ADAPTER, Recipe

MIB = 1024**2
GIB = 1024**3
CUDA_CONTEXT_BYTES = 141 * MIB  # measured on a T4; a process has it before its first tensor
CPU_PROCESS_BYTES = 768 * MIB  # Python with torch, transformers and peft imported
ALLOCATOR_FACTOR = 1.125  # reserved / allocated in CUDA's caching allocator, the median of public measurements
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # 4 bits, an 8-bit scale per 64 weights, a 4-byte one per 256 of those
ATTENDED_PER_TOKEN = 4  # the packer's bound on key positions gathered in attention for each token of a micro-batch


@dataclass(frozen=True)
class Settings:
    """The memory settings of a run.

    Attributes:
        quantization: ``nf4``, ``int8`` or ``none`` (weights in the compute dtype).
        compute_dtype: ``bfloat16``, ``float16`` or ``float32``.
        gradient_checkpointing: layers that are recomputed in the backward pass: all (True), none (False) or the first
            so many.
        offload_checkpoints: the inputs of recomputed layers wait in host memory.
        micro_batch_tokens: packed tokens of one forward and backward pass, and of one prefill pass.
        rollout_batch_size: completions generated at once.
        rollout_weights: ``dequantized``: a 16-bit copy of the NF4 weights exists while sampling; else ``quantized``.
        logits_tile_tokens: positions whose logits exist at once.
        optim: ``adamw`` or ``adamw_8bit``.
        lora: ``r``, ``lora_alpha`` and ``target_modules`` of the policy adapter.
    """

    quantization: str
    compute_dtype: str
    gradient_checkpointing: bool | int
    offload_checkpoints: bool
    micro_batch_tokens: int
    rollout_batch_size: int
    rollout_weights: str
    logits_tile_tokens: int
    optim: str
    lora: dict[str, Any]

    @property
    def width(self) -> int:
        """Bytes of a number in the compute dtype."""
        return 4 if self.compute_dtype == "float32" else 2


Components = dict[str, int]


def block_weight_bytes(dims: ModelDimensions, quantization: str, width: int) -> int:
    """Bytes of the linear layers of the blocks.

    NF4 with double quantization: 0.5 byte + 0.127 bit a weight. int8: 1 byte, and a 4-byte scale for each output row.
    """
    if quantization == "nf4":
        return math.ceil(dims.linear_parameters * NF4_BYTES)
    if quantization == "int8":
        return dims.linear_parameters + 4 * dims.num_layers * sum(linear.outputs for linear in dims.linears)
    return dims.linear_parameters * width


def embedding_bytes(dims: ModelDimensions, width: int) -> int:
    """Bytes of embedding, head, norms and biases: never quantized; a tied head is the embedding itself."""
    return (dims.embedding_parameters + dims.other_parameters) * width


def adapter_bytes(parameters: int, width: int) -> int:
    """Bytes of an adapter: fp32 masters and, below fp32, the copy in the compute dtype that is multiplied."""
    return parameters * (4 if width == 4 else 4 + width)


def optimizer_state_bytes(parameters: int, optim: str) -> int:
    """Bytes of AdamW's two moments: fp32, or 8-bit with a 4-byte scale for each block of 256 numbers.

    With the fp32 weight and gradient this makes 16 bytes an adapter parameter (8-bit: 10.03).
    """
    return 8 * parameters if optim == "adamw" else math.ceil(parameters * 2 * (1 + 4 / 256))


def kv_bytes_per_token(dims: ModelDimensions, width: int) -> int:
    """Bytes of the keys and values of one token in all layers: ``2 * layers * nkv * dk * b``."""
    return 2 * dims.num_layers * dims.num_kv_heads * dims.head_dim * width


def kv_cache_bytes(dims: ModelDimensions, prompt_tokens: int, completion_tokens: int, width: int) -> int:
    """Bytes of the cache: each prompt once, each completion's own tokens.

    While prompts are stacked after the prefill they exist twice, before any completion token does.
    """
    return kv_bytes_per_token(dims, width) * (prompt_tokens + max(prompt_tokens, completion_tokens))


def layer_activation_bytes(dims: ModelDimensions, tokens: int, width: int) -> int:
    """Bytes that one layer holds between its forward and backward pass over packed tokens.

    ``b * T * (12h + 3 nh dk + nkv dk + 3 dff)``, fitted to public measurements of stock layers (our packed pass keeps
    less, with fused norms and gated layers about half), plus the keys and values that packed attention gathers with
    expanded heads: ``2 nh dk`` for each of the at most 4 T positions that the packer allows.
    """
    nh, nkv, dk = dims.num_heads, dims.num_kv_heads, dims.head_dim
    per_token = 12 * dims.hidden_size + 3 * nh * dk + nkv * dk + 3 * dims.intermediate_size
    return width * tokens * (per_token + 2 * ATTENDED_PER_TOKEN * nh * dk)


def forward_activation_bytes(dims: ModelDimensions, tokens: int, width: int) -> int:
    """Bytes of one layer in a pass without gradients: ``b * T * (4h + 3 nh dk + 2 nkv dk + 3 dff)``."""
    nh, nkv, dk = dims.num_heads, dims.num_kv_heads, dims.head_dim
    return width * tokens * (4 * dims.hidden_size + 3 * nh * dk + 2 * nkv * dk + 3 * dims.intermediate_size)


def recomputed_layers(dims: ModelDimensions, checkpointing: bool | int) -> int:
    """Return how many layers ``gradient_checkpointing`` stands for."""
    return dims.num_layers if checkpointing is True else int(checkpointing)


def stored_activation_bytes(
    dims: ModelDimensions, tokens: int, width: int, checkpointing: bool | int, offload: bool = False
) -> int:
    """Bytes kept for the backward pass.

    One hidden state (``b * T * h``) of each recomputed layer, unless it waits in host memory, all activations of every
    other layer, and two hidden states more: the last one, and the one that is being worked on.
    """
    count = recomputed_layers(dims, checkpointing)
    hidden = width * tokens * dims.hidden_size
    checkpoints = 0 if offload else count * hidden
    return 2 * hidden + checkpoints + (dims.num_layers - count) * layer_activation_bytes(dims, tokens, width)


def logits_tile_bytes(dims: ModelDimensions, tokens: int, width: int) -> int:
    """Bytes of a tile of logits in the loss: one in the compute dtype and two in fp32, ``T * V * (b + 8)``."""
    return tokens * dims.vocab_size * (width + 8)


def sampling_logits_bytes(dims: ModelDimensions, rows: int, width: int) -> int:
    """Bytes of the last token's logits while sampling: the compute dtype's and three fp32 copies."""
    return rows * dims.vocab_size * (width + 12)


def decode_scores_bytes(dims: ModelDimensions, rows: int, keys: int, width: int) -> int:
    """Bytes of one layer's attention scores while decoding: ``R * nh * keys``, two in fp32 and one in compute dtype."""
    return rows * dims.num_heads * keys * (8 + width)


def dequantized_bytes(dims: ModelDimensions, quantization: str, width: int) -> int:
    """Bytes of the largest linear layer in the compute dtype, where a quantized weight is expanded to be multiplied."""
    return 0 if quantization == "none" else dims.largest_linear * width


def step_tokens(recipe: Recipe) -> int:
    """Packed tokens of a whole step at full length: each prompt once, all its completions."""
    return recipe.training.prompts_per_step * group_tokens(recipe)


def group_tokens(recipe: Recipe) -> int:
    """Packed tokens of one group at full length: a prompt with its completions, an example, or a pair."""
    if recipe.algorithm not in ONLINE:
        return row_tokens(recipe) * (2 if recipe.algorithm == "reward_model" else 1)
    lengths = recipe.generation
    return recipe.data.max_prompt_length + lengths.num_generations * lengths.max_completion_length


def row_tokens(recipe: Recipe) -> int:
    """Tokens of the longest prompt with one completion: the least a micro-batch must hold."""
    if recipe.algorithm == "sft":
        return recipe.sft.max_length
    if recipe.algorithm == "reward_model":
        return recipe.reward_model.max_length
    return recipe.data.max_prompt_length + recipe.generation.max_completion_length


def length_keys(recipe: Recipe) -> dict[str, int]:
    """Return the recipe's keys that bound a row's tokens, with their values."""
    if recipe.algorithm in ("sft", "reward_model"):
        return {f"{recipe.algorithm}.max_length": row_tokens(recipe)}
    return sampled_keys(recipe)


def sampled_keys(recipe: Recipe) -> dict[str, int]:
    """Return the recipe's keys that bound a prompt with a sampled completion, with their values in tokens."""
    return {
        "data.max_prompt_length": recipe.data.max_prompt_length,
        "generation.max_completion_length": recipe.generation.max_completion_length,
    }


def samples_completions(recipe: Recipe) -> bool:
    """Whether the run writes completions: to learn from, or to judge held-out ones by the recipe's rewards."""
    return recipe.algorithm in ONLINE or (recipe.algorithm == "sft" and bool(recipe.rewards and recipe.data.eval_size))


def adapters_of(recipe: Recipe) -> tuple[int, int]:
    """Return how many adapters train (policy, PPO's critic) and how many are frozen (start, reward models).

    Each is taken to be of the policy's shape.
    """
    trained = 2 if recipe.algorithm == "ppo" and recipe.ppo.critic != "policy" else 1
    start = bool(recipe.adapter) and recipe.algorithm in ONLINE
    return trained, start + sum(reward.function == REWARD_ADAPTER for reward in recipe.rewards)


def prompts_at_once(recipe: Recipe, rows: int) -> int:
    """Prompts in the cache while ``rows`` completions are written, in training or in evaluation.

    Evaluation writes ``num_samples`` completions a prompt, so its rows may each have a prompt of their own.
    """
    training = min(rows // recipe.generation.num_generations, recipe.training.prompts_per_step)
    training = training if recipe.algorithm in ONLINE else 0
    evaluation = min(rows // recipe.evaluation.num_samples, recipe.data.eval_size)
    return max(training, evaluation, 1)  # a wave is of whole groups, or of a part of one


def rollout_rows(recipe: Recipe, settings: Settings) -> int:
    """Completions at once: no more than a step, or the evaluation, has."""
    step = recipe.training.prompts_per_step * recipe.generation.num_generations if recipe.algorithm in ONLINE else 0
    return min(settings.rollout_batch_size, max(step, recipe.data.eval_size * recipe.evaluation.num_samples))


def rollout_copy_bytes(dims: ModelDimensions, settings: Settings) -> int:
    """Bytes of the 16-bit copy of the blocks' linear weights that sampling reads, if the settings want one."""
    if settings.quantization != "nf4" or settings.rollout_weights != "dequantized":
        return 0
    return settings.width * dims.linear_parameters


def phases(dims: ModelDimensions, recipe: Recipe, settings: Settings, device: Device) -> dict[str, Components]:
    """Return bytes by component for rollout (where the run samples), scoring, update, optimizer and export.

    A phase's need is the sum of its components. Where two things are never there together only the larger one is
    listed. On a GPU every phase ends with what the caching allocator holds beyond what is in use (factor 1.125).
    """
    one = dims.lora_parameters(settings.lora["r"], settings.lora["target_modules"])
    trained, frozen = adapters_of(recipe)
    parameters = one * trained
    resident = {
        "weights": block_weight_bytes(dims, settings.quantization, settings.width),
        "embeddings": embedding_bytes(dims, settings.width),
        "adapters": adapter_bytes(one * trained, settings.width) + one * frozen * settings.width,
        "optimizer_state": optimizer_state_bytes(parameters, settings.optim),
    }
    work = {"dequantized_weight": dequantized_bytes(dims, settings.quantization, settings.width)}
    gradients = {"gradients": 4 * parameters}
    result = {
        "rollout": resident
        | work
        | {"rollout_copy": rollout_copy_bytes(dims, settings)}
        | _rollout(dims, recipe, settings),
        "scoring": resident | work | _scoring(dims, settings),
        "update": resident | gradients | work | _update(dims, settings),
        "optimizer": resident | gradients | {"update_buffers": 4 * parameters if settings.optim == "adamw" else 0},
        "export": {key: resident[key] for key in ("weights", "embeddings", "adapters")}
        | {"merged_layer": 2 * 4 * dims.largest_linear},  # one layer at a time: its fp32 weight and its fp32 delta
    }
    if not samples_completions(recipe):
        del result["rollout"]
    factor = ALLOCATOR_FACTOR if device.torch_device.startswith("cuda") else 1.0
    for components in result.values():
        components["allocator"] = round(sum(components.values()) * (factor - 1))
    return result


def peak_phase(by_phase: dict[str, Components]) -> tuple[str, int]:
    """Return the largest phase and its bytes."""
    return max(((name, sum(components.values())) for name, components in by_phase.items()), key=lambda item: item[1])


def _rollout(dims: ModelDimensions, recipe: Recipe, settings: Settings) -> Components:
    rows, width = rollout_rows(recipe, settings), settings.width
    prompt_tokens = prompts_at_once(recipe, rows) * recipe.data.max_prompt_length
    prefill = min(prompt_tokens, max(settings.micro_batch_tokens, recipe.data.max_prompt_length))
    decode = {
        "attention_scores": decode_scores_bytes(dims, rows, sum(sampled_keys(recipe).values()), width),
        "sampling_logits": sampling_logits_bytes(dims, min(rows, settings.logits_tile_tokens), width),
    }
    prefill_pass = {
        "prefill_activations": forward_activation_bytes(dims, prefill, width)
        + prefill * kv_bytes_per_token(dims, width)
    }
    cache = kv_cache_bytes(dims, prompt_tokens, rows * recipe.generation.max_completion_length, width)
    return {"kv_cache": cache} | max(decode, prefill_pass, key=lambda part: sum(part.values()))


def _scoring(dims: ModelDimensions, settings: Settings) -> Components:
    tokens, width = settings.micro_batch_tokens, settings.width
    layer = {"layer_activations": forward_activation_bytes(dims, tokens, width)}
    return {"hidden_states": 2 * width * tokens * dims.hidden_size} | _larger(dims, settings, layer)


def _update(dims: ModelDimensions, settings: Settings) -> Components:
    """Return the bytes at the loss, where every layer's are stored and the last recomputed one's are not yet made.

    The layers that keep theirs come first in the backward pass and have freed them when the recomputed ones are
    reached; so one of these makes the peak higher only when no layer keeps its activations.
    """
    tokens, width, checkpointing = settings.micro_batch_tokens, settings.width, settings.gradient_checkpointing
    stored = stored_activation_bytes(dims, tokens, width, checkpointing, settings.offload_checkpoints)
    every = recomputed_layers(dims, checkpointing) == dims.num_layers
    layer = {"layer_activations": layer_activation_bytes(dims, tokens, width) if every else 0}
    return {"stored_activations": stored} | _larger(dims, settings, layer)


def _larger(dims: ModelDimensions, settings: Settings, layer: Components) -> Components:
    """Return a layer's activations or the logits tile: the tile is gone when the backward pass reaches the layers."""
    tokens = min(settings.logits_tile_tokens, settings.micro_batch_tokens)
    tile = {"logits_tile": logits_tile_bytes(dims, tokens, settings.width)}
    return max(layer, tile, key=lambda part: sum(part.values()))
