"""Several tasks in one run: each with its own data, rewards and length of completions. Loads without torch."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.recipe.bounds import MOST_COEFFICIENT, MOST_TOKENS
from lowmem_rlhf.recipe.errors import OptionErrors
from lowmem_rlhf.recipe.section import Section
from lowmem_rlhf.recipe.sections import DataConfig, GenerationConfig, RewardConfig

_UNSET = {"train": "tasks"}  # stands for `data` until the tasks have been read

RewardList = list[Annotated[RewardConfig, BeforeValidator(lambda v: {"function": v} if isinstance(v, str) else v)]]


def _task_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ValueError(f"got {name!r}; a task's name is a part of its metrics: letters, digits, _ and - only")
    return name


class TaskGeneration(Section):
    """What of `generation` a task may have for itself."""

    max_completion_length: int | None = Field(None, ge=1, le=MOST_TOKENS)  # at most that of all tasks

    @model_validator(mode="before")
    @classmethod
    def _of_all_tasks(cls, values: Any) -> Any:
        """Refuse the other keys of `generation`: the completions of a batch are drawn together, all in one way."""
        shared = [key for key in values if key in GenerationConfig.model_fields] if isinstance(values, dict) else []
        if wrong := [key for key in shared if key not in cls.model_fields]:
            raise OptionErrors([f"{key}: holds for all tasks; set generation.{key}" for key in wrong], below="")
        return values


class TaskConfig(Section):
    """One of several tasks. What its `data` lacks is taken from the recipe's; so are its rewards where it has none."""

    name: Annotated[str, AfterValidator(_task_name)]  # a part of its metrics' names
    weight: float = Field(1.0, gt=0, le=MOST_COEFFICIENT)  # how often it has a turn, see mixing
    data: DataConfig
    rewards: RewardList = Field(default_factory=list)  # absent: the recipe's
    generation: TaskGeneration = Field(default_factory=TaskGeneration)
    accuracy: str = ""  # the reward whose value of at least 1 counts as correct; default: the first


class MixingConfig(Section):
    """How often each of several tasks has a turn: its weight, times its size to the power 1 / temperature if asked."""

    by: Literal["weight", "size"] = "weight"  # the weights alone, or times the sizes of the tasks' data
    # of sizes: 1 gives every prompt the same chance, a high one every task (T5, arXiv 1910.10683, section 3.5.2)
    temperature: float = Field(1.0, ge=0.01, le=MOST_COEFFICIENT)
    # standardise the sums of rewards over each task's completions of a step, so that none teaches more by its scale
    normalize: bool = False

    def shares(self, weights: Sequence[float], sizes: Sequence[int]) -> list[float]:
        """Return the share of each task in the prompts; they add up to 1."""
        sized = self.by == "size"
        rates = [w * n ** (1 / self.temperature) if sized else w for w, n in zip(weights, sizes, strict=True)]
        return [rate / sum(rates) for rate in rates]


def spread(values: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe's values in which each task has what the recipe says for all of them.

    Raises:
        ValueError: a key for all tasks that none of them takes.
    """
    tasks, common, rewards = values.get("tasks"), values.get("data"), values.get("rewards")
    if not tasks or not isinstance(tasks, list) or not all(isinstance(task, dict) for task in tasks):
        return values
    if common is not None and not isinstance(common, dict):
        return values
    own = [task.get("data") if isinstance(task.get("data"), dict) else {} for task in tasks]
    common = common or {}
    for key in common:
        if all(key in data for data in own):
            raise ValueError(
                f"data.{key}: every task has its own; set that of one, for example tasks[0].data.{key}, or leave it out"
            )
    if rewards and all(task.get("rewards") for task in tasks):
        raise ValueError("rewards: every task has its own; set tasks[0].rewards or another one's, or leave it out")
    spread_tasks = [
        {**task, "data": {**common, **data}, **({} if task.get("rewards") else {"rewards": rewards or []})}
        for task, data in zip(tasks, own, strict=True)
    ]
    return {**values, "tasks": spread_tasks, "data": _UNSET, "rewards": []}


def data_of_all(tasks: Sequence[TaskConfig]) -> DataConfig:
    """Return what a plan reads of several tasks' data: the first one's, the longest prompt, all held-out rows."""
    longest = max(task.data.max_prompt_length for task in tasks)
    held_out = sum(task.data.eval_size for task in tasks)
    return tasks[0].data.model_copy(update={"max_prompt_length": longest, "eval_size": held_out})


def rewards_of_all(tasks: Sequence[TaskConfig]) -> list[RewardConfig]:
    """Return the rewards of several tasks, each once."""
    rewards: list[RewardConfig] = []
    for task in tasks:
        rewards += [one for one in task.rewards if one not in rewards]
    return rewards


@contextmanager
def of_task(task: str) -> Iterator[None]:
    """Put a task's name before the message of what is wrong with its data or rewards; an empty name is left out."""
    try:
        yield
    except UserError as error:
        if not task:
            raise
        raise UserError(f"task {task}: {error}") from error.__cause__
