"""What torch and bitsandbytes can do here, told by a process of its own: ``python -m lowmem_rlhf.doctor.probe DEVICE``.

A library that cannot be loaded, a kernel that crashes or a driver that hangs then ends that process alone.
"""

import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Mapping
from typing import Any

MARK = "lowmem-rlhf-probe "
SECONDS = 180.0
COMMAND = (sys.executable, "-m", "lowmem_rlhf.doctor.probe")
ROWS = (1, 16, 128)  # a decoded token, a few (bitsandbytes' fused kernel on a card), and many (dequantized first)
OUT, IN = 192, 256


def ask(device: str, dtype: str, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return what the process says: ``torch`` and ``bitsandbytes``, each with ``error`` (None: it works).

    Args:
        device: a torch device string, on which the 4-bit product is tried.
        dtype: to compute in, ``float16`` or ``bfloat16``.
        environment: of the process; None: this one's.
    """
    given = {**(os.environ if environment is None else environment), "TORCHDYNAMO_DISABLE": "1"}
    command = [*COMMAND, device, dtype]
    try:
        done = subprocess.run(
            command, env=given, capture_output=True, text=True, errors="replace", timeout=SECONDS, check=False
        )
    except OSError as error:
        return _last("", f"it could not be started: {_one_line(error)}")
    except subprocess.TimeoutExpired as late:
        return _last(late.stdout or "", f"it did not end within {SECONDS:.0f} seconds")
    return _last(done.stdout, _how_it_ended(done))


def _how_it_ended(done: "subprocess.CompletedProcess[str]") -> str:
    if done.returncode < 0:
        try:
            return f"it crashed ({signal.Signals(-done.returncode).name})"
        except ValueError:
            return f"it crashed (signal {-done.returncode})"
    last = next((line.strip() for line in reversed(done.stderr.splitlines()) if line.strip()), "it said nothing")
    return f"it ended with code {done.returncode}: {last}"


def _last(out: str | bytes, ended: str) -> dict[str, Any]:
    """Return the last that a process said; of what it had begun, and did not finish, that it ended."""
    text = out.decode(errors="replace") if isinstance(out, bytes) else out
    lines = [line.removeprefix(MARK) for line in text.splitlines() if line.startswith(MARK)]
    told: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    for name in ("torch", "bitsandbytes"):
        told.setdefault(name, {"error": ended})
    return told


def main() -> None:
    """Say what torch is, then what bitsandbytes computes; each as a line, so that a crash leaves the one before."""
    device, dtype = sys.argv[1:]
    warnings.simplefilter("ignore")
    said: dict[str, Any] = {"torch": _torch(device)}
    _say(said)
    if said["torch"]["error"] is None and said["torch"]["unreachable"] is None:
        _say({**said, "bitsandbytes": _bitsandbytes(device, dtype)})


def _say(said: dict[str, Any]) -> None:
    print(MARK + json.dumps(said), flush=True)


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:500]


def _torch(device: str) -> dict[str, Any]:
    try:
        import torch
    except Exception as error:  # whatever keeps a library from loading is what is asked for
        return {"error": _one_line(error)}
    from lowmem_rlhf.hardware.torch_build import torch_build

    return {"error": None, "version": torch.__version__, **torch_build(device)}


def _bitsandbytes(device: str, dtype: str) -> dict[str, Any]:
    try:
        import bitsandbytes
        from bitsandbytes.cextension import ErrorHandlerMockBNBNativeLibrary, lib
    except Exception as error:
        return {"error": _one_line(error), "version": None}
    library = lib.error_msg if isinstance(lib, ErrorHandlerMockBNBNativeLibrary) else None
    told = {"version": bitsandbytes.__version__, "library_error": library and library.splitlines()[0]}
    try:
        return {**told, "error": None, **four_bit_product(device, dtype)}
    except Exception as error:
        return {**told, "error": _one_line(error)}


def four_bit_product(device: str, dtype: str) -> dict[str, Any]:
    """Multiply with an NF4 weight on the device and compare with the product of its dequantized numbers in fp32.

    Returns:
        ``rounding``: by rows, the largest difference over the largest number of the product; ``quantization``: how far
        the dequantized weight is from the original one, root mean square over root mean square (0.1 for normally
        distributed numbers).
    """
    import torch
    from bitsandbytes import matmul_4bit
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    kind = getattr(torch, dtype)
    generator = torch.Generator("cpu").manual_seed(0)
    weight = torch.randn(OUT, IN, generator=generator, device="cpu", dtype=torch.float32)
    codes, state = quantize_4bit(weight.to(device, kind), quant_type="nf4", compress_statistics=True, blocksize=64)
    dense = dequantize_4bit(codes, state).to("cpu", torch.float32)
    rounding = {}
    for rows in ROWS:
        x = torch.randn(rows, IN, generator=generator, device="cpu", dtype=torch.float32).to(kind)
        with torch.no_grad():
            y = matmul_4bit(x.to(device), codes.t(), quant_state=state).to("cpu", torch.float32)
        exact = x.to(torch.float32) @ dense.t()
        rounding[str(rows)] = float((y - exact).abs().max() / exact.abs().max())
    far = (dense - weight).square().mean().sqrt() / weight.square().mean().sqrt()
    return {"rounding": rounding, "quantization": float(far)}


if __name__ == "__main__":
    main()
