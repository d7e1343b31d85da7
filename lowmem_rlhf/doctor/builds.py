"""Which build of torch fits a driver and a card. Facts of their makers, read and not measured here.

- A driver runs every CUDA of its major version and older ones; the least driver of each major version:
  https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html
- Which CUDA builds a release of torch has, and for which cards: the support matrix in torch's RELEASE.md, and for 2.12
  to 2.15 the notices https://github.com/pytorch/pytorch/issues/178665 and /190385.
- The least card of bitsandbytes: the table "Accelerator support" in the README of 0.50.
"""

import re
from dataclasses import dataclass

INDEX = "https://download.pytorch.org/whl/"
LEAST_DRIVER = {13: 580, 12: 525, 11: 450}  # CUDA's major version: the driver's
Version = tuple[int, int]

BITSANDBYTES_LEAST: Version = (6, 0)
BITSANDBYTES_ADVISED: Version = (7, 5)


@dataclass(frozen=True)
class Build:
    """CUDA wheels of torch on an index: releases of torch and cards, from and to."""

    index: str
    torch: tuple[Version, Version]
    cards: tuple[Version, Version]

    @property
    def cuda(self) -> Version:
        """The version of CUDA: ``(12, 6)`` of ``cu126``."""
        return int(self.index[2:4]), int(self.index[4:])


ANY: Version = (99, 9)
# By maker: index, build, the cards that bitsandbytes 0.50 lists. torch 2.11 and newer are on both indexes.
OTHERS = {
    "AMD": ("rocm7.2", "ROCm", "Radeon cards from the RX 5000 on, and no older ones,"),
    "Intel": ("xpu", "XPU", "Arc cards, and no other graphics of Intel,"),
}
BUILDS = (  # the first that fits is named
    Build("cu130", ((2, 9), ANY), ((7, 5), ANY)),
    Build("cu128", ((2, 7), (2, 11)), ((7, 5), ANY)),
    Build("cu126", ((2, 6), (2, 14)), ((5, 0), (9, 0))),
)


def release(version: str) -> Version:
    """Return major and minor of a version: ``(2, 13)`` of ``2.13.0+cu130``; zeros where it has none."""
    match = re.match(r"(\d+)(?:\.(\d+))?", version)
    return (int(match[1]), int(match[2] or 0)) if match else (0, 0)


def cuda_of_driver(driver: str) -> int | None:
    """Return the newest major version of CUDA that a driver runs; None for drivers older than that of CUDA 11."""
    number = release(driver)[0]
    return next((cuda for cuda, least in LEAST_DRIVER.items() if number >= least), None)


def fitting_build(torch: str, cuda: int | None, capability: Version | None) -> Build | None:
    """Return the build of this release of torch that a driver runs and a card computes with; None: there is none.

    Args:
        torch: its version.
        cuda: the newest major version of CUDA that the driver runs; None: no build runs.
        capability: the card's; None: not known, and any is taken to do.
    """
    for build in BUILDS:
        oldest, newest = build.torch
        low, high = build.cards
        of_release = oldest <= release(torch) <= newest
        if of_release and cuda and build.cuda[0] <= cuda and (capability is None or low <= capability <= high):
            return build
    return None


def install(torch: str, index: str) -> str:
    """Return the command that puts another build in this one's place.

    The version carries the build's name, since pip takes ``2.13.0+cpu`` for a ``2.13.0`` that is there already.
    """
    return f'python -m pip install "torch=={torch.partition("+")[0]}+{index}" --index-url {INDEX}{index}'


def is_on(torch: str, index: str) -> bool:
    """Say whether a release of torch is on an index of `OTHERS`."""
    return release(torch) >= (2, 11) and any(index == one[0] for one in OTHERS.values())


def runs_on(capability: Version, architectures: tuple[str, ...]) -> bool:
    """Say whether a build with these architectures (``sm_86``, ``compute_120``) has code for a card.

    Code for ``sm_XY`` runs on cards of the same major number and at least this minor one; ``compute_XY`` is compiled
    by the driver for every later card.
    """
    for name in architectures:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", name)
        if match is None:
            continue
        has = (int(match[2]), int(match[3]))
        if match[1] == "compute" and has <= capability:
            return True
        same_chip = has == capability if match[4] == "a" else has[0] == capability[0] and has <= capability
        if match[1] == "sm" and same_chip:
            return True
    return False
