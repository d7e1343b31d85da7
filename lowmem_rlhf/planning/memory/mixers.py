"""Bytes of a layer that passes a state on (`engine.mixers`) in place of attention. Letters as in `layers`.

A recurrence in plain torch works in fp32 on `MIXED_TOKENS` at a time; what that takes was measured for thirty shapes of
each kind (heads, sizes of keys, values and states, lengths of rows) and fitted within 11 %, mostly within 5 %.
"""

import math
from dataclasses import dataclass

from lowmem_rlhf.architecture.families.mixer import Mixer
from lowmem_rlhf.planning.limits import MIXED_TOKENS, scan_chunk
from lowmem_rlhf.planning.memory.layers import Layer

CHUNK = 64  # tokens that a delta rule takes at once; rows are filled up to it
UPDATE = {"convolution": 0, "delta": 4, "scan": 6}  # copies of the rows' states that one token's step makes
# fp32 numbers at once, as multiples of: T keys, T values, T heads * CHUNK, states
FORWARD = {"delta": (4.2, 4.9, 4.1, 4.3), "scan": (3.0, 3.8, 3.7, 2.8)}
BACKWARD = {"delta": (13.8, 8.5, 4.1, 0.0), "scan": (7.5, 10.5, 2.9, 2.2)}


@dataclass(frozen=True)
class MixerLayer(Layer):
    """A decoder layer with a mixer in place of attention, in a packed pass.

    Attributes:
        mixer: its sizes.
    """

    mixer: Mixer
    mixes = True

    @property
    def rows(self) -> int:
        """Completions in the row."""
        return round(self.shape.attended / self.shape.own_keys) if self.shape.own_keys else 0

    def recurrence(self, backward: bool) -> int:
        """What the recurrence makes of a part of the row."""
        mixer, shape = self.mixer, self.shape
        if mixer.kind == "convolution":
            return 0
        own = shape.own_keys - shape.prompt_keys
        parts = []
        for length, rows in ((shape.prompt_keys, shape.prompt_tokens / max(1, shape.prompt_keys)), (own, self.rows)):
            if not length or not rows:
                continue
            at_once = max(1.0, min(rows, MIXED_TOKENS // length))
            chunk = scan_chunk(length) if mixer.kind == "scan" else CHUNK
            filled = math.ceil(min(length, MIXED_TOKENS) / chunk) * chunk
            tokens = at_once * filled
            states = at_once * mixer.state * (filled / chunk + 1 if mixer.kind == "scan" else 1)
            sizes = (tokens * mixer.keys, tokens * mixer.values, tokens * mixer.heads * chunk, states)
            of = BACKWARD if backward else FORWARD
            parts.append(sum(many * size for many, size in zip(of[mixer.kind], sizes, strict=True)))
        return round(4 * max(parts, default=0))

    def saved_attention(self) -> int:
        """Everything from the layer's input to what the output product takes.

        The input and its norm (2h), ``x A^T``, the products with the input, the convolution's result, the recurrence's
        (fp32 of Mamba 2), and what the gate makes of it; final states of the prompts.
        """
        mixer, shape = self.mixer, self.shape
        elements = 2 * self.dims.hidden_size + self.ranks / 2 + mixer.projected + mixer.channels + mixer.inner
        if mixer.kind == "convolution":
            elements += mixer.channels  # the first gate's result
        else:
            elements += mixer.inner * (4 / self.width if mixer.kind == "scan" else 1) + 12 * mixer.heads / self.width
        prompts = shape.prompt_tokens / max(1, shape.prompt_keys)
        return self.of(elements) + round(4 * mixer.state * prompts)

    def _attention_gradients(self) -> int:
        """The mixer's own backward pass: the MLP is gone; gradients of the recurrence, then of the convolution."""
        held = self.saved_attention() + self.of(self.dims.hidden_size)
        mixer = self.mixer
        # what the gate made of the result is gone by then
        gated = 0 if mixer.kind == "convolution" else self.of(mixer.inner)
        return held + max(self.recurrence(backward=True) - gated, self.of(3 * mixer.channels + mixer.projected))

    def _attention_forward(self) -> int:
        """Input and norm, the products with the input, the convolution's result and what the recurrence makes of it."""
        mixer = self.mixer
        elements = 2 * self.dims.hidden_size + mixer.projected + mixer.channels
        width = 4 / self.width if mixer.kind == "scan" else 1
        return self.of(elements + width * mixer.inner) + max(self.recurrence(backward=False), self.of(mixer.channels))

    def _head_norm_forward(self) -> int:
        """Queries have no part here; the gated norm takes three numbers in fp32."""
        if self.mixer.kind == "convolution":
            return 0
        elements = 2 * self.dims.hidden_size + self.mixer.projected
        return self.of(elements) + 12 * self.mixer.inner * self.shape.tokens

    def kept_keys(self, together: bool = False) -> int:
        """None: what decoding goes on from is a state."""
        return 0


def state_bytes(mixer: Mixer, width: int) -> int:
    """Bytes of what a row keeps between tokens, of all layers: the recurrence's state and the convolution's inputs."""
    return mixer.layers * (4 * mixer.state + width * mixer.channels * (mixer.kernel - 1))
