"""GPT-2, and the families that kept its LayerNorm, its biases and its MLP without a gate. No torch here."""

from dataclasses import replace

from lowmem_rlhf.architecture.families.block import Block
from lowmem_rlhf.architecture.families.row import Family, GGUFArchitecture

_LAYER_NORM = Block(norm="layer", norm_bias=True, gated=False, qkv_bias=True, out_bias=True, mlp_bias=True)
_GPT2 = replace(
    _LAYER_NORM,
    grouped=False,
    fused=True,
    fused_name="c_attn",
    names=("c_proj", "c_fc", "c_proj"),
    path="transformer.h",
    attention="attn",
    tied=True,
    rotary=0.0,
    activation="gelu_new",
)
_GPT_NEOX = replace(
    _LAYER_NORM,
    grouped=False,
    fused=True,
    parallel=("use_parallel_residual", True),
    fused_name="query_key_value",
    names=("dense", "dense_h_to_4h", "dense_4h_to_h"),
    path="gpt_neox.layers",
    attention="attention",
    qkv_bias=("attention_bias", True),
    out_bias=("attention_bias", True),
    rotary=0.25,
    activation="gelu",
)
_OPT = replace(
    _LAYER_NORM,
    grouped=False,
    names=("out_proj", "fc1", "fc2"),
    path="model.decoder.layers",
    mlp="",
    qkv_bias=("enable_bias", True),
    out_bias=("enable_bias", True),
    mlp_bias=("enable_bias", True),
    tied=True,
    rotary=0.0,
    extra_positions=2,
    activation="relu",
)
_PHI = replace(
    _LAYER_NORM,
    norms=1,
    parallel=True,
    names=("dense", "fc1", "fc2"),
    head_bias=True,
    rotary=0.5,
    activation="gelu_new",
)
_STARCODER2 = replace(
    _LAYER_NORM,
    names=("o_proj", "c_fc", "c_proj"),
    qkv_bias=("use_bias", True),
    out_bias=("use_bias", True),
    mlp_bias=("use_bias", True),
    tied=True,
    activation="gelu_pytorch_tanh",
)

ROWS = {
    "gpt2": Family(
        _GPT2,
        tested=True,
        gguf=GGUFArchitecture(
            "gpt2",
            layer_names={"attn_qkv": "c_attn", "attn_output": "c_proj", "ffn_up": "c_fc", "ffn_down": "c_proj"},
            metadata="learned",
            activations=("gelu_new",),
            transposed=True,
        ),
    ),
    "gpt_neox": Family(_GPT_NEOX, tested=True, gguf=GGUFArchitecture("gptneox")),
    "opt": Family(_OPT),
    "phi": Family(_PHI, tested=True, gguf=GGUFArchitecture("phi2")),
    "starcoder2": Family(
        _STARCODER2,
        tested=True,
        gguf=GGUFArchitecture("starcoder2", layer_names={"ffn_up": "c_fc", "ffn_down": "c_proj"}),
    ),
}
