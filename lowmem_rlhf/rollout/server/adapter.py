"""The adapter of the base's role in a plain form, which every server reads alike: one A and one B a layer, scale 1.

Scales, rsLoRA's too, are in B, and where two adapters are active they are one of the sum of their ranks; so no server
has to know of patterns of ranks and alphas.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from lowmem_rlhf.architecture.adapters import CONFIG, WEIGHTS
from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.lora import SharedLoraLinear


@dataclass(frozen=True)
class PlainAdapter:
    """What is added to the base in its present role.

    Attributes:
        layers: by peft's names of the layers, A (r, in) and B (out, r), fp32 on the CPU.
    """

    layers: dict[str, tuple[torch.Tensor, torch.Tensor]]

    @property
    def rank(self) -> int:
        """The largest rank."""
        return max(a.shape[0] for a, _ in self.layers.values())


@torch.no_grad()
def plain_adapter(base: SharedBase) -> PlainAdapter | None:
    """Return the adapter of the role that the base is in; None where it is the base alone."""
    layers = {}
    for name, layer in base.peft.named_modules():
        if not isinstance(layer, SharedLoraLinear):
            continue
        active = [one for one in base.active.names if one in layer.lora_A]
        pairs = [(*layer.masters(one), layer.scaling[one]) for one in active]
        if pairs:
            a = torch.cat([a.detach().to("cpu", torch.float32) for a, _, _ in pairs], dim=0)
            b = torch.cat([b.detach().to("cpu", torch.float32) * scale for _, b, scale in pairs], dim=1)
            layers[name] = (a.contiguous(), b.contiguous())
    return PlainAdapter(layers) if layers else None


def save_plain(adapter: PlainAdapter, folder: Path, model: str) -> None:
    """Write an adapter as peft saves one (adapter_model.safetensors, adapter_config.json).

    Args:
        model: the base's name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"{name}.lora_A.weight": a for name, (a, _) in adapter.layers.items()}
    tensors |= {f"{name}.lora_B.weight": b for name, (_, b) in adapter.layers.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    start, rank = "base_model.model.", adapter.rank
    ranks = {name.removeprefix(start): a.shape[0] for name, (a, _) in adapter.layers.items()}
    others = {name: r for name, r in ranks.items() if r != rank}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,  # of their scale, too, 1 is made
        "target_modules": sorted({name.rpartition(".")[2] for name in ranks}) if not others else sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")
