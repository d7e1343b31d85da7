"""From a recipe to a finished run: device, plan, data, base, training, report. The command line calls nothing else."""

import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem_rlhf.data.preview import with_format
from lowmem_rlhf.errors import RunError, UserError
from lowmem_rlhf.hardware.cpu_process import bound_kernel_caches
from lowmem_rlhf.hardware.detect import detect
from lowmem_rlhf.hardware.device import Device
from lowmem_rlhf.hardware.profiles import find_profile, match_profile, parse_bytes, profile_device
from lowmem_rlhf.planning.advice import warning, why_not
from lowmem_rlhf.planning.plan import Plan, check_positions, make_plan
from lowmem_rlhf.recipe import Recipe
from lowmem_rlhf.recipe_trl import TRL_TRAINERS
from lowmem_rlhf.run import RunDirectory, default_output
from lowmem_rlhf.run_inputs import check_base, check_learned, check_resumed_data, run_inputs
from lowmem_rlhf.run_start import as_written, located, paths_explained

if TYPE_CHECKING:
    from lowmem_rlhf.model.base import SharedBase
    from lowmem_rlhf.training.loop import Loop


def planned_device(recipe: Recipe) -> tuple[Device, str]:
    """Return the device to plan for and its profile's name, without touching it.

    A named profile (or ``vram``) stands for a card that need not be here.

    Raises:
        UserError: no such device or profile, or an unusable amount of memory.
    """
    hardware = recipe.hardware
    if hardware.profile != "auto":
        profile = find_profile(hardware.profile)
        return profile_device(profile, hardware.vram), profile.key
    device = detect(hardware.device)
    profile = match_profile(device)
    return _limited(device, hardware.vram), profile.key


def _limited(device: Device, vram: str | None) -> Device:
    if vram is None:
        return device
    limit = parse_bytes(vram)
    note = f"planned for {vram} as hardware.vram says"
    return replace(device, total_bytes=limit, free_bytes=min(limit, device.free_bytes), notes=(*device.notes, note))


def plan_recipe(recipe: Recipe) -> Plan:
    """Choose every setting of a recipe for its device (see `planned_device`)."""
    device, profile = planned_device(recipe)
    return _planner(recipe)(recipe, device, profile)


def _planner(recipe: Recipe) -> Callable[[Recipe, Device, str], Plan]:
    if recipe.algorithm in TRL_TRAINERS:
        from lowmem_rlhf.training.trl_plan import plan_trl

        return plan_trl
    return make_plan


def running_plan(recipe: Recipe) -> Plan:
    """Plan for a run on this machine: a named profile lends its memory, the device that is here computes."""
    device, profile = planned_device(recipe)
    if device.source == "profile":
        here = detect(recipe.hardware.device)
        free = min(device.free_bytes, here.free_bytes)
        device = replace(here, total_bytes=device.total_bytes, free_bytes=free, bf16=device.bf16 and here.bf16)
    return _planner(recipe)(recipe, device, profile)


KEPT = ("quantization", "compute_dtype", "optim")  # a resumed run keeps them, whatever memory is free today


def _resumed_plan(recipe: Recipe, path: Path) -> Plan:
    """Plan as `running_plan`, with the settings of the run in ``path`` that would change what is computed."""
    began = RunDirectory(path).plan().get("settings", {})
    kept = {key: began[key] for key in KEPT if getattr(recipe.hardware, key) == "auto" and key in began}
    shape = {key: began["lora"][key] for key in ("r", "lora_alpha") if began and getattr(recipe.lora, key) == "auto"}
    update = {"hardware": recipe.hardware.model_copy(update=kept), "lora": recipe.lora.model_copy(update=shape)}
    plan = running_plan(recipe.model_copy(update=update))
    return replace(plan, reasons={**plan.reasons, **dict.fromkeys(kept, "as the run began")})


def planned(recipe: Recipe, plan: Plan) -> Recipe:
    """Return the recipe with the adapter's shape that the plan chose: a part of what is learned, so of the run."""
    shape = {key: plan.settings.lora[key] for key in ("r", "lora_alpha")}
    return recipe.model_copy(update={"lora": recipe.lora.model_copy(update=shape)})


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
        from lowmem_rlhf.training.classifier import train_classifier_run

        _check_computes(detect(recipe.hardware.device))
        return train_classifier_run(recipe, path, resume)
    if recipe.algorithm in TRL_TRAINERS:
        from lowmem_rlhf.training.trl_trainers import checked_arguments

        checked_arguments(recipe)
    recipe = _as_saved(recipe)
    plan = _resumed_plan(recipe, path) if resume else running_plan(recipe)
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
    from lowmem_rlhf.model.tokenizer import load_tokens

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

    from lowmem_rlhf.report.bars import progress_bar
    from lowmem_rlhf.report.html import write_report
    from lowmem_rlhf.report.live import LiveView, print_evaluation, print_plan
    from lowmem_rlhf.training.build import add_roles, make_trainer

    print_plan({**plan.to_dict(), **placed})
    options = recipe.data.chat_template_kwargs
    tokens = load_tokens(recipe.model, recipe.revision, recipe.trust_remote_code, chat_template_kwargs=options)
    assert tokens is not None  # the Hub may be asked
    with progress_bar("rows") as progress:
        data = read_data(recipe, rows, held_out_rows, tokens, progress)
    base = _shared_base(recipe, plan)
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
        from lowmem_rlhf.training.trl_loop import make_trl_loop as make
    trainer = make(recipe, plan, base, rewards, data, run_directory)
    if resume:
        trainer.resume()
    print(f"run directory: {trainer.run.path}", flush=True)
    with LiveView(trainer.recipe.training.max_steps, trainer.step) as view:
        evaluation = trainer.train(view)
    write_report(trainer.run)
    if evaluation:
        print_evaluation(evaluation)
    return trainer.run


def _probes(recipe: Recipe, plan: Plan) -> bool:
    """Whether the plan is tried out: on a CPU, where memory is not so short, only if asked to."""
    if recipe.algorithm in TRL_TRAINERS:
        return False
    wanted = recipe.hardware.probe
    return not plan.device.torch_device.startswith("cpu") if wanted == "auto" else wanted


def _as_saved(recipe: Recipe) -> Recipe:
    """Return the recipe with the shape of the adapter that it continues from.

    Raises:
        UserError: that adapter is not there, belongs to another base or has another shape than the recipe sets.
    """
    if recipe.adapter is None:
        return recipe
    from lowmem_rlhf.model.adapters import saved_adapter

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


def _shared_base(recipe: Recipe, plan: Plan) -> "SharedBase":
    import torch

    from lowmem_rlhf.memory import is_out_of_memory
    from lowmem_rlhf.model.adapters import saved_adapter
    from lowmem_rlhf.model.base import SharedBase

    _check_computes(plan.device)
    saved = saved_adapter(recipe.adapter, recipe.model, recipe.revision) if recipe.adapter else None
    print(f"loading {recipe.model}", flush=True)
    try:
        return SharedBase.load(
            recipe.model,
            torch.device(plan.device.torch_device),
            plan.settings.quantization,
            plan.settings.compute_dtype,
            recipe.revision,
            recipe.trust_remote_code,
            plan.settings.offload_embeddings,
            r=recipe.lora.rank,
            lora_alpha=recipe.lora.alpha(recipe.lora.rank),
            target_modules=saved.target_modules if saved else recipe.lora.target_modules,
            use_rslora=saved.use_rslora if saved else False,
            seed=recipe.training.seed,
        )
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise RunError(
            f"the device's memory ran out while loading {recipe.model}; close other programs that use it, or set "
            "hardware.quantization=nf4"
        ) from error


def held_against_stock(base: "SharedBase", recipe: Recipe, dequantize: bool) -> dict[str, Any]:
    """Hold a base against stock transformers, unless its type is one that the tests hold; return what plan.json says.

    Args:
        dequantize: how NF4 weights are held while sampling.

    Raises:
        UserError: it computes something else.
        RunError: the device's memory ran out.
    """
    from lowmem_rlhf.memory import is_out_of_memory
    from lowmem_rlhf.rollout.stock_check import TESTED_WITH, checked, is_tested

    if recipe.hardware.check == "auto" and is_tested(base.model):
        return {
            "said": f"{base.model.config.model_type} is held against transformers {TESTED_WITH} by this package's tests"
        }
    try:
        found = checked(base, dequantize)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise RunError(
            f"the device's memory ran out while {recipe.model} was held against stock transformers; close other "
            "programs that use it, or set hardware.quantization=nf4"
        ) from error
    print(found.said, file=sys.stderr, flush=True)
    return found.to_dict()


def _check_computes(device: Device) -> None:
    import torch

    if device.torch_device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(
            f"{device.name} is here, but this torch ({torch.__version__}) cannot use it; install a CUDA build of "
            "torch, or set hardware.device=cpu"
        )


def _check_trackers(recipe: Recipe) -> None:
    modules = {"tensorboard": ("tensorboard", "tensorboardX")}
    for tracker in recipe.training.report_to:
        if not any(importlib.util.find_spec(name) for name in modules.get(tracker, (tracker,))):
            raise UserError(f"training.report_to: {tracker} is not installed; pip install {tracker}, or leave it out")


def hush(loggers: Sequence[str] = ("bitsandbytes", "transformers", "datasets", "accelerate")) -> None:
    """Keep what the libraries say about themselves out of the user's sight; our own warnings stay."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' bars
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    for name in loggers:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(bitsandbytes|torch|peft|transformers|accelerate)(\.|$)")
