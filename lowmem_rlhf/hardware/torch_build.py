"""What the installed torch was built for and the accelerators that it finds. torch is imported inside."""

from typing import Any

from lowmem_rlhf.hardware.capabilities import backend_of, kind_of

KINDS = ("cuda", "xpu", "mps")  # in the order in which `detect` takes them


def is_torchs_own(device: str) -> bool:
    """Say whether a torch device string means an accelerator that torch itself knows, and no other package adds."""
    return kind_of(device) in KINDS


def torch_build(device: str) -> dict[str, Any]:
    """Return ``cuda``, ``hip`` and ``xpu`` (the versions it was built with, or None), ``architectures``, and ``cards``.

    Each card has ``device`` (torch's string), ``name``, ``uuid`` and ``capability`` (None where torch does not tell).
    ``unreachable`` is what torch says where it cannot put a tensor on ``device``; None where it can.
    """
    import torch

    version = torch.version
    build = {name: getattr(version, name, None) for name in ("cuda", "hip", "xpu")}
    architectures = list(torch.cuda.get_arch_list()) if build["cuda"] or build["hip"] else []
    cards = [card for kind in KINDS for card in _cards(kind)]
    return {**build, "architectures": architectures, "cards": cards, "unreachable": _why_unreachable(device)}


def _cards(kind: str) -> list[dict[str, Any]]:
    import torch

    module = getattr(torch, kind, None)
    if module is None or not module.is_available():
        return []
    found = []
    for number in range(module.device_count()):
        device = kind if kind == "mps" else f"{kind}:{number}"
        told = module.get_device_properties(number) if hasattr(module, "get_device_properties") else None
        capability = None
        if backend_of(kind) == "cuda":
            capability = list(module.get_device_capability(number))
        found.append(
            {
                "device": device,
                "name": str(getattr(told, "name", device)),
                "uuid": str(uuid) if (uuid := getattr(told, "uuid", None)) else None,
                "capability": capability,
            }
        )
    return found


def _why_unreachable(device: str) -> str | None:
    import torch

    try:
        torch.zeros(1, device=device, dtype=torch.float32).add_(1)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        return str(error).strip().split("\n")[0]
    return None
