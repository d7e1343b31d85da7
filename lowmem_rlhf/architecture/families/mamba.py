"""Mamba, and the families that have its layers beside attention. No torch here.

It multiplies with some weights directly, so that an adapter beside them would be without effect.
"""

from lowmem_rlhf.architecture.families.row import Family

ROWS = dict.fromkeys(
    ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"), Family(bypassed=("out_proj", "dt_proj"))
)
