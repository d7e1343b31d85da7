"""One export of a run, as the values that a format needs to make it."""

from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem_rlhf.export.options import QUANTIZED, ExportOptions
from lowmem_rlhf.hardware.detect import detect
from lowmem_rlhf.hardware.device import Device
from lowmem_rlhf.inference.open_run import OpenRun
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.run.directory import RunDirectory

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ExportJob:
    """What is exported, and how.

    Attributes:
        opened: the run.
        options: with the format's defaults.
        target: the folder that the export becomes.
    """

    opened: OpenRun
    options: ExportOptions
    target: Path

    @property
    def run(self) -> RunDirectory:
        """The run directory."""
        return self.opened.directory

    @property
    def recipe(self) -> Recipe:
        """The recipe of the run, with paths as they are found from here."""
        return self.opened.recipe

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The settings of the run's plan."""
        return asdict(self.opened.plan.settings)

    @property
    def adapter(self) -> Path:
        """The folder of the trained adapter."""
        return self.opened.adapter_folder

    @cached_property
    def base_type(self) -> str:
        """The model type in the base's config.json, which may be that of a model for images or sound."""
        from lowmem_rlhf.export.source import base_folder, read_config

        return str(read_config(base_folder(self.recipe.model, self.recipe.revision)).get("model_type"))

    @property
    def onto_quantized(self) -> bool:
        """Whether the change is added to dequantized weights, which only a quantized base has."""
        return self.options.onto == QUANTIZED and self.settings["quantization"] != "none"

    @cached_property
    def hardware(self) -> Device:
        """The device that the live policy and the export are opened on.

        Raises:
            UserError: this machine has no such device.
        """
        return detect(self.options.device or self.recipe.hardware.device)

    @cached_property
    def device(self) -> "torch.device":
        """The same, as torch's device."""
        import torch

        return torch.device(self.hardware.torch_device)
