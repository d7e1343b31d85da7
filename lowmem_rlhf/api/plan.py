"""A plan as an object: a table when it is printed, a picture in a notebook."""

import io
import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from lowmem_rlhf.api.request import Overrides, RecipeLike, RewardLike, override_texts, request_of
from lowmem_rlhf.errors import OfflineError
from lowmem_rlhf.quiet import hushed
from lowmem_rlhf.recipe.python_objects import given

_WIDTH = 120


def plan(
    recipe: RecipeLike,
    *,
    profile: str | None = None,
    vram: str | None = None,
    model: str | None = None,
    data: Any = None,
    rewards: Sequence[RewardLike] | None = None,
    overrides: Overrides = (),
    processes: int | None = None,
    machines: int | None = None,
    network: float | None = None,
) -> "PlanView":
    """Return the settings that a recipe would run with, why, and the memory it needs; nothing is loaded.

    Args:
        recipe, model, data, rewards, overrides: as of `lowmem_rlhf.train`.
        profile: plan for this card (see ``lowmem-rlhf profiles``) and not for the one that is here; for several
            processes one for all, or one for each with commas between them.
        vram: plan for this much memory, for example ``"11GB"``.
        processes: plan for so many, one a card.
        machines: among which the processes are divided; default: one.
        network: 10^9 bits a second between machines; default: 10.

    Raises:
        UserError: the recipe, the model or the card is not known or cannot be planned for, or data or rewards are not
            what the recipe needs, as ``lowmem-rlhf plan`` checks them.
    """
    from lowmem_rlhf.planning.processes.request import advice_of, cluster_of, plan_of
    from lowmem_rlhf.session.check import QUICK_ROWS, check_recipe
    from lowmem_rlhf.session.saved_lora import as_saved_here

    cluster = cluster_of(processes, machines, network, profile)
    card = {"hardware.profile": None if cluster else profile, "hardware.vram": vram}
    texts = [*override_texts(overrides), *override_texts({k: v for k, v in card.items() if v is not None})]
    request = request_of(recipe, model=model, data=data, rewards=rewards, overrides=texts)
    resolved = request.recipe
    made = plan_of(as_saved_here(resolved), cluster)
    with hushed(lambda text: None), given(request.objects), suppress(OfflineError):  # no rows, and a plan all the same
        check = check_recipe(resolved, 0, network=False, most=QUICK_ROWS)
        check.raise_errors()
        resolved = check.recipe
    return PlanView(made.to_dict(), f"{resolved.name}, {resolved.model}", advice_of(made, resolved, cluster))


class PlanView:
    """A plan.

    Attributes:
        values: what ``plan --json`` prints.
        advice: what to change when it does not fit; empty when it does.
    """

    def __init__(self, values: dict[str, Any], name: str = "", advice: str = "") -> None:
        """Wrap the values of a plan."""
        self.values: dict[str, Any] = json.loads(json.dumps(values))  # lists for tuples, as in plan.json
        self.advice = advice
        self._name = name

    @property
    def fits(self) -> bool:
        """Whether the predicted peak is within the budget."""
        return bool(self.values["fits"])

    @property
    def settings(self) -> dict[str, Any]:
        """The chosen settings."""
        return dict(self.values["settings"])

    @property
    def reasons(self) -> dict[str, str]:
        """Why each setting was chosen, under its name."""
        return dict(self.values["reasons"])

    @property
    def memory(self) -> dict[str, Any]:
        """Budget, peak and the bytes of every phase by component."""
        return dict(self.values["memory"])

    def to_dict(self) -> dict[str, Any]:
        """Return what ``plan --json`` prints."""
        return self.values

    def plot(self) -> Any:
        """Return the memory of each phase against the card's as a matplotlib figure; of several, the fullest card's."""
        from lowmem_rlhf.report.plan_plots import draw_phases

        return draw_phases(self.values, self._name)

    def __repr__(self) -> str:
        """Return the table that ``lowmem-rlhf plan`` prints."""
        from rich.console import Console

        from lowmem_rlhf.display.processes import print_plans

        text = io.StringIO()
        print_plans(self.values, Console(file=text, width=_WIDTH, force_jupyter=False))
        return "\n".join([text.getvalue().rstrip(), *([self.advice] if self.advice else [])])

    def _repr_png_(self) -> bytes:
        """Return the picture for a notebook."""
        from lowmem_rlhf.report.plots import to_png

        return to_png(self.plot(), 110)
