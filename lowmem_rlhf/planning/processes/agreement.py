"""What all processes of a run must have in common, for their policies to be one. No torch.

The format of the base, the dtype that it computes in, the adapters' rank and the optimizer's moments are of the run and
not of a card. They are what a run in one process takes on the card with the least room, so that they are the same in
any number of processes; bfloat16 is taken only where every card has it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lowmem_rlhf.planning.inputs import PINNED
from lowmem_rlhf.planning.plan import Plan
from lowmem_rlhf.recipe.field_roles import fields_with
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.recipe.sections import HardwareConfig

NUMERIC = fields_with(HardwareConfig, changes_numbers=True)


@dataclass(frozen=True)
class Agreement:
    """What processes agree on.

    Attributes:
        recipe: with it.
        reasons: by setting, of those that the plan chose.
    """

    recipe: Recipe
    reasons: dict[str, str]

    def holds(self, plan: Plan) -> bool:
        """Whether a plan that was made without it says the same."""
        hardware, lora = self.recipe.hardware, self.recipe.lora
        same = all(getattr(plan.settings, key) == getattr(hardware, key) for key in NUMERIC)
        return same and plan.settings.lora["r"] == lora.r

    def explained(self, plan: Plan) -> Plan:
        """Return a plan of its recipe with these reasons in place of the recipe's."""
        return replace(plan, reasons={**plan.reasons, **self.reasons})


def agreement(recipe: Recipe, plans: Sequence[Plan]) -> Agreement:
    """Return what the processes of these plans agree on.

    Args:
        recipe: which each plan was made from.
        plans: of a run in one process, for each kind of card.
    """
    smallest = min(plans, key=lambda plan: plan.memory["budget_bytes"])
    values = {key: getattr(smallest.settings, key) for key in NUMERIC}
    rank = min(plan.settings.lora["r"] for plan in plans)
    reasons = {
        key: f"as one process would take it on the smallest card, {smallest.device.name}: {smallest.reasons[key]}"
        for key in (*NUMERIC, "lora")
        if not smallest.reasons[key].startswith(PINNED)
    }
    without = next((plan.device for plan in plans if plan.device.half_dtype == "float16"), None)
    if without and values["compute_dtype"] == "bfloat16":
        values["compute_dtype"] = "float16"
        reasons["compute_dtype"] = f"{without.name} has no bfloat16, and every card computes alike"
    hardware = recipe.hardware.model_copy(update=values)
    lora = recipe.lora.model_copy(update={"r": rank})
    return Agreement(recipe.model_copy(update={"hardware": hardware, "lora": lora}), reasons)
