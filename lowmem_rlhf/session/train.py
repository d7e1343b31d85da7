"""From a recipe to a finished run in four acts: check, plan, open, run. The command line and the Python API call these.

An act takes what the one before has made, and each refuses what can be refused without the next: nothing is planned for
a recipe that is wrong, no weights are loaded for a plan that does not fit or for rows that cannot be learned from.
"""

import importlib.util
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem_rlhf.algorithms.spec import resolve
from lowmem_rlhf.architecture.lookup import model_dimensions
from lowmem_rlhf.data.preview import with_format
from lowmem_rlhf.data.provenance import check_base, check_learned, check_resumed_data, run_inputs
from lowmem_rlhf.display.run_display import RunDisplay, display_for, steps_shown
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.hardware.capabilities import capabilities
from lowmem_rlhf.hardware.cpu_process import bound_kernel_caches
from lowmem_rlhf.hardware.detect import detect
from lowmem_rlhf.inference.base import LoadedModel, check_computes, held_against_stock, open_base
from lowmem_rlhf.paths import cannot_be_written
from lowmem_rlhf.planning.advice import warning, why_not
from lowmem_rlhf.planning.plan import Plan, check_positions
from lowmem_rlhf.planning.run_plan import planned
from lowmem_rlhf.planning.time.measured import measured_time
from lowmem_rlhf.processes.start import begin_processes, number_of_processes, times_restarted
from lowmem_rlhf.processes.world import begun
from lowmem_rlhf.progress import current
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.run.directory import RECIPE, RunDirectory, default_output
from lowmem_rlhf.run.listing import base_name
from lowmem_rlhf.run.start import as_written, located, paths_explained
from lowmem_rlhf.run.trust import check_code
from lowmem_rlhf.run.unwritten import UnwrittenRun
from lowmem_rlhf.session.processes import (
    check_processes,
    check_same_folder,
    check_same_recipe,
    check_same_rows,
    run_plan_of,
)
from lowmem_rlhf.session.saved_lora import as_saved
from lowmem_rlhf.stopping import telling_what_is_kept

if TYPE_CHECKING:
    from lowmem_rlhf.data.examples import TrainingData
    from lowmem_rlhf.data.sources import SplitRows
    from lowmem_rlhf.engine.base import SharedBase
    from lowmem_rlhf.rewards.loading import Reward
    from lowmem_rlhf.training.loop import Loop

# packages whose frames hold tensors of a step
_OF_A_STEP = {"lowmem_rlhf", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "trl"}


@dataclass(frozen=True)
class Checked:
    """A recipe that can be planned for.

    Attributes:
        recipe: with the columns of its data's format and the shape of the adapter that it continues from; its paths
            lead to what they name from the current folder.
        written: with its paths as they stand in its file.
        path: the run's folder.
        resume: the run that is there goes on.
    """

    recipe: Recipe
    written: Recipe
    path: Path
    resume: bool


@dataclass(frozen=True)
class Planned:
    """A run that fits, with all that it is made of but the weights.

    Attributes:
        checked: what it was planned for.
        recipe: with the adapter's shape that the plan chose.
        plan: the settings.
        probes: the plan is tried out before the first step.
        rewards: the reward functions.
        rows: of the data, by task.
        facts: what plan.json says beside the plan.
    """

    checked: Checked
    recipe: Recipe
    plan: Plan
    probes: bool
    rewards: "list[Reward]"
    rows: "dict[str, SplitRows]"
    facts: dict[str, Any] = field(default_factory=dict)


def train(
    recipe: Recipe,
    output: Path | None = None,
    resume: bool = False,
    display: RunDisplay | None = None,
    loaded: LoadedModel | None = None,
) -> RunDirectory:
    """Run a recipe and return its run directory.

    Args:
        output: the run's folder; None: ``runs/NAME``.
        resume: go on from the last checkpoint of the run that is there.
        display: where the run is shown; None: on the current display, which shows nothing where none was entered.
        loaded: a model that the caller has loaded already.

    Raises:
        UserError: the input is wrong; nothing was trained.
        RunError: the run had begun and failed; a note says which step is kept.
    """
    display = display or display_for(current())
    checked = check(recipe, output, resume, display)
    if (own_run := recipe.spec.run) is not None:
        check_computes(detect(recipe.hardware.device))
        run: RunDirectory = resolve(own_run)(checked.recipe, checked.path, resume, display)
        return run
    trainer = open_run_of(plan(checked, display), display, loaded)
    with (
        _freed_where_it_fails(trainer.base, loaded),
        steps_shown(display, trainer.recipe.training.max_steps, trainer.step),
        telling_what_is_kept(trainer.what_is_kept),
    ):
        trainer.train(display, display.step)
    finish(trainer, display)
    return trainer.run


def finish(trainer: "Loop", display: RunDisplay) -> None:
    """Write the report of a run whose steps are done, and show its results."""
    from lowmem_rlhf.report.html import write_report

    def written() -> None:
        if trainer.run.writes:
            _record_time(trainer, display)
            write_report(trainer.run)

    begun().agreed(written)  # all return to a run that is written
    if evaluation := trainer.run.evaluation():
        display.evaluation(evaluation)


def _record_time(trainer: "Loop", display: RunDisplay) -> None:
    """Put on record what a step took against what was predicted for texts of these lengths, and say it."""
    recipe, plan, measured = trainer.recipe, trainer.plan, None
    if plan.time is None or begun().several:  # the recipe's lengths are held against one process
        return
    with suppress(UserError):  # sizes from the Hub, which may be gone by now
        dims = model_dimensions(recipe.model, recipe.revision, recipe.trust_remote_code)
        measured = measured_time(dims, recipe, plan.settings, plan.device, trainer.run.metrics()[trainer.began_at :])
    if measured is None:
        return
    trainer.run.record_time(measured)
    step, predicted = measured["step_seconds"], measured["predicted"]["step_seconds"]
    texts = "texts of this length" if all(measured["lengths"].values()) else "texts of full length"
    display.message(
        f"a step took {step:.3g} s; predicted for {texts} were {predicted:.3g} s ({measured['ratio']:.2f} times that)"
    )


def check(recipe: Recipe, output: Path | None, resume: bool, display: RunDisplay) -> Checked:
    """Check what a recipe says, as far as that needs neither a plan nor its rows.

    The processes of a run that has several meet here; from then on what one of them refuses is refused in all. A run
    that torchrun has started again, since a process of it has failed, goes on from its last checkpoint.

    Raises:
        UserError: it cannot run.
    """
    if number_of_processes() > 1:
        check_processes(recipe)  # in each by itself, as they do not know each other yet
        on_cpu = capabilities(detect(recipe.hardware.device).torch_device).on_cpu
        begin_processes(on_cpu, recipe.training.ddp_timeout)
    return begun().agreed(lambda: _check(recipe, output, resume, display))


def _check(recipe: Recipe, output: Path | None, resume: bool, display: RunDisplay) -> Checked:
    bound_kernel_caches()
    if times_restarted() and not resume:
        resume = ((output or default_output(recipe.name, resume=True)) / RECIPE).is_file()
    # as the first process has it: another machine may see a shared folder late
    path, resume = begun().gather((output or default_output(recipe.name, resume), resume))[0]
    check_same_recipe(recipe)
    if not output and not resume and path.name != base_name(recipe.name):
        display.message(
            f"this run is {path}; earlier ones of this name stay: `lowmem-rlhf runs` lists them, and for chat, eval, "
            f"export and report {base_name(recipe.name)} is the newest finished one"
        )
    if resume:
        check_code(path, recipe.model_dump(), resumed=True)
    elif why := cannot_be_written(path):
        raise UserError(f"output: {why}; choose another folder with --output")
    with paths_explained(path, recipe) if resume else nullcontext():
        written, recipe = recipe, located(recipe, path) if resume else recipe
        _check_trackers(recipe)
        _check_rate(recipe)
        recipe, note = with_format(recipe)
        if note:
            display.message(note)
        if recipe.rewards and recipe.spec.rewards == "refused":
            raise UserError(f"rewards: {recipe.algorithm} learns from its data alone; leave them out (rewards=[])")
        if recipe.spec.check is not None:
            resolve(recipe.spec.check)(recipe)
        return Checked(as_saved(recipe), written, path, resume)


def plan(checked: Checked, display: RunDisplay) -> Planned:
    """Plan a run, load its rewards and read its rows.

    Raises:
        UserError: it does not fit, its rewards or rows are wrong, or it cannot begin (or go on) in its folder.
    """
    with paths_explained(checked.path, checked.written) if checked.resume else nullcontext():
        return begun().agreed(lambda: _plan(checked, display))


def _plan(checked: Checked, display: RunDisplay) -> Planned:
    recipe, path, resume = checked.recipe, checked.path, checked.resume
    if resume:
        RunDirectory(path).check_text_files()
    plan, processes = run_plan_of(recipe, path, resume)
    probes = _probes(recipe, plan)
    if not plan.fits and not (plan.verdict == "unknown" and probes):
        raise UserError(why_not(plan, recipe))
    recipe = planned(recipe, plan)
    from lowmem_rlhf.rewards.loading import load_rewards, placements

    free_bytes = plan.memory["budget_bytes"] - plan.memory["peak_bytes"]
    rewards = load_rewards(recipe.rewards, plan.device.torch_device, free_bytes, recipe.model, recipe.revision)
    RunDirectory.check(path, as_written(recipe, checked.written, path), resume)
    if resume:
        check_base(RunDirectory(path), recipe, resume)
        check_learned(RunDirectory(path), recipe, resume)
    rows = _rows(checked, recipe, rewards, display)
    facts = {"rewards": placements(rewards), **processes}
    display.plan({**plan.to_dict(), **facts, "evaluation_steps": _evaluation_steps(recipe)})
    return Planned(checked, recipe, plan, probes, rewards, rows, facts)


def _evaluation_steps(recipe: Recipe) -> int | None:
    """Return after how many steps each a display has to expect an evaluation; 0: at the ends only, None: never."""
    return recipe.evaluation.steps or 0 if recipe.data.eval_size else None


def _rows(checked: Checked, recipe: Recipe, rewards: "Sequence[Reward]", display: RunDisplay) -> "dict[str, SplitRows]":
    """Read the rows and hold them against what the rewards read; on a resume they are those that the run began with."""
    from lowmem_rlhf.data.sources import load_tasks
    from lowmem_rlhf.rewards.references import check_rows

    rows = load_tasks(recipe)
    if checked.resume:
        check_resumed_data(RunDirectory(checked.path), checked.written, rows)
    for sentence in check_rows(rewards, recipe, rows):
        display.message(sentence)
    return rows


def open_run_of(planned: Planned, display: RunDisplay, loaded: LoadedModel | None = None) -> "Loop":
    """Load the base, put the roles on it, try the plan out, and begin (or go on with) the run's folder.

    Raises:
        UserError: the rows cannot be tokenized, or the model is not what the run or its adapters ask for.
        RunError: the device's memory ran out.
    """
    checked = planned.checked
    with paths_explained(checked.path, checked.written) if checked.resume else nullcontext():
        return begun().agreed(lambda: _open(planned, display, loaded))


def _open(planned: Planned, display: RunDisplay, loaded: LoadedModel | None) -> "Loop":
    with base_of(planned, display, loaded) as (base, data):
        return _begun(base, data, planned, display)


@contextmanager
def base_of(
    planned: Planned, display: RunDisplay, loaded: LoadedModel | None = None
) -> "Iterator[tuple[SharedBase, TrainingData]]":
    """Give the base of a planned run and its data, tokenized for it; where the block raises the base is freed.

    Raises:
        UserError: the rows cannot be tokenized, or the model cannot be loaded.
        RunError: the device's memory ran out.
    """
    from lowmem_rlhf.data.examples import read_tasks
    from lowmem_rlhf.engine.tokenizer import load_tokens

    recipe = planned.recipe
    options = recipe.data.chat_template_kwargs
    tokens = load_tokens(recipe.model, recipe.revision, recipe.trust_remote_code, chat_template_kwargs=options)
    assert tokens is not None  # the Hub may be asked
    data = read_tasks(recipe, planned.rows, tokens, lambda done, total: display.phase("rows", done, total))
    base = open_base(recipe, planned.plan, loaded=loaded)
    with _freed_where_it_fails(base, loaded):
        if base.stop_ids != tokens.stop_ids:  # a model may know of more ends than its files say
            data = read_tasks(recipe, planned.rows, base.tokens)
        yield base, data


def ready(base: "SharedBase", planned: Planned, display: RunDisplay) -> tuple[Plan, dict[str, Any]]:
    """Hold a loaded base against the recipe, put the roles on it, and try the plan out where that is asked for.

    Returns:
        The plan as it is then, and the facts of plan.json.

    Raises:
        UserError: the model is not what the run or its adapters ask for.
        RunError: the device's memory ran out.
    """
    from lowmem_rlhf.training.memory import opening_ladder
    from lowmem_rlhf.training.roles import add_roles

    recipe, plan, rewards, facts = planned.recipe, planned.plan, planned.rewards, dict(planned.facts)
    if planned.checked.resume:
        check_base(RunDirectory(planned.checked.path), recipe, resume=True)  # once more: now a Hub's model is here
    limit = base.rotary_limit
    check_positions(
        recipe, limit, f"takes other rotary factors for all texts of a pass once one has over {limit} tokens"
    )
    ladder = opening_ladder(recipe, plan)
    facts["check"] = ladder.survive(
        "loading",
        lambda: held_against_stock(base, recipe, plan.settings.rollout_weights == "dequantized"),
        display.message,
        sizes=False,
    )
    if base.note:
        display.message(base.note)
        key = "micro_batch_tokens"
        plan = replace(plan, reasons={**plan.reasons, key: f"{plan.reasons[key]}; {base.note}"})
    ladder.survive("loading", lambda: add_roles(base, recipe, rewards), display.message, sizes=False)
    if planned.probes:
        from lowmem_rlhf.training.probe import probe

        plan, probed = probe(base, recipe, plan)
        display.message(probed.said)
        facts["probe"] = probed.to_dict()
    elif sentence := warning(plan):
        display.message(sentence)
    return plan, facts


def _begun(base: "SharedBase", data: "TrainingData", planned: Planned, display: RunDisplay) -> "Loop":
    """Make a loaded base ready, and begin the run's folder."""
    from lowmem_rlhf.algorithms.build import make_trainer

    plan, facts = ready(base, planned, display)
    checked, recipe, rewards = planned.checked, planned.recipe, planned.rewards
    path, resume = checked.path, checked.resume

    def run_directory(resolved: Recipe) -> RunDirectory:
        inputs = None if resume else run_inputs(recipe, planned.rows)
        check_same_rows(inputs or {"data": None})  # nothing is written before all are ready
        if begun().rank:
            begun().gather(None)  # by then the first process has made the folder, or gone back to a checkpoint
            return UnwrittenRun(path)
        written = as_written(resolved, checked.written, path)
        run = RunDirectory.create(path, written, {**plan.to_dict(), **facts}, resume, inputs)
        begun().gather(None)
        return run

    try:
        trainer = make_trainer(recipe, plan, base, rewards, data, run_directory)
    except BaseException as error:
        if not resume and (path / RECIPE).is_file():
            error.add_note(f"the run's folder {path} is made: go on with --resume")
        raise
    if resume:
        try:
            check_same_folder(trainer.run)
            trainer.resume()
        except BaseException:
            trainer.run.unlock()
            raise
    display.message(f"run directory: {trainer.run.path}")
    return trainer


@contextmanager
def _freed_where_it_fails(base: "SharedBase", loaded: LoadedModel | None) -> Iterator[None]:
    """Free a base that was loaded here when the block raises: a notebook keeps the last error, and so its frames.

    Frames that have ended lose their locals, but for those of the user's own functions; the closures that they ran keep
    theirs, and so the weights themselves are let go.
    """
    try:
        yield
    except BaseException as error:
        chain: BaseException | None = error
        while chain is not None:
            for frame, _ in traceback.walk_tb(chain.__traceback__):
                if str(frame.f_globals.get("__name__")).partition(".")[0] in _OF_A_STEP:
                    with suppress(RuntimeError):  # it still runs
                        frame.clear()
            chain = chain.__cause__ or chain.__context__
        if loaded is None:
            base.free()
        raise


def _probes(recipe: Recipe, plan: Plan) -> bool:
    """Whether the plan is tried out: on a CPU, where memory is not so short, only if asked to."""
    if not recipe.spec.probed or recipe.hardware.shard_base:  # where a failed try would leave the others waiting
        return False
    wanted = recipe.hardware.probe
    return not plan.device.on_cpu if wanted == "auto" else wanted


def _check_rate(recipe: Recipe) -> None:
    """Refuse a run whose only optimizer step is the first of a warm-up, which has a learning rate of zero."""
    training = recipe.training
    steps = training.max_steps * recipe.spec.updates(recipe) if training.num_train_epochs is None else 0
    if steps == 1 and training.warmup_steps and training.lr_scheduler_type != "constant":
        raise UserError(
            f"training.warmup_steps: got {training.warmup_steps} for a run of one optimizer step, whose learning rate "
            "would be 0; set training.warmup_steps=0 or raise training.max_steps"
        )


def _check_trackers(recipe: Recipe) -> None:
    modules = {"tensorboard": ("tensorboard", "tensorboardX")}
    for tracker in recipe.training.report_to:
        if recipe.spec.run is not None:
            raise UserError(f"training.report_to: {recipe.algorithm} reports to no tracker; leave it out")
        if not any(_is_installed(name) for name in modules.get(tracker, (tracker,))):
            raise UserError(f"training.report_to: {tracker} is not installed; pip install {tracker}, or leave it out")


def _is_installed(name: str) -> bool:
    """Whether there is a package; a plain folder of the same name, as trackers leave them, is none."""
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None
