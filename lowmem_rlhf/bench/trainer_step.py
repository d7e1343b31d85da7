"""One step of a run's own trainer at the largest shapes that its plan allows for, its bytes and seconds by phase.

Prompts and completions are random tokens of exactly the recipe's maximal lengths; no token ends a completion.
"""

import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lowmem_rlhf.algorithms.build import make_trainer
from lowmem_rlhf.bench.meter import Counter
from lowmem_rlhf.bench.our_step import EndlessBase
from lowmem_rlhf.data.examples import read_data
from lowmem_rlhf.data.prompts import Example
from lowmem_rlhf.data.stream import PromptStream
from lowmem_rlhf.data.supervised import Pair, Supervised
from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.hardware.live_bytes import LiveBytes
from lowmem_rlhf.hardware.memory import clock
from lowmem_rlhf.planning.plan import Plan
from lowmem_rlhf.planning.run_plan import planned
from lowmem_rlhf.planning.shapes import length_keys
from lowmem_rlhf.progress import Silence
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.rewards.loading import Reward
from lowmem_rlhf.run.directory import RunDirectory
from lowmem_rlhf.training.loop import Loop
from lowmem_rlhf.training.roles import add_roles

SKIPPED = 8  # steps at most while the scale of a float16 loss is found


def hash_reward(prompts: Any, completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Return numbers that depend on the tokens only."""
    return [random.Random(str(ids)).random() for ids in completion_ids]


def load(recipe: Recipe, plan: Plan) -> SharedBase:
    """Load the base of a recipe in the precision of its plan."""
    settings = plan.settings
    lora = planned(recipe, plan).lora
    return EndlessBase.load(
        recipe.model,
        torch.device(plan.device.torch_device),
        settings.quantization,
        settings.compute_dtype,
        offload_embeddings=settings.offload_embeddings,
        offload_experts=settings.offload_experts,
        join=settings.rollout_weights == "joined",
        **lora.shape().values,
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
    *_, longest = length_keys(recipe).values()

    def ids(count: int) -> list[int]:
        return [draw.randrange(vocabulary) for _ in range(count)]

    for _ in range(recipe.training.prompts_per_step):
        match recipe.spec.rows:
            case "completions":
                whole = ids(longest)
                yield Supervised(whole[:1], whole[1:])
            case "pairs":
                half = longest // 2
                yield Pair(ids(half), ids(half), ids(half), 0.0)
            case _:
                yield Example("", ids(recipe.data.max_prompt_length), {})


class _Messages(Silence):
    """A display that keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def message(self, text: str) -> None:
        """Keep a line."""
        self.lines.append(text)


class Measured:
    """Peaks by phase of one step, less what lived in the process before the run's base was loaded.

    Args:
        recipe, plan: of the run.
        counter: makes what counts during the step; live tensors by default.
        others: bytes that are not the run's; by default those of the tensors that live now, for as long as they do.
        timed: one more step is taken before, on which nothing counts.

    Attributes:
        peaks: bytes by the trainer's phases.
        seconds: by the same phases, of the step that is timed; empty where none is.
        counter: what counted the bytes.
        said: what the trainer told the user.
    """

    def __init__(
        self,
        recipe: Recipe,
        plan: Plan,
        counter: Callable[[], Counter] = LiveBytes,
        others: int | None = None,
        timed: bool = False,
    ) -> None:
        self.peaks: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self.counter: Counter | None = None
        self._device, self._timing = torch.device(plan.device.torch_device), False
        self._before = LiveBytes() if others is None else None
        self._others = others or 0
        said = _Messages()
        with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
            trainer: Any = trainer_of(recipe, plan, Path(folder))
            trainer.timed = self._phase
            for _ in range(SKIPPED + 1):
                trainer.one_step(said)  # makes the optimizer's state, unless float16's gradients overflow
                trainer.step += 1
                if trainer.optimizer.torch_optimizer.state:
                    break
            if timed:
                self._timing = True
                trainer.one_step(said)
                trainer.step += 1
                self._timing = False
            self.counter = counter()
            with self.counter:
                trainer.one_step(said)
        self.said = "\n".join(said.lines)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        if self.counter:
            self.counter.reset_peak()
        began = clock(self._device)
        yield
        if self._timing:
            self.seconds[name] = self.seconds.get(name, 0.0) + clock(self._device) - began
        if self.counter:
            others = self._before.current if self._before else self._others
            self.peaks[name] = max(self.peaks.get(name, 0), self.counter.peak - others)
