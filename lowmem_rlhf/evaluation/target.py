"""The target of an evaluation: a run's policy and its reference on one base, or a model by itself, with the problems.

A model is loaded in the precision that its weights are stored in, whatever the recipe says: quantizing a merged model
to 4 bits, or rounding it to bfloat16, would lose what training changed.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from lowmem_rlhf.architecture.source import resolve_model
from lowmem_rlhf.data.preview import with_format
from lowmem_rlhf.data.provenance import other_learned, recorded_rows
from lowmem_rlhf.data.sources import SplitRows
from lowmem_rlhf.data.values import Row
from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.ladder import Ladder
from lowmem_rlhf.engine.load import quiet
from lowmem_rlhf.engine.roles import POLICY, REFERENCE
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.evaluation.problems import check_overrides, held_out_rows
from lowmem_rlhf.hardware.detect import detect
from lowmem_rlhf.hardware.device import Device
from lowmem_rlhf.inference.base import held_against_stock, open_base
from lowmem_rlhf.inference.open_run import OpenRun
from lowmem_rlhf.inference.opening import add_initial_adapter, check_device, open_trained
from lowmem_rlhf.planning.plan import Plan, Settings
from lowmem_rlhf.planning.run_plan import in_one_process, running_plan
from lowmem_rlhf.progress import message
from lowmem_rlhf.recipe.field_roles import fields_with
from lowmem_rlhf.recipe.loading import load_recipe
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.recipe.sections import HardwareConfig, LoraSettings
from lowmem_rlhf.recipe.tasks import of_task
from lowmem_rlhf.rewards.loading import Reward, load_rewards, rewards_by_task
from lowmem_rlhf.rewards.references import check_rows
from lowmem_rlhf.rollout.engine import Engine, engine_for
from lowmem_rlhf.run.directory import RECIPE
from lowmem_rlhf.run.start import located, paths_explained
from lowmem_rlhf.run.trust import check_code
from lowmem_rlhf.training.roles import bind_rewards, share_ladder

logger = logging.getLogger(__name__)

Rows = Sequence[Row]


@dataclass(frozen=True)
class EvalTarget:
    """A base with the roles to evaluate.

    Attributes:
        roles: role on the base by the name that results have.
        rows: held-out rows of the data, by task (see `Recipe.by_task`).
        ladder: how passes and rollouts are cut.
        engine: what samples answers.
        steps: that the policy was trained for; None: a model.
    """

    base: SharedBase
    recipe: Recipe
    rewards: Sequence[Reward]
    rows: Mapping[str, Rows]
    roles: dict[str, str]
    ladder: Ladder
    engine: Engine
    steps: int | None = None

    def by_task(self) -> "dict[str, EvalTarget]":
        """Return the same base and roles for each task alone."""
        rewards, rows = rewards_by_task(self.recipe, self.rewards), self.rows
        return {
            task: replace(self, recipe=own, rewards=rewards[task], rows={"": rows[task]})
            for task, own in self.recipe.by_task.items()
            if task in self.rows
        }


def open_run_target(
    opened: OpenRun, overrides: list[str], device: str | None = None, judged: bool = True
) -> EvalTarget:
    """Open a run: its base once, with the trained policy and the reference that it is compared with.

    Args:
        overrides: changes of the recipe that leave what was learned alone.
        device: as in a recipe; None: that of the run's recipe.
        judged: read the held-out rows and the rewards.

    Raises:
        UserError: as `open_policy`; the run names code of elsewhere (see `run.trust`); an override that is not
            allowed, or no held-out rows.
        RunError: the device's memory ran out.
    """
    check_overrides(overrides)
    overrides = [*overrides, *_task_lengths(opened.recipe, overrides)]
    path, written = opened.directory.path, opened.written  # which asks for what the recipe would execute
    changed = load_recipe(str(path / RECIPE), overrides, quiet=True)
    recipe = located(changed, path, written)
    if judged:
        _check_rewards_code(opened, recipe)
    with paths_explained(path, written):
        return _open_run(opened, recipe, overrides, device, judged)


def _task_lengths(recipe: Recipe, overrides: list[str]) -> list[str]:
    """Return overrides that keep the completions of each task to a length that is given for all."""
    key = "generation.max_completion_length"
    given = [value.strip() for name, _, value in (one.partition("=") for one in overrides) if name.strip() == key]
    if not given or not given[-1].isdecimal():
        return []
    most = [task.generation.max_completion_length for task in recipe.tasks]
    return [f"tasks[{n}].{key}={given[-1]}" for n, own in enumerate(most) if own is not None and own > int(given[-1])]


def _check_rewards_code(opened: OpenRun, recipe: Recipe) -> None:
    """Check that the rewards that the run itself names may be executed; those of this command's overrides may."""
    own = {reward.function for reward in opened.recipe.rewards}
    values = {"rewards": [{"function": one.function if one.function in own else ""} for one in recipe.rewards]}
    check_code(opened.directory.path, values)


def _open_run(opened: OpenRun, recipe: Recipe, overrides: list[str], device: str | None, judged: bool) -> EvalTarget:
    run = opened.directory
    if recipe.spec.output == "classes":
        raise UserError(
            f"the run in {run.path} trained a {recipe.spec.title}; its held-out results stand in evaluation.json, "
            "and it can be used as a reward"
        )
    opened.check_base()
    _check_learned(opened, recipe)
    rows = _held_out(recipe, opened, {one.partition("=")[0].strip() for one in overrides}) if judged else {}
    hardware = detect(device or recipe.hardware.device)
    rewards = _rewards(recipe, rows, hardware, _spare_bytes(opened.plan, hardware)) if judged else []
    base = open_trained(opened, device)
    roles = {POLICY: POLICY}
    if recipe.spec.output == "text":  # a score head that has not learned says nothing
        add_initial_adapter(base, recipe)
        roles = {REFERENCE: REFERENCE, POLICY: POLICY}
    last = max((int(row["step"]) for row in run.metrics() if "step" in row), default=0)
    if recipe.training.num_train_epochs is not None:  # the steps that came of them
        recipe = recipe.model_copy(update={"training": recipe.training.model_copy(update={"max_steps": last})})
    steps = last if opened.step is None else opened.step
    return _target(base, recipe, rewards, rows, roles, opened.plan.settings, steps)


def _held_out(recipe: Recipe, opened: OpenRun | None = None, changed: Collection[str] = ()) -> dict[str, Rows]:
    """Return the held-out rows of each task that holds some out, or of the only one.

    Args:
        recipe: with the changes of this evaluation.
        opened: the run that is evaluated; None: a model is.
        changed: keys of the recipe that this evaluation sets.
    """
    rows: dict[str, Rows] = {}
    tasks = recipe.by_task
    for number, (task, own) in enumerate(tasks.items()):
        if not own.data.eval_size and any(other.data.eval_size for other in tasks.values()):
            message(f"task {task}: nothing is held out of it, so it is left out here")
            continue
        trained = opened.recipe.by_task[task] if opened else None
        recorded = recorded_rows(opened.directory, task).get("eval") if opened else None
        named = not {"data.eval", f"tasks[{number}].data.eval"}.isdisjoint(changed)
        with of_task(task):
            rows[task] = held_out_rows(trained, own, recorded, named)
    return rows


def _spare_bytes(plan: Plan, hardware: Device) -> int:
    """Return what a plan leaves free of the device that it was made for; of another one nothing is known."""
    if hardware.torch_device != plan.device.torch_device:
        return 0
    return int(plan.memory["budget_bytes"] - plan.memory["peak_bytes"])


def open_model_target(
    model: str, recipe: Recipe, overrides: list[str], device: str | None, judged: bool = True
) -> EvalTarget:
    """Open a model by itself for the held-out data and the rewards of a recipe.

    Args:
        model: as in a recipe.
        overrides: those that were applied to the recipe; only they may set another precision.
        judged: read the held-out rows and the rewards.

    Raises:
        UserError: it cannot be loaded, the recipe judges no answers, or nothing is held out.
        RunError: the device's memory ran out.
    """
    if recipe.spec.output != "text":
        raise UserError(
            f"--recipe {recipe.name}: {recipe.algorithm} judges texts and has nothing to evaluate of a model"
        )
    detected = detect(device or recipe.hardware.device)
    hardware: dict[str, Any] = {"device": device or recipe.hardware.device}
    keys = {override.partition("=")[0].strip() for override in overrides}
    if "hardware.quantization" not in keys:
        hardware["quantization"] = "none"
    if "hardware.compute_dtype" not in keys:
        hardware["compute_dtype"] = _stored_dtype(model, recipe, detected)
    update = {"model": model, "adapter": None, "hardware": recipe.hardware.model_copy(update=hardware)}
    recipe = in_one_process(recipe.model_copy(update=update))
    if judged:
        recipe, note = with_format(recipe, "eval")
        if note:
            message(note)
    plan = running_plan(recipe)
    settings = plan.settings
    check_device(detected, settings.compute_dtype)
    rows = _held_out(recipe) if judged else {}
    rewards = _rewards(recipe, rows, detected, _spare_bytes(plan, detected)) if judged else []
    precision = f"{settings.quantization.replace('none', 'unquantized')}, {settings.compute_dtype}"
    # the reference needs no adapter, so the one that every base has is as small as can be
    plain = recipe.model_copy(update={"lora": LoraSettings(r=1)})
    base = open_base(plain, plan, where=f" on {detected.name} ({precision})", remedy="take --device cpu")
    held_against_stock(base, recipe, settings.rollout_weights == "dequantized")
    return _target(base, recipe, rewards, rows, {"model": REFERENCE}, settings, None)


def _target(
    base: SharedBase,
    recipe: Recipe,
    rewards: Sequence[Reward],
    rows: Mapping[str, Rows],
    roles: dict[str, str],
    settings: Settings,
    steps: int | None,
) -> EvalTarget:
    batching = fields_with(HardwareConfig, only_batching=True)
    pinned = {key: value for key in batching if (value := getattr(recipe.hardware, key)) != "auto"}
    settings = replace(settings, **pinned)
    ladder = Ladder.of(replace(settings, keep_graphs=False), base.device)  # it samples once
    bind_rewards(base, rewards)
    share_ladder(rewards, ladder)
    engine = engine_for(base, recipe.generation.engine, settings.rollout_weights == "dequantized")
    return EvalTarget(base, recipe, rewards, rows, roles, ladder, engine, steps)


def _check_learned(opened: OpenRun, recipe: Recipe) -> None:
    """Warn of models of rewards that are not those of the run.

    Raises:
        UserError: the adapter that is the reference is another one.
    """
    opened.check_initial_adapter(recipe)
    for difference in other_learned(opened.directory, recipe).values():
        logger.warning(difference)


def _rewards(recipe: Recipe, rows: Mapping[str, Rows], device: Device, free_bytes: int) -> list[Reward]:
    rewards = load_rewards(recipe.rewards, device.torch_device, max(0, free_bytes), recipe.model, recipe.revision)
    for note in check_rows(rewards, recipe, {task: SplitRows([], held_out) for task, held_out in rows.items()}):
        message(note)
    return rewards


def _stored_dtype(model: str, recipe: Recipe, device: Device) -> str:
    """Return the dtype to compute in: the one that holds the stored weights exactly, where the device has it."""
    from transformers import AutoConfig

    path = resolve_model(model)
    stored = torch.float16  # what a GGUF becomes
    if not path.endswith(".gguf"):
        try:
            with quiet():
                config = AutoConfig.from_pretrained(
                    path, revision=recipe.revision, trust_remote_code=recipe.trust_remote_code
                )
        except (OSError, ValueError) as error:
            raise UserError(f"model {model!r} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
        stored = getattr(config.get_text_config(), "dtype", None) or torch.float32
    if stored == torch.float16:  # a CPU takes ten times longer for it than for float32, which holds the same numbers
        return "float16" if device.capabilities.fast_float16 else "float32"
    if stored == torch.bfloat16:
        return "bfloat16" if device.bf16 else "float32"
    return "float32"
