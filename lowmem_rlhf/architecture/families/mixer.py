"""Layers that pass a state from token to token in place of attention: the sizes that their memory is planned with.

No torch here. How they are computed: `engine.mixers`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Mixer:
    """The layers of a model that have a convolution, and mostly a recurrence, in place of attention.

    Attributes:
        kind: a convolution alone (LFM2), a gated delta rule (Qwen3.5), or Mamba 2's scan (Granite 4).
        places: of each layer of the model, whether it has it.
        projected: numbers of a token that come from the products with its input.
        channels, kernel: of the convolution.
        heads: of the recurrence.
        keys, values: numbers of a token's keys (Mamba 2: B), and of its values, over all heads.
        inner: numbers that the output product takes.
        state: fp32 numbers that a row's recurrence keeps between tokens.
    """

    kind: Literal["convolution", "delta", "scan"]
    places: tuple[bool, ...]
    projected: int
    channels: int
    kernel: int
    heads: int
    keys: int
    values: int
    inner: int
    state: int

    @property
    def layers(self) -> int:
        """How many of the model's layers have it."""
        return sum(self.places)


def _places(config: Mapping[str, Any], kinds: tuple[str, ...], every: int) -> tuple[bool, ...]:
    """Return which layers are of a kind; where none is named, all but every so many-th (0: all) are."""
    count = int(config["num_hidden_layers"])
    if named := config.get("layer_types") or config.get("layers_block_type"):
        return tuple(kind in kinds for kind in list(named)[:count])
    return tuple(not every or (place + 1) % every != 0 for place in range(count))


def short_convolution(config: Mapping[str, Any]) -> Mixer | None:
    """LFM2: two gates around a convolution."""
    hidden = int(config["hidden_size"])
    places = _places(config, ("conv",), 0)
    if (full := config.get("full_attn_idxs")) is not None and not config.get("layer_types"):
        places = tuple(place not in full for place in range(int(config["num_hidden_layers"])))
    kernel = int(config.get("conv_L_cache", 3))
    return _some(Mixer("convolution", places, 3 * hidden, hidden, kernel, 0, 0, 0, hidden, 0))


def gated_delta(config: Mapping[str, Any]) -> Mixer | None:
    """Qwen3.5, Qwen3-Next: a convolution of queries, keys and values, and a gated delta rule (arXiv 2412.06464)."""
    heads, key_heads = int(config.get("linear_num_value_heads", 32)), int(config.get("linear_num_key_heads", 16))
    key, value = int(config.get("linear_key_head_dim", 128)), int(config.get("linear_value_head_dim", 128))
    values, channels = heads * value, 2 * key_heads * key + heads * value
    places = _places(config, ("linear_attention",), int(config.get("full_attention_interval", 4)))
    kernel = int(config.get("linear_conv_kernel_dim", 4))
    projected = channels + values + 2 * heads
    state = heads * key * value
    return _some(Mixer("delta", places, projected, channels, kernel, heads, heads * key, values, values, state))


def mamba2(config: Mapping[str, Any]) -> Mixer | None:
    """Granite 4: Mamba 2 (arXiv 2405.21060)."""
    heads, groups = int(config.get("mamba_n_heads", 128)), int(config.get("mamba_n_groups", 1))
    size, inner = int(config.get("mamba_d_state", 256)), int(config.get("mamba_expand", 2)) * int(config["hidden_size"])
    channels = inner + 2 * groups * size
    places = _places(config, ("mamba", "linear_attention"), 0)
    kernel, projected = int(config.get("mamba_d_conv", 4)), inner + channels + heads
    return _some(Mixer("scan", places, projected, channels, kernel, heads, heads * size, inner, inner, inner * size))


def _some(mixer: Mixer) -> Mixer | None:
    return mixer if mixer.layers else None
