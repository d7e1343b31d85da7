"""Sequence classifiers, trained whole, for the `classifier` reward. Loads without torch."""

from typing import TYPE_CHECKING

from lowmem_rlhf.algorithms.classifier.settings import ClassifierSettings
from lowmem_rlhf.algorithms.spec import AlgorithmSpec

if TYPE_CHECKING:
    from lowmem_rlhf.recipe.schema import Recipe


def _prepare(recipe: "Recipe") -> None:
    if not (recipe.data.text and recipe.data.label):
        raise ValueError("data.text, data.label: a classifier needs both, the columns with its text and its class")


def _no_plan(recipe: "Recipe") -> str:
    return (
        "algorithm: a classifier has no plan, as nothing is chosen for it: all of it trains in float32 (16 bytes a "
        f"parameter), and a pass has at most classifier.batch_tokens ({recipe.classifier.batch_tokens}) tokens; "
        "start it with train"
    )


SPEC = AlgorithmSpec(
    name="classifier",
    title="classifier",
    section="classifier",
    settings=ClassifierSettings,
    rows="texts",
    output="classes",
    rewards="refused",
    prepare=_prepare,
    no_plan=_no_plan,
    run="lowmem_rlhf.algorithms.classifier.update:train_classifier_run",
    leaves="model",
    resumable=False,
)
