"""Gemma: norms that add one to their weights, a scaled embedding, since Gemma 2 windows and norms on both sides."""

from dataclasses import replace

from lowmem_rlhf.architecture.families.layers import gemma4
from lowmem_rlhf.architecture.families.llama import ATTENTION_BIASED
from lowmem_rlhf.architecture.families.row import GELU, Family, GGUFArchitecture, WideStream

_GEMMA = replace(ATTENTION_BIASED, tied=True, head_dim=256, activation="gelu_pytorch_tanh", embedding_scale=True)
_GEMMA2 = replace(_GEMMA, norms=4, norm_place="both", softcaps=(50.0, 30.0), window=4096, full_every=2)
_GEMMA3 = replace(_GEMMA2, qk_norm="head", softcaps=(None, None), full_every=6)

_GGUF = GGUFArchitecture("gemma", metadata="rotary", activations=GELU, shifts_norms=True)
_GGUF2 = replace(
    _GGUF,
    name="gemma2",
    softcaps=("attn_logit_softcapping", "final_logit_softcapping"),
    window_every=2,
    wide_scale_layers=46,
)
_GGUF3 = replace(
    _GGUF,
    name="gemma3",
    softcaps=("final_logit_softcapping",),
    window_rope=True,
    window_every=6,
    wide_scale_layers=62,
)

_TEXT3 = Family(_GEMMA3, overflows_float16=True, wide_stream=WideStream(), rotary_tables=2, tested=True, gguf=_GGUF3)
_WIDE4 = WideStream(results=("o_proj", "down_proj", "per_layer_projection"))
_GEMMA4 = replace(_GEMMA3, value_norm=True, wide_norms=False)
_TEXT4 = Family(
    _GEMMA4,
    counted=True,
    layers=gemma4,
    overflows_float16=True,
    wide_stream=_WIDE4,
    rotary_tables=2,
    gguf=GGUFArchitecture("gemma4", metadata="unlike", activations=GELU),
)
ROWS = {
    "gemma": Family(_GEMMA, tested=True, gguf=_GGUF),
    "gemma2": Family(_GEMMA2, tested=True, gguf=_GGUF2),
    # as GGUF files are called; a config.json of this type has a vision tower as well, and is refused
    "gemma3": replace(_TEXT3, tested=False, gguf=replace(_GGUF3, metadata=None)),
    "gemma3_text": _TEXT3,
    **dict.fromkeys(("gemma3n", "gemma3n_text"), Family(overflows_float16=True, rotary_tables=2)),
    **dict.fromkeys(("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"), _TEXT4),
}
