"""The card that a test's process runs on: the virtual one, or the machine's own. Both answer to the same names."""

import fcntl
import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from spared import spare_collector, spare_disk
from torch.nn.attention import SDPBackend, sdpa_kernel

_LIBRARIES: list[Any] = []  # what they add ends with them


class TorchCard:
    """The first card of a kind that torch knows, with the functions of the module ``vcard`` (shared/vcard)."""

    def __init__(self, kind: str) -> None:
        self._kind, self._module = kind, torch.get_device_module(kind)
        self._filling: list[torch.Tensor] = []
        self._once = False
        self._attach = getattr(torch._C, f"_{kind}_attach_out_of_memory_observer", None)
        if self._attach is not None:
            self._attach(self._ran_out)

    def live(self) -> int:
        """Return the bytes of live tensors, each rounded up to 512."""
        count = getattr(self._module, "memory_allocated", None) or self._module.current_allocated_memory
        return int(count())

    def peak(self) -> int:
        """Return the highest of these since `reset_peak`."""
        return int(self._module.max_memory_allocated())

    def reset_peak(self) -> None:
        """Begin a new peak."""
        self._module.reset_peak_memory_stats()

    def allocs(self) -> int:
        """Return how often memory was asked for so far."""
        return int(self._module.memory_stats()["allocation.all.allocated"])

    def set_capacity(self, count: int) -> None:
        """Let the process reserve so many bytes; where that is less than it has, nothing at all is left to take."""
        self._filling.clear()
        self._module.empty_cache()
        self._module.set_per_process_memory_fraction(min(1.0, count / self._module.mem_get_info()[1]))
        if count < self._module.memory_reserved():
            self._fill()

    def fail_at(self, number: int) -> None:
        """Let the very next allocation fail, whatever its number is; a negative one: none."""
        if self._attach is None:
            raise NotImplementedError(f"torch tells nobody when the memory of {self._kind} runs out")
        self.set_capacity(2**60 if number < 0 else 0)
        self._once = number >= 0

    def _fill(self) -> None:
        once, self._once = self._once, False
        for size in (2**20, 2**16, 2**12, 512):
            try:
                while True:
                    self._filling.append(torch.empty(size, dtype=torch.uint8, device=self._kind))
            except torch.OutOfMemoryError:
                continue
        self._once = once

    def _ran_out(self, *_: Any) -> None:
        if self._once:
            self._once = False
            self._filling.clear()
            self._module.set_per_process_memory_fraction(1.0)


def card_of(argument: str) -> tuple[Any, str]:
    """Return the card that a script was told of and its device: a kind of torch's, or the virtual card's folder."""
    spare_collector()
    spare_disk()
    if not os.path.isdir(argument):
        return TorchCard(argument), f"{argument}:0"
    sys.path.insert(0, argument)
    with _one_builder():
        card = importlib.import_module("vcard")
    _add_kernels()
    return card, "vcard:0"


@contextmanager
def _one_builder() -> Iterator[None]:
    """Compile the virtual card in a folder of its own, one process at a time.

    torch marks a build that has begun by a file, which a process that is killed leaves behind: all later ones would
    wait for it for ever. The lock taken here ends with its process, so whatever marks are found under it are such ones.
    """
    from torch.utils.cpp_extension import get_default_build_root

    folder = Path(get_default_build_root()) / "lowmem_rlhf"
    folder.mkdir(parents=True, exist_ok=True)
    before = os.environ.get("TORCH_EXTENSIONS_DIR")
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    with (folder / "builder").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for left in folder.glob("*/lock"):
            left.unlink()
        try:
            yield
        finally:
            os.environ.pop("TORCH_EXTENSIONS_DIR")
            if before is not None:
                os.environ["TORCH_EXTENSIONS_DIR"] = before


def _add_kernels() -> None:
    """Let the virtual card compute by way of the CPU what CUDA has kernels of and it has not.

    Convolutions, a norm and its gradient, and SiLU's, as the one kernel that each is there.
    """
    library = torch.library.Library("aten", "IMPL")

    def forward(x: Any, weight: Any, bias: Any, *rest: Any) -> Any:
        at_host = [None if one is None else one.cpu() for one in (x, weight, bias)]
        return torch.ops.aten.convolution(*at_host, *rest).to(x.device)

    def backward(grad: Any, x: Any, weight: Any, *rest: Any) -> Any:
        *sizes, wanted = rest
        found = torch.ops.aten.convolution_backward(grad.cpu(), x.cpu(), weight.cpu(), None, *sizes, wanted)
        return tuple(None if one is None else one.to(x.device) for one in found)

    def norm(x: Any, shape: Any, weight: Any, eps: Any) -> Any:
        rows, dims = x.cpu().float(), tuple(range(-len(shape), 0))
        scale = (rows.square().mean(dims, keepdim=True) + eps).rsqrt()
        y = rows * scale if weight is None else rows * scale * weight.cpu().float()
        return y.to(x.dtype).to(x.device), scale.to(x.device)

    def norm_backward(grad: Any, x: Any, shape: Any, scale: Any, weight: Any, wanted: Any) -> Any:
        rows, scales, dims = x.cpu().float(), scale.cpu().float(), tuple(range(-len(shape), 0))
        outer = grad.cpu().float() if weight is None else grad.cpu().float() * weight.cpu().float()
        inner = (outer * rows * scales).mean(dims, keepdim=True)
        of_x = ((outer - rows * scales * inner) * scales).to(x.dtype).to(x.device) if wanted[0] else None
        summed = tuple(range(x.dim() - len(shape)))
        of_weight = (grad.cpu().float() * rows * scales).sum(summed) if wanted[1] else None
        return of_x, None if of_weight is None else of_weight.to(weight.dtype).to(x.device)

    def silu_backward(grad: Any, x: Any) -> Any:
        return torch.ops.aten.silu_backward(grad.cpu(), x.cpu()).to(x.device)

    library.impl("_fused_rms_norm", norm, "PrivateUse1")
    library.impl("_fused_rms_norm_backward", norm_backward, "PrivateUse1")
    library.impl("silu_backward", silu_backward, "PrivateUse1")
    library.impl("convolution_overrideable", forward, "PrivateUse1")
    library.impl("convolution_backward_overrideable", backward, "PrivateUse1")
    _LIBRARIES.append(library)


def its_attention(device: str) -> AbstractContextManager[None]:
    """Return what both sides of a comparison with this card run SDPA under: the virtual card has the math path only."""
    return sdpa_kernel(SDPBackend.MATH) if device.startswith("vcard") else nullcontext()
