"""Supervised fine-tuning. Loads without torch."""

from typing import TYPE_CHECKING

from lowmem_rlhf.algorithms.sft.settings import SFTSettings
from lowmem_rlhf.algorithms.spec import AlgorithmSpec

if TYPE_CHECKING:
    from lowmem_rlhf.recipe.schema import Recipe


def _prepare(recipe: "Recipe") -> None:
    if recipe.data.text and recipe.sft.learn == "all":
        raise ValueError("sft.learn: got all, which is for conversations; a text of data.text is learned whole")


SPEC = AlgorithmSpec(
    name="sft",
    title="SFT",
    section="sft",
    settings=SFTSettings,
    rows="completions",
    rewards="optional",
    lengths=lambda recipe: {"sft.max_length": recipe.sft.max_length},
    prepare=_prepare,
    in_fits=True,
    build="lowmem_rlhf.algorithms.sft.build:build",
)
