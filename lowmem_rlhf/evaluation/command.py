"""What `eval` was asked for, checked before anything is loaded; then measured and kept."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lowmem_rlhf.errors import RunError, UserError
from lowmem_rlhf.inference.open_run import OpenRun, Step
from lowmem_rlhf.paths import local_path, obstacle
from lowmem_rlhf.recipe.loading import load_recipe, validate_recipe
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.run.directory import RECIPE, open_run, run_folder
from lowmem_rlhf.run.evaluations import append_evaluation
from lowmem_rlhf.run.trust import check_code

TASK_TOKENS = 128  # that the plan of a model on lm-eval's tasks counts with a text; a longer one is a pass of its own


@dataclass(frozen=True)
class Request:
    """The command line of `eval`.

    Attributes:
        what: a run's folder or its recipe's name (see `run.directory.open_run`), or a model.
        overrides: changes of the recipe.
        sampling: changes that its options stand for, all of how answers are sampled.
        recipe, against: of a model.
        step: of a run's checkpoint, or ``best``.
        tasks, limit, chat: of lm-eval.
        trust: the code that the run's recipe names may be executed (see `run.trust`).
    """

    what: str
    overrides: list[str]
    sampling: list[str]
    recipe: str | None = None
    against: str | None = None
    step: Step = None
    device: str | None = None
    tasks: tuple[str, ...] | list[str] = ()
    limit: int | None = None
    chat: bool = False
    trust: bool = False


def run_evaluation(request: Request) -> tuple[dict[str, Any], Path | RunError | None]:
    """Evaluate; the outcome of a run is kept in its folder, and its report.html shows it.

    Returns:
        The outcome (see `run.evaluations`), and the file that it is kept in (None: it is of a model), or why it could
        not be kept, which is to be raised once the outcome is shown.

    Raises:
        UserError: the request is wrong; RunError: it failed.
    """
    if not request.what.strip():
        raise UserError(f"got {request.what!r}; give a run's folder, or a model as in a recipe")
    if why := obstacle(local_path(request.what)):
        raise UserError(f"{request.what} {why}; give a run's folder, or a model as in a recipe")
    if request.recipe is None and request.against is None and (run := run_folder(request.what)) != Path(request.what):
        request = replace(request, what=str(run))  # a model's name stays as it was written
    _check(request)
    if not is_run(request.what):
        return _of_model(request), None
    opened = OpenRun.at(open_run(request.what, request.trust), request.step)
    outcome = _of_run(opened, request)
    from lowmem_rlhf.report.html import write_report

    try:
        path = append_evaluation(opened.directory.path, outcome)
        write_report(opened.directory)
    except RunError as error:
        return outcome, error
    return outcome, path


def is_run(what: str) -> bool:
    """Whether a run is to be evaluated and not a model: an export has a recipe too, beside its weights."""
    folder = Path(what)
    return (folder / RECIPE).is_file() and not _holds_model(folder)


def _holds_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() or any(folder.glob("*.gguf"))


def _check(request: Request) -> None:
    """Check that the options go together.

    Raises:
        UserError: they do not.
    """
    if is_run(request.what):
        for option, value in (("--recipe", request.recipe), ("--against", request.against)):
            if value:
                raise UserError(f"{option}: is for a MODEL; {request.what} is a run, which has its own recipe and base")
    elif request.step is not None:
        raise UserError(f"--step: is for a RUN, and {request.what} holds no {RECIPE} of one; leave it out")
    if request.tasks:
        for name, is_set in (("--against", request.against), ("--recipe", request.recipe), *_named(request)):
            if is_set:
                raise UserError(f"--lm-eval: its tasks bring their own data and settings; leave {name} out")
    elif request.limit is not None:
        raise UserError("--limit: is for --lm-eval; set data.eval_size=N for held-out data")
    elif request.chat:
        raise UserError("--chat: is for --lm-eval; held-out prompts are written as in training")


def _named(request: Request) -> list[tuple[str, bool]]:
    options = {"evaluation.num_samples": "--samples", "evaluation.temperature": "--temperature"}
    options["generation.max_completion_length"] = "--max-tokens"
    return [(options[one.partition("=")[0]], True) for one in request.sampling]


def _of_run(opened: OpenRun, request: Request) -> dict[str, Any]:
    from lowmem_rlhf.evaluation.evaluate import evaluate_run

    run = opened.directory
    values = run.recipe_values()
    named = [values, *(values.get("tasks") or ())]
    rewarded = any(one.get("rewards") for one in named) or any("rewards" in o for o in request.overrides)
    if request.sampling and not rewarded:
        name, _ = _named(request)[0]
        raise UserError(f"{name}: the run in {run.path} has no rewards, so no answers are sampled; leave it out")
    overrides = [*request.overrides, *request.sampling]
    return evaluate_run(opened, overrides, request.device, request.tasks, request.limit, request.chat)


def _of_model(request: Request) -> dict[str, Any]:
    from lowmem_rlhf.evaluation.evaluate import evaluate_model_tasks, evaluate_models

    overrides = [*request.overrides, *request.sampling]
    if request.tasks:
        recipe = load_recipe_of_tasks(request.what, overrides)
        return evaluate_model_tasks(
            request.what, recipe, overrides, request.device, request.tasks, request.limit, request.chat
        )
    beside = Path(request.what) / RECIPE
    source = request.recipe or (str(beside) if beside.is_file() else None)
    if source is None:
        raise UserError(
            f"{request.what} is no run (it holds no {RECIPE}); for a model give --recipe with the recipe whose "
            "held-out data and rewards are to be used, or --lm-eval with tasks"
        )
    if not request.recipe:  # the recipe came with the model, and its user has not seen it
        named = open_run(request.what, request.trust).recipe_values()
        check_code(Path(request.what), named)
    recipe = load_recipe(source, overrides)
    models = [request.against, request.what] if request.against else [request.what]
    return evaluate_models(models, recipe, overrides, request.device)


def load_recipe_of_tasks(model: str, overrides: list[str]) -> Recipe:
    """Return a recipe that says how a model is held, where no recipe's data are needed.

    Raises:
        UserError: an override is of something else than ``hardware``.
    """
    values: dict[str, Any] = {"name": "lm-eval", "model": model, "algorithm": "sft", "data": {"train": "arithmetic"}}
    values["sft"] = {"max_length": TASK_TOKENS}
    for override in overrides:
        key, _, value = override.partition("=")
        section, _, name = key.strip().partition(".")
        if section != "hardware":
            raise UserError(f"override {override!r}: of a model on lm-eval's tasks only hardware.* can be set")
        values.setdefault("hardware", {})[name] = value
    return validate_recipe(values, source="--lm-eval")
