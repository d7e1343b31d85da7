"""A run that has been opened: its recipe, its plan and its trained adapter, each read from disk once. No torch here.

This lies in the room that opens models and not beside the run directory: a `Plan` is planning's value, and whether the
base and the adapters are still those of the run is asked of files that architecture and data know how to read.
"""

import logging
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from lowmem_rlhf.architecture.adapters import SavedAdapter, saved_adapter
from lowmem_rlhf.data.provenance import check_base, check_learned
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.hardware.device import Device
from lowmem_rlhf.planning.plan import Plan
from lowmem_rlhf.planning.run_plan import in_one_process
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.run.checkpoints import check_adapter
from lowmem_rlhf.run.directory import ADAPTER, RunDirectory
from lowmem_rlhf.run.start import located
from lowmem_rlhf.run.text_files import changed_text_files
from lowmem_rlhf.run.trust import check_code

logger = logging.getLogger(__name__)


Step = int | Literal["best"] | None  # best: that of the best evaluation


@dataclass(frozen=True)
class OpenRun:
    """A run to generate with, to evaluate or to export.

    Nothing is read before it is asked for, and nothing is read twice.

    Attributes:
        directory: the run directory.
        step: of the checkpoint that stands for the policy; None: the finished adapter does.
    """

    directory: RunDirectory
    step: int | None = None

    @classmethod
    def at(cls, directory: RunDirectory, step: Step) -> "OpenRun":
        """Open a run at a checkpoint.

        Args:
            step: of the checkpoint; ``best``: that of the best evaluation, which `evaluation.keep_best` keeps; None:
                the finished adapter.

        Raises:
            UserError: the best one is asked for, and the run knows of none.
        """
        if not isinstance(step, str):
            return cls(directory, step)
        if (best := directory.best_step()) is None:
            raise UserError(
                f"--step best: the run in {directory.path} has kept no best checkpoint; evaluation.keep_best=true with "
                "evaluation.steps=N does so while it trains, and --step N takes a checkpoint that is there"
            )
        return cls(directory, best)

    @cached_property
    def written(self) -> Recipe:
        """The recipe with its paths as they stand in recipe.yaml.

        Raises:
            UserError: as `RunDirectory.recipe`; or its model's own code is code of elsewhere (see `run.trust`).
        """
        for name in changed_text_files(self.directory.path):
            logger.warning(f"{self.directory.path / name} is not what the run wrote: it is damaged, gone or was edited")
        values, path = self.directory.recipe_values(), self.directory.path
        check_code(path, {key: values.get(key) for key in ("algorithm", "model", "revision", "trust_remote_code")})
        return self.directory.recipe()

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe with paths that lead from the current folder to what they name (see `run.start.located`).

        What several processes shared while it trained is whole here.
        """
        return in_one_process(located(self.written, self.directory.path))

    @cached_property
    def plan(self) -> Plan:
        """The plan that the run was made with.

        Raises:
            UserError: the run has none.
        """
        try:
            plan = Plan.from_dict(self.directory.plan())
            return replace(plan, settings=replace(plan.settings, base_shards=1, offload_base=False))
        except ValueError as error:
            raise UserError(
                f"{self.directory.path} holds no plan.json with the run's settings, so its precision is not known"
            ) from error

    def plan_on(self, device: Device) -> Plan:
        """Return the plan for loading the run's base on a device, which need not be the one that it was trained on."""
        settings = self.plan.settings
        if device.on_cpu:
            settings = replace(settings, offload_embeddings=False, offload_experts=False)
        return replace(self.plan, device=device, settings=settings)

    @cached_property
    def adapter_folder(self) -> Path:
        """The folder of the run's finished adapter, or of the checkpoint of the step.

        Raises:
            UserError: it is not there, and the message names the steps there are; or it is damaged.
        """
        path = self.directory.path
        checkpoints = dict(self.directory.checkpoints())
        steps = ", ".join(map(str, checkpoints))
        if self.step is not None:
            if self.step not in checkpoints:
                remedy = f"there is {steps}" if checkpoints else "there is none; leave --step out"
                raise UserError(f"--step {self.step}: the run in {path} holds no checkpoint of that step; {remedy}")
            check_adapter(checkpoints[self.step], f"leave --step out, or take another one (there is {steps})")
            return checkpoints[self.step]
        if (path / ADAPTER).is_dir():
            check_adapter(
                path / ADAPTER,
                f"the `train` that made it, with --output {path} --resume, writes it anew"
                f"{f', or take a checkpoint with --step ({steps})' if checkpoints else ''}",
            )
            return path / ADAPTER
        now = f", or take a checkpoint with --step ({steps})" if checkpoints else ""
        raise UserError(
            f"the run in {path} has no adapter yet; let it finish (the `train` that began it, with --output {path} "
            f"--resume, goes on){now}"
        )

    @cached_property
    def adapter(self) -> SavedAdapter:
        """The trained adapter.

        Raises:
            UserError: as `adapter_folder` and `saved_adapter`.
        """
        return saved_adapter(str(self.adapter_folder), self.recipe.model, self.recipe.revision)

    def check(self) -> SavedAdapter:
        """Check that the model is the run's base and that the trained adapter can lie on it; return the adapter.

        Raises:
            UserError: as `check_base` and `adapter`.
        """
        self.check_base()
        return self.adapter

    def check_base(self, warn: bool = True) -> None:
        """Check that the recipe's model is the base that the run was trained on.

        Args:
            warn: say that its tokenizer or chat template is another one.

        Raises:
            UserError: it is another model.
        """
        difference = check_base(self.directory, self.recipe)
        if difference and warn:
            logger.warning(difference)

    def check_initial_adapter(self, recipe: Recipe | None = None) -> None:
        """Check that the adapter that training began with, where there is one, is still the same.

        Args:
            recipe: with changes of this command; None: the run's.

        Raises:
            UserError: it is gone or another one.
        """
        check_learned(self.directory, recipe or self.recipe)
