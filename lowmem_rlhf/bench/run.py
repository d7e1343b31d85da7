"""One run of ``bench``: its parts in order, within the time, each recorded as soon as it has ended. No torch here."""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lowmem_rlhf.architecture.source import resolve_model
from lowmem_rlhf.bench.budget import Bar, Budget
from lowmem_rlhf.bench.child import Start, run_child
from lowmem_rlhf.bench.parts import PREPARE_SECONDS, Part, chosen
from lowmem_rlhf.bench.record import Record, file_name, new_record, publishable, save
from lowmem_rlhf.bench.work import ON_A_CARD, ON_A_CPU, Sizes, Work
from lowmem_rlhf.errors import LowmemError, RunError, UserError, one_line
from lowmem_rlhf.hardware.detect import detect
from lowmem_rlhf.hardware.device import Device
from lowmem_rlhf.paths import cannot_be_written
from lowmem_rlhf.progress import message

PATIENCE = 3  # times what a part takes roughly, after which a task of it is taken to hang
STOPPED = "the run was stopped"


@dataclass(frozen=True)
class BenchOptions:
    """What the user asks for.

    Attributes:
        minutes: in all.
        device: as of ``detect``.
        model: whose sizes and weights are taken, as in a recipe; None: of the sizes that suit the device.
        out: the record's file; None: ``bench-CARD-DATE.json`` in the current folder.
        only: parts by name, with commas between them; None: all.
        sizes: how much work; None: what suits the device.
    """

    minutes: float = 8.0
    device: str = "auto"
    model: str | None = None
    out: Path | None = None
    only: str | None = None
    sizes: Sizes | None = None


def run_bench(options: BenchOptions, start: Start = run_child) -> tuple[Record, Path]:
    """Measure what the time suffices for; return the record and its file, which is written after every part.

    Args:
        start: runs a task.

    Raises:
        UserError: an option is wrong, the model cannot be had, or torch cannot use the device.
        RunError: the model cannot be written, or the record.
        KeyboardInterrupt: the run was stopped; a note says where the record is.
    """
    parts, budget = chosen(options.only), Budget(options.minutes)
    if options.model is not None:
        resolve_model(options.model)
    device = detect(options.device)
    path = options.out or file_name(device, Path())
    if why := "is a folder" if path.is_dir() else cannot_be_written(path):
        raise UserError(f"--out: {path} {why}" if path.is_dir() else f"--out: {why}")
    sizes = options.sizes or (ON_A_CPU if device.on_cpu else ON_A_CARD)
    work = Work.on(device, sizes, options.model)
    record = new_record(device, work, options.minutes)
    if device.on_cpu:
        smaller = "" if options.model else ", with a smaller model"
        message(f"the CPU is measured, not a card{smaller}")
    with tempfile.TemporaryDirectory(prefix="lowmem-rlhf-bench-", ignore_cleanup_errors=True) as folder:
        run = _Run(record, path, device, replace(work, folder=folder), budget, start)
        run.measure(parts)
    return publishable(record), path


class _Run:
    """A run under way."""

    def __init__(self, record: Record, path: Path, device: Device, work: Work, budget: Budget, start: Start) -> None:
        self._record, self._path, self._device = record, path, device
        self._work, self._budget, self._start = work, budget, start

    def measure(self, parts: Sequence[Part]) -> None:
        """Prepare the model, then run the parts for which there is time."""
        bar = Bar(PREPARE_SECONDS + sum(part.seconds(self._device) for part in parts))
        bar.begin(PREPARE_SECONDS)
        self._prepare(bar)
        bar.end()
        try:
            for part in parts:
                self._record["parts"][part.name] = self._part(part, bar)
                self._save()
                message(_said(part, self._record["parts"][part.name]))
        except KeyboardInterrupt as stop:
            for part in parts:
                self._record["parts"].setdefault(part.name, _ended(part, "skipped", 0.0, STOPPED))
            self._save()
            stop.add_note(f"what was measured is kept in {self._path}")
            raise

    def _prepare(self, bar: Bar) -> None:
        found = self._start("prepare", self._work, 60 * self._budget.minutes, bar.tick)
        self._record["versions"]["cuda"] = found["cuda"]
        self._record["model"]["weights"] = found["weights"]
        self._work = replace(self._work, model=found["model"])

    def _part(self, part: Part, bar: Bar) -> dict[str, Any]:
        if why := part.why_not(self._device) or self._budget.why_not(part, self._device):
            bar.leave_out(part.seconds(self._device))
            return _ended(part, "skipped", 0.0, why)
        began = time.monotonic()
        bar.begin(part.seconds(self._device))
        values: dict[str, Any] = {}
        reasons = []

        def ended(reasons: Sequence[str]) -> dict[str, Any]:
            status, seconds = "failed" if reasons else "done", time.monotonic() - began
            return _ended(part, status, seconds, "; ".join(reasons), part.combine(values))

        try:
            for number, name in enumerate(part.tasks):
                try:
                    values[name] = self._task(part, name, number, bar)
                except LowmemError as error:
                    reasons.append(one_line(error) if len(part.tasks) == 1 else f"{name}: {one_line(error)}")
        except KeyboardInterrupt:
            self._record["parts"][part.name] = ended([*reasons, STOPPED])
            raise
        bar.end()
        return ended(reasons)

    def _task(self, part: Part, name: str, number: int, bar: Bar) -> dict[str, Any]:
        """Run one task of a part, for no longer than is left, and than `PATIENCE` times what the part takes."""
        left = self._budget.left
        if left <= 0:
            raise RunError("no time was left")
        limit = left if part.least else min(left, PATIENCE * part.seconds(self._device))
        work, all_tasks = replace(self._work, seconds=limit), len(part.tasks)
        return self._start(f"{part.name}.{name}", work, limit, lambda share: bar.tick((number + share) / all_tasks))

    def _save(self) -> None:
        self._record["seconds"] = round(self._budget.spent, 1)
        save(self._record, self._path)


def _said(part: Part, found: dict[str, Any]) -> str:
    if found["status"] == "done":
        return f"{part.title}: {found['seconds']:.0f} s"
    return f"{part.title} {found['status']}: {found['reason']}"


def _ended(
    part: Part, status: str, seconds: float, reason: str = "", values: dict[str, Any] | None = None
) -> dict[str, Any]:
    return {
        "title": part.title,
        "status": status,
        "seconds": round(seconds, 1),
        **({"reason": reason} if reason else {}),
        "values": values or {},
    }
