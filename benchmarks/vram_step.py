"""One step of a run's own trainer at the largest shapes that its plan allows for, its live bytes counted by phase.

Prompts and completions are random tokens of exactly the recipe's maximal lengths; no token ends a completion.
"""

import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console

from lowmem_rlhf.algorithms.build import make_trainer
from lowmem_rlhf.data.examples import read_data
from lowmem_rlhf.data.prompts import Example
from lowmem_rlhf.data.stream import PromptStream
from lowmem_rlhf.data.supervised import Pair, Supervised
from lowmem_rlhf.display.live import LiveView
from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.hardware.live_bytes import LiveBytes
from lowmem_rlhf.planning.plan import Plan
from lowmem_rlhf.planning.run_plan import planned
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.rewards.loading import Reward
from lowmem_rlhf.run.directory import RunDirectory
from lowmem_rlhf.training.loop import Loop
from lowmem_rlhf.training.roles import add_roles

SKIPPED = 8  # steps at most while the scale of a float16 loss is found


class _Endless(SharedBase):
    stop_ids = frozenset()  # type: ignore[assignment]


def hash_reward(prompts: Any, completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Return numbers that depend on the tokens only."""
    return [random.Random(str(ids)).random() for ids in completion_ids]


def load(recipe: Recipe, plan: Plan) -> SharedBase:
    """Load the base of a recipe in the precision of its plan."""
    settings = plan.settings
    lora = planned(recipe, plan).lora
    return _Endless.load(
        recipe.model,
        torch.device(plan.device.torch_device),
        settings.quantization,
        settings.compute_dtype,
        r=lora.rank,
        lora_alpha=lora.alpha(lora.rank),
        target_modules=lora.target_modules,
    )


def start_adapter(recipe: Recipe, plan: Plan, folder: Path) -> Path:
    """Write an adapter that training may start from: the policy's of a recipe, as it is before the first step."""
    load(recipe, plan).save_adapter(folder)
    return folder


def trainer_of(recipe: Recipe, plan: Plan, folder: Path) -> Loop:
    """Return the trainer of a recipe with random data of the recipe's maximal lengths."""
    base, recipe = load(recipe, plan), planned(recipe, plan)
    rewards = [Reward("hash", hash_reward)] if recipe.spec.samples else []
    add_roles(base, recipe, rewards)
    columns = ("prompt", "question", "answer", "completion", "text", "chosen", "rejected")
    row = dict.fromkeys(columns, "a") | {"rejected": "b"}
    rows = [row] * max(recipe.training.prompts_per_step, 2)

    def run_directory(resolved: Recipe) -> RunDirectory:
        return RunDirectory.create(folder / "run", resolved, plan.to_dict(), resume=False)

    trainer: Any = make_trainer(recipe, plan, base, rewards, read_data(recipe, rows, [], base.tokens), run_directory)
    examples = list(_examples(recipe, base.head.vocabulary))
    trainer.stream = PromptStream(examples, recipe.training.prompts_per_step, recipe.training.seed)
    return trainer


def _examples(recipe: Recipe, vocabulary: int) -> Iterator[Any]:
    draw = random.Random(0)

    def ids(count: int) -> list[int]:
        return [draw.randrange(vocabulary) for _ in range(count)]

    for _ in range(recipe.training.prompts_per_step):
        if recipe.algorithm == "sft":
            whole = ids(recipe.sft.max_length)
            yield Supervised(whole[:1], whole[1:])
        elif recipe.algorithm == "reward_model":
            half = recipe.reward_model.max_length // 2
            yield Pair(ids(half), ids(half), ids(half), 0.0)
        else:
            yield Example("", ids(recipe.data.max_prompt_length), {})


class Counter(Protocol):
    """What measures bytes while it is entered: `LiveBytes`, or a card's own counts."""

    peak: int

    def __enter__(self) -> Any: ...
    def __exit__(self, *error: Any) -> Any: ...
    def reset_peak(self) -> None: ...


class Measured:
    """Peaks by phase of one step, less what lived in the process before the run's base was loaded.

    Args:
        recipe, plan: of the run.
        counter: makes what counts during the step; live tensors by default.
        others: bytes that are not the run's; counted by default.

    Attributes:
        peaks: bytes by the trainer's phases.
        counter: what counted them.
        said: what the trainer told the user.
    """

    def __init__(
        self, recipe: Recipe, plan: Plan, counter: Callable[[], Counter] = LiveBytes, others: int | None = None
    ) -> None:
        self.peaks: dict[str, int] = {}
        others = LiveBytes().current if others is None else others
        said = StringIO()
        with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
            trainer: Any = trainer_of(recipe, plan, Path(folder))
            trainer.timed = self._phase
            view = LiveView(1, console=Console(file=said))
            for _ in range(SKIPPED + 1):
                trainer.one_step(view)  # makes the optimizer's state, unless float16's gradients overflow
                trainer.step += 1
                if trainer.optimizer.torch_optimizer.state:
                    break
            self.counter = counter()
            with self.counter:
                trainer.one_step(view)
        self.peaks = {name: peak - others for name, peak in self.peaks.items()}
        self.said = said.getvalue()

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        counter = getattr(self, "counter", None)
        if counter:
            counter.reset_peak()
        yield
        if counter:
            self.peaks[name] = max(self.peaks.get(name, 0), counter.peak)
