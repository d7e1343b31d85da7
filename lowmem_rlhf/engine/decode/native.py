"""C for a CPU with AVX-512 bf16: products of few rows, and `fast_decoder` in one call a token.

Decoding a few rows is hundreds of small operations a token, and dispatching them costs more than computing them. The C
source (native.c) is compiled once and kept in the cache; where there is no compiler, or the machine or the model are
of another kind, torch's operations stay. ``LOWMEM_RLHF_NATIVE=0`` switches it off.
"""

import ctypes
import hashlib
import subprocess
import tempfile
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_float, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from lowmem_rlhf.architecture.source import cache_folder
from lowmem_rlhf.engine.fused import SILU, gated_activation, norm_scale
from lowmem_rlhf.hardware.capabilities import capabilities
from lowmem_rlhf.hardware.cpu_device import cpu_device

SOURCE = Path(__file__).with_suffix(".c")
FLAGS = (
    *("-O3", "-march=native", "-mprefer-vector-width=512", "-fopenmp", "-fPIC", "-shared"),
    *("-fno-math-errno", "-fno-trapping-math"),
)
PARTS = 3  # of a Linear
TOGETHER = 4  # as in native.c
FEW_ROWS = 32  # of a 16-bit product; with more torch is as fast


class Linear(Structure):
    """As in native.c."""

    _fields_ = (
        ("codes", c_void_p * PARTS),
        ("scales", c_void_p * PARTS),
        *((name, c_void_p) for name in ("bias", "a")),
        ("b", c_void_p * PARTS),
        *((name, c_int64) for name in ("inputs", "outputs", "parts")),
        ("outs", c_int64 * PARTS),
        ("ranks", c_int64 * PARTS),
    )


class Layer(Structure):
    """As in native.c."""

    _fields_ = (
        *((name, Linear) for name in ("qkv", "o", "gate_up", "down")),
        *((name, c_void_p) for name in ("attention_norm", "mlp_norm")),
        *((name, c_void_p) for name in ("prompt_k", "prompt_v", "own_k", "own_v")),
    )


class Pass(Structure):
    """As in native.c."""

    _fields_ = (
        *((name, c_int64) for name in ("layers", "rows", "hidden", "heads", "kv_heads", "head_size", "inner")),
        *((name, c_int64) for name in ("slots", "longest", "room", "length", "threads", "scratch_size")),
        *((name, c_float) for name in ("scaling", "eps")),
        *((name, c_void_p) for name in ("prompt", "slot", "prompt_length", "cos", "sin")),
        *((name, c_void_p) for name in ("x", "normed", "wide", "narrow", "sorted", "xa", "scratch")),
    )


@dataclass(frozen=True)
class KVCacheView:
    """Keys and values while decoding, as `rollout.cache.SharedPromptCache` keeps them.

    Attributes:
        layers: of each layer the prompts' keys (B * nkv, d, P) and values (B * nkv, P, d) and the completions' own
            (B * nkv * G', d, room), (B * nkv * G', room, d), with room for the token that is to be run.
        rows: of each row its prompt, its slot and its prompt's length.
        slots: G'.
        length: tokens of each completion, the one that is to be run included.
    """

    layers: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]
    rows: Sequence[tuple[int, int, int]]
    slots: int
    length: int


@cache
def library() -> Any:
    """Return the compiled library; None where it is switched off, cannot be compiled or this CPU is not for it."""
    compiler = cpu_device().compiler
    if compiler is None:
        return None
    try:
        compiled = ctypes.CDLL(str(_compiled(compiler)))
    except (OSError, subprocess.CalledProcessError):
        return None
    compiled.lowmem_decode.argtypes = (POINTER(Pass), POINTER(Layer))
    compiled.lowmem_multiply.argtypes = (POINTER(Linear), c_int64, *[c_void_p] * 4, c_int64)
    compiled.lowmem_product.argtypes = (c_int64, c_int64, c_int64, c_void_p, c_void_p, c_void_p, c_int64)
    compiled.lowmem_decode.restype = compiled.lowmem_multiply.restype = compiled.lowmem_product.restype = None
    return compiled


def few_rows(x: torch.Tensor, layer: Any) -> torch.Tensor | None:
    """Return a plain 16-bit linear layer's output (K, out) for a few rows x (K, in); None where torch is to do it.

    It reads the weights as they lie, once, as fast as memory gives them; torch sorts them anew for each product.
    """
    suits = (
        capabilities(x.device).on_cpu
        and x.dtype == torch.bfloat16
        and x.dim() == 2
        and 0 < x.shape[0] <= FEW_ROWS
        and x.shape[1] % 32 == 0
        and type(layer) is torch.nn.Linear
        and layer.bias is None
        and layer.weight.dtype == x.dtype
        and layer.weight.is_contiguous()
        and not torch.is_grad_enabled()
    )
    if not suits or (native := library()) is None:
        return None
    x, weight = x.contiguous(), layer.weight
    y = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
    sizes, pointers = (x.shape[0], *weight.shape), (x.data_ptr(), weight.data_ptr(), y.data_ptr())
    native.lowmem_product(*sizes, *pointers, torch.get_num_threads())
    return y


def _compiled(compiler: str) -> Path:
    """Return the library's file; made anew for another source, compiler or processor.

    Raises:
        OSError, subprocess.CalledProcessError: the compiler or the file system refuses.
    """
    about = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    flags = next((line for line in Path("/proc/cpuinfo").read_bytes().splitlines() if line.startswith(b"flags")), b"")
    key = hashlib.sha256(b"\n".join([SOURCE.read_bytes(), " ".join(FLAGS).encode(), about, flags])).hexdigest()[:16]
    target = cache_folder() / "native" / f"decode-{key}.so"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            compiled = Path(folder) / target.name
            subprocess.run([compiler, *FLAGS, str(SOURCE), "-o", str(compiled), "-lm"], capture_output=True, check=True)
            compiled.replace(target)
    return target


class NativeProduct:
    """The product of a group of NF4 layers, a few rows at a time: it reads the weights' own codes, not a copy.

    Args:
        bases: linear layers of bitsandbytes with NF4 weights in blocks of 64 that lie within a row; at most `PARTS`.
        bias: of all of them in a row, or None.
    """

    def __init__(self, bases: Sequence[Any], bias: torch.Tensor | None) -> None:
        self._bias = bias
        self._codes = [base.weight.data for base in bases]
        self._scales = [block_scales(base.weight.quant_state) for base in bases]
        outs = [base.weight.quant_state.shape[0] for base in bases]
        self.linear = Linear(
            codes=(c_void_p * PARTS)(*(codes.data_ptr() for codes in self._codes)),
            scales=(c_void_p * PARTS)(*(scales.data_ptr() for scales in self._scales)),
            inputs=bases[0].weight.quant_state.shape[1],
            outputs=sum(outs),
            parts=len(outs),
            bias=None if bias is None else bias.data_ptr(),
            outs=(c_int64 * PARTS)(*outs),
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product (T, sum of out) of x (T, in), biases included."""
        x = x.contiguous()
        y = torch.empty((x.shape[0], self.linear.outputs), dtype=x.dtype, device=x.device)
        room = torch.empty_like(x)
        pointers = (x.data_ptr(), y.data_ptr(), room.data_ptr(), None)
        library().lowmem_multiply(ctypes.byref(self.linear), x.shape[0], *pointers, torch.get_num_threads())
        return y


def block_scales(state: Any) -> torch.Tensor:
    """Return the largest magnitude of each block of NF4 weights, fp32, in their order."""
    from bitsandbytes.functional import dequantize_blockwise

    if not state.nested:
        return state.absmax.float().contiguous()
    return (dequantize_blockwise(state.absmax, state.state2) + state.offset).float().contiguous()


class NativeDecoder:
    """The layers of a `FastDecoder` with what they multiply with at present.

    Args:
        function: the library's.
        layers: the fast decoder's layers; every product of theirs is a `NativeProduct`.
        dtype: the compute dtype.
    """

    def __init__(self, function: Any, layers: Sequence[Any], dtype: torch.dtype) -> None:
        self._function, self._dtype = function, dtype
        self._kept_alive: list[Any] = []
        first = layers[0]
        d, nkv = first.head_size, first.kv_heads
        self._layers = (Layer * len(layers))()
        for target, layer in zip(self._layers, layers, strict=True):
            target.qkv, target.o = self._linear(layer.qkv), self._linear(layer.out)
            target.gate_up, target.down = self._linear(layer.gate_up), self._linear(layer.down)
            target.attention_norm, target.mlp_norm = (norm.weight.data_ptr() for norm in layer.norms)
        self._pass = Pass(
            hidden=first.qkv.layers[0].in_features,
            heads=sum(first.qkv.outs) // d - 2 * nkv,
            kv_heads=nkv,
            head_size=d,
            inner=first.gate_up.outs[0],
            scaling=first.attention[0],
            eps=first.norms[0].variance_epsilon,
        )
        linears = [getattr(one, name) for one in self._layers for name in ("qkv", "o", "gate_up", "down")]
        self._wide = max(linear.outputs for linear in linears)
        self._narrow = max(linear.inputs for linear in linears)
        self._ranks = max(sum(linear.ranks) for linear in linears)

    def _linear(self, group: Any) -> Linear:
        product: NativeProduct = group.decode_product
        adapters = group.adapters_now(self._dtype)
        linear = Linear.from_buffer_copy(product.linear)
        if adapters is not None:
            linear.a, linear.b = adapters.a.data_ptr(), (c_void_p * PARTS)(*(b.data_ptr() for b in adapters.b))
            linear.ranks = (c_int64 * PARTS)(*(part.stop - part.start for part in adapters.columns))
        self._kept_alive += [product, adapters]
        return linear

    def run(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cache: KVCacheView, only: int | None = None
    ) -> None:
        """Turn embeddings x (R, H) into the last layer's result, in place, and store the token's keys and values.

        Args:
            cos, sin: (R, d), contiguous; the first half of sin is negated.
            only: the one layer that is run, on its own input x.
        """
        rows, call = x.shape[0], self._pass
        for target, tensors in zip(self._layers, cache.layers, strict=True):
            target.prompt_k, target.prompt_v, target.own_k, target.own_v = (t.data_ptr() for t in tensors)
        call.threads = min(rows, torch.get_num_threads())
        call.rows, call.slots, call.length = rows, cache.slots, cache.length
        call.longest, call.room = cache.layers[0][0].shape[2], cache.layers[0][2].shape[2]
        places = [(c_int64 * rows)(*column) for column in zip(*cache.rows, strict=True)]
        call.prompt, call.slot, call.prompt_length = (ctypes.addressof(place) for place in places)
        keys = call.longest + cache.length
        call.scratch_size = TOGETHER * (2 * call.head_size + keys)
        scratch = torch.empty((call.threads, call.scratch_size), dtype=torch.float32, device=x.device)
        widths = (call.hidden, self._wide, self._narrow, self._narrow, self._ranks)
        room = [torch.empty((rows, n), dtype=x.dtype, device=x.device) for n in widths]
        call.cos, call.sin, call.x, call.scratch = (t.data_ptr() for t in (cos, sin, x, scratch))
        call.normed, call.wide, call.narrow, call.sorted, call.xa = (t.data_ptr() for t in room)
        first, call.layers = (0, len(self._layers)) if only is None else (only, 1)
        self._function(ctypes.byref(call), self._layers[first])


def native_decoder(layers: Sequence[Any], dtype: torch.dtype) -> NativeDecoder | None:
    """Return the fast decoder's layers in C; None where there is no library, or a layer is of a kind it has not."""
    first = layers[0]
    _, window, softcap = first.attention
    same = all(
        layer.head_norms is None
        and gated_activation(layer.mlp) is SILU
        and layer.attention == first.attention
        and all(
            isinstance(group.decode_product, NativeProduct)
            for group in (layer.qkv, layer.out, layer.gate_up, layer.down)
        )
        and all(_plain(norm, first.norms[0], dtype) for norm in layer.norms)
        for layer in layers
    )
    if not same or window is not None or softcap or first.head_size % 2 or (native := library()) is None:
        return None
    return NativeDecoder(native.lowmem_decode, layers, dtype)


def _plain(norm: Any, first: Any, dtype: torch.dtype) -> bool:
    """Whether a norm multiplies with its weight, rounds before it does, and has the same epsilon as the first one."""
    scale, eps = norm_scale(norm), getattr(norm, "variance_epsilon", None)
    if scale is None or scale is not norm.weight:
        return False
    return scale.dtype == dtype and eps == first.variance_epsilon
