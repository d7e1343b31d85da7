"""Whole runs of PPO, RLOO and REINFORCE++: what they write and continue from, and that all roles are one base."""

import gc
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from reports import data_of
from safetensors.torch import load_file
from tiny_runs import learned, tiny_recipe, write_jsonl

from lowmem_rlhf.algorithms import build
from lowmem_rlhf.algorithms.grpo.trainer import GRPO
from lowmem_rlhf.algorithms.ppo import policy_gradient
from lowmem_rlhf.algorithms.ppo import trainer as ppo
from lowmem_rlhf.algorithms.ppo import update as ppo_update
from lowmem_rlhf.algorithms.ppo.trainer import PPO
from lowmem_rlhf.architecture.adapters import saved_adapter
from lowmem_rlhf.display.run_display import ConsoleDisplay
from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.passes import BatchLimits, completion_logprobs, head_outputs, with_bootstrap_position
from lowmem_rlhf.engine.roles import CRITIC, INITIAL, POLICY, REFERENCE, REWARD
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.planning.run_plan import running_plan
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.report import html
from lowmem_rlhf.rewards.loading import load_rewards
from lowmem_rlhf.rollout.rollout import Completion, Rollout
from lowmem_rlhf.run.directory import RunDirectory
from lowmem_rlhf.session import train as session
from lowmem_rlhf.session.saved_lora import as_saved
from lowmem_rlhf.session.train import train
from lowmem_rlhf.training.online import Trainer
from lowmem_rlhf.training.roles import add_roles

CONTRACT = [
    *("step", "reward/mean", "reward/std", "reward/length", "kl", "entropy", "loss", "grad_norm", "learning_rate"),
    *("completion/mean_length", "completion/truncated", "tokens/generated", "tokens/trained"),
    *("time/step", "time/rollout", "time/score", "time/update", "memory/peak_bytes", "sampling/logp_difference"),
]
OF_PPO = ["value/loss", "value/explained_variance", "policy/approx_kl", "policy/clip_fraction"]
PASSES = BatchLimits(1.0, 96, 16)
write_report = html.write_report
PRECISIONS = [("none", "float32"), ("none", "bfloat16"), ("nf4", "bfloat16")]


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """One thread for the runs of fixtures too, which is exact as well; and no report, which is not what they test."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(html, "write_report", lambda run: None)
        yield
    torch.set_num_threads(threads)


def ppo_recipe(model: Path, algorithm: str = "ppo", **sections: Any) -> Recipe:
    """Return a small recipe; its steps are of 8 completions, with 2 epochs."""
    sections["ppo"] = {"num_ppo_epochs": 2, **sections.get("ppo", {})}
    sections["generation"] = {"num_generations": 2, **sections.get("generation", {})}
    hardware = {"gradient_checkpointing": False, **sections.pop("hardware", {})}
    return tiny_recipe(model, algorithm=algorithm, hardware=hardware, **sections)


@pytest.fixture(scope="module")
def sft(tiny_model, tmp_path_factory) -> Path:
    """Return the run of a supervised fine-tuning."""
    recipe = tiny_recipe(tiny_model, algorithm="sft", rewards=[], sft={"max_length": 32}, data={"eval_size": 0})
    return train(recipe, tmp_path_factory.mktemp("runs") / "sft").path


@pytest.fixture(scope="module")
def reward_model(tiny_model, tmp_path_factory) -> Path:
    """Return the run of a reward model."""
    folder = tmp_path_factory.mktemp("runs")
    pairs = [{"prompt": f"{a}+{b}=", "chosen": "12", "rejected": "abc"} for a in range(4) for b in range(3)]
    data = {"train": str(write_jsonl(folder / "pairs.jsonl", pairs)), "template": None, "prompt": "prompt"}
    data |= {"train_size": None, "eval_size": 0}
    recipe = tiny_recipe(
        tiny_model, algorithm="reward_model", rewards=[], reward_model={"max_length": 32}, data=data, lora={"r": 2}
    )
    return train(recipe, folder / "reward_model").path


def judged_by(reward_model: Path) -> list[dict[str, Any]]:
    return [{"function": "reward_adapter", "options": {"adapter": str(reward_model)}}]


@pytest.fixture
def watched(monkeypatch) -> Callable[[Recipe, Path], Trainer]:
    """Return a function that runs a recipe and gives its trainer."""

    def run(recipe: Recipe, path: Path) -> Trainer:
        found = []
        original = build.make_trainer

        def made(*args: Any) -> Trainer:
            found.append(original(*args))
            return found[0]

        with monkeypatch.context() as patch:
            patch.setattr(build, "make_trainer", made)
            train(recipe, path, display=ConsoleDisplay())
        return found[0]

    return run


def roles_of(recipe: Recipe) -> SharedBase:
    """Return the base of a recipe with all its roles, as `session.train` makes it."""
    recipe = as_saved(recipe)
    plan = running_plan(recipe)
    base = session.open_base(recipe, plan)
    add_roles(base, recipe, load_rewards(recipe.rewards, "cpu", 0, recipe.model))
    return base


def some_batch() -> Rollout:
    """Return two prompts with two completions each, of the tiny model's tokens."""
    texts = [[5, 6, 7, 1], [8], [4, 9, 12, 10, 3, 1], [11, 5]]
    return Rollout([[3, 21, 4, 25], [9, 21]], [Completion(ids, [], False) for ids in texts], 2)


def logps_in(base: SharedBase, role: str, batch: Rollout | None = None) -> torch.Tensor:
    """Return all log-probs of a batch in a role."""
    batch = batch or some_batch()
    with base.role(role):
        found = completion_logprobs(base, batch.groups(range(len(batch.completions))), PASSES)
    return torch.cat([found[row] for row in sorted(found)])


def policy_with(model: Path, run: Path, quantization: str = "none", dtype: str = "float32") -> SharedBase:
    """Return the base whose policy is a run's result, its head included."""
    saved = saved_adapter(str(run), str(model))
    base = SharedBase.load(str(model), torch.device("cpu"), quantization, dtype, **saved.shape.values)
    base.load_adapter(saved.folder)
    if saved.head:
        base.add_head(POLICY)
        base.load_head(saved.folder, POLICY)
    return base


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Return the norm of the difference of two adapters over the norm of the first."""
    assert list(one) == list(other)
    a, b = (torch.cat([state[key].flatten() for key in state]).double() for state in (one, other))
    return float((a - b).norm() / a.norm())


# What a run writes, and what a resumed one continues


def adaptive(model: Path) -> Recipe:
    """Return a recipe that keeps more than weights between its steps."""
    return ppo_recipe(
        model,
        training={"max_steps": 4, "lr_scheduler_type": "linear", "save_steps": 100},
        ppo={"kl_target": 0.5, "kl_horizon": 40, "normalize_scores": "running", "num_mini_batches": 2},
    )


@pytest.fixture(scope="module")
def whole(tiny_model, tmp_path_factory) -> RunDirectory:
    """Return the run of `adaptive` that nothing disturbed."""
    return train(adaptive(tiny_model), tmp_path_factory.mktemp("runs") / "whole")


def counters(run: RunDirectory) -> dict[str, Any]:
    step, folder = run.latest_checkpoint() or (0, run.path)
    assert step == 4
    return json.loads((folder / "state.json").read_text())["counters"]


def everything(run: RunDirectory) -> dict[str, Any]:
    """Return what a run computed, the critic and what is kept between steps included."""
    critic = run.path / "adapter" / CRITIC
    files = {name: load_file(critic / f"{name}.safetensors") for name in ("adapter_model", "head")}
    return {**learned(run), "critic": files["adapter_model"], "head": files["head"], "counters": counters(run)}


def assert_equal(got: dict[str, Any], want: dict[str, Any]) -> None:
    for key, value in want.items():
        if key in ("adapter", "critic", "head"):
            assert got[key].keys() == value.keys()
            assert all(torch.equal(got[key][name], tensor) for name, tensor in value.items()), key
        else:
            assert got[key] == value, key


def test_every_metric_is_there_and_finite(whole):
    rows = whole.metrics()
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert not [key for key in [*CONTRACT, *OF_PPO] if key not in row]
        assert not {key: value for key, value in row.items() if not math.isfinite(value)}
        assert row["sampling/logp_difference"] < 1e-5
        assert row["policy/approx_kl_first"] < 1e-9 < row["policy/approx_kl"]
        assert row["value/loss"] > 0 and row["grad_norm"] > 0
        assert row["policy/epochs"] == 2
        # two epochs in two roles, each prompt once or twice
        assert row["tokens/trained"] > 4 * (row["tokens/generated"] - 8)
        assert row["objective/non_score_reward"] == pytest.approx(-row["objective/kl_coef"] * row["objective/kl"])
        assert row["time/step"] == pytest.approx(row["time/rollout"] + row["time/score"] + row["time/update"])
    assert rows[0]["kl"] == 0 and rows[0]["value/mean"] == 0  # nothing has learned yet
    assert rows[-1]["kl"] != 0 and rows[-1]["value/mean"] != 0
    assert [row["learning_rate"] for row in rows] == pytest.approx([1e-2, 7.5e-3, 5e-3, 2.5e-3])


def test_policy_critic_and_head_have_learned(whole):
    done = everything(whole)
    assert all(w.any() for name, w in done["adapter"].items() if "lora_B" in name)
    assert all(w.any() for name, w in done["critic"].items() if "lora_B" in name)
    assert done["head"].keys() == {"weight", "bias"} and all(w.any() for w in done["head"].values())


@pytest.mark.parametrize("where", ["in the rollout", "in the update"])
def test_a_resumed_run_is_the_uninterrupted_one(tiny_model, tmp_path, whole, monkeypatch, where):
    """An interrupted step leaves no trace: neither in the moments of the scores nor in the KL's coefficient."""
    want = everything(whole)
    assert want["counters"]["moments"]["count"] == 32
    coefficients = [row["objective/kl_coef"] for row in want["metrics"]] + [want["counters"]["kl"]["value"]]
    assert len(set(coefficients)) == 5
    owner, name = (Trainer, "_rollout") if where == "in the rollout" else (ppo_update, "backward")
    original, calls = getattr(owner, name), []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        if len(calls) == (3 if where == "in the rollout" else 9):  # of the third step
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(adaptive(tiny_model), tmp_path / "run")
    stopped = RunDirectory(tmp_path / "run")
    assert stopped.latest_checkpoint()[0] == 2  # type: ignore[index]
    assert_equal(everything(train(adaptive(tiny_model), tmp_path / "run", resume=True)), want)


# What a run continues from


@pytest.mark.parametrize(("quantization", "dtype"), PRECISIONS)
def test_policy_and_reference_begin_as_the_sft_model(tiny_model, sft, quantization, dtype):
    hardware = {"quantization": quantization, "compute_dtype": dtype}
    base = roles_of(ppo_recipe(tiny_model, adapter=str(sft), hardware=hardware))
    want = logps_in(policy_with(tiny_model, sft, quantization, dtype), POLICY)
    assert torch.equal(logps_in(base, POLICY), want)
    assert torch.equal(logps_in(base, REFERENCE), want)
    base.roles["bare"] = ()
    assert not torch.allclose(logps_in(base, "bare"), want, atol=1e-2)  # the fine-tuning moved the model


def test_no_step_of_ppo_leaves_the_sft_model(tiny_model, sft, tmp_path):
    run = train(ppo_recipe(tiny_model, adapter=str(sft), training={"max_steps": 0}), tmp_path / "run")
    got, want = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (run.path, sft))
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
    shape = [json.loads((path / "adapter" / "adapter_config.json").read_text()) for path in (run.path, sft)]
    assert {key: shape[0][key] for key in ("r", "lora_alpha")} == {key: shape[1][key] for key in ("r", "lora_alpha")}
    assert not run.metrics()
    evaluation = run.evaluation()
    assert evaluation["before"] == evaluation["after"]


@pytest.fixture(scope="module")
def with_all_roles(tiny_model, sft, reward_model) -> Callable[..., Recipe]:
    """Return what makes a recipe with start, policy, critic and reward."""

    def recipe(algorithm: str = "ppo", **sections: Any) -> Recipe:
        sections = {"training": {"max_steps": 2}, "data": {"eval_size": 0}, **sections}
        return ppo_recipe(tiny_model, algorithm, adapter=str(sft), rewards=judged_by(reward_model), **sections)

    return recipe


@pytest.mark.parametrize("critic", ["adapter", "policy"])
def test_the_reference_stays_the_sft_model(tiny_model, sft, with_all_roles, watched, tmp_path, critic):
    trainer = watched(with_all_roles(ppo={"critic": critic}), tmp_path / "run")
    rows = trainer.run.metrics()
    assert rows[0]["kl"] == 0 != rows[1]["kl"]
    want = logps_in(policy_with(tiny_model, sft), POLICY)
    assert torch.equal(logps_in(trainer.base, REFERENCE), want)
    assert not torch.allclose(logps_in(trainer.base, POLICY), want, atol=1e-3)


@pytest.mark.parametrize(("quantization", "dtype"), PRECISIONS[1:])
def test_all_roles_lie_on_one_copy_of_the_base(with_all_roles, quantization, dtype):
    recipe = as_saved(with_all_roles(hardware={"quantization": quantization, "compute_dtype": dtype}))
    plan = running_plan(recipe)
    base = session.open_base(recipe, plan)
    logps_in(base, POLICY)
    before, alive = storages(base), weights_alive(base)
    add_roles(base, recipe, load_rewards(recipe.rewards, "cpu", 0, recipe.model))
    assert base.roles == {REFERENCE: (INITIAL,), POLICY: (POLICY,), INITIAL: (INITIAL,), REWARD: (REWARD,)} | {
        CRITIC: (INITIAL, CRITIC)
    }
    for role in (POLICY, REFERENCE):
        logps_in(base, role)
    for role in (CRITIC, REWARD):
        head_outputs(base, role, some_batch().groups(range(4)), PASSES)
    now = storages(base)
    assert before.items() <= now.items()
    added = {
        p.data_ptr(): p.untyped_storage().nbytes()
        for name, p in [*base.peft.named_parameters(), *base.heads.named_parameters()]
        if f".{POLICY}." not in name and ("lora_" in name or name.startswith((CRITIC, REWARD)))
    }
    assert {address: now[address] for address in now.keys() - before.keys()} == added
    layers = len(list(base.adapter_layers()))
    assert len(added) == 3 * 2 * layers + 3  # A and B of three roles; two heads, the critic's with a bias
    assert weights_alive(base) == alive


def storages(base: SharedBase) -> dict[int, int]:
    """Return the bytes of every storage that the base holds, by address; of NF4 the scales too."""
    tensors: list[torch.Tensor] = []
    for p in [*base.parameters(), *base.buffers()]:
        tensors.append(p.data)
        state = getattr(p, "quant_state", None)
        while state is not None:
            tensors += [x for x in vars(state).values() if torch.is_tensor(x)]
            state = state.state2
    return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}


def weights_alive(base: SharedBase) -> int:
    """Return how many tensors there are anywhere that have as many numbers as a layer has weights."""
    sizes = {layer.in_features * layer.out_features for layer in base.adapter_layers()}
    gc.collect()
    return sum(issubclass(type(x), torch.Tensor) and x.numel() in sizes for x in gc.get_objects())  # not isinstance,
    # which asks objects of other libraries for their class


def test_roles_beside_other_layers_are_refused(tiny_model, reward_model, tmp_path):
    recipe = ppo_recipe(tiny_model, rewards=judged_by(reward_model), lora={"target_modules": ["q_proj", "v_proj"]})
    with pytest.raises(UserError, match=r"not beside the same layers \(down_proj, .*; set lora\.target_modules to"):
        train(recipe, tmp_path / "run")


# Scores that a reward model gives on the policy's base


def rollouts_of(monkeypatch, algorithm: type) -> list[Any]:
    """Return a list that every rollout of this algorithm will come into."""
    found: list[Any] = []
    original = algorithm.learn  # type: ignore[attr-defined]

    def learn(self: Any, rollout: Any, *args: Any) -> Any:
        found.append(rollout)
        return original(self, rollout, *args)

    monkeypatch.setattr(algorithm, "learn", learn)
    return found


def own_scores(model: Path, reward_model: Path, rollout: Any, group: int = 2) -> list[float]:
    """Return what the reward model as it was trained, with its adapter as the policy, says of a rollout."""
    base = policy_with(model, reward_model)
    groups = rollout.groups(range(len(rollout.completions)))
    found = head_outputs(base, POLICY, with_bootstrap_position(groups), PASSES)
    return [float(found[row][-1]) for row in range(len(rollout.completions))]


@pytest.mark.parametrize(("algorithm", "kind"), [("ppo", PPO), ("grpo", GRPO)])
def test_the_reward_adapter_says_what_the_reward_model_says(
    tiny_model, reward_model, with_all_roles, tmp_path, monkeypatch, algorithm, kind
):
    rollouts = rollouts_of(monkeypatch, kind)
    run = train(with_all_roles(algorithm), tmp_path / "run")
    assert len(rollouts) == 2  # in the second the policy has changed, and the score has not
    for rollout, row in zip(rollouts, run.metrics(), strict=True):
        want = own_scores(tiny_model, reward_model, rollout)
        assert rollout.scores.by_name["reward_adapter"] == pytest.approx(want, rel=1e-5, abs=1e-6)
        assert row["reward/mean"] == pytest.approx(sum(want) / len(want), rel=1e-5)
        assert max(want) - min(want) > 0.1


def test_a_critic_from_the_reward_says_its_score_at_the_last_token(with_all_roles, tmp_path, monkeypatch):
    rollouts, scored = rollouts_of(monkeypatch, PPO), []
    original = PPO._score
    monkeypatch.setattr(PPO, "_score", lambda *a: scored.append(original(*a)) or scored[-1])
    train(with_all_roles(ppo={"critic": "reward", "bootstrap_truncated": True}), tmp_path / "run")
    (first, second), (before, after) = rollouts, scored
    for rollout, roles, equal in ((first, before, True), (second, after, False)):
        wanted = rollout.scores.by_name["reward_adapter"]
        got = [float(roles.critic.bootstrap[row]) for row in range(8)]
        assert (got == pytest.approx(wanted, rel=1e-5, abs=1e-6)) == equal
        assert all(len(roles.critic.values[row]) == len(roles.logps[row]) for row in range(8))


# Completions that no reward applies to

PARTLY = '''
def partly(completions, trainer_state, **columns):
    """None for all in the first step, then for every third."""
    nothing = trainer_state.global_step == 0
    return [None if nothing or i % 3 == 0 else i * 0.25 for i in range(len(completions))]
'''


@pytest.mark.parametrize(
    ("algorithm", "settings"),
    [
        ("rloo", {}),
        ("rloo", {"normalize_advantages": True, "num_mini_batches": 3}),
        ("reinforce_plus_plus", {}),
        ("reinforce_plus_plus", {"group_baseline": True, "normalize_scores": "running"}),
        ("ppo", {"critic": "policy", "whiten_rewards": True}),
        ("grpo", {}),
    ],
)
def test_completions_without_a_reward_are_left_out(tiny_model, tmp_path, algorithm, settings):
    (tmp_path / "reward.py").write_text(PARTLY)
    rewards = [{"function": f"{tmp_path / 'reward.py'}:partly", "name": "length"}]
    sections = {"training": {"max_steps": 2, "log_completions": 4}, "data": {"eval_size": 0}}
    run = train(ppo_recipe(tiny_model, algorithm, rewards=rewards, ppo=settings, **sections), tmp_path / "run")
    nothing, partly = run.metrics()
    keys = [*CONTRACT, *(OF_PPO if algorithm == "ppo" else OF_PPO[2:] if algorithm != "grpo" else [])]
    for row in (nothing, partly):
        assert not [key for key in keys if key not in row]
        assert not {key: value for key, value in row.items() if value is not None and not math.isfinite(value)}
    assert nothing["reward/mean"] is None and nothing["grad_norm"] == nothing["loss"] == 0
    assert nothing["groups/without_signal"] == 1
    assert not [key for key in keys if partly[key] is None]
    assert partly["reward/mean"] == pytest.approx(0.25 * (1 + 2 + 4 + 5 + 7) / 5)
    assert partly.get("policy/approx_kl", 1) > 0  # the first of two epochs moved the policy
    samples = run.samples()[4:]  # of the second step, the first completion of each prompt
    assert [sample["rewards"]["length"] for sample in samples] == [None, 0.5, 1.0, None]
    advantages = [sample["advantage"] for sample in samples]
    assert advantages[0] == advantages[3] == 0 != advantages[2]
    if algorithm in ("rloo", "grpo"):
        assert advantages[1] == 0  # the only one of its prompt that was scored
    assert all(w.isfinite().all() for w in learned(run)["adapter"].values())
    if settings.get("group_baseline"):
        assert data_of(write_report(run))["columns"]["columns"]  # numbers that are not there do not stop it


def test_equal_rewards_teach_rloo_nothing(tiny_model, tmp_path):
    """Three completions a prompt, since the mean of two or four equal numbers is exact anyway."""
    (tmp_path / "reward.py").write_text("def same(completions, **columns):\n    return [0.7] * len(completions)\n")
    rewards = [{"function": f"{tmp_path / 'reward.py'}:same", "name": "length"}]
    recipe = ppo_recipe(
        tiny_model,
        "rloo",
        rewards=rewards,
        generation={"num_generations": 3},
        training={"max_steps": 1},
        data={"eval_size": 0},
        ppo={"kl_coef": 0.0},
    )
    with pytest.raises(Exception, match="nothing was learned"):
        train(recipe, tmp_path / "run")


# Memory that runs out

OUT = {
    "the update": (ppo_update, "backward", lambda base, batch, rows, targets, settings, passes, *_: passes),
    "the critic's passes": (ppo, "head_outputs", lambda base, role, groups, passes, *_: passes),
    "the scoring": (policy_gradient, "completion_logprobs", lambda base, groups, passes, *_: passes),
}


@pytest.mark.parametrize("where", OUT)
def test_a_step_goes_on_with_less_memory_and_the_same_result(
    tiny_model, tmp_path, whole, monkeypatch, watched, capsys, where
):
    module, name, passes_of = OUT[where]
    original = getattr(module, name)

    def limited(*args: Any) -> Any:
        result = original(*args)  # the work is lost, as when the last allocation fails
        if passes_of(*args).micro_batch_tokens > 70:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return result

    monkeypatch.setattr(module, name, limited)
    trainer = watched(adaptive(tiny_model), tmp_path / "run")
    said = capsys.readouterr().out
    key = "micro_batch_tokens" if where == "the update" else "score_batch_tokens"
    assert f"memory ran out with hardware.{key}=96; going on with 64" in said
    assert said.count("memory ran out with") == 1  # from then on it is 64
    tokens = trainer.ladder.micro_batch_tokens if where == "the update" else trainer.ladder.score_batch_tokens
    assert tokens == 64
    got, want = everything(trainer.run), everything(whole)
    for mine, theirs in zip(got["metrics"], want["metrics"], strict=True):
        for key in ("reward/mean", "completion/mean_length", "loss", "kl", "entropy", "grad_norm", "value/loss"):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-5), key
    for part in ("adapter", "critic", "head"):
        assert distance(want[part], got[part]) < 1e-3
    assert got["counters"]["moments"] == want["counters"]["moments"]
