"""What a row of the table of families holds. No torch here."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lowmem_rlhf.architecture.families.block import Block
from lowmem_rlhf.architecture.families.layers import Experts, LayerSizes
from lowmem_rlhf.architecture.families.mixer import Mixer

SILU, GELU = ("silu", "swish"), ("gelu_pytorch_tanh", "gelu_new")


@dataclass(frozen=True)
class GGUFArchitecture:
    """How llama.cpp has a family, and where it computes otherwise.

    Sources: llama.cpp's src/models/*.cpp (what is read and computed) and gguf.constants (the names).

    Attributes:
        name: llama.cpp's.
        layer_names: a block's linear layers that are not called as Llama's, llama.cpp's name -> transformers'.
        metadata: which function of `export.gguf.metadata` describes a model, by its kind of positions or of layers;
            None: no GGUF is written here, only read.
        activations: the ones that llama.cpp computes.
        softcaps: the soft caps that it computes, as config fields.
        output_bias: it adds a bias to attention's output.
        rope_types: how it stretches rotary positions, beside the linear and the YaRN way of all families.
        window_rope: layers with a window have a rotary base of their own.
        window_every: one layer in so many attends to all tokens where the others have a window; 0: it knows no window.
        states_no_window: a file says so where no layer has a window, which llama.cpp takes for granted otherwise.
        wide_scale_layers: attention is scaled by a number that no file states: the head's width, but hidden size over
            heads in the model with so many layers (27B); 0: it is scaled as everywhere.
        scales: config fields of factors that it multiplies by, and its keys for them.
        attention_factors: YaRN's own factors, and a temperature that grows with the position (Ministral 3).
        position_free: one layer in so many has no positions; 0: each has.
        pairs_rows: rows of the query and key weights are ordered so that the two halves of a rotation lie together.
        shifts_norms: norms are stored as weight + 1.
        transposed: linear layers are stored as (inputs, outputs), as GPT-2 has them.
    """

    name: str
    layer_names: Mapping[str, str] = field(default_factory=dict)
    metadata: Literal["rotary", "learned", "convolutions", "scan", "delta", "unlike"] | None = None
    activations: tuple[str, ...] = SILU
    softcaps: tuple[str, ...] = ()
    output_bias: bool = False
    rope_types: tuple[str, ...] = ()
    window_rope: bool = False
    window_every: int = 0
    states_no_window: bool = False
    wide_scale_layers: int = 0
    scales: Mapping[str, str] = field(default_factory=dict)
    attention_factors: bool = False
    position_free: int = 0
    pairs_rows: bool = False
    shifts_norms: bool = False
    transposed: bool = False


@dataclass(frozen=True)
class WideStream:
    """Where a family whose residual stream exceeds float16 is computed in fp32 (see `engine.wide`).

    Attributes:
        results: linear layers whose output is added to the stream.
        inputs: norms of the stream before linear layers.
    """

    results: tuple[str, ...] = ("o_proj", "down_proj")
    inputs: tuple[str, ...] = ("input_layernorm", "pre_feedforward_layernorm")


@dataclass(frozen=True)
class Family:
    """What is known of a model type of transformers; each part may be left out.

    How a model is packed is no part of it: that is tried out on the model itself (`engine.padded`). Nor is its chat
    format, which is told by its template (`export.ollama`).

    Attributes:
        block: the terms of its memory; None: its parameters are counted on its class, the rest is estimated as Llama's.
        counted: its parameters are counted on its class although its terms are known: its layers are of unlike sizes.
        mixer: the layers that pass a state on, from a config's fields.
        layers: the sizes of each layer where they differ, from a config's fields.
        experts: what it has of them, from a config's fields; None where their terms are not known.
        overflows_float16: activations exceed 65504, so float16 gives inf.
        wide_stream: how it is computed in float16 all the same; None: not at all where it overflows.
        avoids_four_bits: those who publish or support it advise against 4-bit weights under adapters.
        rotary_tables: tables of cosines and sines that its layers share; two where layers with a window turn otherwise.
        bypassed: linear layers whose weights the model also multiplies with directly, past an adapter beside them;
            ``all-linear`` leaves them out.
        tested: the tests hold it against stock transformers, packed and decoded, in every dtype (`tests/tiny_models`).
        gguf: how llama.cpp has it; None: under the same name if at all, read as Llama's, and not written here.
    """

    block: Block | None = None
    counted: bool = False
    mixer: Callable[[Mapping[str, Any]], Mixer | None] | None = None
    layers: Callable[[Mapping[str, Any]], tuple[LayerSizes, ...]] | None = None
    experts: Callable[[Mapping[str, Any]], Experts | None] | None = None
    overflows_float16: bool = False
    wide_stream: WideStream | None = None
    avoids_four_bits: bool = False
    rotary_tables: int = 1
    bypassed: tuple[str, ...] = ()
    tested: bool = False
    gguf: GGUFArchitecture | None = None
