"""What holds of CUDA's cards alone: a process that sees one of them, and torch's build for them."""

from collections.abc import Mapping

from lowmem_rlhf.hardware.capabilities import kind_of

VISIBLE = "CUDA_VISIBLE_DEVICES"


def is_cuda(device: str) -> bool:
    """Say whether a torch device string means a card of CUDA."""
    return kind_of(device) == "cuda"


def alone(device: str, environment: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """Return a device's string in a process that sees no other card, and that process's environment.

    Libraries that spread over all cards (transformers' trainer) then stay on this one. Other kinds are as they are.
    """
    if not is_cuda(device):
        return device, dict(environment)
    number = int(device.partition(":")[2] or 0)
    listed = [entry.strip() for entry in environment.get(VISIBLE, "").split(",") if entry.strip()]
    entry = listed[number] if number < len(listed) else str(number)
    return "cuda:0", {**environment, VISIBLE: entry}


def torch_build() -> str | None:
    """Return the version of CUDA that torch was built for; None for another build."""
    import torch

    return torch.version.cuda
