"""Count the bytes of all live tensors, and their peak, on any device: what a step really needs.

`LiveBytes` is a dispatch mode. It sees every storage that an operator returns or is given, in the forward pass, in the
backward pass and inside custom autograd functions, and forgets a storage when it is freed. Views share a storage and
count once. Operators of other libraries whose kernels are Python code (bitsandbytes) are looked into.

What is left out: scratch memory inside torch's own C++ kernels (the blocked weights of a matmul, for example), what an
allocator keeps in reserve, and tensors on the meta device. A storage counts from the end of the operator that made it.
"""

import gc
import weakref
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

TORCH_NAMESPACES = {"aten", "prims", "prim", "profiler", "c10d"}


class LiveBytes(TorchDispatchMode):
    """Counts while it is entered as a context manager; freed storages are noticed afterwards too.

    Attributes:
        current: bytes of the live storages that were seen.
        peak: the highest ``current`` since the start or since `reset_peak`.
    """

    def __init__(self, scan: bool = True) -> None:
        """Start counting.

        Args:
            scan: begin with every tensor that Python can reach: parameters, buffers, quantization constants,
                optimizer states.
        """
        super().__init__()
        self.current = 0
        self.peak = 0
        self._seen: dict[int, tuple[weakref.ref, int]] = {}  # by the storage's address
        if scan:
            self.scan()

    def scan(self) -> None:
        """Add the storages of all tensors that the garbage collector knows."""
        gc.unfreeze()  # it neither tells of what a program has frozen nor frees it, and that may hold tensors as well
        gc.collect()
        for thing in gc.get_objects():
            if issubclass(type(thing), torch.Tensor):  # isinstance would wake lazily loaded modules
                self.add(thing)

    def add(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage, once however often it is added; a storage that was resized counts anew."""
        if tensor.device.type == "meta" or tensor.layout is not torch.strided:
            return
        try:
            storage = tensor.untyped_storage()
        except NotImplementedError:  # wrapper subclasses have none
            return
        key, size = storage._cdata, storage.nbytes()
        known = self._seen.get(key)
        if known is not None and known[1] == size:
            return
        if known is None:
            reference = weakref.ref(storage, partial(self._forget_storage, key))
        else:
            reference = known[0]
            self.current -= known[1]
        self._seen[key] = (reference, size)
        self.current += size
        self.peak = max(self.peak, self.current)

    def _forget_storage(self, key: int, _: Any) -> None:
        _, size = self._seen.pop(key)
        self.current -= size

    def reset_peak(self) -> None:
        """Begin a new peak at what is live now."""
        self.peak = self.current

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and count what it was given and what it returns."""
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        for tensor in given:
            self.add(tensor)
        if func.namespace in TORCH_NAMESPACES or not given:
            out = func(*args, **kwargs)
        else:
            out = self._look_into(func, given[0].device, args, kwargs)
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        return out

    def _look_into(self, func: Any, device: torch.device, args: Any, kwargs: Any) -> Any:
        """Run another library's kernel with the mode on, so that tensors made inside are seen."""
        backend = torch._C.DispatchKeySet(torch._C._dispatch_key_parse(device.type.upper()))
        with self:
            return func.redispatch(backend, *args, **kwargs)
