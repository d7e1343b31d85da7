"""What an algorithm is, as facts: all that planning, data, evaluation, inference and export need to know of it.

One `AlgorithmSpec` an algorithm, in ``spec.py`` of its folder; `registry` holds them by name. Loads without torch: what
trains is named as ``module:function`` and imported where a run begins.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lowmem_rlhf.recipe.section import Section

if TYPE_CHECKING:
    from lowmem_rlhf.recipe.schema import Recipe

Reference = str | Callable[..., Any]  # ``module:function``, imported when it is called for, or the function itself
Row = Literal["prompts", "completions", "pairs", "answers", "texts"]
Output = Literal["text", "scores", "classes"]
Rewards = Literal["needed", "optional", "refused"]


def sampled_lengths(recipe: "Recipe") -> dict[str, int]:
    """Return the recipe's keys that bound a prompt with a sampled completion, with their values in tokens."""
    return {
        "data.max_prompt_length": recipe.data.max_prompt_length,
        "generation.max_completion_length": recipe.generation.max_completion_length,
    }


def one_update(recipe: "Recipe") -> int:
    """Return 1: a step of the run is one optimizer step."""
    return 1


def none(recipe: "Recipe") -> int:
    """Return 0."""
    return 0


def whole(recipe: "Recipe") -> float:
    """Return 1: all of a step's completions."""
    return 1.0


def no_critic(recipe: "Recipe") -> None:
    """Return None: nothing trains beside the policy."""


def as_the_policy(recipe: "Recipe") -> tuple[float | None, float | None]:
    """Return that a critic has no learning rate and no gradient norm of its own."""
    return None, None


def at_once(recipe: "Recipe") -> int:
    """Return 0: the policy moves from the first step on."""
    return 0


def never(recipe: "Recipe") -> bool:
    """Return False."""
    return False


def nothing(recipe: "Recipe") -> str:
    """Return an empty text."""
    return ""


def keep(recipe: "Recipe") -> None:
    """Leave the recipe as it is."""


@dataclass(frozen=True)
class Following:
    """How the reference follows the policy, in a frozen adapter of its own (`engine.following`).

    Attributes:
        rank: of that adapter, as a multiple of the policy's.
        steps: optimizer steps from one change of it to the next.
    """

    rank: int
    steps: int


def stays(recipe: "Recipe") -> None:
    """Return None: the reference stays as the run began."""


@dataclass(frozen=True)
class AlgorithmSpec:
    """An algorithm. Every function takes the recipe.

    Attributes:
        name: what a recipe calls it.
        title: what sentences call it; a recipe may, too.
        section: the key of the recipe that its settings stand under; several algorithms may share one.
        settings: what may stand there; None: the recipe's schema has the section already.
        rows: what a row of data is: ``prompts`` whose completions are sampled; ``completions``, a prompt with the one
            to learn, read as the section says (`SFTSettings`); ``pairs``, a prompt with a better and a worse answer;
            ``answers``, one answer with a label (pairs are taken apart); ``texts``, a text with its class.
        output: what its model gives: ``text``, so that the loss is of log-probs of tokens; ``scores``, one number a
            text, from a head; ``classes``.
        rewards: whether the recipe's rewards are ``needed``, ``optional`` (they judge held-out completions) or
            ``refused``.
        reference: what its loss compares the policy with: None for nothing, else the base, or where the recipe starts
            from an adapter that one, frozen: ``below`` the policy's, which begins anew on top of it, or ``beside`` the
            policy's, which goes on from it.
        follows: how the reference follows the policy; None: it stays.
        critic: whether and how a critic trains too: None, or with its own ``adapter``, with one that begins as the
            ``reward`` adapter, or as a head on the ``policy``.
        critic_rate: learning rate and largest gradient norm of the critic's own parameters; None: those of all.
        critic_warmup: steps at the beginning in which the critic learns alone.
        bootstrap: whether the critic is read one position behind the last token as well.
        scores_policy: whether the policy makes passes without gradients over what is learned from.
        entropy_passes: passes of the policy without gradients that the updates of a step make over what is learned
            from, for entropies that they must know beforehand.
        entropy_gradient: whether entropy is a part of the loss.
        keeps_states: whether the update holds the hidden states of scored tokens during the backward pass.
        lengths: the keys of the recipe that bound a row in tokens, the one that grows with the examples last.
        updates: optimizer steps of each step.
        epochs: passes with gradients over the data of each step.
        compared: of a step's completions, the share whose log-probs the reference gives too.
        compares: what compares the completions of a prompt with each other and so needs two, in words; empty: nothing.
        prepare: fills in the columns that follow from the algorithm and checks its section; raises ValueError with a
            message that begins with the key.
        no_plan: why nothing is planned for it, as a sentence; empty: it is planned.
        planner: ``(recipe, device, profile) -> Plan``.
        in_fits: whether the tables of what fits on which card have it.
        probed: whether the plan's largest shapes are tried before the first step.
        check: ``(recipe)``, raises UserError before anything is loaded for what only its own libraries can check.
        functions: keys of its section that may name a function of the user's own, as ``path.py:function``.
        checks_quickly: whether `plan` and `data`, which take seconds, ask ``check`` too.
        learner: ``(recipe) -> training.online.Algorithm`` of what samples, for the default of ``build``.
        build: ``(recipe, plan, base, rewards, data, run_directory) -> Loop``.
        run: ``(recipe, path, resume, display) -> RunDirectory``, where there is no shared base: the whole run is its
            own.
        leaves: the folder of the run with its result.
        resumable: whether an interrupted run can be continued.
    """

    name: str
    title: str
    section: str
    settings: type[Section] | None = None
    rows: Row = "prompts"
    output: Output = "text"
    rewards: Rewards = "needed"
    reference: Literal["below", "beside"] | None = None
    follows: Callable[["Recipe"], Following | None] = stays
    critic: Callable[["Recipe"], Literal["adapter", "reward", "policy"] | None] = no_critic
    critic_rate: Callable[["Recipe"], tuple[float | None, float | None]] = as_the_policy
    critic_warmup: Callable[["Recipe"], int] = at_once
    bootstrap: Callable[["Recipe"], bool] = never
    scores_policy: bool = True
    entropy_passes: Callable[["Recipe"], int] = none
    entropy_gradient: Callable[["Recipe"], bool] = never
    keeps_states: bool = False
    lengths: Callable[["Recipe"], dict[str, int]] = sampled_lengths
    updates: Callable[["Recipe"], int] = one_update
    epochs: Callable[["Recipe"], int] = one_update
    compared: Callable[["Recipe"], float] = whole
    compares: Callable[["Recipe"], str] = nothing
    prepare: Callable[["Recipe"], None] = keep
    no_plan: Callable[["Recipe"], str] = nothing
    planner: Reference = "lowmem_rlhf.planning.plan:make_plan"
    in_fits: bool = False
    probed: bool = True
    check: Reference | None = None
    functions: tuple[str, ...] = ()
    checks_quickly: bool = False
    learner: Reference | None = None
    build: Reference = "lowmem_rlhf.algorithms.build:online"
    run: Reference | None = None
    leaves: Literal["adapter", "model"] = "adapter"
    resumable: bool = True

    @property
    def samples(self) -> bool:
        """Whether it learns from completions that it samples."""
        return self.rows == "prompts"

    def own(self, recipe: "Recipe") -> Any:
        """Return the section of a recipe with its settings."""
        return getattr(recipe, self.section)

    def completions(self, recipe: "Recipe") -> int:
        """Return the completions that share a prompt in a step."""
        if self.samples:
            return recipe.generation.num_generations
        return 2 if self.rows == "pairs" else 1


def resolve(reference: Reference) -> Callable[..., Any]:
    """Return the function that a reference names; its module is imported."""
    if callable(reference):
        return reference
    module, _, name = reference.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function
