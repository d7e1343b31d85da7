"""The run directory: everything a run leaves on disk, and the rules for starting, resuming and reading one.

Files appear whole or not at all (see :mod:`lowmem_rlhf.files`), so a run that is killed at any moment can be read and
resumed. ``metrics.jsonl`` and ``samples.jsonl`` grow by appended lines; a line torn by a kill is ignored by readers and
dropped by a resume. What is read back has to be what was written (see :mod:`lowmem_rlhf.run.proof`), and one process at
a time writes (see :mod:`lowmem_rlhf.run.lock`). No torch here.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.files import (
    append_lines,
    begin_folder,
    check_room,
    delete,
    dumps,
    finish_folder,
    is_temp,
    set_aside,
    sync_file,
    sync_folder,
    writing,
)
from lowmem_rlhf.paths import obstacle
from lowmem_rlhf.progress import message
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.run.base_file import write_base
from lowmem_rlhf.run.checkpoints import STATE, write_state
from lowmem_rlhf.run.held_out import taken_back
from lowmem_rlhf.run.listing import RUNS, base_name, newest_run
from lowmem_rlhf.run.lock import LOCK, Lock
from lowmem_rlhf.run.logs import LogProof, rewind_log
from lowmem_rlhf.run.proof import HASHES, Damaged, read_sealed, write_hashes
from lowmem_rlhf.run.reading import (
    ADAPTER,
    CHECKPOINTS,
    EVALUATION,
    INPUTS,
    METRICS,
    MODEL,
    PLAN,
    RECIPE,
    REPORT,
    SAMPLES,
    RunReader,
)
from lowmem_rlhf.run.rules import Found, check_new, check_resume, check_text_files, check_there, find_checkpoint
from lowmem_rlhf.run.start import write_start
from lowmem_rlhf.run.text_files import adopt_text_files, changed_text_files, hashes_damaged, write_text_file
from lowmem_rlhf.run.trust import trust_code

__all__ = ["ADAPTER", "INPUTS", "MODEL", "RECIPE", "REPORT", "RunDirectory", "default_output", "open_run"]

_GO_ON = "then go on with --resume"


class RunDirectory(RunReader):
    """One run on disk. Make one with :meth:`create`, read one with :func:`open_run`.

    Attributes:
        writes: False in those of several processes that leave writing to another one.
    """

    writes = True

    def __init__(self, path: Path, save_total_limit: int | None = None) -> None:
        """Wrap a folder; nothing is checked or written. Without ``save_total_limit`` every checkpoint is kept."""
        super().__init__(path)
        self.save_total_limit = save_total_limit
        self.unhealthy_from: int | None = None  # the step from which on training is not in order
        self._lock = Lock(self._absolute / LOCK, f"the run in {path}")
        self._logs = {name: LogProof(self._absolute / name) for name in (METRICS, SAMPLES)}
        self._base: Any = None  # of inputs.json, once it is read or written

    @classmethod
    def create(
        cls,
        path: str | Path,
        recipe: Recipe,
        plan_dict: dict[str, Any],
        resume: bool,
        inputs: dict[str, Any] | None = None,
    ) -> "RunDirectory":
        """Start a run in a new or empty folder, or continue the one that is there.

        A resume goes back to the latest checkpoint that is what was written; damaged ones are set aside, and the logs
        taken back to it (see :meth:`rewind`), without one to the start. The run is locked until `unlock`.

        Args:
            path: the folder.
            recipe: with its paths as they were written, relative to the current folder or to the one of the start.
            plan_dict: what plan.json holds.
            resume: continue.
            inputs: what inputs.json holds (see `data.provenance`); None: what is there stays.

        Raises:
            UserError: the folder holds another run or foreign files, is a file or cannot be written, or another process
                writes there; with ``resume``, there is no run, the recipe differs in what is learned or ends before the
                steps done, or no checkpoint is whole. Nothing was changed then.
        """
        run = cls(Path(path), recipe.training.save_total_limit)
        with writing(f"output folder {path}", UserError, "or choose another one with --output"):
            run._lock.check()
            check_there(run) if resume else check_new(run)
            run.path.mkdir(parents=True, exist_ok=True)
            try:
                run._lock.acquire()
                run._begin(recipe, plan_dict, resume, inputs)
            except BaseException:
                run._lock.release() if resume or run.holds_run() else run._lock.remove()
                raise
        return run

    def _begin(
        self, recipe: Recipe, plan_dict: dict[str, Any], resume: bool, inputs: dict[str, Any] | None = None
    ) -> None:
        found = self._check(recipe, resume, resolved=True)  # nobody else writes from here on
        if resume:
            self._go_back(found, recipe)
        self._clean()
        write_text_file(self.path, RECIPE, recipe.to_yaml())
        write_text_file(self.path, PLAN, dumps(plan_dict, indent=2) + "\n")
        write_start(self.path, recipe)
        trust_code(self.path, recipe.model_dump())
        if inputs is not None:
            write_text_file(self.path, INPUTS, dumps(inputs, indent=2) + "\n")
        adopt_text_files(self.path, (INPUTS, EVALUATION))
        self._base = self.inputs().get("base")
        sync_folder(self._absolute.parent)

    @classmethod
    def check(cls, path: str | Path, recipe: Recipe, resume: bool) -> None:
        """Check that a run may start (or continue) there, before anything costly; writes nothing.

        Raises:
            UserError: as for `create`.
        """
        cls(Path(path))._check(recipe, resume)

    def _check(self, recipe: Recipe, resume: bool, resolved: bool = False) -> Found:
        """Check as `check`; return the checkpoints. A length in epochs is known only once the recipe is resolved."""
        self._lock.check()
        if not resume:
            check_new(self)
            return Found(None, [])
        check_resume(self, recipe)
        found = find_checkpoint(self)
        done = found.latest[0] if found.latest else 0
        if recipe.training.max_steps < done and (resolved or recipe.training.num_train_epochs is None):
            raise UserError(
                f"--resume: training.max_steps: got {recipe.training.max_steps}, and the run in {self.path} has taken "
                f"{done} steps; give {done} or more, or start a new run with another --output"
            )
        return found

    def _go_back(self, found: Found, recipe: Recipe) -> None:
        """Take everything back to the checkpoint that the run goes on from."""
        for folder, what in found.damaged:
            aside = set_aside(folder)
            message(f"{folder} is damaged ({what}): it is {aside.name} now, and an earlier one is taken")
        step = found.latest[0] if found.latest else 0
        self.rewind(step)
        if hashes_damaged(self.path):
            message(
                f"{self.path / HASHES} is damaged: {RECIPE}, {PLAN}, {INPUTS} and {EVALUATION} are taken as they are"
            )
        file = self.path / EVALUATION
        evaluation: dict[str, Any] = {}
        damage = "is not what the run wrote" if EVALUATION in changed_text_files(self.path) else ""
        try:
            evaluation = self.evaluation()
        except UserError as error:
            damage = str(error).removeprefix(f"{file} ")
        if damage and file.exists():
            message(f"{file} {damage}: it is {set_aside(file).name} now, and what it says is not used")
        elif (left := taken_back(evaluation, step, step >= recipe.training.max_steps, recipe.evaluation)) != evaluation:
            self._write_evaluation(left)
        self._prune()

    def check_text_files(self) -> None:
        """Check that what a resume computes from is what the run wrote.

        Raises:
            UserError: recipe.yaml, plan.json or inputs.json was changed by something else.
        """
        check_text_files(self)

    def lock(self) -> None:
        """Be the one that writes the run, as `create` already made it, until `unlock`.

        Raises:
            UserError: another process is it, or has been it since this one was.
        """
        with writing(self.path / LOCK, UserError):
            self._lock.acquire()

    def unlock(self) -> None:
        """Let others write the run."""
        self._lock.release()

    def _clean(self) -> None:
        """Remove what a killed process left half-written."""
        for folder in (self.path, self.path / CHECKPOINTS):
            if folder.is_dir():
                for path in [p for p in folder.iterdir() if is_temp(p)]:
                    delete(path)

    # Writing

    def log_metrics(self, metrics: dict[str, Any]) -> None:
        """Append one step's metrics (with its ``step``); numbers that are not finite become null.

        Raises:
            RunError: the system refuses to write; so of all that is written.
        """
        self._append(METRICS, [{"step": metrics["step"], **metrics}])

    def log_samples(self, step: int, samples: Iterable[dict[str, Any]]) -> None:
        """Append a step's samples: ``prompt`` (text or chat messages), ``completion``, ``rewards`` by name, ..."""
        self._append(SAMPLES, [{"step": step, **sample} for sample in samples])

    def _append(self, name: str, rows: list[dict[str, Any]]) -> None:
        with writing(self.path / name, remedy=_GO_ON):
            append_lines(self.path / name, rows)

    def write_evaluation(self, evaluation: dict[str, Any]) -> None:
        """Write the held-out results (see `run.held_out`); ``after`` may still be missing.

        The checkpoint of an evaluation that was the best before is then one of many.
        """
        with writing(self.path / EVALUATION, remedy=_GO_ON):
            self._write_evaluation(evaluation)
        with suppress(OSError):
            self._prune()

    def _write_evaluation(self, evaluation: dict[str, Any]) -> None:
        write_text_file(self.path, EVALUATION, dumps(evaluation, indent=2) + "\n")

    def change_settings(self, settings: dict[str, Any], reason: str) -> None:
        """Write settings that changed while the run goes on into plan.json, with the reason."""
        plan = self.plan()
        if not plan:
            return
        plan["settings"] = {**plan.get("settings", {}), **settings}
        plan["reasons"] = {**plan.get("reasons", {}), **dict.fromkeys(settings, reason)}
        with writing(self.path / PLAN, remedy=_GO_ON):
            write_text_file(self.path, PLAN, dumps(plan, indent=2) + "\n")

    def record_time(self, measured: dict[str, Any]) -> None:
        """Write into plan.json what a step took, beside what was predicted."""
        plan = self.plan()
        if not isinstance(plan.get("time"), dict):
            return
        plan["time"] = {**plan["time"], "measured": measured}
        with writing(self.path / PLAN, remedy=_GO_ON):
            write_text_file(self.path, PLAN, dumps(plan, indent=2) + "\n")

    def rewind(self, step: int) -> None:
        """Go back to ``step``: drop later lines and torn ones from the logs, and later checkpoints.

        A log that is not what it was then is said, and what can be read of it stays.
        """
        proofs: dict[str, Any] = {}
        with suppress(Damaged, UserError, KeyError):
            logs = read_sealed(dict(self.checkpoints())[step] / STATE)[0].get("logs")
            proofs = logs if isinstance(logs, dict) else {}
        for name in self._logs:
            rewind_log(self._absolute / name, self.path / name, step, proofs.get(name), name == METRICS)
        for later, folder in self.checkpoints():
            if later > step:
                delete(folder)

    @contextmanager
    def new_checkpoint(self, step: int, healthy: bool = True, needed: int = 0) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Yield a temporary folder and the values of its state.json, both to be filled.

        When the block ends without an error they become ``checkpoints/step-N``, with the hashes of all files, and the
        oldest ones beyond ``save_total_limit`` are deleted, but never the latest one that is healthy, nor that of the
        best evaluation. The logs reach the disk before it.

        Args:
            step: the steps done.
            healthy: training is in order.
            needed: bytes that are about to be written.

        Raises:
            RunError: the disk has not the room, or the system refuses to write; nothing of it stays.
        """
        target = self.path / CHECKPOINTS / f"step-{step}"
        with writing(target, remedy=_GO_ON):
            check_room(target, needed, _GO_ON)
            with self._new_folder(target) as folder:
                state: dict[str, Any] = {}
                yield folder, state
                write_base(folder, self._base_values())
                for name in self._logs:
                    sync_file(self._absolute / name)
                logs = {name: log.values() for name, log in self._logs.items()}
                write_state(folder, step, healthy, logs, state)
        with suppress(OSError):  # what is too many goes with the next one
            self._prune()

    @contextmanager
    def new_adapter(self) -> Iterator[Path]:
        """Yield a temporary folder that becomes ``adapter/`` when the block ends without an error."""
        target = self.path / ADAPTER
        with writing(target, remedy=_GO_ON), self._new_folder(target) as folder:
            yield folder
            write_base(folder, self._base_values())
            write_hashes(folder)

    def _base_values(self) -> Any:
        """Return what is known of the base, read once: a run does not end by a damage to a file that it has read."""
        self._base = self._base or self.inputs().get("base")
        return self._base

    @contextmanager
    def _new_folder(self, target: Path) -> Iterator[Path]:
        """Yield a temporary folder that takes a folder's place at the end of the block, or goes with its error."""
        folder = begin_folder(target)
        try:
            yield folder
            finish_folder(target)
        except BaseException:
            with suppress(OSError):
                delete(folder)
            raise

    def _prune(self) -> None:
        """Delete the oldest checkpoints beyond the limit, but the latest healthy one and the best evaluation's."""
        if self.save_total_limit is not None and (surplus := self.checkpoints()[: -self.save_total_limit]):
            healthy, best = self.last_healthy(self.unhealthy_from), self.best_step()
            for checkpoint in surplus:
                if checkpoint != healthy and checkpoint[0] != best:
                    delete(checkpoint[1])


def open_run(path: str | Path, trust: bool = False) -> RunDirectory:
    """Open a run for reading.

    Args:
        path: the folder; or the name of a recipe, for its newest finished run below ``runs``.
        trust: the code that its recipe names may be executed, from now on (see `run.trust`).

    Raises:
        UserError: there is no run in that folder, or no finished one of that name.
    """
    if why := obstacle(path):
        raise UserError(f"run {path} {why}; give the folder that `train` wrote, for example runs/NAME")
    folder = run_folder(path)
    if (folder / RECIPE).is_file():
        run = RunDirectory(folder)
        if trust:
            trust_code(folder, run.recipe_values())
        return run
    problem = "does not exist" if not folder.exists() else f"is no run: it holds no {RECIPE}"
    inside = next((f"; did you mean {p}?" for p in list(folder.parents)[:2] if (p / RECIPE).is_file()), "")
    raise UserError(f"{path} {problem}; give the folder that `train` wrote, for example runs/NAME{inside}")


def run_folder(path: str | Path) -> Path:
    """Return the folder that is meant: the one given, or of a recipe's name its newest finished run, which is said.

    Raises:
        UserError: none of the runs of that name is finished.
    """
    folder = Path(path)
    if len(folder.parts) == 1 and folder.name and not folder.exists() and (newest := newest_run(folder.name)):
        message(f"{path} is {newest}, its newest finished run")
        return newest
    return folder


def default_output(name: str, resume: bool = False) -> Path:
    """Return the first free of ``runs/NAME``, ``runs/NAME-2``, ...; with ``resume`` the last that is taken.

    Characters that a folder name cannot have on every system are replaced by a dash.
    """
    base = base_name(name)
    candidate, last, number = RUNS / base, RUNS / base, 1
    while candidate.exists() and not (candidate.is_dir() and not any(candidate.iterdir())):
        number, last = number + 1, candidate
        candidate = RUNS / f"{base}-{number}"
    return last if resume else candidate
