"""Layers that pass a state from token to token, on packed rows: short convolutions, delta rules and Mamba 2.

In a stock mixer of transformers two functions let tokens meet: a causal convolution and a recurrence (a short
convolution has the first alone). All else in it works token by token, so it runs on the packed row as it stands, and
only these two are replaced by ones that know where prompts and completions lie: they hand the tokens, row by row, to
the stock functions together with the state that a row begins with. A completion begins with its prompt's final state
and last inputs, so a prompt runs once for all of its completions; gradients flow through both.

In plain torch a recurrence makes some twenty copies of its input in fp32. So it runs on `MIXED_TOKENS` at a time, along
the rows and along a long row, and its backward pass makes them again; convolutions and gated norms do so too.

Shapes: D channels of a convolution, K its kernel, n sequences of L tokens, R rows that are being written.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from types import FunctionType
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lowmem_rlhf.planning.limits import MIXED_TOKENS, scan_chunk

CONVOLUTION, CONVOLUTION_STEP = "causal_conv1d_fn", "causal_conv1d_update"
DELTA_RULES = {  # by chunks of many tokens, and token by token
    "torch_chunk_gated_delta_rule": "torch_recurrent_gated_delta_rule",
    "chunk_kimi_delta_attention": "recurrent_kimi_delta_attention",
}
SCAN, SCAN_STEP = "mamba2_chunk_scan", "mamba2_selective_state_update"
# token by token; the fused kernel is for modules in training mode, in which no mixer here is (`training_modes`)
TOKEN_BY_TOKEN = {"apply_mask_to_padding_states", "mamba2_split_conv1d_scan_combined"}

StateKey = tuple[int, str]  # the number of a mixer, and which of its states
# (n, L, ..) tensors and the state that the rows begin with (None: at nothing; of fewer: each for as many rows in
# succession) -> (n, L, ..) and their final state
Mix = Callable[[Sequence[torch.Tensor], torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]]


class MixingContext(Protocol):
    """What decides which tokens of a packed row follow each other, and what state they begin with."""

    def mix(self, key: StateKey, tensors: Sequence[torch.Tensor], mix: Mix) -> torch.Tensor:
        """Return what ``mix`` makes of (1, T, ..) tensors, as (1, T, ..); ``key`` names the layer's state."""
        ...


class PackedMixer:
    """A stock mixer's forward on packed rows; without a context it is the stock forward.

    Args:
        module: a mixer that `is_mixer` says yes to.
        number: tells its states from those of others.
    """

    def __init__(self, module: nn.Module, number: int) -> None:
        self._module, self._number, self._context = module, number, None
        self._stock_forward = module.forward
        stock = _stock(module)
        self._globals = stock.__globals__
        replaced: dict[str, Any] = {CONVOLUTION: self._convolution}
        for name in DELTA_RULES:
            replaced[name] = self._delta_rule(name)
        replaced[SCAN] = self._scan
        self._forward = FunctionType(
            stock.__code__, {**stock.__globals__, **replaced}, stock.__name__, stock.__defaults__, stock.__closure__
        )
        self._forward.__kwdefaults__ = stock.__kwdefaults__

    def __call__(self, *args: Any, lowmem_context: Any = None, **kwargs: Any) -> Any:
        """Run the mixer on a packed row (1, T, H)."""
        if lowmem_context is None:
            return self._stock_forward(*args, **kwargs)
        self._context = lowmem_context
        try:
            return self._forward(self._module, *args, **kwargs)
        finally:
            self._context = None

    def _mix(self, part: str, tensors: Sequence[torch.Tensor], mix: Mix) -> torch.Tensor:
        context: Any = self._context
        return context.mix((self._number, part), tensors, mix)  # type: ignore[no-any-return]

    def _mix_again(self, part: str, tensors: Sequence[torch.Tensor], mix: Mix) -> torch.Tensor:
        """As `_mix`; the backward pass runs it again, and nothing else is kept than the tensors."""
        context, key = self._context, (self._number, part)
        return recomputed(lambda *given: context.mix(key, given, mix), *tensors)  # type: ignore[attr-defined, no-any-return]

    def _convolution(
        self,
        hidden_states: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        activation: str | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """As ``causal_conv1d_fn``: hidden_states and result (1, D, T)."""
        stock, step = self._globals[CONVOLUTION], self._globals[CONVOLUTION_STEP]
        before = weight.shape[-1] - 1

        def mix(
            tensors: Sequence[torch.Tensor], state: torch.Tensor | None
        ) -> tuple[torch.Tensor, torch.Tensor]:  # the state is the last inputs, (n, D, K - 1)
            x = tensors[0].transpose(1, 2)
            if state is None:
                out = stock(x, weight, bias, activation=activation)
                return out.transpose(1, 2), F.pad(x, (max(0, before - x.shape[-1]), 0))[..., -before:]
            if x.shape[-1] == 1 and len(x) == len(state) and not torch.is_grad_enabled():
                return step(x, state, weight, bias, activation).transpose(1, 2), state  # which it changed
            state = state.repeat_interleave(len(x) // len(state), dim=0)
            whole = torch.cat([state.to(x.dtype), x], dim=-1)
            out = stock(whole, weight, bias, activation=activation)[..., before:]
            return out.transpose(1, 2), whole[..., -before:]

        return self._mix_again("inputs", [hidden_states.transpose(1, 2)], mix).transpose(1, 2)

    def _delta_rule(self, name: str) -> Callable[..., tuple[torch.Tensor, None]]:
        def rule(
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            g: torch.Tensor,
            beta: torch.Tensor,
            initial_state: None = None,
            output_final_state: bool = False,
            use_qk_l2norm_in_kernel: bool = False,
            **kwargs: Any,
        ) -> tuple[torch.Tensor, None]:
            """As the rule of that name (arXiv 2412.06464): all (1, T, heads, ..)."""

            def mix(tensors: Sequence[torch.Tensor], state: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
                one = tensors[0].shape[1] == 1 and not torch.is_grad_enabled()
                q, k, v, decay, rate = tensors
                return self._globals[DELTA_RULES[name] if one else name](  # type: ignore[no-any-return]
                    q,
                    k,
                    v,
                    g=decay,
                    beta=rate,
                    initial_state=state,
                    output_final_state=True,
                    use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
                )

            return self._mix("state", [query, key, value, g, beta], bounded(mix)), None

        return rule

    def _scan(
        self,
        hidden_states: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        chunk_size: int,
        D: torch.Tensor | None = None,
        dt_bias: torch.Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        **kwargs: Any,
    ) -> torch.Tensor:
        """As ``mamba2_chunk_scan`` (arXiv 2405.21060): hidden_states and result (1, T, heads, head size)."""
        stock, step = self._globals[SCAN], self._globals[SCAN_STEP]

        def mix(tensors: Sequence[torch.Tensor], state: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
            x, times, b, c = tensors
            if state is None or x.shape[1] > 1 or torch.is_grad_enabled():
                return stock(  # type: ignore[no-any-return]
                    x,
                    times,
                    A,
                    b,
                    c,
                    chunk_size=min(chunk_size, scan_chunk(x.shape[1])),
                    D=D,
                    dt_bias=dt_bias,
                    dt_softplus=dt_softplus,
                    dt_limit=dt_limit,
                    initial_states=state,
                    return_final_states=True,
                )
            # one token, in fp32 and with the limits, as the chunks are computed
            times = times if dt_bias is None else times + dt_bias.to(times.dtype)
            times = (F.softplus(times) if dt_softplus else times).clamp(*dt_limit)
            sizes = x.shape[2:]  # heads, head size
            wide = times[:, 0, :, None].float().expand(-1, *sizes)
            rates = A.float()[:, None, None].expand(*sizes, b.shape[-1])
            skip = None if D is None else D.float()[:, None].expand(*sizes)
            out = step(state, x[:, 0].float(), wide, rates, b[:, 0].float(), c[:, 0].float(), skip)
            return out[:, None], state  # which it changed

        return self._mix("state", [hidden_states, dt, B, C], bounded(mix))


def recomputed(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function of tensors that keeps no more than these for its backward pass, which calls it again."""
    if not torch.is_grad_enabled():
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def bounded(mix: Mix) -> Mix:
    """Return the same on at most `MIXED_TOKENS` at a time, of rows side by side or of one row, recomputed."""

    def parts(tensors: Sequence[torch.Tensor], state: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        rows, length = tensors[0].shape[:2]
        at_once = max(1, MIXED_TOKENS // length)
        outs: list[torch.Tensor] = []
        finals: list[torch.Tensor] = []
        for first in range(0, rows, at_once):
            some = slice(first, min(first + at_once, rows))
            own = state is not None and len(state) == rows
            last, along = state[some] if own and state is not None else state, list[torch.Tensor]()
            for begin in range(0, length, MIXED_TOKENS):
                piece = [x[some, begin : begin + MIXED_TOKENS] for x in tensors]
                each = 0 if begin or own or state is None else rows // len(state)
                out, last = recomputed(_beginning(mix, each, some), last, *piece)
                along.append(out)
            outs.append(along[0] if len(along) == 1 else torch.cat(along, dim=1))
            finals.append(last)  # type: ignore[arg-type]
        if len(outs) == 1:
            return outs[0], finals[0]
        return torch.cat(outs), torch.cat(finals)

    return parts


def _beginning(mix: Mix, each: int, some: slice) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Return ``mix`` of a part of the rows, to be called with its state and its tensors.

    Args:
        each: rows that begin with each of the states, of which then only those of the part are repeated; 0: the states
            are the part's own, one a row.
        some: the part.
    """

    def run(state: torch.Tensor | None, *tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if state is not None and each:
            state = state.index_select(0, torch.arange(some.start, some.stop, device=state.device) // each)
        return mix(tensors, state)

    return run


def _stock(module: nn.Module) -> FunctionType:
    return inspect.unwrap(type(module).forward)  # type: ignore[return-value]


def is_mixer(module: nn.Module) -> bool:
    """Whether a module lets tokens meet by a causal convolution and, if at all, by a recurrence that is known here."""
    stock = _stock(module)
    names = getattr(getattr(stock, "__code__", None), "co_names", ())
    if CONVOLUTION not in names:
        return False
    own = {name for name in names if inspect.isfunction(stock.__globals__.get(name))}
    steps = {CONVOLUTION_STEP, SCAN_STEP, *DELTA_RULES.values()}
    return own <= {CONVOLUTION, SCAN, *steps, *DELTA_RULES, *TOKEN_BY_TOKEN}


def pack_mixers(model: nn.Module) -> int:
    """Let a model's mixers take packed rows; return how many it has."""
    mixers = [module for module in model.modules() if is_mixer(module)]
    for number, module in enumerate(mixers):
        if not isinstance(module.forward, PackedMixer):
            module.forward = PackedMixer(module, number)  # type: ignore[method-assign]
            for norm in module.children():
                if "Gated" in type(norm).__name__ and not list(norm.children()):
                    norm.forward = partial(recomputed, norm.forward)  # type: ignore[method-assign]
    return len(mixers)
