"""A run as an object: what it measured, what its model says, and its ways out."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lowmem_rlhf.api.plan import PlanView
from lowmem_rlhf.api.request import Overrides, RewardLike, given_objects, override_texts
from lowmem_rlhf.display.run_display import display_for
from lowmem_rlhf.errors import RunError, UserError
from lowmem_rlhf.progress import message, shown_by
from lowmem_rlhf.quiet import hushed
from lowmem_rlhf.recipe.python_objects import given
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.run.directory import RunDirectory
from lowmem_rlhf.run.directory import open_run as open_directory
from lowmem_rlhf.suggest import did_you_mean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lowmem_rlhf.engine.base import SharedBase


def open_run(
    path: str | Path,
    *,
    data: Any = None,
    eval_data: Any = None,
    rewards: Sequence[RewardLike] | None = None,
    trust: bool = False,
    progress: Any = "auto",
) -> "Run":
    """Open a run directory.

    Args:
        path: the folder that `train` (or ``lowmem-rlhf train``) wrote; or the name of a recipe, for its newest finished
            run in ``runs``.
        data, eval_data, rewards: what the run was made with, where those were objects of a program: to evaluate it.
        trust: the Python files and the model's code that the run's recipe names may be executed; of a run that was
            trained here and whose code is still the same they may anyway.
        progress: as of `train`.

    Raises:
        UserError: there is no run in that folder, or no finished one of that name.
    """
    if not isinstance(path, str | Path):
        raise UserError(f"open_run: got a {type(path).__name__}; give the folder that `train` wrote")
    display_for(progress)  # raises now, and not at the first answer
    return Run(open_directory(path, trust).path, given_objects(data, eval_data, rewards), progress)


class Run:
    """A run on the disk. Its model is loaded when it is first asked for something, and freed by `close`."""

    def __init__(self, path: Path, objects: Mapping[str, Any] | None = None, progress: Any = "auto") -> None:
        """Wrap a run directory; nothing is read yet. Use `open_run` or `train`."""
        self._directory = RunDirectory(Path(path))
        self._objects, self._progress = dict(objects or {}), progress
        self._policy: tuple[SharedBase, Recipe] | None = None
        self._compares = False

    def __repr__(self) -> str:
        """Name the folder and how far the run is."""
        return f"<Run {str(self.path)!r}, {len(self.metrics())} steps>"

    @property
    def path(self) -> Path:
        """The run directory."""
        return self._directory.path

    @property
    def recipe(self) -> Recipe:
        """The resolved recipe."""
        return self._directory.recipe()

    @property
    def plan(self) -> PlanView:
        """The plan that the run was made with."""
        return PlanView(self._directory.plan(), str(self._directory.recipe_values().get("name", "")))

    def metrics(self) -> list[dict[str, Any]]:
        """Return the metrics, a dict a step; `pandas.DataFrame` takes them as they are.

        A step that was evaluated (`evaluation.steps`) has ``eval/NAME`` too.
        """
        return self._directory.metrics()

    def samples(self) -> list[dict[str, Any]]:
        """Return the completions that were logged, with their prompts and rewards, oldest first."""
        return self._directory.samples()

    def evaluation(self) -> dict[str, Any]:
        """Return the held-out results that training measured: ``before``, ``after``, and ``during`` where it did."""
        return self._directory.evaluation()

    def plot(self, path: str | Path | None = None) -> "Figure":
        """Return the picture of the run as a matplotlib figure, which a notebook shows.

        Args:
            path: also save it as this .png, .svg or .pdf.

        Raises:
            UserError: the path names no such file.
        """
        from lowmem_rlhf.report.plan_plots import check_picture, save_picture
        from lowmem_rlhf.report.plots import draw_run

        if path is not None:
            check_picture(Path(path))
        figure = draw_run(self.metrics(), self.evaluation())
        if path is not None:
            save_picture(figure, Path(path))
        return figure

    def report(self) -> Path:
        """Write ``report.html`` anew; return the file."""
        from lowmem_rlhf.report.html import write_report

        return write_report(self._directory)

    def generate(
        self,
        prompt: str | Sequence[str],
        n: int = 1,
        *,
        compare: bool = False,
        max_tokens: int | None = None,
        temperature: float | None = None,
        seed: int = 0,
        task: str | None = None,
    ) -> Any:
        """Return completions of the trained policy, written as training writes its prompts.

        Args:
            prompt: what a user would type, or several of them.
            n: completions of each prompt.
            compare: the reference answers too.
            max_tokens: of a completion; None: as many as in training.
            temperature: None: 0 (the likeliest tokens) for one completion, as in training for several.
            seed: the same seed gives the same completions.
            task: of several, the one whose prompts are written; None: the first.

        Returns:
            A list of ``n`` texts; of several prompts a list of such lists; with ``compare`` a dict of either by role,
            ``policy`` and ``reference``.

        Raises:
            UserError: the run has no finished adapter or no policy, or a prompt is empty or too long.
            RunError: the device's memory ran out.
        """
        if isinstance(prompt, Mapping) or not isinstance(prompt, Iterable):
            raise UserError(f"generate: got a {type(prompt).__name__}; give a text, or a list of texts")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        with self._inside():
            from lowmem_rlhf.inference.generate import answer_prompts

            base, recipe = self._opened(compare)
            dequantize = self._directory.plan()["settings"].get("rollout_weights") == "dequantized"
            answers = answer_prompts(base, recipe, prompts, n, compare, max_tokens, temperature, seed, dequantize, task)
        by_role: dict[str, Any] = {
            role: lists[0] if isinstance(prompt, str) else lists for role, lists in answers.items()
        }
        return by_role if compare else by_role["policy"]

    def evaluate(
        self, overrides: Overrides = (), *, step: int | Literal["best"] | None = None, device: str | None = None
    ) -> dict[str, Any]:
        """Measure the policy beside its reference on held-out data, with intervals; keep and return the outcome.

        Args:
            overrides: changes of the recipe, for example ``["evaluation.num_samples=8"]``.
            step: of a checkpoint; ``"best"``: that of the best evaluation (`evaluation.keep_best`); None: the finished
                adapter.
            device: None: the recipe's.

        Returns:
            What ``eval --json`` prints.

        An outcome that the run's folder cannot take is returned all the same, and that is said.

        Raises:
            UserError: what is asked for does not fit the run; RunError: it failed.
        """
        from lowmem_rlhf.inference.open_run import OpenRun
        from lowmem_rlhf.report.html import write_report
        from lowmem_rlhf.run.evaluations import append_evaluation

        self.close()  # one copy of the base at a time
        with self._inside():
            from lowmem_rlhf.evaluation.evaluate import evaluate_run

            outcome = evaluate_run(OpenRun.at(self._directory, step), override_texts(overrides), device)
            try:
                append_evaluation(self.path, outcome)
                write_report(self._directory)
            except RunError as error:  # what was measured is not lost by that
                message(f"{error}; the outcome was returned and not kept")
        return outcome

    def export(self, format: str = "merged", **options: Any) -> dict[str, Any]:
        """Take the model away as a folder that others load, proven against the live policy.

        Args:
            format: ``merged``, ``adapter``, ``gguf`` or ``ollama``.
            options: those of ``lowmem-rlhf export``: ``onto``, ``dtype``, ``quantize``, ``output``, ``step``,
                ``heads``, ``device``, ``push``.

        Returns:
            What ``export --json`` prints; ``folder`` is where it lies.

        Raises:
            UserError: the options do not go together or are unknown; RunError: the export is not what it should be.
        """
        from lowmem_rlhf.export.export import Export
        from lowmem_rlhf.export.options import ExportOptions

        known = [one.name for one in fields(ExportOptions) if one.name != "format"]
        for name in options:
            if name not in known:
                hint = did_you_mean(name, known)
                raise UserError(f"export: there is no option {name!r}{hint} (its options: {', '.join(known)})")
        if isinstance(options.get("output"), str):
            options["output"] = Path(options["output"])
        self.close()
        with self._inside():
            return Export(self._directory, ExportOptions(format, **options)).make()

    def close(self) -> None:
        """Free the model, if one is loaded."""
        if self._policy is None:
            return
        from lowmem_rlhf.hardware.memory import release

        device = self._policy[0].device
        self._policy, self._compares = None, False
        release(device)

    def __enter__(self) -> "Run":
        """Return the run, which is closed at the end of the block."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close it."""
        self.close()

    def _opened(self, compare: bool) -> "tuple[SharedBase, Recipe]":
        from lowmem_rlhf.inference.open_run import OpenRun
        from lowmem_rlhf.inference.opening import add_initial_adapter, open_policy

        if self._policy is None:
            opened = OpenRun(self._directory)
            self._policy = open_policy(opened), opened.recipe
        if compare and not self._compares:
            add_initial_adapter(*self._policy)
            self._compares = True
        return self._policy

    @contextmanager
    def _inside(self) -> Iterator[None]:
        """Let what runs inside report to the display, find the program's objects, and keep other libraries quiet.

        What loads them is imported inside: bitsandbytes talks while it is imported.
        """
        display = display_for(self._progress)
        try:
            with shown_by(display), hushed(display.message), given(self._objects):
                yield
        finally:
            display.end()
