"""The probe: what each phase takes at the largest planned shape, and the plan made once more where it was wrong."""

import json
from dataclasses import replace

import pytest
import torch
from spared import spare_scan
from tiny_models import save_tiny
from tiny_runs import save_tiny_model, tiny_recipe

from lowmem_rlhf.display.run_display import ConsoleDisplay
from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.host_embedding import HostEmbedding
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.hardware.capabilities import CPU_PROCESS_BYTES
from lowmem_rlhf.hardware.cpu_device import cpu_device
from lowmem_rlhf.hardware.device import Device
from lowmem_rlhf.planning.inputs import MARGIN
from lowmem_rlhf.planning.plan import make_plan
from lowmem_rlhf.planning.run_plan import planned, running_plan
from lowmem_rlhf.recipe.loading import validate_recipe
from lowmem_rlhf.session.train import train
from lowmem_rlhf.training import probe as probing
from lowmem_rlhf.training.roles import add_roles

LARGER = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "vocab_size": 1024,
    "num_hidden_layers": 4,
    "max_position_embeddings": 1024,
}


@pytest.fixture(autouse=True)
def spared_scan(monkeypatch):
    """A probe counts all live tensors once a phase, and a scan goes through all modules as well."""
    spare_scan(monkeypatch.setattr)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("model") / "llama", **LARGER)


def recipe_of(folder, algorithm="grpo", **hardware):
    return validate_recipe(
        {
            "name": "probed",
            "model": str(folder),
            "algorithm": algorithm,
            "hardware": {"device": "cpu", "quantization": "nf4", **hardware},
            "data": {"train": "arithmetic", "eval_size": 0, "max_prompt_length": 100},
            "generation": {"num_generations": 4, "max_completion_length": 100},
            "training": {"prompts_per_step": 2},
            "sft": {"max_length": 200},
            "reward_model": {"max_length": 200},
            **(
                {}
                if algorithm in ("sft", "reward_model")
                else {"rewards": [{"function": "length", "options": {"target": 5}}]}
            ),
        }
    )


def case(folder, algorithm="grpo", **hardware):
    recipe = recipe_of(folder, algorithm, **hardware)
    plan = make_plan(recipe, cpu_device(), "cpu")
    recipe = planned(recipe, plan)
    settings = plan.settings
    base = SharedBase.load(str(folder), torch.device("cpu"), settings.quantization, settings.compute_dtype)
    add_roles(base, recipe, [])
    if algorithm == "reward_model":
        base.add_head("policy", std=0.1)
    return base, recipe, plan


@pytest.mark.parametrize("algorithm", ["grpo", "ppo", "rloo", "sft", "reward_model"])
def test_every_phase_is_measured_and_close_to_the_plan(folder, algorithm):
    base, recipe, plan = case(folder, algorithm)
    weights = [p.detach().clone() for p in base.trainable().values()]
    kept, found = probing.probe(base, recipe, plan)
    assert (kept is plan) == ("it stays" in found.said)
    assert set(found.phases) == {"scoring", "update"} | ({"rollout"} if recipe.rewards else set())
    for one in found.phases.values():
        assert one["measured_bytes"] == pytest.approx(one["predicted_bytes"], rel=0.08)
    assert all(p.grad is None for p in base.trainable().values()), "gradients are given back"
    assert all(torch.equal(p, w) for p, w in zip(base.trainable().values(), weights, strict=True)), "nothing is learned"


@pytest.mark.parametrize(("wrong", "word"), [(0.5, "tightened"), (2.0, "relaxed")])
def test_a_plan_that_was_wrong_is_made_once_more(folder, monkeypatch, wrong, word):
    base, recipe, plan = case(folder)
    true = probing.phases
    predicted = {}

    def wrongly(*given):
        for name, components in true(*given).items():
            predicted[name] = {key: round(size * wrong) for key, size in components.items()}
        return predicted

    monkeypatch.setattr(probing, "phases", wrongly)
    short = replace(plan.device, free_bytes=plan.memory["peak_bytes"] + 800 * 1024**2)
    plan = replace(plan, device=short)
    made, found = probing.probe(base, recipe, plan)
    assert word in found.said and found.ratio == pytest.approx(1 / wrong, rel=0.1)
    before, after = plan.settings, made.settings
    assert (after.quantization, after.compute_dtype, after.lora) == (
        before.quantization,
        before.compute_dtype,
        before.lora,
    )
    assert made.device == plan.device and made.memory["budget_bytes"] == plan.memory["budget_bytes"]
    if word == "tightened":
        assert after.micro_batch_tokens < before.micro_batch_tokens or after.gradient_checkpointing
        assert "->" in found.said


@pytest.mark.parametrize(
    ("measured", "ratio"),
    [
        ((670, 1595), 1595 / 1683),  # a small phase took half as much again: the large one still has room
        ((1700, 1500), 1700 / 1683),  # ... until it is the largest itself
        ((380, 1400), 380 / 436),  # all took less: the worst of them says by how much
        ((670, 1400), 1.0),  # one took more, and a larger plan would let it grow
    ],
)
def test_a_small_phase_that_takes_more_does_not_shrink_the_large_ones(measured, ratio):
    """The first line is what an H100 took for the quickstart, in MB."""
    planned = dict(zip(("rollout", "update"), (436, 1683), strict=True))
    taken = dict(zip(planned, measured, strict=True))
    found = {name: {"predicted_bytes": planned[name], "measured_bytes": taken[name]} for name in planned}
    assert probing.ratio_of(found) == pytest.approx(ratio)


def test_a_phase_that_runs_out_of_memory_tightens_the_plan(folder, monkeypatch):
    base, recipe, plan = case(folder)

    def full(*given, **more):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(probing, "packed_logprobs", full)
    _, found = probing.probe(base, recipe, plan)
    assert found.phases["update"]["measured_bytes"] is None and found.phases["rollout"]["measured_bytes"]
    assert found.ratio == probing.FAILED and "tightened" in found.said


def test_other_tensors_in_memory_are_not_the_phases(folder):
    base, recipe, plan = case(folder)
    probing.probe(base, recipe, plan)  # what the first one makes and keeps
    _, alone = probing.probe(base, recipe, plan)
    reward = torch.zeros(50_000_000, dtype=torch.uint8)
    _, beside = probing.probe(base, recipe, plan)
    assert beside.phases["update"]["measured_bytes"] == pytest.approx(
        alone.phases["update"]["measured_bytes"], rel=0.01
    )
    assert reward.numel()


def test_a_run_that_asks_for_it_keeps_what_was_found(folder, tmp_path, capsys):
    _, recipe, _ = case(folder, "sft", probe=True)
    data = recipe.data.model_copy(update={"train_size": 8})
    training = recipe.training.model_copy(update={"max_steps": 1})
    run = train(
        recipe.model_copy(update={"data": data, "training": training}), tmp_path / "run", display=ConsoleDisplay()
    )
    kept = json.loads((run.path / "plan.json").read_text())["probe"]
    assert kept["said"] in capsys.readouterr().out
    assert set(kept["phases"]) == {"scoring", "update"} and kept["ratio"] > 0.5


@pytest.fixture(scope="module")
def unknown(tmp_path_factory):
    """A model of a type that has no terms in the planner: its parameters are counted, its activations estimated."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWMEM_RLHF_CACHE", str(cache))
        yield save_tiny("falcon_h1", tmp_path_factory.mktemp("model") / "falcon_h1", **LARGER)


def one_step(recipe):
    data = recipe.data.model_copy(update={"train_size": 8})
    return recipe.model_copy(
        update={"data": data, "training": recipe.training.model_copy(update={"max_steps": 1, "learning_rate": 1e-3})}
    )


def test_a_run_that_nobody_knows_to_fit_warns_on_a_cpu(unknown, tmp_path, capsys):
    recipe = one_step(recipe_of(unknown, "sft"))
    plan = json.loads((train(recipe, tmp_path / "run", display=ConsoleDisplay()).path / "plan.json").read_text())
    assert "warning: whether this run fits is not known" in capsys.readouterr().out
    assert plan["verdict"] == "unknown" and "probe" not in plan


def test_the_probe_knows_whether_an_unknown_model_fits(unknown, tmp_path, capsys):
    recipe = one_step(recipe_of(unknown, "sft", probe=True))
    plan = json.loads((train(recipe, tmp_path / "run", display=ConsoleDisplay()).path / "plan.json").read_text())
    assert plan["verdict"] == "yes" and set(plan["probe"]["phases"]) == {"scoring", "update"}
    assert "warning" not in capsys.readouterr().out


def test_an_estimate_that_does_not_fit_ends_only_a_run_without_a_probe(unknown, tmp_path):
    """Room for the weights, not for what Llama's layers would take beside them."""
    pins = {"gradient_checkpointing": False, "micro_batch_tokens": 400, "score_batch_tokens": 400}
    need = running_plan(recipe_of(unknown, "sft", **pins)).memory["peak_bytes"]
    room = (0.5 * need + CPU_PROCESS_BYTES) / (1 - MARGIN)
    recipe = one_step(recipe_of(unknown, "sft", vram=f"{room / 2**20:.2f}MiB", **pins))
    plan = running_plan(recipe)
    assert not plan.fits and plan.verdict == "unknown"
    with pytest.raises(UserError, match="by its estimate the plan does not fit"):
        train(recipe, tmp_path / "first")
    wanted = recipe.model_copy(update={"hardware": recipe.hardware.model_copy(update={"probe": True})})
    assert train(wanted, tmp_path / "second").metrics()


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A tiny mixture of experts whose embedding is no head."""
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 16}
    folder = tmp_path_factory.mktemp("mixture")
    return save_tiny_model(folder, 0, "qwen3_moe", **sizes, hidden_size=128, tie_word_embeddings=False)


def test_a_second_plan_moves_embeddings_and_leaves_experts_where_they_were_loaded(mixture):
    """What a plan says lies in host memory does, and what cannot leave the card any more is not counted as away."""
    recipe = tiny_recipe(mixture, hardware={"device": "auto", "quantization": "nf4"})
    card = Device("cuda:0", "RTX 4090", 2**34, 2**34, (8, 9), True)
    base = SharedBase.load(str(mixture), torch.device("cpu"), "nf4", "float32", r=4)
    plan = make_plan(recipe, card, "x")
    assert not plan.settings.offload_embeddings and not plan.settings.offload_experts
    made, probed = probing._again(base, recipe, plan, {}, 1e4)
    assert made.settings.offload_embeddings and not made.settings.offload_experts
    assert isinstance(base.model.get_input_embeddings(), HostEmbedding)
    assert "offload_embeddings False -> True" in probed.said
