"""The scripts of examples/: a step on the public pieces is the trainer's, and each runs as it is and fits on a page."""

import sys
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoTokenizer

from lowmem_rlhf.algorithms.build import make_trainer
from lowmem_rlhf.data.examples import TrainingData
from lowmem_rlhf.data.prompts import build_examples
from lowmem_rlhf.data.sources import load_rows
from lowmem_rlhf.display.live import LiveView
from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.planning.run_plan import running_plan
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.rewards.loading import Reward
from lowmem_rlhf.run.directory import RunDirectory
from lowmem_rlhf.training.online import Trainer
from lowmem_rlhf.training.roles import add_roles

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT / "examples"), str(ROOT / "tests" / "integration")]

import grpo_by_hand  # noqa: E402
import ppo_by_hand  # noqa: E402
from tiny_runs import save_tiny_model, tiny_recipe  # noqa: E402

LIMIT = 150  # lines that a page has
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
# What a recipe and an example's settings have under one name. The micro-batches are smaller than the batch.
SIZES = {"rollout_batch_size": 8, "micro_batch_tokens": 96, "logits_tile_tokens": 16}
GENERATION = {"num_generations": 4, "max_completion_length": 12, "temperature": 0.9}
STEPS = 2


@pytest.fixture(scope="module")
def tiny_chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a random two-layer Llama whose tokenizer has a chat template."""
    folder = save_tiny_model(tmp_path_factory.mktemp("model"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def digits(text: str, answer: str = "") -> float:
    """The reward of the examples: tenths of the digits in a text."""
    return sum(character.isdigit() for character in text) / 10


def rewarded(completions: list[list[dict[str, str]]], **columns: Any) -> list[float]:
    """`digits` as the trainer's reward function."""
    return [digits(message["content"]) for (message,) in completions]


def recipe_of(model: Path, algorithm: str, **section: Any) -> Recipe:
    """Return a recipe in fp32, whose passes without gradients are cut as those with them."""
    hardware = {**SIZES, "score_batch_tokens": SIZES["micro_batch_tokens"], "optim": "adamw"}
    data = {"template": "{question}", "eval_size": 0}
    return tiny_recipe(
        model, algorithm=algorithm, hardware=hardware, data=data, generation=GENERATION, **{algorithm: section}
    )


def base_of(recipe: Recipe) -> SharedBase:
    """Return the base of a recipe with its roles, as `session.train` makes it."""
    lora = recipe.lora
    adapter = {"r": lora.r, "lora_alpha": lora.lora_alpha, "seed": recipe.training.seed}
    base = SharedBase.load(recipe.model, torch.device("cpu"), "none", "float32", **adapter)
    add_roles(base, recipe, [])
    return base


def trainer_of(recipe: Recipe, path: Path) -> Trainer:
    plan, base = running_plan(recipe), base_of(recipe)
    examples = build_examples(load_rows(recipe.data, "train"), recipe.data, base.tokenizer, base.stop_ids)
    run = RunDirectory.create(path, recipe, plan.to_dict(), False)
    data = TrainingData(examples, [], [])
    trainer = make_trainer(recipe, plan, base, [Reward("digits", rewarded)], data, lambda resolved: run)
    assert isinstance(trainer, Trainer)
    return trainer


def in_step(example: ModuleType, recipe: Recipe, settings: Any, path: Path) -> Iterator[tuple[Any, Any, int]]:
    """Take steps with the trainer and by hand; yield what both gave, after each step holding the weights together."""
    trainer, base = trainer_of(recipe, path), base_of(recipe)
    engine = example.lm.engine_for(base)
    optimizer = torch.optim.AdamW(base.trainable().values(), lr=recipe.training.learning_rate, weight_decay=0.0)
    before = {name: p.detach().clone() for name, p in base.trainable().items()}
    with LiveView(recipe.training.max_steps, 0, Console(file=StringIO())) as view:
        for number, trained in enumerate(trainer.steps(view)):
            batch = trainer.stream.batch(number)
            questions = [one.prompt[0]["content"] for one in batch]
            answers = [str(one.columns["answer"]) for one in batch]
            by_hand = example.step(base, engine, optimizer, questions, answers, digits, number, settings)
            theirs = trainer.base.trainable()
            assert base.trainable().keys() == theirs.keys()
            for name, p in base.trainable().items():
                assert torch.equal(p, theirs[name]), name
            yield trained, by_hand, number
            if number + 1 == STEPS:  # in the first step, with B at zero, no A moves
                assert not [name for name, p in base.trainable().items() if torch.equal(p, before[name])]
                return


def test_a_step_of_grpo_by_hand_is_the_trainer_s(tiny_chat_model, tmp_path):
    recipe = recipe_of(tiny_chat_model, "grpo", beta=0.04)
    settings = grpo_by_hand.Settings(**SIZES, **GENERATION, beta=0.04)
    for trained, by_hand, number in in_step(grpo_by_hand, recipe, settings, tmp_path / "run"):
        assert by_hand.rollout.completions == trained.rollout.completions
        assert torch.equal(by_hand.rewards.flatten(), torch.tensor(trained.rollout.scored.total))
        assert by_hand.loss == trained.metrics["loss"] != 0
        assert by_hand.kl == pytest.approx(trained.metrics["kl"], rel=1e-6)  # divided before it is summed up
        assert (by_hand.kl > 0) == bool(number)  # before the first step the policy is the reference


def test_a_step_of_ppo_by_hand_is_the_trainer_s(tiny_chat_model, tmp_path):
    recipe = recipe_of(tiny_chat_model, "ppo", num_ppo_epochs=2, num_mini_batches=2)
    settings = ppo_by_hand.Settings(**SIZES, **GENERATION, num_ppo_epochs=2, num_mini_batches=2)
    for trained, (rollout, scores, loss), _ in in_step(ppo_by_hand, recipe, settings, tmp_path / "run"):
        assert rollout.completions == trained.rollout.completions
        assert torch.equal(scores, torch.tensor(trained.rollout.scored.total))
        assert loss == trained.metrics["loss"] != 0


@pytest.mark.parametrize("example", [grpo_by_hand, ppo_by_hand])
def test_an_example_fits_on_a_page_and_runs(example, tiny_chat_model, capsys):
    assert len(Path(example.__file__).read_text(encoding="utf-8").splitlines()) <= LIMIT
    example.main(str(tiny_chat_model), steps=2, prompts=2)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["step 1", "step 2"]
