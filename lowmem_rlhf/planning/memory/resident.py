"""What a run holds in memory, and what its passes take beside it: pure arithmetic in bytes, without torch."""

import math
from dataclasses import dataclass, fields, replace
from typing import Any

from lowmem_rlhf.architecture.dimensions import ModelDimensions
from lowmem_rlhf.architecture.families.layers import LayerSizes
from lowmem_rlhf.hardware.device import Device
from lowmem_rlhf.planning.limits import tile_shape
from lowmem_rlhf.planning.memory.layers import Layer
from lowmem_rlhf.planning.memory.mixers import MixerLayer
from lowmem_rlhf.planning.shapes import PackedShape, adapters_of, reference_adapters, starts_from_adapter, step_shape
from lowmem_rlhf.recipe.lora_shape import LoraShape
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.recipe.sections import REWARD_ADAPTER
from lowmem_rlhf.recipe.server import SERVERS, VLLM, ServerConfig, shares_card

KIB = 1024
MIB = 1024**2


GIB = 1024**3


ALLOCATOR_FACTOR = 1.125  # reserved / allocated in CUDA's caching allocator, the median of public measurements


ALLOCATOR_HIGH = 1.25  # the same, its 90th percentile with SDPA


EXPERT_BYTES = 0.5 + 4 / 64  # 4 bits, and a 4-byte scale per 64 weights


NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # 4 bits, an 8-bit scale per 64 weights, a 4-byte one per 256 of those


GATHERED_LAYERS = 2  # of a shared base at once: the one that computes, and the next, fetched in the meantime


COMPARED_TOKENS, COMPARED_LENGTH = 384, 96  # tokens that an export is compared on, and of one text among them


VLLM_SHARE = 0.92  # of its card that vLLM takes if it is told nothing (vllm/config/cache.py)


SLEEPING_BYTES = 2 * GIB  # of a vLLM that sleeps: its process's context and graphs; not measured here


LOGITS_BYTES = 4 * 2**25  # of one model on these, at most


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
        score_batch_tokens: packed tokens of one pass without gradients.
        rollout_batch_size: completions generated at once.
        rollout_weights: ``dequantized``: a 16-bit copy of the NF4 weights exists while sampling; ``joined``: weights of
            layers with one input are multiplied at once, for which their scales exist in fp32; else ``quantized``.
        logits_tile_tokens: positions whose logits exist at once.
        optim: ``adamw`` or ``adamw_8bit``.
        lora: the policy adapter's shape: ``r``, ``lora_alpha``, ``target_modules``, and what else a recipe sets of it.
        offload_embeddings: the token embedding lies in host memory.
        offload_experts: experts in NF4 lie in host memory, and each is copied to the device for its product.
        keep_graphs: the captured passes of decoding, and the caches that they read, stay from one rollout to the next.
        base_shards: processes among which the layers' weights are shared out; 1: each process holds all of them.
        offload_base: the own share of them lies in host memory.
    """

    quantization: str
    compute_dtype: str
    gradient_checkpointing: bool | int
    offload_checkpoints: bool
    micro_batch_tokens: int
    score_batch_tokens: int
    rollout_batch_size: int
    rollout_weights: str
    logits_tile_tokens: int
    optim: str
    lora: dict[str, Any]
    offload_embeddings: bool = False
    offload_experts: bool = False
    keep_graphs: bool = False
    base_shards: int = 1
    offload_base: bool = False

    @property
    def width(self) -> int:
        """Bytes of a number in the compute dtype."""
        return 4 if self.compute_dtype == "float32" else 2


Components = dict[str, int]


def total(components: Components) -> int:
    """Return the sum of a moment's or a phase's components."""
    return sum(components.values())


def cublas_workspace(compute_capability: tuple[int, int] | None) -> int:
    """Return the bytes that torch takes from the allocator, and keeps, for each thread that multiplies with cuBLAS.

    ``parseChosenWorkspaceSize`` of ``aten/src/ATen/cuda/CublasHandlePool.cpp``: ":4096:2:16:8", and 32 MiB on Hopper
    and on data-centre Blackwell. The backward pass multiplies in a thread of its own.
    """
    return 32 * MIB if compute_capability and compute_capability[0] in (9, 10) else 2 * 4096 * KIB + 8 * 16 * KIB


def expert_bytes(dims: ModelDimensions) -> int:
    """Bytes of all experts in NF4."""
    return math.ceil(dims.expert_parameters * EXPERT_BYTES)


def block_weight_bytes(dims: ModelDimensions, quantization: str, width: int, experts_away: bool = False) -> int:
    """Bytes of the linear layers of the blocks.

    NF4 with double quantization: 0.5 byte + 0.127 bit a weight. int8: 1 byte, and a 4-byte scale for each output row.
    Experts: NF4 without the second quantization, or as they are.

    Args:
        experts_away: NF4 experts lie in host memory; the codes of one are on the device.
    """
    if quantization == "nf4":
        one = math.ceil(2 * dims.experts.inner * dims.hidden_size * EXPERT_BYTES) if dims.experts else 0
        return math.ceil(dims.linear_parameters * NF4_BYTES) + (one if experts_away else expert_bytes(dims))
    experts = dims.expert_parameters * width
    if quantization == "int8":
        return experts + dims.linear_parameters + 4 * sum(linear.outputs * many for linear, many in dims.quantizable)
    return experts + dims.linear_parameters * width


def layer_weight_bytes(dims: ModelDimensions, quantization: str, width: int) -> int:
    """Bytes of the linear layers of one block, gathered from the processes that share a base: of the largest one."""
    average = block_weight_bytes(dims, quantization, width) / dims.num_layers
    if not dims.counted:
        return math.ceil(average)
    largest = sum(linear.inputs * linear.outputs for linear in dims.counted.block)
    return math.ceil(average * max(1.0, largest * dims.num_layers / max(1, dims.linear_parameters)))


def embedding_bytes(dims: ModelDimensions, width: int, offloaded: bool = False) -> int:
    """Bytes of embedding, head, norms and biases: never quantized; a tied head is the embedding itself.

    Args:
        offloaded: embeddings lie in host memory (not a tied one, which is the head; those of each layer too).
    """
    away = dims.movable_embeddings if offloaded else 0
    return (dims.embedding_parameters - away + dims.other_parameters - dims.expert_parameters) * width


def optimizer_state_bytes(parameters: int, optim: str) -> int:
    """Bytes of AdamW's two moments: fp32, or 8-bit with a 4-byte scale for each block of 256 numbers.

    With the fp32 weight and gradient this makes 16 bytes an adapter parameter (8-bit: 10.03).
    """
    return 8 * parameters if optim == "adamw" else math.ceil(parameters * 2 * (1 + 4 / 256))


def dense_bytes(dims: ModelDimensions, quantization: str, width: int) -> int:
    """Bytes of the largest weight in the compute dtype, where a quantized one is expanded to be multiplied.

    It is a linear layer's, or under NF4 an expert's.
    """
    expert = 2 * dims.experts.inner * dims.hidden_size if dims.experts and quantization == "nf4" else 0
    return 0 if quantization == "none" else max(dims.largest_linear, expert) * width


def recomputed_layers(dims: ModelDimensions, checkpointing: bool | int) -> int:
    """Return how many layers ``gradient_checkpointing`` stands for."""
    return dims.num_layers if checkpointing is True else int(checkpointing)


def logits_tile_bytes(
    dims: ModelDimensions,
    positions: int,
    tile: int,
    width: int,
    gradient: bool,
    on_cpu: bool,
    entropy: bool = False,
) -> int:
    """Bytes of a tile in the log-probs: K positions by C of the vocabulary, one in the compute dtype and two in fp32.

    ``K C (b + 8)``, with K C at most ``tile * V``; with gradients, and a soft cap, its slope (4 K C), and the mean of
    the head's rows, ``K h (b + 4)``; with the entropy's gradient another mean of them and what both are combined in,
    ``16 K h``. K and C as `limits.tile_shape` has them.
    """
    most, chunk = tile_shape(positions, tile, dims.vocab_size, on_cpu)
    rows = math.ceil(positions / math.ceil(positions / most)) if positions else 0
    slope = 4 if gradient and dims.logit_softcap else 0
    means = width + 4 + (16 if entropy else 0)
    return rows * chunk * (width + 8 + slope) + (rows * dims.hidden_size * means if gradient else 0)


def distinct(layers: list[Layer]) -> list[Layer]:
    """Return each object of a list once."""
    return list({id(layer): layer for layer in layers}.values())


class Memory:
    """The memory of one run with given settings.

    Args:
        dims, recipe, settings, device: of the run.
    """

    def __init__(self, dims: ModelDimensions, recipe: Recipe, settings: Settings, device: Device) -> None:
        self.dims, self.recipe, self.settings = dims, recipe, settings
        self.width, self.card_bytes = settings.width, device.total_bytes
        self.on_cpu, self.capabilities = device.on_cpu, device.capabilities
        self.workspace = cublas_workspace(device.compute_capability) if self.capabilities.blas_workspace else 0
        self.four_bit_product = device.multiplies_four_bit(settings.compute_dtype)
        self.four_bit_in_place = self.four_bit_product and device.compiler is not None  # `engine.decode.native`
        self.beside = dims.adapted(LoraShape.of(**settings.lora))
        self.one_adapter = self.beside.parameters
        self.trained, self.frozen = adapters_of(recipe)
        follows = recipe.spec.follows(recipe)
        self.following = self.one_adapter * follows.rank if follows else 0  # parameters, see `engine.following`
        self.dense = dense_bytes(dims, settings.quantization, self.width)

    def resident(self) -> Components:
        """Return what lies on the device in every phase.

        Trained adapters are fp32 masters, and so is a reference that follows them; frozen ones are the numbers they
        multiply with. On CUDA cuBLAS keeps a workspace for each of two threads, autograd's being the second. Of a
        shared base it is a share of the layers, and the layers that are gathered at once.
        """
        settings, trained = self.settings, self.one_adapter * self.trained
        return {
            **self._layers_of_base(),
            "embeddings": embedding_bytes(self.dims, self.width, settings.offload_embeddings),
            "adapters": 4 * (trained + self.following) + self.width * self.one_adapter * self.frozen,
            "optimizer_state": optimizer_state_bytes(trained, settings.optim),
            "workspaces": 2 * self.workspace,
        }

    def _layers_of_base(self) -> Components:
        """Return the weights of all layers, or what one process has of them where several share the base."""
        settings = self.settings
        if settings.base_shards == 1:
            all_layers = block_weight_bytes(self.dims, settings.quantization, self.width, settings.offload_experts)
            return {"weights": all_layers}
        gathered = GATHERED_LAYERS * layer_weight_bytes(self.dims, settings.quantization, self.width)
        return {"weights": 0 if settings.offload_base else self.shard(), "gathered_layers": gathered}

    def shard(self) -> int:
        """Return the bytes of the layers' weights that one of the processes that share a base holds."""
        return math.ceil(self.base_layers() / self.settings.base_shards)

    def base_layers(self) -> int:
        """Return the bytes of all layers' weights, which a pass over a shared base gathers."""
        return block_weight_bytes(self.dims, self.settings.quantization, self.width)

    def server_bytes(self) -> int:
        """Bytes of our card that a server of `generation.server` takes while it samples.

        vLLM takes the share of the whole card that it is told; llama.cpp's the weights in 16 bits, as wide as they
        can be, and the keys and values of all that it writes at once.
        """
        recipe = self.recipe
        server = recipe.generation.server or ServerConfig()
        if recipe.generation.engine not in SERVERS or self.on_cpu or not shares_card(server):
            return 0
        if recipe.generation.engine == VLLM:
            return round(self.card_bytes * (server.gpu_memory_utilization or VLLM_SHARE))
        dims, tokens = self.dims, recipe.data.max_prompt_length + recipe.generation.max_completion_length
        sizes = [(one.num_kv_heads, one.head_dim) for one in dims.layer_sizes]
        sizes = sizes or [(dims.num_kv_heads, dims.head_dim)] * dims.attention_layers
        return 2 * dims.num_parameters + server.parallel * tokens * sum(4 * heads * wide for heads, wide in sizes)

    def server_between_rollouts(self) -> int:
        """Bytes of our card that it keeps while we train: all, or what a sleeping vLLM has of a process of its own."""
        taken, server = self.server_bytes(), self.recipe.generation.server or ServerConfig()
        if not taken or not server.sleep:
            return taken
        return min(taken, SLEEPING_BYTES) if self.recipe.generation.engine == VLLM else 0

    def trained_state(self) -> int:
        """Return the bytes of what trains, its moments and what follows it, in host memory once more on a card."""
        trained = self.one_adapter * self.trained
        return 4 * (trained + self.following) + optimizer_state_bytes(trained, self.settings.optim)

    def adapter_copies(self, adapters: int = 1) -> Components:
        """Return the copies in the compute dtype of the adapters of the role that computes."""
        return {"adapter_copies": self.width * self.one_adapter * adapters}

    def layers(self, shape: PackedShape, adapters: int = 1) -> list[Layer]:
        """Return each layer in a pass over a packed row; those that are alike are one and the same object."""
        count, mixer = self.dims.num_layers, self.dims.mixer
        sizes = self.dims.layer_sizes or (None,) * count
        kinds = list(zip(self.beside.ranks, sizes, mixer.places if mixer else (False,) * count, strict=True))
        layer = self.layer(shape, adapters)
        made = {kind: self._of_kind(layer, *kind) for kind in dict.fromkeys(kinds)}
        return [made[kind] for kind in kinds]

    def _of_kind(self, layer: Layer, ranks: tuple[int, ...], sizes: LayerSizes | None, mixes: bool) -> Layer:
        """Return a layer with these ranks beside its linear layers, of these sizes, or that passes a state on."""
        own = {}
        if sizes is not None:
            own = {one.name: getattr(sizes, one.name) for one in fields(LayerSizes) if one.name != "reuses_keys"}
            if sizes.reuses_keys:
                names = [linear.name for linear in self.dims.linears]
                ranks = tuple(0 if name in ("k_proj", "v_proj") else r for name, r in zip(names, ranks, strict=True))
            layer = replace(layer, dims=replace(self.dims, **own), reuses_keys=sizes.reuses_keys)
        layer = replace(layer, beside=ranks)
        if mixes and self.dims.mixer:
            values = {one.name: getattr(layer, one.name) for one in fields(Layer)}
            return MixerLayer(**values, mixer=self.dims.mixer)
        return layer

    def layer(self, shape: PackedShape, adapters: int = 1) -> Layer:
        """Return a layer with attention in a pass over a packed row, in a role with so many adapters.

        It is the one with the most of them.
        """
        beside = max(self.beside.ranks, key=sum)
        dense = self.dense
        if self.settings.quantization == "int8" and self.capabilities.int8_kernel:  # int8 inputs, int32 results
            dense = max(dense, *(shape.tokens * (x.inputs + 4 * x.outputs) for x, _ in self.dims.quantizable))
        wide = self.dims.wide_stream and self.settings.compute_dtype == "float16"
        nf4 = self.settings.quantization == "nf4"
        explicit = self.capabilities.explicit_scores
        return Layer(self.dims, shape, self.width, beside, adapters, dense, explicit, wide, one_by_one=nf4)

    def scoring(self) -> Components:
        """Return the largest moment of all roles' passes without gradients: a layer, or what is read of the states."""
        moments: list[Components] = []
        for adapters, language in self._scoring_roles():
            copies = self.adapter_copies(adapters)
            moments += [copies | moment for moment in self._scoring_moments(adapters, language)]
        return max(moments, key=total, default={})

    def _scoring_roles(self) -> set[tuple[int, bool]]:
        """Return of each role that scores its adapters, and whether it gives log-probs (else a number a position)."""
        recipe, spec = self.recipe, self.recipe.spec
        roles = {(1, False)} if any(reward.function == REWARD_ADAPTER for reward in recipe.rewards) else set()
        if spec.reference:
            roles.add((reference_adapters(recipe), True))
        if spec.scores_policy or spec.entropy_passes(recipe):
            roles.add((1, spec.output == "text"))
        if spec.critic(recipe):
            roles.add((self.critic_adapters(), False))
        return roles

    def critic_adapters(self) -> int:
        """Return how many adapters the critic computes with: its own, and the start's below."""
        return 1 + (self.recipe.spec.critic(self.recipe) == "adapter" and starts_from_adapter(self.recipe))

    def _scoring_moments(self, adapters: int, language: bool) -> list[Components]:
        shape = step_shape(self.recipe, self.settings.score_batch_tokens)
        layer = self.layer(shape, adapters)
        loss = {"scored_states": layer.of(self.dims.hidden_size, shape.scored)}
        if language:
            loss["logits_tile"] = self._tile(shape.scored, gradient=False)
        else:
            loss["scored_states"] += 4 * self.dims.hidden_size * shape.scored  # in fp32 for the head
        peak = max(one.forward_peak() for one in distinct(self.layers(shape, adapters)))
        return [{"layer_activations": peak + layer.common()}, loss]

    def _tile(self, positions: int, gradient: bool, entropy: bool = False) -> int:
        tile = self.settings.logits_tile_tokens
        return logits_tile_bytes(self.dims, positions, tile, self.width, gradient, self.on_cpu, entropy)

    def update(self) -> Components:
        """Return the largest moment of the policy's and the critic's passes with gradients."""
        moments, spec = [], self.recipe.spec
        critic = spec.critic(self.recipe)
        if spec.output == "text":
            moments += [self.adapter_copies() | moment for moment in self._pass_moments(1, True)]
        if critic or spec.output == "scores":
            adapters = self.critic_adapters() if critic else 1
            head = self._pass_moments(adapters, False)
            moments += [self.adapter_copies(adapters) | moment for moment in head]
        return {"gradients": 4 * self.one_adapter * self.trained} | max(moments, key=total)

    def layer_in_step(self, adapters: int) -> Layer:
        """Return a layer in the passes of the update."""
        return self.layer(step_shape(self.recipe, self.settings.micro_batch_tokens), adapters)

    def _pass_moments(self, adapters: int, language: bool) -> list[Components]:
        """Return the moments of a pass with gradients: the loss, the last norm, and a layer of each kind.

        Layers below the first adapter have no backward pass and keep nothing. Those that keep their activations come
        first in the backward pass and have freed them when the recomputed ones are reached. Each of these has its
        input, and all of itself again when its turn comes.

        Args:
            adapters: of the role.
            language: the loss is of log-probs; otherwise of one number a position (value, score).
        """
        layer = self.layer_in_step(adapters)
        each = self.layers(layer.shape, adapters)
        layers, hidden, scored = self.dims.num_layers, layer.hidden, layer.shape.scored
        first = self.beside.first  # nothing below has a gradient
        count = max(first, recomputed_layers(self.dims, self.settings.gradient_checkpointing))
        again = count - first
        inputs = hidden * (min(again, 1) if self.settings.offload_checkpoints else again)
        of_each = {id(one): one.saved() for one in distinct(each)}
        kept = [of_each[id(one)] for one in each[count:]]
        saved = sum(kept)
        states = layer.of(self.dims.hidden_size, scored)
        held = states if self.recipe.spec.keeps_states else 0
        both = {"positions": layer.common(gradient=True), "stored_activations": inputs + saved}
        entropy = language and self.recipe.spec.entropy_gradient(self.recipe)
        loss: Components = {"final_states": hidden, "scored_states": (3 if entropy else 2) * states}
        if language:
            loss["logits_tile"] = self._tile(scored, gradient=True, entropy=entropy)
        else:
            loss["scored_states"] = states + 4 * self.dims.hidden_size * scored
        norm = {"final_states": 2 * hidden + layer.norm_gradients(), "scored_states": held}
        moments = [both | loss, both | norm]
        if entropy:  # two gradients in fp32, which are added up
            back = 3 * states + 8 * self.dims.hidden_size * scored
            moments.append(both | {"final_states": hidden, "scored_states": back})
        if count < layers:
            # the last layer of each kind, once those behind it have freed what they kept
            last = {id(one): (one, sum(kept[: place + 1])) for place, one in enumerate(each[count:])}
            extra = max(one.backward_peak() - one.saved() + held - saved for one, held in last.values())
            moments.append(both | {"layer_gradients": max(0, extra), "scored_states": held})
        if again:
            stored = {"positions": layer.common(gradient=True), "stored_activations": inputs, "scored_states": held}
            peak = max(one.backward_peak(recomputed=True) for one in distinct(each[first:count]))
            moments.append(stored | {"layer_activations": peak - hidden})
        if first:
            peak = max(one.forward_peak() for one in distinct(each[:first]))
            moments.append({"positions": layer.common(gradient=True), "layer_activations": peak})
        return moments

    def optimizer(self) -> Components:
        """Return the optimizer step: gradients, and on a GPU one more number a parameter inside AdamW.

        Where the reference follows, what mixes the policy into it beside one layer takes the place of these.
        """
        parameters = self.one_adapter * self.trained
        inside = 4 * parameters if self.settings.optim == "adamw" and not self.on_cpu else 0
        return {"gradients": 4 * parameters, "update_buffers": max(inside, self.mixing())} | self.adapter_copies()

    def mixing(self) -> int:
        """Return the bytes of mixing the policy into a reference that follows it, beside the largest linear layer.

        Five times the stacked factors, ``4 n (inputs + outputs)``: their parts, themselves, their Q, what QR works in.
        """
        if not self.following:
            return 0
        rank = (reference_adapters(self.recipe) + 1) * max(map(max, self.beside.ranks))
        return 20 * rank * max(linear.inputs + linear.outputs for linear, _ in self.beside.linears)

    def export(self) -> Components:
        """Return what an export has on the device: the live policy that it is compared with, and a text's logits.

        On a CPU the logits of all texts stay there, the policy's and its base's. The merge itself works in host memory,
        before (see `planning.memory.export`).
        """
        resident = self.resident()
        policy: Components = {
            key: resident[key] for key in ("weights", "gathered_layers", "embeddings") if key in resident
        }
        policy |= {"adapters": 4 * self.one_adapter, "workspaces": self.workspace}
        logits = COMPARED_LENGTH * self.dims.vocab_size * (self.width + 4)
        if self.on_cpu:
            logits += 2 * min(LOGITS_BYTES, 4 * COMPARED_TOKENS * self.dims.vocab_size)
        return policy | self.adapter_copies() | {"compared_logits": logits}
