"""What sizes of a model memory is planned with, and how they follow from the fields of its config.json. No torch here.

`lookup` finds the config.json, or the GGUF header, that a recipe's model leads to.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from lowmem_rlhf.architecture.adapted import Adapted, adapted
from lowmem_rlhf.architecture.config_fields import LIMITS, block_traits, common_fields, heads_of, positive
from lowmem_rlhf.architecture.counted_fields import counted_fields, is_gated
from lowmem_rlhf.architecture.counting import CannotCount, Counted, Linears, Places, count, weights_of
from lowmem_rlhf.architecture.families import block_of, family_of
from lowmem_rlhf.architecture.families.block import Block, Linear, block_linears, module_names, other_parameters
from lowmem_rlhf.architecture.families.layers import Experts, LayerSizes
from lowmem_rlhf.architecture.families.mixer import Mixer
from lowmem_rlhf.architecture.families.wrappers import text_config
from lowmem_rlhf.architecture.kinds import check_experts, check_kind, has_experts
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.recipe.lora_shape import LoraShape


@dataclass(frozen=True)
class ModelDimensions:
    """The sizes of a decoder-only language model, and what of its block decides memory.

    Attributes:
        head_dim: dimension of one attention head; ``num_heads * head_dim`` need not be ``hidden_size``.
        tied: the output head is the token embedding.
        attention_bias: whether query, key and value have biases.
        gated: the MLP has a gate (SwiGLU, GeGLU) beside its up projection.
        max_positions: the longest sequence the model was made for, in tokens; None if unbounded.
        torch_dtype: of the stored weights, as config.json says; None when unknown (GGUF).
        linears: the linear layers of one block: these are quantized and take adapters.
        other_parameters: norms, biases and learned positions of the whole model, and whatever else was counted.
        norm: RMSNorm, or LayerNorm.
        norms: norms of ``hidden_size`` in a block.
        norm_place: whether attention and MLP are normed before, after, or on both sides.
        qk_norm: norms of queries and keys: none, over each head's dimension, or over all heads.
        parallel: attention and MLP work on the block's input side by side (Phi, GPT-NeoX, Cohere).
        activation: of the MLP, as transformers names it.
        rotary_dim: numbers of a head that rotary positions turn; 0 where positions are learned (GPT-2, OPT).
        attention_softcap, logit_softcap: soft caps of attention scores and of logits (Gemma 2); None: none.
        embedding_scale: the embedding is multiplied by a number, which makes a second copy of it (Gemma, Granite).
        sliding_window: tokens that a layer with a window attends to; None where no layer has one.
        sliding_layers: how many layers have it. A packed rollout only masks what lies outside (`rollout.cache`): its
            key-value cache is as long for them as for the others.
        note: what is not certain about these sizes, as a sentence; empty when nothing.
        counted: what the real class has, for a type without terms in the table of families or with layers of unlike
            sizes; None for other types, and where it could not be counted.
        mixer: the layers that pass a state on in place of attention; None where there are none, or their terms are not
            known.
        layer_sizes: of each layer where they differ; empty where all are as the whole model is described.
        experts: None where there are none, or their terms are not known.
        layer_input: numbers of each token that enter every layer beside its stream (Gemma 4); 0: none.
    """

    model_type: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tied: bool
    attention_bias: bool
    gated: bool
    max_positions: int | None
    torch_dtype: str | None
    linears: tuple[Linear, ...]
    other_parameters: int
    norm: Literal["rms", "layer"]
    norms: int
    norm_place: Literal["before", "after", "both"]
    qk_norm: Literal["none", "head", "all"]
    parallel: bool
    activation: str
    rotary_dim: int
    attention_softcap: float | None
    logit_softcap: float | None
    embedding_scale: bool
    sliding_window: int | None
    sliding_layers: int
    note: str = field(default="", compare=False)
    counted: Counted | None = None
    mixer: Mixer | None = None
    layer_sizes: tuple[LayerSizes, ...] = ()
    experts: Experts | None = None
    layer_input: int = 0

    @property
    def attention_layers(self) -> int:
        """Layers that keep keys and values."""
        return self.num_layers - (self.mixer.layers if self.mixer else 0)

    @property
    def known(self) -> bool:
        """Whether the terms of this model type stand in the table of families; otherwise activations are estimated."""
        family, experts = family_of(self.model_type), self.experts is not None or not self.expert_parameters
        return family.block is not None and experts and not (family.counted and self.counted is None)

    @property
    def quantizable(self) -> Linears:
        """The linear layers of the whole model that are quantized, and how many there are of each."""
        return self.counted.quantized if self.counted else tuple((x, self.num_layers) for x in self.linears)

    @property
    def adaptable(self) -> Linears:
        """The linear layers of the whole model that take adapters, and how many there are of each."""
        return self.counted.adapted if self.counted else tuple((x, self.num_layers) for x in self.linears)

    @property
    def linear_parameters(self) -> int:
        """Weights inside the quantizable linear layers of all blocks."""
        return weights_of(self.quantizable)

    @property
    def token_embedding(self) -> int:
        """Parameters of the token embedding."""
        return self.counted.embedding if self.counted else self.vocab_size * self.hidden_size

    @property
    def expert_parameters(self) -> int:
        """Parameters of stacked experts, which NF4 quantizes as well (`engine.experts`)."""
        return self.counted.stacked if self.counted else 0

    @property
    def layer_embeddings(self) -> int:
        """Parameters of embeddings of tokens in each layer (Gemma 3n and 4)."""
        return self.counted.tables if self.counted else 0

    @property
    def movable_embeddings(self) -> int:
        """Parameters of embeddings that only look tokens up, so that they can lie in host memory."""
        return (0 if self.tied else self.token_embedding) + self.layer_embeddings

    @property
    def embedding_parameters(self) -> int:
        """Token embedding and output head; one matrix when they are tied."""
        if self.counted:
            return self.counted.embedding + self.counted.head
        return self.vocab_size * self.hidden_size * (1 if self.tied else 2)

    @property
    def num_parameters(self) -> int:
        """All parameters; a tied matrix counts once, as ``model.parameters()`` does."""
        return self.linear_parameters + self.embedding_parameters + self.other_parameters

    @property
    def largest_linear(self) -> int:
        """Weights of the largest quantizable linear layer."""
        return max((linear.inputs * linear.outputs for linear, _ in self.quantizable), default=0)

    @property
    def overflows_float16(self) -> bool:
        """Whether the family's activations are known to exceed float16 (Gemma 3)."""
        return family_of(self.model_type).overflows_float16

    @property
    def avoids_four_bits(self) -> bool:
        """Whether 4-bit weights are advised against."""
        return family_of(self.model_type).avoids_four_bits

    @property
    def wide_stream(self) -> bool:
        """Whether it is computed in float16 all the same, with an fp32 residual stream (`engine.wide`)."""
        return family_of(self.model_type).wide_stream is not None

    @property
    def places(self) -> Places:
        """The linear layers that take adapters, by their whole names (see `Counted.places`)."""
        if self.counted:
            return self.counted.places
        block, every = family_of(self.model_type).block or Block(), tuple(range(self.num_layers))
        names = module_names(block, self.linears)
        return tuple((f"{block.path}.*.{name}", x, every) for name, x in zip(names, self.linears, strict=True))

    def adapted(self, shape: LoraShape) -> Adapted:
        """Return which linear layers an adapter of a shape lies beside.

        Raises:
            UserError: it names none, or something that is none.
        """
        if shape not in self._known_shapes:
            self._known_shapes[shape] = adapted(self, shape)
        return self._known_shapes[shape]

    @cached_property
    def _known_shapes(self) -> dict[LoraShape, Adapted]:
        return {}  # a plan asks for the same one again and again

    def lora_parameters(self, r: int, target_modules: Literal["all-linear"] | Iterable[str] = "all-linear") -> int:
        """Adapter parameters at rank r: ``r * (inputs + outputs)`` for every adapted layer (LoRA, arXiv 2106.09685).

        Raises:
            UserError: see `adapted`.
        """
        return self.adapted(LoraShape.of(r, target_modules=target_modules)).parameters


def from_config_file(path: Path, model: str, trust_remote_code: bool = True) -> ModelDimensions:
    """Return the sizes that a config.json tells, under any file name; ``model`` is only named in errors.

    Raises:
        UserError: the file is no JSON object, or as `dimensions_from_config`.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"model {model!r}: its config.json cannot be read as JSON ({error})") from error
    if not isinstance(config, dict):
        raise UserError(f"model {model!r}: its config.json is not a JSON object")
    return dimensions_from_config(config, model, trust_remote_code)


def dimensions_from_config(
    config: Mapping[str, Any], model: str, trust_remote_code: bool = True, known: Counted | None = None
) -> ModelDimensions:
    """Return the sizes that the fields of a config.json tell; ``model`` is only named in errors.

    Of a wrapper for images or sound they are those of its text tower.

    Args:
        known: what was counted on its class before.

    Raises:
        UserError: a field is missing, is no plausible number, or the model is of an unsupported kind.
    """
    config = text_config(config)
    model_type = check_kind(model, config, trust_remote_code)
    family = family_of(model_type)
    alike = family.block and not family.counted and not has_experts(config)
    counted, counted_sizes, why_not = (None, {}, "") if alike else _count(config, known)
    check_experts(model, config, counted)
    fields = {**common_fields(config), **counted_sizes}
    if missing := [key for key in LIMITS if key not in fields]:
        raise UserError(_lacking(model, model_type, missing, counted, why_not))
    numbers = {key: positive(fields[key], key, model) for key in LIMITS}
    block = block_of(model_type, fields)
    if counted and not family.block:
        block = replace(block, gated=is_gated(counted, numbers["hidden_size"], numbers["intermediate_size"]))
    heads, kv_heads, dim = heads_of(fields, block, numbers, model)
    positions = fields.get("max_position_embeddings")
    if block.learned_positions and positions is None:
        raise UserError(f"model {model!r}: its config.json lacks n_positions or max_position_embeddings")
    if positions is not None:
        positions = positive(positions, "max_position_embeddings", model)
    tied = not counted.head if counted else fields.get("tie_word_embeddings", block.tied)
    if not isinstance(tied, bool):
        raise UserError(f"model {model!r}: its config gives tie_word_embeddings = {tied!r}; true or false is expected")
    try:
        traits = block_traits(block, {**config, **fields}, dim)
        mixer = family.mixer(fields) if family.mixer else None
        sizes = family.layers(config) if family.layers else ()
        routed = family.experts(config) if family.experts and counted and counted.stacked else None
        entering = _layer_input(counted, fields, numbers)
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        raise UserError(
            f"model {model!r}: its config.json has a sliding_window, layer_types, soft cap, partial_rotary_factor or "
            f"size of its layers that is missing or of the wrong kind ({type(error).__name__}: {error}); fetch it again"
        ) from error
    linears = block_linears(block, fields, heads=heads, kv_heads=kv_heads, dim=dim)
    others = other_parameters(block, fields, linears, heads=heads, kv_heads=kv_heads, dim=dim)
    dtype = fields.get("dtype", fields.get("torch_dtype"))
    return ModelDimensions(
        model_type=model_type,
        hidden_size=numbers["hidden_size"],
        num_layers=numbers["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        intermediate_size=numbers["intermediate_size"],
        vocab_size=numbers["vocab_size"],
        tied=tied,
        attention_bias=linears[0].bias,
        gated=block.gated,
        max_positions=positions,
        torch_dtype=None if dtype is None else str(dtype).removeprefix("torch."),
        linears=(_of_any_layer(counted) if sizes else counted.block) if counted else tuple(linears),
        other_parameters=counted.other if counted else others,
        **traits,
        note=_doubts(model_type, fields, counted, why_not, routed),
        counted=counted,
        mixer=mixer,
        layer_sizes=sizes,
        experts=routed,
        layer_input=entering,
    )


def _layer_input(counted: Counted | None, fields: Mapping[str, Any], numbers: Mapping[str, int]) -> int:
    """Return the numbers of a token that enter each layer beside its stream, of tables that are looked up by token."""
    if counted is None or not counted.tables:
        return 0
    rows = int(fields.get("vocab_size_per_layer_input") or numbers["vocab_size"])
    return counted.tables // (rows * numbers["num_hidden_layers"])


def _of_any_layer(counted: Counted) -> tuple[Linear, ...]:
    """Return the linear layers that some layer has, each in its largest size."""
    largest: dict[str, Linear] = {}
    for linear, many in counted.adapted:
        known = largest.get(linear.name)
        if many > 1 and (known is None or known.inputs * known.outputs < linear.inputs * linear.outputs):
            largest[linear.name] = linear
    return tuple(largest.values())


def _count(config: Mapping[str, Any], known: Counted | None = None) -> tuple[Counted | None, dict[str, Any], str]:
    """Return the count of a config's class and the sizes that go with it, or why there is none."""
    if known:
        return known, counted_fields(known, common_fields(config)), ""
    try:
        counted, named = count(config)
    except CannotCount as error:
        return None, {}, str(error)
    return counted, counted_fields(counted, named), ""


def _billions(count: int) -> str:
    return f"{count / 1e9:.2f} billion" if count >= 1e8 else f"{count / 1e6:.3g} million"


def _lacking(model: str, model_type: str, missing: list[str], counted: Counted | None, why_not: str) -> str:
    if counted:
        return (
            f"model {model!r} ({model_type}): neither its config.json nor its class tells {' and '.join(missing)}, so "
            "its memory cannot be planned; take another model"
        )
    why = f" ({model_type!r} is not known here, and its parameters could not be counted: {why_not})" if why_not else ""
    return f"model {model!r}: its config.json lacks {', '.join(missing)}{why}"


def _doubts(
    model_type: str, fields: Mapping[str, Any], counted: Counted | None, why_not: str, experts: Experts | None
) -> str:
    """Return what is not certain about the sizes of a model; an empty string for a family that is known."""
    if family_of(model_type).block and counted is None and family_of(model_type).counted:
        return f"the parameters of this {model_type} model could not be counted ({why_not}): its layers are estimated"
    if family_of(model_type).block:
        estimated = counted is not None and counted.stacked and experts is None
        return f"what the experts of {model_type} take beside their weights is estimated" if estimated else ""
    kinds = sorted(set(fields.get("layer_types") or ()) - {"full_attention", "sliding_attention"})
    others = f"; its layers of the kind {' and '.join(map(str, kinds))} are taken for attention" if kinds else ""
    if counted is None:
        return (
            f"the model type {model_type!r} is not known here: its blocks are taken for Llama's{others}, and its "
            f"parameters could not be counted ({why_not})"
        )
    return (
        f"the model type {model_type!r} is not known here: its {_billions(counted.total)} parameters are counted from "
        f"its class, but what its layers take beside them is estimated as Llama's{others}"
    )
