"""Families some of whose layers pass a state on, beside layers with attention. No torch here.

Their layers have unlike linear layers, so these are counted on the model's class.
"""

from dataclasses import replace

from lowmem_rlhf.architecture.families.block import Block
from lowmem_rlhf.architecture.families.layers import experts
from lowmem_rlhf.architecture.families.llama import GRANITE_SCALES, LLAMA
from lowmem_rlhf.architecture.families.mixer import gated_delta, mamba2, short_convolution
from lowmem_rlhf.architecture.families.row import Family, GGUFArchitecture

_QWEN = Block(qk_norm="head", head_dim=256, rotary=0.25, gated_attention=True, wide_norms=True)
_GRANITE = replace(LLAMA, keeps_gate=True, tied=True, embedding_scale=True)
_QWEN35 = Family(
    _QWEN,
    counted=True,
    mixer=gated_delta,
    avoids_four_bits=True,
    gguf=GGUFArchitecture("qwen35", metadata="delta"),
)
_QWEN35_MOE = replace(_QWEN35, gguf=None, experts=experts(shared="shared_expert_intermediate_size"))

ROWS = {
    "lfm2": Family(
        Block(qk_norm="head", tied=True, keeps_gate=True),
        counted=True,
        mixer=short_convolution,
        gguf=GGUFArchitecture(
            "lfm2",
            layer_names={"attn_output": "out_proj", "ffn_gate": "w1", "ffn_up": "w3", "ffn_down": "w2"},
            metadata="convolutions",
        ),
    ),
    "qwen3_5": _QWEN35,
    "qwen3_5_text": _QWEN35,
    "qwen3_5_moe": _QWEN35_MOE,
    "qwen3_5_moe_text": _QWEN35_MOE,
    "granitemoehybrid": Family(
        _GRANITE,
        counted=True,
        mixer=mamba2,
        experts=experts("intermediate_size", "shared_intermediate_size"),
        gguf=GGUFArchitecture(
            "granitehybrid", metadata="scan", pairs_rows=True, output_bias=True, scales=GRANITE_SCALES
        ),
    ),
}
