"""The command line. Typer commands, nothing else; torch is imported only by the commands that compute."""

import json
import shlex
import sys
from contextlib import AbstractContextManager, nullcontext, redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from lowmem_rlhf import __version__
from lowmem_rlhf.errors import LowmemError, OfflineError, RunError, UserError, with_notes
from lowmem_rlhf.plain_text import harmless
from lowmem_rlhf.stopping import cause, exit_code, stoppable

if TYPE_CHECKING:
    from lowmem_rlhf.recipe.schema import Recipe


class _Commands(TyperGroup):
    """The commands; one that is stopped by a signal says what is kept and exits with the signal's code."""

    def invoke(self, ctx: Any) -> Any:
        from lowmem_rlhf.processes.start import rank_of_process

        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            if not rank_of_process():
                _tell(with_notes(cause(stop), stop))
            raise typer.Exit(exit_code(stop)) from None


app = typer.Typer(
    cls=_Commands,
    help="RLHF on one consumer graphics card: name a recipe, the settings follow from the card.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

rewards_app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.add_typer(rewards_app, name="rewards")

A_RUN = "A run directory, or a recipe's name for its newest finished run."
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Trust = Annotated[
    bool, typer.Option("--trust-run", help="Execute the code that the run's recipe names, though it is from elsewhere.")
]
Step = Annotated[
    str | None,
    typer.Option(metavar="N|best", help="Take this checkpoint, or the best one, and not the finished adapter."),
]
RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped recipe.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes, e.g. training.max_steps=10.")
]


def main() -> None:
    """Run the command line; errors that are the user's to mend are one clear message without a traceback."""
    from lowmem_rlhf.display.lines import Bars
    from lowmem_rlhf.display.terminal import prepare_streams
    from lowmem_rlhf.hardware.cpu_process import bound_kernel_caches, let_waiting_threads_sleep
    from lowmem_rlhf.hardware.detect import pin_cuda_order
    from lowmem_rlhf.processes.start import rank_of_process
    from lowmem_rlhf.progress import Silence, shown_by

    prepare_streams()
    pin_cuda_order()  # before torch: card numbers then mean the same to NVML and to CUDA
    bound_kernel_caches()
    let_waiting_threads_sleep()
    try:
        with stoppable(), Bars() as display, shown_by(Silence() if rank_of_process() else display):
            app(standalone_mode=True)
    except KeyboardInterrupt as stop:
        sys.exit(exit_code(stop))
    except LowmemError as error:
        which = f"process {rank}: " if (rank := rank_of_process()) else ""
        if not error.said_elsewhere:
            _tell(f"error: {which}{with_notes(str(error), error)}")
        sys.exit(error.exit_code)


def _step(given: str | None) -> int | Literal["best"] | None:
    if given is None:
        return None
    if given == "best":
        return "best"
    try:
        return int(given)
    except ValueError:
        raise UserError(f"--step: got {given!r}; give the number of a step that has a checkpoint, or best") from None


def _tell(line: str) -> None:
    """Print on standard error, where somebody is there to read it."""
    with suppress(OSError, ValueError):  # the terminal is closed
        print(harmless(line), file=sys.stderr, flush=True)


def _version(show: bool) -> None:
    if show:
        print(f"lowmem-rlhf {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


def _prints_aside(as_json: bool) -> AbstractContextManager[Any]:
    """Send what a user's functions print to standard error, where standard output is one JSON object."""
    return redirect_stdout(sys.stderr) if as_json else nullcontext()


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


@app.command()
def detect(
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or another torch device.")] = "auto",
    as_json: Json = False,
) -> None:
    """Show the device that a run would use, its memory and what else uses it."""
    from lowmem_rlhf.hardware.detect import describe
    from lowmem_rlhf.hardware.detect import detect as find
    from lowmem_rlhf.hardware.profiles import match_profile

    found = find(device)
    profile = match_profile(found)
    if as_json:
        _print_json({**found.to_dict(), "profile": profile.key})
        return
    for line in describe(found):
        print(line)
    print(f"profile: {profile.key}")


@app.command()
def profiles(as_json: Json = False) -> None:
    """List the known cards."""
    from lowmem_rlhf.hardware.profiles import load_profiles

    known = load_profiles()
    if as_json:
        _print_json({key: {**profile.model_dump(), "tried": profile.tried} for key, profile in known.items()})
        return
    for key, profile in known.items():
        memory = f"{profile.memory_mib / 1024:.1f} GiB" if profile.memory_mib else "RAM"
        capability = f"sm_{profile.compute_capability.replace('.', '')}" if profile.compute_capability else ""
        line = f"{key:20} {profile.name:32} {memory:>9}  {capability or profile.architecture or '':7}"
        print(f"{line} {'bf16' if profile.bf16 else 'fp16'}{'' if profile.tried else '  never run on such'}")


@app.command()
def recipes(as_json: Json = False) -> None:
    """List the shipped recipes."""
    from lowmem_rlhf.display.tables import print_listing
    from lowmem_rlhf.recipe.loading import load_recipe, shipped_recipes

    found = {name: load_recipe(name) for name in shipped_recipes()}
    if as_json:
        _print_json({name: recipe.model_dump() for name, recipe in found.items()})
        return
    print_listing((name, recipe.description) for name, recipe in found.items())


@app.command()
def plan(
    recipe: RecipeName,
    overrides: Overrides = None,
    profile: Annotated[str | None, typer.Option(help="Plan for this card (see `profiles`).")] = None,
    vram: Annotated[str | None, typer.Option(help="Plan for this much memory, e.g. 11GB.")] = None,
    all_profiles: Annotated[
        bool, typer.Option("--all-profiles", help="What fits: models against all known cards, or the one named.")
    ] = False,
    models: Annotated[
        str | None, typer.Option(metavar="all|NAME,NAME", help="With --all-profiles: these models.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Also draw it, as this .png, .svg or .pdf: the phases, or what fits.")
    ] = None,
    processes: Annotated[
        int | None, typer.Option(metavar="N", help="Plan for so many, one a card; --profile takes A or A,B,... then.")
    ] = None,
    machines: Annotated[int | None, typer.Option(metavar="M", help="That the processes are divided among.")] = None,
    network: Annotated[
        float | None, typer.Option(metavar="GBIT", help="10^9 bits a second between machines; default 10.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show the settings that a recipe would run with, why, and the memory it needs."""
    from lowmem_rlhf.display.processes import print_plans
    from lowmem_rlhf.planning.processes.request import advice_of, cluster_of, plan_of
    from lowmem_rlhf.recipe.loading import load_recipe
    from lowmem_rlhf.report.plan_plots import check_picture, draw_phases, save_picture
    from lowmem_rlhf.session.saved_lora import as_saved_here

    if plot:
        check_picture(plot)
    if models and not all_profiles:
        raise UserError("--models: is for --all-profiles; a recipe's own model is changed with model=NAME")
    cluster = cluster_of(processes, machines, network, profile)
    if cluster and (all_profiles or plot):
        raise UserError(
            f"--{'all-profiles' if all_profiles else 'plot'}: shows one process a card; leave out --processes"
        )
    here = {"profile": None if cluster else profile, "vram": vram}
    given = [f"hardware.{key}={value}" for key, value in here.items() if value is not None]
    resolved = load_recipe(recipe, [*(overrides or []), *given])
    if all_profiles:
        _what_fits(resolved, models, plot, as_json)
        return
    made = plan_of(as_saved_here(resolved), cluster)
    resolved = _checked(resolved, network=False)
    if as_json:
        _print_json(made.to_dict())
    else:
        print_plans(made.to_dict())
        if not made.fits:
            print(harmless(advice_of(made, resolved, cluster)))
    if plot:
        picture = save_picture(draw_phases(made.to_dict(), f"{resolved.name}, {resolved.model}"), plot)
        _say(picture, as_json)


def _checked(recipe: "Recipe", network: bool) -> "Recipe":
    """Hold a recipe's data and rewards against the checks of training; return it with the columns that were found."""
    from lowmem_rlhf.quiet import hush
    from lowmem_rlhf.session.check import QUICK_ROWS, check_recipe

    hush()
    try:
        with _prints_aside(True):
            check = check_recipe(recipe, 0, network, most=QUICK_ROWS)
    except OfflineError as error:  # training needs what a plan can do without
        print(harmless(f"rows were not looked at: {error}"), file=sys.stderr)
        return recipe
    check.raise_errors()
    for line in check.lines():
        print(harmless(line), file=sys.stderr)
    return check.recipe


def _what_fits(recipe: "Recipe", models: str | None, plot: Path | None, as_json: bool) -> None:
    from lowmem_rlhf.planning.fits import chosen_models, one_card, shipped_cards, what_fits
    from lowmem_rlhf.planning.run_plan import planned_device
    from lowmem_rlhf.report.fits_view import print_fits
    from lowmem_rlhf.report.plan_plots import draw_fits, save_picture

    named = recipe.hardware.profile != "auto" or recipe.hardware.vram
    cards = one_card(*planned_device(recipe)) if named else shipped_cards()
    fits = what_fits(recipe, cards, chosen_models(recipe, models))
    if as_json:
        _print_json(fits.to_dict())
    else:
        print_fits(fits)
    if plot:
        _say(save_picture(draw_fits(fits), plot), as_json)


def _say(path: Path, as_json: bool) -> None:
    """Name a file that was written, where standard output is not one JSON object."""
    print(path, file=sys.stderr if as_json else sys.stdout)


@app.command()
def data(
    recipe: RecipeName,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=0, help="Examples of each split to print.")] = 3,
    measure_difficulty: Annotated[
        int | None,
        typer.Option(metavar="K", min=1, help="Sample K answers to each training prompt, and write its mean reward."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE.jsonl", help="For --measure-difficulty: the rows with what it measured."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show the rows of a recipe as the model will see them, what is learned and what is left out."""
    if (measure_difficulty is None) != (output is None):
        raise UserError("--measure-difficulty K and --output FILE.jsonl belong together; give both, or neither")
    if measure_difficulty is not None and output is not None:
        _measure_difficulty(recipe, overrides, measure_difficulty, output, as_json)
        return
    from lowmem_rlhf.quiet import hush
    from lowmem_rlhf.recipe.loading import load_recipe
    from lowmem_rlhf.report.data_view import print_preview
    from lowmem_rlhf.session.check import check_recipe

    hush()
    with _prints_aside(as_json):
        check = check_recipe(load_recipe(recipe, overrides), rows)
    if as_json:
        _print_json(check.to_dict())
    else:
        print_preview(check.to_dict())
    check.raise_errors()


def _measure_difficulty(recipe: str, overrides: list[str] | None, samples: int, output: Path, as_json: bool) -> None:
    from lowmem_rlhf.quiet import hush
    from lowmem_rlhf.recipe.loading import load_recipe
    from lowmem_rlhf.rewards.time_limit import end_process, stuck_calls_end_with
    from lowmem_rlhf.session.difficulty import measure_difficulty

    hush()
    with _prints_aside(as_json), stuck_calls_end_with(end_process, own_process=True):
        told = measure_difficulty(load_recipe(recipe, overrides), samples, output)
    if as_json:
        _print_json(told)
        return
    print(told["said"])
    for file, overrides in zip(told["files"], told["overrides"], strict=True):
        print(f"{file}: learn from it with {shlex.join(overrides)}")


@rewards_app.callback(invoke_without_command=True)
def rewards(context: typer.Context, as_json: Json = False) -> None:
    """List the rewards that ship with the package, with their options; `rewards try` scores texts with one."""
    from lowmem_rlhf.display.rewards import print_rewards
    from lowmem_rlhf.rewards.catalogue import described_rewards

    if context.invoked_subcommand is not None:
        if as_json:
            raise UserError(f"--json: write it behind the command, `rewards {context.invoked_subcommand} ... --json`")
        return
    known = {name: one.to_dict() for name, one in described_rewards().items()}
    _print_json(known) if as_json else print_rewards(known)


@rewards_app.command(name="try")
def try_reward(
    name: Annotated[str, typer.Argument(metavar="NAME", help="As in a recipe; path.py:function for your own.")],
    text: Annotated[
        list[str] | None, typer.Option(help="A completion to score, as often as there are; - reads standard input.")
    ] = None,
    option: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="An option of the reward.")] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="A column of the data, for all texts or once for each."),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Give the completions as chat messages.")] = False,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="MODEL", help="For rewards that count tokens: count those of this model.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Score texts with a reward, without a policy."""
    from lowmem_rlhf.display.rewards import print_trial
    from lowmem_rlhf.files import dumps
    from lowmem_rlhf.quiet import hush
    from lowmem_rlhf.rewards.time_limit import end_process, stuck_calls_end_with
    from lowmem_rlhf.rewards.trial import try_reward as scored

    hush()
    texts = [sys.stdin.read() if one == "-" else one for one in text or []]
    with _prints_aside(as_json), stuck_calls_end_with(end_process, own_process=True):
        trial = scored(name, texts, option or [], column or [], chat, tokenizer).to_dict()
    print(harmless(dumps(trial, indent=2))) if as_json else print_trial(trial)


@app.command()
def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    output: Annotated[Path | None, typer.Option(help="The run's folder; default runs/NAME.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the folder's last checkpoint.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved recipe and the plan, and stop.")
    ] = False,
    trust_run: Trust = False,
    processes: Annotated[
        int | None, typer.Option(metavar="N", help="Train in N processes on this machine, one for each card.")
    ] = None,
) -> None:
    """Run a recipe."""
    from lowmem_rlhf.display.processes import print_plans
    from lowmem_rlhf.display.run_display import display_for
    from lowmem_rlhf.planning.processes.request import advice_of, cluster_of, plan_of
    from lowmem_rlhf.planning.run_plan import running_plan
    from lowmem_rlhf.processes.launch import check_number
    from lowmem_rlhf.processes.start import rank_of_process
    from lowmem_rlhf.progress import shown_by
    from lowmem_rlhf.quiet import hush
    from lowmem_rlhf.recipe.loading import load_recipe
    from lowmem_rlhf.rewards.time_limit import end_process, stuck_calls_end_with
    from lowmem_rlhf.run.directory import open_run
    from lowmem_rlhf.session.train import train as run_recipe

    if trust_run:
        if not (resume and output):
            raise UserError("--trust-run: is for a run that goes on; give its folder with --output, and --resume")
        open_run(output.absolute(), trust=True)  # a folder, and not the name of a recipe that has runs elsewhere
    if processes is not None:
        check_number(processes)
    resolved = load_recipe(recipe, overrides)
    cluster = cluster_of(processes, None, None, None)
    if dry_run:
        made = plan_of(resolved, cluster) if cluster else running_plan(resolved)
        resolved = _checked(resolved, network=True)
        print(resolved.to_yaml())
        print_plans(made.to_dict())
        if not made.fits:
            print(harmless(advice_of(made, resolved, cluster)))
        return
    if cluster:
        _in_processes(cluster.processes)
    hush()
    display = display_for("auto")
    with shown_by(display), stuck_calls_end_with(end_process, own_process=True):
        run = run_recipe(resolved, output, resume, display)
    if rank_of_process():
        return  # the first of several says what there is
    result = resolved.spec.leaves
    print(f"{result + ':':8} {run.path / result}\nreport:  {run.path / 'report.html'}")


def _in_processes(number: int) -> None:
    """Start this command in so many processes, and end with their exit code."""
    from lowmem_rlhf.processes.launch import launch, without_option

    code, said = launch(number, without_option("--processes", sys.argv[1:]))
    if said:
        _tell(f"error: {said}")
    sys.exit(code)


@app.command()
def runs(
    folder: Annotated[Path | None, typer.Argument(help="Where they lie; default runs.")] = None,
    as_json: Json = False,
) -> None:
    """List the runs below a folder with their state, time and result, the newest last."""
    from lowmem_rlhf.display.runs import print_runs
    from lowmem_rlhf.run.listing import RUNS, runs_in

    found = runs_in(folder or RUNS)
    if as_json:
        _print_json({"runs": [run.to_dict() for run in found]})
    else:
        print_runs(found, folder or RUNS)


@app.command()
def chat(
    run: Annotated[Path, typer.Argument(metavar="RUN", help=A_RUN)],
    prompt: Annotated[str | None, typer.Option(help="Answer this text and stop; without it, a prompt line.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Show what the reference answers, too.")] = False,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Of an answer; default: as in training.")] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of what is drawn at a temperature above 0.")] = 0,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, ...; default: the recipe's.")] = None,
    step: Step = None,
    task: Annotated[str | None, typer.Option(help="Of a run with several: how prompts are written.")] = None,
    trust_run: Trust = False,
    as_json: Json = False,
) -> None:
    """Talk to the policy that a run has trained."""
    from lowmem_rlhf.inference.chat.show import answer, interact, show
    from lowmem_rlhf.inference.chat.talk import ChatOptions
    from lowmem_rlhf.inference.open_run import OpenRun
    from lowmem_rlhf.inference.opening import conversation
    from lowmem_rlhf.quiet import hush
    from lowmem_rlhf.run.directory import open_run

    if as_json and prompt is None:
        raise UserError("--json prints one answer; give its prompt with --prompt TEXT")
    if prompt is not None and not prompt.strip():
        raise UserError("--prompt: the prompt is empty; give a text to answer")
    options = ChatOptions(compare, max_tokens, temperature, seed, task)
    hush()
    with conversation(OpenRun.at(open_run(run, trust_run), _step(step)), device, options) as talk:
        if prompt is None:
            interact(talk)
        elif as_json:
            _print_json(answer(talk, prompt))
        else:
            show(talk.ask(prompt))


@app.command(name="eval")
def evaluate(
    what: Annotated[str, typer.Argument(metavar="RUN|MODEL", help=f"{A_RUN[:-1]}; or a model as in a recipe.")],
    overrides: Overrides = None,
    recipe: Annotated[
        str | None, typer.Option(help="For a MODEL: the recipe whose held-out data and rewards are used.")
    ] = None,
    against: Annotated[str | None, typer.Option(metavar="MODEL", help="Compare a MODEL with this one.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Answers a problem, for pass@k.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, help="0 takes the likeliest token.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Of an answer; default: as in training.")] = None,
    step: Step = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, ...; default: the recipe's.")] = None,
    lm_eval: Annotated[
        str | None,
        typer.Option(metavar="TASKS", help="Tasks of lm-eval (A,B or YAML files) in place of held-out data."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Of an lm-eval task's problems, for a quick look.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Of lm-eval's prompts: write them as chats.")] = False,
    trust_run: Trust = False,
    as_json: Json = False,
) -> None:
    """Measure a run's policy beside its reference, or a model, on held-out data, with intervals."""
    from lowmem_rlhf.display.outcome import print_outcome
    from lowmem_rlhf.evaluation.command import Request, run_evaluation
    from lowmem_rlhf.files import dumps
    from lowmem_rlhf.quiet import hush
    from lowmem_rlhf.rewards.time_limit import end_process, stuck_calls_end_with

    given = {
        "evaluation.num_samples": samples,
        "evaluation.temperature": temperature,
        "generation.max_completion_length": max_tokens,
    }
    asked = [f"{key}={value}" for key, value in given.items() if value is not None]
    tasks = [task.strip() for task in (lm_eval or "").split(",") if task.strip()]
    if lm_eval is not None and not tasks:
        raise UserError(f"--lm-eval: got {lm_eval!r}; give tasks with commas between them, or leave it out")
    at = _step(step)
    request = Request(what, overrides or [], asked, recipe, against, at, device, tasks, limit, chat, trust_run)
    hush()
    with _prints_aside(as_json), stuck_calls_end_with(end_process, own_process=True):
        outcome, kept = run_evaluation(request)
    print(harmless(dumps(outcome, indent=2))) if as_json else print_outcome(outcome)
    if isinstance(kept, RunError):
        sys.stdout.flush()
        raise kept
    if kept and not as_json:
        print(f"kept in {kept}")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help=A_RUN)],
    format: Annotated[
        str | None, typer.Option(help="merged (the default), adapter, gguf or ollama; of a reward model: adapter.")
    ] = None,
    onto: Annotated[
        str | None, typer.Option(help="Add the change to the quantized weights of the run, or to the original ones.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of merged weights: float16, bfloat16 or float32; default: see docs/export.md.")
    ] = None,
    quantize: Annotated[str | None, typer.Option(help="f16, bf16, q8_0 (default), q6_k, q5_k_m or q4_k_m.")] = None,
    output: Annotated[Path | None, typer.Option(help="The folder; default RUN/export/FORMAT.")] = None,
    step: Step = None,
    heads: Annotated[bool, typer.Option("--heads", help="Take a value or score head along.")] = False,
    as_class: Annotated[
        str | None,
        typer.Option("--for", help="Of a base for images or sound: the names of its wrapper class, or text's alone."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, ...; default: the recipe's.")] = None,
    push: Annotated[str | None, typer.Option(metavar="REPO", help="Upload it to this repository of the Hub.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the memory and disk it takes, and stop.")] = False,
    trust_run: Trust = False,
    as_json: Json = False,
) -> None:
    """Take the trained model away, proven against the live policy."""
    from lowmem_rlhf.display.export import show_plan, show_result
    from lowmem_rlhf.display.lines import ByteBars
    from lowmem_rlhf.export.export import Export
    from lowmem_rlhf.export.options import ExportOptions
    from lowmem_rlhf.progress import shown_by
    from lowmem_rlhf.quiet import hush
    from lowmem_rlhf.run.directory import open_run

    if push is not None and not push.strip():
        raise UserError(f"--push: got {push!r}; give OWNER/NAME, or NAME for your own account")
    options = ExportOptions(format, onto, dtype, quantize, output, _step(step), heads, as_class, device, push)
    job = Export(open_run(run, trust_run), options)
    with ByteBars() as display, shown_by(display):
        hush()
        outcome = job.plan() if dry_run else job.make()
    if as_json:
        _print_json(outcome)
    elif dry_run:
        show_plan(outcome)
    else:
        show_result(outcome)


@app.command()
def bench(
    minutes: Annotated[float, typer.Option(help="Time in all; the most telling parts come first.")] = 8.0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or another torch device.")] = "auto",
    model: Annotated[
        str | None, typer.Option(help="Measure this one; default: Qwen2.5-0.5B's sizes, random where it is not cached.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The record's file; default bench-CARD-DATE.json.")] = None,
    only: Annotated[
        str | None, typer.Option(metavar="PART,PART", help="Of graphs, step, plan, precisions, device_tests.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure this card: decoding, a step against TRL, the plan, precisions, the device tests."""
    from lowmem_rlhf.bench.run import BenchOptions, run_bench
    from lowmem_rlhf.report.bench_view import print_record

    record, path = run_bench(BenchOptions(minutes, device, model, out, only))
    if as_json:
        _print_json(record)
    else:
        print_record(record)
    _say(path, as_json)
    statuses = {part["status"] for part in record["parts"].values()}
    if "failed" in statuses and not any(part["values"] for part in record["parts"].values()):
        raise RunError("nothing could be measured; the record says why of each part")


@app.command()
def doctor(
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or another torch device.")] = "auto",
    as_json: Json = False,
) -> None:
    """Check card, driver, libraries, disk and network, and say what mends them; --json is for a bug report."""
    from lowmem_rlhf.doctor.finding import worst
    from lowmem_rlhf.doctor.machine import Machine
    from lowmem_rlhf.doctor.run import examine
    from lowmem_rlhf.doctor.run import report as report_of
    from lowmem_rlhf.doctor.show import print_findings

    machine = Machine(device)
    findings = examine(machine)
    _print_json(report_of(machine, findings)) if as_json else print_findings(findings)
    if worst(findings) == "error":
        raise typer.Exit(1)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help=A_RUN)],
    plot: Annotated[Path | None, typer.Option(help="Also save the reward curve as this PNG.")] = None,
) -> None:
    """Write a run's report.html."""
    from lowmem_rlhf.report.html import write_report
    from lowmem_rlhf.report.plan_plots import check_picture
    from lowmem_rlhf.report.plots import plot_reward
    from lowmem_rlhf.run.directory import open_run

    if plot:
        check_picture(plot)
    opened = open_run(run)
    print(write_report(opened))
    if plot:
        plot_reward(opened.metrics(), opened.evaluation(), plot, str(opened.recipe_values().get("name", "")))
        print(plot)


@app.command()
def watch(
    runs: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN]...", help="Runs, folders of runs, or recipes' names for their newest runs."),
    ] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Default: a free one.")] = None,
    opens: Annotated[bool, typer.Option("--open/--no-browser", help="Open the page in a browser.")] = False,
) -> None:
    """Follow runs on a page of this machine: curves, samples, plan, evaluation; Ctrl-C ends it."""
    from lowmem_rlhf.api.run import open_run
    from lowmem_rlhf.page.server import watch as serve

    def say(line: str) -> None:
        print(line, flush=True)

    serve(runs or [], port, opens, lambda path: open_run(path, progress=None), say)
