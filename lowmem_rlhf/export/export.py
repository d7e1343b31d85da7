"""`export`: from a run to a folder that others load. It appears whole, once it is proven, or not at all.

What is written and how it is proven is a format's own (`export.formats`).
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lowmem_rlhf.architecture.families.wrappers import WRAPPERS
from lowmem_rlhf.architecture.lookup import model_dimensions
from lowmem_rlhf.errors import LowmemError, RunError, UserError
from lowmem_rlhf.export.formats.table import FORMATS, check_options
from lowmem_rlhf.export.job import ExportJob
from lowmem_rlhf.export.options import ExportOptions
from lowmem_rlhf.export.proof.words import in_words
from lowmem_rlhf.export.target import EXPORT, check_disk, check_target, free_disk
from lowmem_rlhf.files import begin_folder, delete, dumps, fault_number, finish_folder, why_not_written
from lowmem_rlhf.inference.open_run import OpenRun
from lowmem_rlhf.inference.opening import check_device, memory_explained
from lowmem_rlhf.run.directory import RunDirectory
from lowmem_rlhf.run.lock import Lock
from lowmem_rlhf.run.start import paths_explained
from lowmem_rlhf.run.trust import trust_code


class Export:
    """One export of a run.

    Raises:
        UserError: what is asked for cannot be made of this run.
    """

    def __init__(self, run: RunDirectory, options: ExportOptions) -> None:
        opened = OpenRun.at(run, options.step)
        self.written = opened.written
        options = check_options(options, opened.recipe, run)
        self.format = FORMATS[str(options.format)]
        target = options.output or run.path / "export" / self.format.name
        self.job = ExportJob(opened, options, target)
        _ = self.job.adapter, self.job.settings  # refused before anything costly where they are not there
        if options.as_class and self.job.base_type not in WRAPPERS:
            raise UserError(
                f"--for: the base {self.job.recipe.model!r} ({self.job.base_type}) is no model for images or sound, so "
                "its files have one class's names only; leave it out"
            )
        check_target(target)

    def plan(self) -> dict[str, Any]:
        """Return what the export will take: bytes of memory by part, of disk, and of the disk that is free.

        Raises:
            UserError: the sizes of the base are not known.
        """
        job = self.job
        with paths_explained(job.run.path, self.written):
            dims = model_dimensions(job.recipe.model, job.recipe.revision)
        needed = self.format.bytes(job, dims)
        return {
            "format": self.format.name,
            "dtype": needed.dtype,
            "memory_bytes": needed.memory,
            "disk_bytes": needed.disk,
            "free_disk_bytes": free_disk(job.target),
        }

    def make(self) -> dict[str, Any]:
        """Write the export and return what export.json holds; with ``--push`` it is uploaded.

        Raises:
            UserError: the base is gone or not the run's, or a dtype was asked for that loses the change.
            RunError: the disk is too small or filled up, or the export is not what the live policy is.
        """
        job = self.job
        check_device(job.hardware, job.settings["compute_dtype"])
        with paths_explained(job.run.path, self.written), memory_explained(job.recipe):
            job.opened.check()
            self._check_disk()
            facts = self._write()
            if job.options.push:
                facts["pushed"] = self._push(job.options.push)
            trust_code(job.target, job.run.recipe_values())  # `eval` of it reads the recipe in it
            return {"folder": str(job.target), **facts}

    def _check_disk(self) -> None:
        try:
            needed = self.plan()["disk_bytes"]
        except UserError:
            needed = 0  # the planner does not know the sizes; they are read from the weights themselves later
        check_disk(needed, self.job.target)

    def _write(self) -> dict[str, Any]:
        """Write, prove and describe the export; return what export.json holds."""
        from lowmem_rlhf.export.card.write import write_card

        job = self.job
        with self._whole_or_not() as folder:
            written = self.format.write(job, folder)
            proof = self.format.prove(job, folder, written)
            facts = {"format": self.format.name, "step": job.opened.step, **written.facts, "proof": proof}
            facts = {"summary": in_words(facts), **facts}
            (folder / EXPORT).write_text(dumps(facts, indent=2) + "\n", encoding="utf-8")
            write_card(folder, job.run, facts)
        return facts

    @contextmanager
    def _whole_or_not(self) -> Iterator[Path]:
        """Yield a temporary folder that becomes the export when the block ends without an error."""
        folder, target = None, self.job.target
        lock = Lock(target.absolute().with_name(f".{target.name}.lock"), f"the export in {target}")
        try:
            lock.file.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
            folder = begin_folder(target)
            yield folder
            finish_folder(target)
        except Exception as error:
            if (number := fault_number(error)) is None or isinstance(error, LowmemError):
                raise
            why = why_not_written(error, number, "or choose another folder with --output")
            kept = why.replace("; ", "; nothing was kept, ", 1)
            raise RunError(f"the export to {target} cannot be written: {kept}") from error
        except KeyboardInterrupt as stop:
            stop.add_note("nothing was kept")
            raise
        finally:
            if folder is not None:
                with suppress(OSError):
                    delete(folder)
            lock.remove()

    def _push(self, repo: str) -> str:
        from lowmem_rlhf.export.push import push

        try:
            return push(self.job.target, repo)
        except KeyboardInterrupt as stop:
            stop.add_note(f"the export in {self.job.target} is whole, what arrived of it is not sent again")
            raise
