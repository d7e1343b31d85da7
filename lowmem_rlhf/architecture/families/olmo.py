"""OLMo: a LayerNorm without weights; since OLMo 2 norms behind attention and MLP. No torch here."""

from dataclasses import replace

from lowmem_rlhf.architecture.families.llama import ATTENTION_BIASED
from lowmem_rlhf.architecture.families.row import Family, GGUFArchitecture

_OLMO2 = replace(ATTENTION_BIASED, norm_place="after", qk_norm="all")

ROWS = {
    "olmo": Family(replace(ATTENTION_BIASED, norm="layer", norm_weights=False)),
    "olmo2": Family(_OLMO2, tested=True, gguf=GGUFArchitecture("olmo2", metadata="rotary")),
    "olmo3": Family(replace(_OLMO2, window=4096, full_every=4)),
}
