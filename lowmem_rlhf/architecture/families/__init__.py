"""The table of model families: what is known of a model type, one row each. No torch here.

What another room does differently for a family it reads from the family's row; no other room compares a model type with
a name. A type without a row is counted on its class, and what it computes is tried out.

Read from the model classes of transformers 5; a test holds every family against the parameter count, the linear layers
and the sliding windows of the real class.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lowmem_rlhf.architecture.families import cohere, gemma, gpt, hybrid, llama, mamba, olmo
from lowmem_rlhf.architecture.families.block import Block, activation_of, flag
from lowmem_rlhf.architecture.families.row import Family

FAMILIES: dict[str, Family] = {
    **llama.ROWS,
    **gemma.ROWS,
    **gpt.ROWS,
    **cohere.ROWS,
    **olmo.ROWS,
    **mamba.ROWS,
    **hybrid.ROWS,
}
_UNKNOWN = Family()


def family_of(model_type: str) -> Family:
    """Return the row of a model type; an empty one where there is none."""
    return FAMILIES.get(model_type, _UNKNOWN)


def family_of_gguf(name: str) -> tuple[str, Family]:
    """Return the model type that a GGUF's architecture is read as, and its row.

    Of several types that llama.cpp has as one (Llama and Mistral) it is the one of the same name.
    """
    known = [model_type for model_type, family in FAMILIES.items() if family.gguf and family.gguf.name == name]
    model_type = name if name in known or not known else known[0]
    return model_type, family_of(model_type)


def types_with_terms() -> list[str]:
    """Return the model types whose memory terms are known."""
    return [model_type for model_type, family in FAMILIES.items() if family.block]


def block_of(model_type: str, config: Mapping[str, Any]) -> Block:
    """Return what a model's blocks consist of; of an unknown type Llama's layout, gated when it uses SiLU."""
    if block := family_of(model_type).block:
        return replace(block, parallel=flag(block.parallel, config))
    gated = (activation_of(config) or "silu") in ("silu", "swish")
    names = llama.LLAMA.names if gated else ("o_proj", "up_proj", "down_proj")
    return replace(llama.LLAMA, gated=gated, names=names)
