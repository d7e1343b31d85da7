"""TRL's own trainers as algorithms of a recipe: which there are, and what is said of those that are not here.

Loads without torch. That a key of the ``trl:`` section is one of TRL's is checked where TRL may be imported, before a
run begins (`algorithms.trl.trainers`).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lowmem_rlhf.algorithms.spec import AlgorithmSpec
from lowmem_rlhf.algorithms.trl.settings import max_length
from lowmem_rlhf.suggest import did_you_mean

if TYPE_CHECKING:
    from lowmem_rlhf.recipe.schema import Recipe

PREFIX = "trl/"


@dataclass(frozen=True)
class TRLTrainer:
    """One of TRL's trainers.

    Attributes:
        module, trainer, config: where TRL has its classes.
        reference: whether its loss compares with a reference.
        labelled: it learns from single answers that are labelled good or bad (or from pairs, which are taken apart).
        full_logits: it asks for the logits of all positions, where others take log-probs.
    """

    module: str
    trainer: str
    config: str
    reference: bool = False
    labelled: bool = False
    full_logits: bool = False


TRL_TRAINERS: dict[str, TRLTrainer] = {
    "trl/dpo": TRLTrainer("trl", "DPOTrainer", "DPOConfig", reference=True),
    "trl/kto": TRLTrainer("trl", "KTOTrainer", "KTOConfig", reference=True, labelled=True),
    "trl/orpo": TRLTrainer("trl.experimental.orpo", "ORPOTrainer", "ORPOConfig", full_logits=True),
    "trl/cpo": TRLTrainer("trl.experimental.cpo", "CPOTrainer", "CPOConfig", full_logits=True),
}

_OWN = {"sft": "sft", "reward": "reward_model", "grpo": "grpo", "rloo": "rloo", "ppo": "ppo"}
_LOSSES = {
    "simpo": "algorithm: trl/cpo with trl.loss_type: simpo and trl.cpo_alpha: 0",
    "alphapo": "algorithm: trl/cpo with trl.loss_type: alphapo",
    "ipo": "algorithm: trl/dpo with trl.loss_type: ipo",
    "apo": "algorithm: trl/dpo with trl.loss_type: apo_zero",
}
_OTHERS = {
    "tpo": "it learns from three answers to a prompt",
    "online_dpo": "it samples while it trains",
    "gmpo": "it samples while it trains",
    "a2po": "it samples while it trains",
    "sdpo": "it samples while it trains",
    "gkd": "it learns from a second, larger model",
    "gold": "it learns from a second, larger model",
    "distillation": "it learns from a second, larger model",
}


def check_name(name: Any) -> Any:
    """Return an algorithm's name as it is, unless it names a trainer of TRL's that this package does not run.

    Raises:
        ValueError: it does.
    """
    if isinstance(name, str) and PREFIX + name.lower() in TRL_TRAINERS:
        raise ValueError(f"got {name!r}; it is TRL's, write {PREFIX + name.lower()}")
    if not isinstance(name, str) or not name.startswith(PREFIX) or name in TRL_TRAINERS:
        return name
    kind = name.removeprefix(PREFIX).lower()
    there = ", ".join(TRL_TRAINERS)
    if kind in _OWN:
        raise ValueError(f"got {name!r}; this package has its own, algorithm: {_OWN[kind]} (TRL's here: {there})")
    if kind in _LOSSES:
        raise ValueError(f"got {name!r}; TRL has it as a loss of another trainer: {_LOSSES[kind]}")
    if kind in _OTHERS:
        raise ValueError(f"got {name!r}, which cannot run here: {_OTHERS[kind]}; there are {there}")
    hint = did_you_mean(name, TRL_TRAINERS)
    raise ValueError(f"got {name!r}; TRL has no such trainer that learns from given answers{hint} (there are {there})")


def _prepare(recipe: "Recipe") -> None:
    """Set the columns of a recipe's ``data`` that follow from the trainer.

    They are ``chosen`` and ``rejected``; where the trainer takes labelled answers and one of their columns is named,
    ``completion`` and ``label``.

    Raises:
        ValueError: a column that the trainer does not read, or too few examples in a step.
    """
    data, trainer = recipe.data, TRL_TRAINERS[recipe.algorithm]
    if data.margin is not None:
        raise ValueError("data.margin: is for reward_model; TRL's losses know none, leave it out")
    if data.text:
        raise ValueError("data.text: whole texts are neither better nor worse; name data.prompt and its answers")
    labelled = trainer.labelled and (data.label or data.completion)
    if (data.label or data.completion) and not trainer.labelled:
        raise ValueError("data.label, data.completion: labelled answers are for trl/kto; name data.chosen and rejected")
    if labelled and (data.chosen or data.rejected):
        raise ValueError("data: got chosen or rejected and completion or label; trl/kto learns from one kind of them")
    if labelled:
        data.completion, data.label = data.completion or "completion", data.label or "label"
    else:
        data.chosen, data.rejected = data.chosen or "chosen", data.rejected or "rejected"
    if trainer.labelled and recipe.training.prompts_per_step < 2:
        raise ValueError(
            "training.prompts_per_step: got 1; trl/kto compares the answers of a step with each other's prompts and "
            "needs at least 2"
        )


def _spec(name: str, trainer: TRLTrainer) -> AlgorithmSpec:
    return AlgorithmSpec(
        name=name,
        title=f"TRL's {trainer.trainer.removesuffix('Trainer')}",
        section="trl",
        rows="answers" if trainer.labelled else "pairs",
        rewards="optional",
        reference="beside" if trainer.reference else None,
        lengths=lambda recipe: {"trl.max_length": max_length(recipe.trl)},
        prepare=_prepare,
        planner="lowmem_rlhf.algorithms.trl.plan:plan_trl",
        probed=False,  # its passes are TRL's
        check="lowmem_rlhf.algorithms.trl.trainers:checked_arguments",
        build="lowmem_rlhf.algorithms.trl.update:make_trl_loop",
    )


SPECS = tuple(_spec(name, trainer) for name, trainer in TRL_TRAINERS.items())
