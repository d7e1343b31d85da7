"""Layers that differ within one model, and experts: the sizes that their memory is planned with. No torch here."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LayerSizes:
    """What may differ from layer to layer of a model with attention.

    Attributes:
        head_dim, num_kv_heads, intermediate_size: as `ModelDimensions` has them of a whole model.
        reuses_keys: it attends to the keys and values that an earlier layer has made, and has no products for them.
    """

    head_dim: int
    num_kv_heads: int
    intermediate_size: int
    reuses_keys: bool = False


def gemma4(config: Mapping[str, Any]) -> tuple[LayerSizes, ...]:
    """Gemma 4: larger heads where there is no window, keys that the last layers reuse, mostly with wider MLPs."""
    count = int(config["num_hidden_layers"])
    kinds = list(config.get("layer_types") or [])[:count] or [
        "sliding_attention" if (place + 1) % 6 else "full_attention" for place in range(count)
    ]
    if len(kinds) != count:
        raise ValueError(f"layer_types of {len(kinds)} layers and num_hidden_layers {count}")
    kinds[-1] = "full_attention"
    heads, fewer = int(config.get("num_key_value_heads") or 4), config.get("num_global_key_value_heads")
    everywhere = {"head_dim": config.get("global_head_dim") or 512}
    if fewer and config.get("attention_k_eq_v"):
        everywhere["num_key_value_heads"] = fewer
    said = config.get("per_layer_config")  # as transformers writes it; the published files say it as above
    inner = int(config.get("intermediate_size") or 9216)
    first = count - int(config.get("num_kv_shared_layers") or 0)  # that reuses keys
    if not 0 < first <= count:
        raise ValueError(f"num_kv_shared_layers {count - first} of {count}")
    sizes = []
    for place, kind in enumerate(kinds):
        own = everywhere if kind == "full_attention" else {}
        if said is not None:
            own = said.get(str(place)) or said.get(place) or {}
        double = place >= first and config.get("use_double_wide_mlp")
        sizes.append(
            LayerSizes(
                head_dim=int(own.get("head_dim") or config.get("head_dim") or 256),
                num_kv_heads=int(own.get("num_key_value_heads") or heads),
                intermediate_size=inner * (2 if double else 1),
                reuses_keys=place >= first,
            )
        )
    return tuple(sizes)


@dataclass(frozen=True)
class Experts:
    """The experts in each layer of a model.

    Attributes:
        count: in one layer.
        per_token: that a token is routed to.
        inner: of one expert's MLP.
        shared: inner size of the MLP beside them that takes all tokens; 0 where there is none.
    """

    count: int
    per_token: int
    inner: int
    shared: int


def experts(inner: str = "moe_intermediate_size", shared: str = "") -> Callable[[Mapping[str, Any]], Experts | None]:
    """Return what reads a config's experts by the names of its fields.

    It returns None where some layers have none, and where a field is left to the class's default.
    """

    def read(config: Mapping[str, Any]) -> Experts | None:
        count = config.get("num_experts") or config.get("num_local_experts")
        said = all(config.get(key) for key in (inner, "num_experts_per_tok"))
        if not count or not said or config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
            return None
        beside = int(config.get(shared) or 0) if shared else 0
        return Experts(int(count), int(config["num_experts_per_tok"]), int(config[inner]), beside)

    return read
