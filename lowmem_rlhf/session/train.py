"""From a recipe to a finished run: device, plan, data, base, training, report. The command line calls nothing else."""

import importlib.util
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem_rlhf.data.preview import with_format
from lowmem_rlhf.data.provenance import check_base, check_learned, check_resumed_data, run_inputs
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.hardware.cpu_process import bound_kernel_caches
from lowmem_rlhf.hardware.detect import detect
from lowmem_rlhf.inference.base import check_computes, held_against_stock, open_base
from lowmem_rlhf.planning.advice import warning, why_not
from lowmem_rlhf.planning.plan import Plan, check_positions
from lowmem_rlhf.planning.run_plan import planned, resumed_plan, running_plan
from lowmem_rlhf.quiet import hush
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.recipe.trl import TRL_TRAINERS
from lowmem_rlhf.run.directory import RunDirectory, default_output
from lowmem_rlhf.run.start import as_written, located, paths_explained

if TYPE_CHECKING:
    from lowmem_rlhf.training.loop import Loop


def train(recipe: Recipe, output: Path | None = None, resume: bool = False) -> RunDirectory:
    """Run a recipe and return its run directory; everything the user watches is printed.

    Raises:
        UserError: the input is wrong; nothing was trained.
        RunError: the run had begun and failed; a note says which step is kept.
    """
    hush()
    bound_kernel_caches()
    path = output or default_output(recipe.name, resume)
    with paths_explained(path, recipe) if resume else nullcontext():
        return _train(located(recipe, path) if resume else recipe, path, resume, recipe)


def _train(recipe: Recipe, path: Path, resume: bool, written: Recipe) -> RunDirectory:
    """Train as `train` does; ``written`` is the recipe with its paths as they stand in the file."""
    _check_trackers(recipe)
    recipe, said = with_format(recipe)
    if said:
        print(said, flush=True)
    if recipe.rewards and recipe.algorithm in ("reward_model", "classifier"):
        raise UserError(f"rewards: {recipe.algorithm} learns from its data alone; leave them out (rewards=[])")
    if recipe.algorithm == "classifier":
        from lowmem_rlhf.algorithms.classifier.update import train_classifier_run

        check_computes(detect(recipe.hardware.device))
        return train_classifier_run(recipe, path, resume)
    if recipe.algorithm in TRL_TRAINERS:
        from lowmem_rlhf.algorithms.trl.trainers import checked_arguments

        checked_arguments(recipe)
    recipe = _as_saved(recipe)
    plan = resumed_plan(recipe, path) if resume else running_plan(recipe)
    probes = _probes(recipe, plan)
    if not plan.fits and not (plan.verdict == "unknown" and probes):
        raise UserError(why_not(plan, recipe))
    recipe = planned(recipe, plan)
    from lowmem_rlhf.rewards.loading import check_reward_columns, load_rewards, placements
    from lowmem_rlhf.rewards.references import check_run_references

    free_bytes = plan.memory["budget_bytes"] - plan.memory["peak_bytes"]
    rewards = load_rewards(recipe.rewards, plan.device.torch_device, free_bytes, recipe.model, recipe.revision)
    placed: dict[str, Any] = {"rewards": placements(rewards)}
    RunDirectory.check(path, as_written(recipe, written, path), resume)
    if resume:
        check_base(RunDirectory(path), recipe, resume)
        check_learned(RunDirectory(path), recipe, resume)

    from lowmem_rlhf.data.examples import read_data
    from lowmem_rlhf.data.sources import load_rows
    from lowmem_rlhf.engine.tokenizer import load_tokens

    rows, held_out_rows = load_rows(recipe.data, "train", recipe.training.seed), []
    if recipe.data.eval_size:
        held_out_rows = load_rows(recipe.data, "eval", recipe.training.seed)
    if resume:
        check_resumed_data(RunDirectory(path), written, rows, held_out_rows)
    if rewards:
        given = ["answer"] if recipe.data.answer is not None else []
        check_reward_columns(rewards, {name for row in rows for name in [*row, *given]})
        for said in check_run_references(rewards, recipe, rows, held_out_rows):
            print(said, flush=True)

    from lowmem_rlhf.algorithms.build import make_trainer
    from lowmem_rlhf.display.bars import progress_bar
    from lowmem_rlhf.display.live import LiveView, print_evaluation, print_plan
    from lowmem_rlhf.report.html import write_report
    from lowmem_rlhf.training.roles import add_roles

    print_plan({**plan.to_dict(), **placed})
    options = recipe.data.chat_template_kwargs
    tokens = load_tokens(recipe.model, recipe.revision, recipe.trust_remote_code, chat_template_kwargs=options)
    assert tokens is not None  # the Hub may be asked
    with progress_bar("rows") as progress:
        data = read_data(recipe, rows, held_out_rows, tokens, progress)
    base = open_base(recipe, plan)
    base.chat_template_kwargs = options
    if base.stop_ids != tokens.stop_ids:  # a model may know of more ends than its files say
        data = read_data(recipe, rows, held_out_rows, base.tokens)
    if resume:
        check_base(RunDirectory(path), recipe, resume)  # once more: now a Hub's model is here
    limit = base.rotary_limit
    check_positions(
        recipe, limit, f"takes other rotary factors for all texts of a pass once one has over {limit} tokens"
    )
    placed["check"] = held_against_stock(base, recipe, plan.settings.rollout_weights == "dequantized")
    if base.note:
        print(base.note, flush=True)
        key = "micro_batch_tokens"
        plan = replace(plan, reasons={**plan.reasons, key: f"{plan.reasons[key]}; {base.note}"})
    add_roles(base, recipe, plan, rewards)
    if probes:
        from lowmem_rlhf.training.probe import probe

        plan, probed = probe(base, recipe, plan)
        print(probed.said, flush=True)
        placed["probe"] = probed.to_dict()
    elif said := warning(plan):
        print(said, flush=True)

    def run_directory(resolved: Recipe) -> RunDirectory:
        inputs = None if resume else run_inputs(recipe, rows, held_out_rows)
        kept = as_written(resolved, written, path)
        return RunDirectory.create(path, kept, {**plan.to_dict(), **placed}, resume, inputs)

    make: Callable[..., Loop] = make_trainer
    if recipe.algorithm in TRL_TRAINERS:
        from lowmem_rlhf.algorithms.trl.update import make_trl_loop as make
    trainer = make(recipe, plan, base, rewards, data, run_directory)
    if resume:
        trainer.resume()
    print(f"run directory: {trainer.run.path}", flush=True)
    with LiveView(trainer.recipe.training.max_steps, trainer.step) as view:
        evaluation = trainer.train(view, view.step)
    write_report(trainer.run)
    if evaluation:
        print_evaluation(evaluation)
    return trainer.run


def _probes(recipe: Recipe, plan: Plan) -> bool:
    """Whether the plan is tried out: on a CPU, where memory is not so short, only if asked to."""
    if recipe.algorithm in TRL_TRAINERS:
        return False
    wanted = recipe.hardware.probe
    return not plan.device.on_cpu if wanted == "auto" else wanted


def _as_saved(recipe: Recipe) -> Recipe:
    """Return the recipe with the shape of the adapter that it continues from.

    Raises:
        UserError: that adapter is not there, belongs to another base or has another shape than the recipe sets.
    """
    if recipe.adapter is None:
        return recipe
    from lowmem_rlhf.architecture.adapters import saved_adapter

    saved = saved_adapter(recipe.adapter, recipe.model, recipe.revision)
    for key in ("r", "lora_alpha"):
        value = getattr(recipe.lora, key)
        if key in recipe.lora.model_fields_set and value not in ("auto", getattr(saved, key)):
            raise UserError(
                f"lora.{key}: got {value:g}, but the adapter that the recipe continues from ({recipe.adapter}) has "
                f"{getattr(saved, key):g}; leave it out or set it to that"
            )
    targets = recipe.lora.target_modules
    if isinstance(targets, list) and isinstance(saved.target_modules, list):
        wanted, there = ({name.rsplit(".", 1)[-1] for name in names} for names in (targets, saved.target_modules))
        if wanted != there:
            raise UserError(
                f"lora.target_modules: got {', '.join(targets)}, but the adapter that the recipe continues from "
                f"({recipe.adapter}) is beside {', '.join(sorted(there))}; leave it out or set it to that"
            )
    lora = recipe.lora.model_copy(update={"r": saved.r, "lora_alpha": saved.lora_alpha})
    return recipe.model_copy(update={"lora": lora})


def _check_trackers(recipe: Recipe) -> None:
    modules = {"tensorboard": ("tensorboard", "tensorboardX")}
    for tracker in recipe.training.report_to:
        if not any(importlib.util.find_spec(name) for name in modules.get(tracker, (tracker,))):
            raise UserError(f"training.report_to: {tracker} is not installed; pip install {tracker}, or leave it out")
