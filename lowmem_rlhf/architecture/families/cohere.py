"""Cohere: one LayerNorm a block, attention and MLP side by side. No torch here."""

from dataclasses import replace

from lowmem_rlhf.architecture.families.llama import ATTENTION_BIASED
from lowmem_rlhf.architecture.families.row import Family, GGUFArchitecture

_COHERE = replace(ATTENTION_BIASED, norm="layer", norms=1, parallel=True, tied=True)

ROWS = {
    "cohere": Family(_COHERE, tested=True, gguf=GGUFArchitecture("command-r")),
    "cohere2": Family(replace(_COHERE, window=4096, full_every=4)),
}
