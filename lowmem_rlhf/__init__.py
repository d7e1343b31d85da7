"""RLHF on one consumer graphics card: one frozen quantized base, small adapters, a plan made before the run.

``import lowmem_rlhf as lm`` imports nothing else; each name is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowmem_rlhf import algorithms as algorithms
    from lowmem_rlhf.algorithms.registry import register_algorithm as register_algorithm
    from lowmem_rlhf.algorithms.spec import AlgorithmSpec as AlgorithmSpec
    from lowmem_rlhf.api.plan import PlanView as PlanView
    from lowmem_rlhf.api.plan import plan as plan
    from lowmem_rlhf.api.recipes import recipes as recipes
    from lowmem_rlhf.api.run import Run as Run
    from lowmem_rlhf.api.run import open_run as open_run
    from lowmem_rlhf.api.trainer import Trainer as Trainer
    from lowmem_rlhf.api.trainer import train as train
    from lowmem_rlhf.engine.base import SharedBase as SharedBase
    from lowmem_rlhf.engine.ladder import RolloutLimits as RolloutLimits
    from lowmem_rlhf.engine.logprobs import tiled_logprobs as tiled_logprobs
    from lowmem_rlhf.engine.packing import Group as Group
    from lowmem_rlhf.engine.packing import PackedBatch as PackedBatch
    from lowmem_rlhf.engine.packing import pack as pack
    from lowmem_rlhf.engine.passes import BatchLimits as BatchLimits
    from lowmem_rlhf.engine.passes import completion_logprobs as completion_logprobs
    from lowmem_rlhf.engine.passes import head_outputs as head_outputs
    from lowmem_rlhf.engine.passes import micro_batches as micro_batches
    from lowmem_rlhf.engine.passes import packed_logprobs as packed_logprobs
    from lowmem_rlhf.engine.passes import packed_outputs as packed_outputs
    from lowmem_rlhf.errors import LowmemError as LowmemError
    from lowmem_rlhf.errors import RunError as RunError
    from lowmem_rlhf.errors import UserError as UserError
    from lowmem_rlhf.export.formats.format import ExportFormat as ExportFormat
    from lowmem_rlhf.export.formats.table import register_format as register_format
    from lowmem_rlhf.progress import Progress as Progress
    from lowmem_rlhf.recipe.schema import Recipe as Recipe
    from lowmem_rlhf.rollout.engine import Engine as Engine
    from lowmem_rlhf.rollout.engine import engine_for as engine_for
    from lowmem_rlhf.rollout.engine import register_engine as register_engine
    from lowmem_rlhf.rollout.rollout import Completion as Completion
    from lowmem_rlhf.rollout.rollout import Rollout as Rollout
    from lowmem_rlhf.rollout.sampling import Sampling as Sampling
    from lowmem_rlhf.training.optimizer import Optimizer as Optimizer

__version__ = "0.1.0"

_PLACES = {
    "train": "api.trainer",
    "Trainer": "api.trainer",
    "plan": "api.plan",
    "PlanView": "api.plan",
    "open_run": "api.run",
    "Run": "api.run",
    "recipes": "api.recipes",
    "Recipe": "recipe.schema",
    "Progress": "progress",
    "LowmemError": "errors",
    "UserError": "errors",
    "RunError": "errors",
    # the pieces that a step is made of
    "SharedBase": "engine.base",
    "Group": "engine.packing",
    "PackedBatch": "engine.packing",
    "pack": "engine.packing",
    "BatchLimits": "engine.passes",
    "micro_batches": "engine.passes",
    "packed_logprobs": "engine.passes",
    "completion_logprobs": "engine.passes",
    "packed_outputs": "engine.passes",
    "head_outputs": "engine.passes",
    "tiled_logprobs": "engine.logprobs",
    "RolloutLimits": "engine.ladder",
    "Engine": "rollout.engine",
    "engine_for": "rollout.engine",
    "Sampling": "rollout.sampling",
    "Completion": "rollout.rollout",
    "Rollout": "rollout.rollout",
    "Optimizer": "training.optimizer",
    # what is added from outside
    "AlgorithmSpec": "algorithms.spec",
    "register_algorithm": "algorithms.registry",
    "register_engine": "rollout.engine",
    "ExportFormat": "export.formats.format",
    "register_format": "export.formats.table",
}
__all__ = ["__version__", "algorithms", *_PLACES]


def __getattr__(name: str) -> Any:
    if name == "algorithms":
        return import_module("lowmem_rlhf.algorithms")
    if name not in _PLACES:
        raise AttributeError(f"module 'lowmem_rlhf' has no attribute {name!r}")
    from lowmem_rlhf.quiet import hushed

    with hushed(lambda text: None):  # libraries that talk while they are imported
        value = getattr(import_module(f"lowmem_rlhf.{_PLACES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
