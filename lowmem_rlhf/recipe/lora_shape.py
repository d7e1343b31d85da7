"""The shape of an adapter: beside which linear layers it lies, of which rank, and how each is scaled. No torch here.

The words and their meaning are peft's (`LoraConfig`, `tuners_utils.check_target_module_exists`,
`utils.other.get_pattern_key`): a plan, a base and a merge ask the same questions here.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

ALL = "all-linear"
_LAYER = re.compile(r".*?\.[^.]*\.(\d+)\.")  # the first number in a module's name, as peft finds it


def scaling(r: int, lora_alpha: float, use_rslora: bool) -> float:
    """Return what ``B A`` is multiplied by: alpha / r (arXiv 2106.09685), or alpha / sqrt(r) (rsLoRA, 2312.03732)."""
    return lora_alpha / (r**0.5 if use_rslora else r)


def layer_number(name: str) -> int | None:
    """Return the number of the layer that a module is in, by its whole name; None outside of layers."""
    match = _LAYER.match(name)
    return int(match[1]) if match else None


def in_any_layer(name: str) -> str:
    """Return a module's whole name with * for the number of its layer."""
    match = _LAYER.match(name)
    return f"{name[: match.start(1)]}*{name[match.end(1) :]}" if match else name


@dataclass(frozen=True)
class LoraShape:
    """The shape of one adapter.

    Attributes:
        r, lora_alpha: of the layers that no pattern names.
        target_modules: ``all-linear``, a regular expression that fits whole names of modules, or ends of names.
        use_rslora: see `scaling`.
        layers_to_transform: numbers of the layers that take part; empty: all do.
        rank_pattern, alpha_pattern: other numbers for modules whose names end as a pattern says; the first fit counts.
    """

    r: int = 16
    lora_alpha: float = 32
    target_modules: str | tuple[str, ...] = ALL
    use_rslora: bool = False
    layers_to_transform: tuple[int, ...] = ()
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()

    @classmethod
    def of(
        cls,
        r: int = 16,
        lora_alpha: float = 32,
        target_modules: str | Iterable[str] = ALL,
        use_rslora: bool = False,
        layers_to_transform: Iterable[int] | None = None,
        rank_pattern: Mapping[str, int] | None = None,
        alpha_pattern: Mapping[str, float] | None = None,
    ) -> "LoraShape":
        """Return the shape that these values say, in peft's types."""
        return cls(
            r,
            lora_alpha,
            target_modules if isinstance(target_modules, str) else tuple(target_modules),
            bool(use_rslora),
            tuple(sorted(set(layers_to_transform or ()))),
            tuple((rank_pattern or {}).items()),
            tuple((alpha_pattern or {}).items()),
        )

    @property
    def values(self) -> dict[str, Any]:
        """The values that `of` takes, as JSON has them: the first three, and what else is not left at its default."""
        targets = self.target_modules if isinstance(self.target_modules, str) else list(self.target_modules)
        more = {
            "use_rslora": self.use_rslora,
            "layers_to_transform": list(self.layers_to_transform),
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": dict(self.alpha_pattern),
        }
        first = {"r": self.r, "lora_alpha": self.lora_alpha, "target_modules": targets}
        return first | {key: value for key, value in more.items() if value}

    def widened(self, times: int) -> "LoraShape":
        """Return the shape beside the same modules of so many times the rank, whose ``B A`` is multiplied by 1."""
        ranks = tuple((pattern, times * r) for pattern, r in self.rank_pattern)
        r = times * self.r
        return replace(self, r=r, lora_alpha=r, use_rslora=False, rank_pattern=ranks, alpha_pattern=ranks)

    @property
    def is_regex(self) -> bool:
        """Whether the target modules are a regular expression."""
        return isinstance(self.target_modules, str) and self.target_modules != ALL

    def takes(self, name: str) -> bool:
        """Whether a linear layer inside the model, by its whole name, carries the adapter."""
        if self.is_regex:
            return re.fullmatch(str(self.target_modules), name) is not None
        if self.layers_to_transform and layer_number(name) not in self.layers_to_transform:
            return False
        return self.target_modules == ALL or any(ends_with(name, target) for target in self.target_modules)

    def rank(self, name: str) -> int:
        """Return the rank beside a module."""
        return int(_by_pattern(self.rank_pattern, name, self.r))

    def alpha(self, name: str) -> float:
        """Return the alpha beside a module."""
        return float(_by_pattern(self.alpha_pattern, name, self.lora_alpha))

    def scaling(self, name: str) -> float:
        """Return what a module's ``B A`` is multiplied by."""
        return scaling(self.rank(name), self.alpha(name), self.use_rslora)


def ends_with(name: str, target: str) -> bool:
    """Whether a module's name is a target's, or ends with it."""
    return name == target or name.endswith(f".{target}")


def fits(pattern: str, name: str) -> bool:
    """Whether a pattern of ranks or alphas names a module."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def _by_pattern(patterns: Iterable[tuple[str, Any]], name: str, otherwise: Any) -> Any:
    return next((value for pattern, value in patterns if fits(pattern, name)), otherwise)
