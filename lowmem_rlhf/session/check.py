"""The check of a recipe before its run: what its rows become, and every fault of its inputs that needs no weights.

`lowmem-rlhf data` prints it; `plan`, `--dry-run` and training hold their recipe against the same checks.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lowmem_rlhf.algorithms.spec import resolve
from lowmem_rlhf.architecture.adapters import adapter_folder
from lowmem_rlhf.data.bad_rows import RowReport
from lowmem_rlhf.data.examples import classes_of
from lowmem_rlhf.data.preview import SplitPreview, preview_split, with_format
from lowmem_rlhf.data.sources import SplitRows, is_on_hub, load_tasks
from lowmem_rlhf.data.tasks import Split
from lowmem_rlhf.data.values import Row
from lowmem_rlhf.engine.tokenizer import Tokens, load_tokens
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.progress import reported_as
from lowmem_rlhf.recipe.data_sources import is_generated
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.recipe.sections import LEARNED_REWARDS, REWARD_ADAPTER, RewardConfig
from lowmem_rlhf.recipe.tasks import of_task
from lowmem_rlhf.rewards.loading import load_rewards
from lowmem_rlhf.rewards.references import check_rows

QUICK_ROWS = 5000  # of each split that are looked at where an answer takes seconds, as of `plan`
SPLITS: tuple[Split, Split] = ("train", "eval")


@dataclass
class RecipeCheck:
    """What was found.

    Attributes:
        recipe: with the columns of the format that its data have.
        splits: by task (see `Recipe.by_task`) ``train``, and ``eval`` where something is held out; empty where the data
            were not at hand.
        notes: what is worth saying of the recipe as a whole.
        errors: what keeps it from running, a message each.
    """

    recipe: Recipe
    splits: dict[str, dict[str, SplitPreview]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        recipe = self.recipe
        splits = {task: {name: one.to_dict() for name, one in own.items()} for task, own in self.splits.items()}
        return {
            "recipe": recipe.name,
            "algorithm": recipe.algorithm,
            "model": recipe.model,
            "said": self.notes,
            **({"tasks": splits} if recipe.tasks else splits.get("", {})),
            "step": self._step(),
            "errors": self.errors,
        }

    def lines(self) -> list[str]:
        """Return what is worth saying, of the recipe, of what is left out of its rows, and of the others."""
        lines = list(self.notes)
        for task, splits in self.splits.items():
            for split in splits.values():
                own = ["\n  ".join(split.dropped)] if split.dropped else []
                lines += [f"task {task}: {line}" if task else line for line in [*own, *split.said]]
        return lines

    def raise_errors(self) -> None:
        """Check that the recipe can run.

        Raises:
            UserError: it cannot; the message has every error.
        """
        if self.errors:
            raise UserError("\n".join(self.errors))

    def _step(self) -> dict[str, Any]:
        """Return what a step reads and learns, as far as the data say it."""
        recipe, tasks = self.recipe, [own["train"] for own in self.splits.values() if "train" in own]
        if not tasks or len(tasks) < len(recipe.tasks) or not all(one.kept_lengths and one.kept for one in tasks):
            return {}
        prompts = recipe.training.prompts_per_step
        kept = [one.kept for one in tasks]
        shares = recipe.mixing.shares([task.weight for task in recipe.tasks] or [1.0], kept)
        means = [sum(one.kept_lengths) / len(one.kept_lengths) for one in tasks]
        mean = sum(share * length for share, length in zip(shares, means, strict=True))
        epoch = {} if recipe.data.streaming else {"steps_per_epoch": math.ceil(sum(kept) / prompts)}
        step: dict[str, Any] = {"examples": prompts, **epoch}
        if recipe.spec.samples:
            completions = prompts * recipe.generation.num_generations
            most = completions * recipe.generation.max_completion_length
            return {
                **step,
                "prompt_tokens": round(prompts * mean),
                "completions": completions,
                "generated_at_most": most,
            }
        learned = sum(share * sum(one.learned) / one.kept for share, one in zip(shares, tasks, strict=True))
        return {**step, "tokens": round(prompts * mean), "learned_tokens": round(prompts * learned)}


def check_recipe(recipe: Recipe, shown: int = 3, network: bool = True, most: int | None = None) -> RecipeCheck:
    """Check a recipe's data, rewards and tokenizer.

    Where no example is to be shown, rows that are all generated are not tokenized: nothing is wrong with them, and
    torch need not be imported.

    Args:
        shown: how many examples of each split are kept as texts.
        network: whether the Hub may be asked for what is not on this disk; if not, that is left out and said.
        most: rows of each split that are tokenized, where there are more; None: all.

    Raises:
        UserError: the data cannot be read at all, or the model has no tokenizer.
    """
    sources = _sources(recipe)
    away = [f"{key} ({source})" for key, source in sources if is_on_hub(source)]
    if away and not network:
        check = RecipeCheck(recipe)
        check.notes.append(
            f"{', '.join(away)} is on the Hub; `lowmem-rlhf data` looks at it, and so does training before it starts"
        )
        _check_rewards(check, {})
        _check_algorithm(check)
        _check_adapter(check, network)
        return check
    recipe, line = with_format(recipe)
    check = RecipeCheck(recipe, notes=[line] if line else [])
    tokens = None
    if shown or not all(is_generated(source) for _, source in sources):
        options = recipe.data.chat_template_kwargs
        tokens = load_tokens(recipe.model, recipe.revision, recipe.trust_remote_code, network, options)
    if tokens is None and not all(is_generated(own.data.train) for own in recipe.by_task.values()):
        check.notes.append(f"the tokenizer of {recipe.model} is not on this disk, so that no row was tokenized")
    rows = load_tasks(recipe)
    for task in recipe.by_task:
        _check_task(check, task, rows[task], tokens, shown, most)
    _check_rewards(check, rows)
    _check_algorithm(check)
    _check_adapter(check, network)
    return check


def _sources(recipe: Recipe) -> list[tuple[str, str]]:
    """Return the recipe's sources of rows by key."""
    keys = [f"tasks[{number}].data" for number in range(len(recipe.tasks))] or ["data"]
    named = [
        (f"{key}.{split}", getattr(own.data, split))
        for key, own in zip(keys, recipe.by_task.values(), strict=True)
        for split in SPLITS
    ]
    return [(key, source) for key, source in named if source]


def _check_task(
    check: RecipeCheck, task: str, rows: SplitRows, tokens: Tokens | None, shown: int, most: int | None
) -> None:
    report, whole, before = None, True, f"task {task}: " if task else ""
    check.splits[task] = {}
    if check.recipe.by_task[task].data.streaming:
        check.notes.append(f"{before}data.streaming: the first {len(rows.train):,} training rows were looked at")
    for split, of_split in zip(SPLITS, (rows.train, rows.held_out), strict=True):
        if tokens is not None and most is not None and len(of_split) > most:
            whole = False
            check.notes.append(
                f"{before}of {len(of_split):,} {split} rows the first {most:,} were looked at; `lowmem-rlhf data` "
                "looks at all"
            )
        if of_split:
            report = _check_split(check, task, split, of_split[:most], tokens, shown, report)
    if whole:
        _check_kinds(check, task)


def _check_split(
    check: RecipeCheck,
    task: str,
    split: Split,
    rows: Sequence[Row],
    tokens: Tokens | None,
    shown: int,
    before: RowReport | None,
) -> RowReport | None:
    own, report = check.recipe.by_task[task], None
    try:
        with of_task(task):
            progress = reported_as(f"{task} {split} rows".lstrip())
            check.splits[task][split], report = preview_split(own, split, rows, tokens, shown, progress, before)
            if tokens is not None:
                report.check()
    except UserError as error:
        check.errors.append(str(error))
    return report


def _check_adapter(check: RecipeCheck, network: bool) -> None:
    """Say that the first stage is missing: no fault of a plan, which may be made before any stage has run."""
    try:
        if check.recipe.adapter:
            adapter_folder(check.recipe.adapter, fetch=network)
    except UserError as error:
        check.notes.append(f"training cannot begin yet: {error}")


def _check_kinds(check: RecipeCheck, task: str) -> None:
    """Check that there are answers, or classes, of more than one kind: of all rows, as a file may be sorted by them."""
    train, held_out = check.splits[task].get("train"), check.splits[task].get("eval")
    if train is None or not train.kept:
        return
    if train.fault:
        check.errors.append(train.fault)
    if check.recipe.spec.rows == "texts":
        try:
            classes_of(train.classes, held_out.classes if held_out else ())
        except UserError as error:
            check.errors.append(str(error))


def _check_algorithm(check: RecipeCheck) -> None:
    """Ask the algorithm for what only it can check, where that takes no time."""
    spec = check.recipe.spec
    if spec.check is None or not spec.checks_quickly:
        return
    try:
        resolve(spec.check)(check.recipe)
    except UserError as error:
        check.errors.append(str(error))


def _check_rewards(check: RecipeCheck, rows: Mapping[str, SplitRows]) -> None:
    """Check rewards that are functions; the models of learned ones are loaded when training starts."""
    recipe = check.recipe.with_each(lambda _, own: own.model_copy(update={"rewards": _functions(own.rewards)}))
    try:
        rewards = load_rewards(recipe.rewards)
        if rows and all(own.train for own in rows.values()):
            check.notes += check_rows(rewards, recipe, rows)
    except UserError as error:
        check.errors.append(str(error))


def _functions(rewards: Sequence[RewardConfig]) -> list[RewardConfig]:
    return [one for one in rewards if one.function not in (*LEARNED_REWARDS, REWARD_ADAPTER)]
