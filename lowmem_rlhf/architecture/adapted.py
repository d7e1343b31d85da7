"""Which linear layers of a model an adapter of some shape lies beside, counted without the model. No torch here."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowmem_rlhf.architecture.counting import Linears
from lowmem_rlhf.architecture.families.block import Linear
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.recipe.lora_shape import LoraShape, ends_with, fits
from lowmem_rlhf.suggest import did_you_mean

if TYPE_CHECKING:
    from lowmem_rlhf.architecture.dimensions import ModelDimensions

SHOWN = 4  # names of modules in a message


@dataclass(frozen=True)
class Adapted:
    """What an adapter is beside.

    Attributes:
        parameters: of its A and B: ``r * (inputs + outputs)`` for each linear layer with one (LoRA, arXiv 2106.09685).
        linears: these linear layers, and how many there are of each.
        ranks: for each layer of the model the rank beside each of its `ModelDimensions.linears`; 0: it has none there.
            Where layers are unlike, what a layer lacks has the rank that it would have.
        first: the first layer with an adapter: the backward pass ends there.
    """

    parameters: int
    linears: Linears
    ranks: tuple[tuple[int, ...], ...]
    first: int

    @property
    def matrices(self) -> int:
        """A and B of all layers."""
        return 2 * sum(many for _, many in self.linears)

    @property
    def everywhere(self) -> bool:
        """Whether every linear layer of every layer has one."""
        return all(all(ranks) for ranks in self.ranks)


def adapted(dims: "ModelDimensions", shape: LoraShape) -> Adapted:
    """Return what an adapter is beside on a model.

    Raises:
        UserError: it names no linear layer, or something that is none.
    """
    modules = list(_modules(dims))
    _check(dims, shape, [name for name, _, _ in modules])
    parameters, linears = 0, Counter[Linear]()
    by_layer: list[dict[str, list[int]]] = [{} for _ in range(dims.num_layers)]
    outside = False
    for name, layer, linear in modules:
        rank = shape.rank(name) if shape.takes(name) else 0
        parameters += rank * (linear.inputs + linear.outputs)
        linears[linear] += rank > 0
        if layer is not None and layer < dims.num_layers:
            by_layer[layer].setdefault(linear.name, []).append(rank)
        outside |= layer is None and rank > 0
    with_one = [place for place, found in enumerate(by_layer) if any(map(any, found.values()))]
    return Adapted(
        parameters,
        tuple((linear, many) for linear, many in linears.items() if many),
        _ranks(dims, shape, by_layer, set(with_one)),
        with_one[0] if with_one and not outside else 0,
    )


def _modules(dims: "ModelDimensions") -> Iterator[tuple[str, int | None, Linear]]:
    """Yield name, layer and kind of every linear layer that takes adapters."""
    for template, linear, layers in dims.places:
        if not layers:
            yield template, None, linear
        for layer in layers:
            yield template.replace("*", str(layer), 1), layer, linear


def _ranks(
    dims: "ModelDimensions", shape: LoraShape, by_layer: Sequence[dict[str, list[int]]], with_one: set[int]
) -> tuple[tuple[int, ...], ...]:
    of_name = {name: max(ranks) for found in by_layer for name, ranks in found.items() if any(ranks)}
    rows = []
    for layer, found in enumerate(by_layer):
        seen: Counter[str] = Counter()
        row = []
        for linear in dims.linears:
            mine = found.get(linear.name, [])
            lacking = shape.r if linear.name in of_name and layer in with_one else 0
            row.append(mine[seen[linear.name]] if seen[linear.name] < len(mine) else lacking)
            seen[linear.name] += 1
        rows.append(tuple(row))
    return tuple(rows)


def _check(dims: "ModelDimensions", shape: LoraShape, names: Sequence[str]) -> None:
    """Check that everything that a shape names is there."""
    last = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))
    targets = shape.target_modules if isinstance(shape.target_modules, tuple) else ()
    for target in targets:
        if not any(ends_with(name, target) for name in names):
            raise UserError(
                f"lora.target_modules: got {target!r}; the linear layers of a {dims.model_type} block are "
                f"{', '.join(last)}{did_you_mean(target, last)}"
            )
    if beyond := [number for number in shape.layers_to_transform if number >= dims.num_layers]:
        raise UserError(
            f"lora.layers_to_transform: got {beyond[0]}; the model has {dims.num_layers} layers, 0 to "
            f"{dims.num_layers - 1}"
        )
    taken = [name for name in names if shape.takes(name)]
    if not taken:
        raise UserError(_nothing(dims, shape, names, last))
    for key, patterns in (("rank_pattern", shape.rank_pattern), ("alpha_pattern", shape.alpha_pattern)):
        for pattern, _ in patterns:
            if not any(fits(pattern, name) for name in taken):
                raise UserError(
                    f"lora.{key}: {pattern!r} fits the end of no adapted layer's name; these are such as "
                    f"{', '.join(_spread(taken))}"
                )


def _nothing(dims: "ModelDimensions", shape: LoraShape, names: Sequence[str], last: Sequence[str]) -> str:
    """Return the sentence for a shape that takes no layer."""
    shown = ", ".join(_spread(names))
    if not shape.is_regex:
        return f"lora.layers_to_transform: no target module lies in these layers; there are {shown}"
    target = str(shape.target_modules)
    of_name = f"; for all layers of that name write [{target}]" if target in last else ""
    return (
        f"lora.target_modules: the regular expression {target!r} fits the whole name of no linear layer of this "
        f"{dims.model_type} model; there are {shown}{of_name}"
    )


def _spread(names: Sequence[str]) -> list[str]:
    """Return some of the names: of unlike kinds, and the last one."""
    kinds = {name.rsplit(".", 1)[-1]: name for name in reversed(names)}
    return [*list(reversed(kinds.values()))[: SHOWN - 1], names[-1]]
