"""Everything follows the model's device: runs on a card equal the CPU's, a foreign default is ignored."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import learned, tiny_recipe

from lowmem_rlhf.planning.memory.resident import cublas_workspace
from lowmem_rlhf.run.directory import RunDirectory
from lowmem_rlhf.session.train import train


@pytest.fixture(scope="module")
def card(on_the_card, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Run all cases of card_process.py once; return the folder of their runs and what the process saw."""
    output = tmp_path_factory.mktemp("card")
    on_the_card("integration/card_process.py", str(tiny_model), str(output), made=output / "facts.json")
    return output, json.loads((output / "facts.json").read_text())


def run_of(card: tuple[Path, dict[str, Any]], case: str) -> RunDirectory:
    output, facts = card
    assert "error" not in (facts[case] or {}), facts[case]
    return RunDirectory(output / case)


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Return the norm of the difference of two adapters over the norm of the first."""
    assert list(one) == list(other)
    a, b = (torch.cat([state[key].flatten() for key in state]).double() for state in (one, other))
    return float((a - b).norm() / a.norm())


def test_the_base_lies_on_the_card_and_devices_do_not_mix(card, card_device):
    facts = card[1]["placement"]
    assert facts["devices"] == [card_device], facts
    assert "same device" in facts["mixing"]


# Adam's first steps have the size of the learning rate whatever the gradient's, so an entry whose gradient is rounding
# noise moves either way: the 16-bit adapters agree as a whole, the curves closely.
def test_a_run_on_the_card_equals_the_cpus(card):
    cpu, there = (learned(run_of(card, f"float32-{device}")) for device in ("cpu", "card"))
    assert [row["step"] for row in there["metrics"]] == [1, 2, 3]
    assert cpu["samples"] == there["samples"]
    assert cpu["evaluation"] == there["evaluation"]
    for expected, got in zip(cpu["metrics"], there["metrics"], strict=True):
        assert expected.pop("sampling/logp_difference") < 1e-2 and got.pop("sampling/logp_difference") < 1e-2
        assert got == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert any(row["kl"] > 0 for row in there["metrics"]), "the reference was never scored"
    assert distance(cpu["adapter"], there["adapter"]) < 1e-4


@pytest.mark.parametrize("precision", ["float16", "bfloat16", "nf4", "int8"])
def test_a_16_bit_run_on_the_card_is_the_cpus_to_rounding(card, card_device, precision):
    """Other kernels round otherwise, and a draw that lies on the edge then gives another token."""
    if precision == "int8" and card_device == "vcard:0":
        pytest.skip("the virtual card has no 8-bit product")
    cpu, there = (learned(run_of(card, f"{precision}-{device}")) for device in ("cpu", "card"))
    assert [row["step"] for row in there["metrics"]] == [1, 2, 3]
    pairs = list(zip(cpu["samples"], there["samples"], strict=True))
    assert [a["prompt"] for a, _ in pairs] == [b["prompt"] for _, b in pairs]
    assert sum(a["completion"] == b["completion"] for a, b in pairs) >= len(pairs) / 2
    assert all(row["sampling/logp_difference"] < 2e-2 for row in there["metrics"])
    assert any(row["kl"] > 0 for row in there["metrics"]), "the reference was never scored"
    assert distance(cpu["adapter"], there["adapter"]) < 0.1


@pytest.mark.parametrize("precision", ["float32", "nf4"])
def test_a_run_by_graphs_is_the_run_by_waves(card, precision):
    run, facts = run_of(card, f"graphs-{precision}"), card[1][f"graphs-{precision}"]
    assert "error" not in facts and "one by one" not in facts["said"], facts
    waves, graphs = learned(run_of(card, f"{precision}-card")), learned(run)
    assert [row["step"] for row in graphs["metrics"]] == [1, 2, 3]
    assert run.plan()["settings"]["keep_graphs"]
    assert run.plan()["settings"]["rollout_weights"] == ("joined" if precision == "nf4" else "quantized")
    # once for each shape of the evaluation before, of three steps, and of the evaluation behind; in NF4 all have one
    assert len(facts["captured"]) == {"float32": 5, "nf4": 2}[precision], facts["captured"]
    if precision == "float32":
        assert waves["samples"] == graphs["samples"] and waves["evaluation"] == graphs["evaluation"]
    assert all(
        row["sampling/logp_difference"] < (1e-5 if precision == "float32" else 2e-2) for row in graphs["metrics"]
    )
    assert distance(waves["adapter"], graphs["adapter"]) < (1e-4 if precision == "float32" else 0.1)


@pytest.mark.parametrize("precision", ["float32", "nf4"])
def test_the_plan_and_the_peak_are_the_cards(card, card_device, precision):
    run = run_of(card, f"{precision}-card")
    assert run.plan()["device"]["torch_device"] == card_device
    peaks = [row["memory/peak_bytes"] for row in run.metrics()]
    # the process itself holds hundreds of megabytes; the tiny model with its batch takes about one, and cuBLAS
    # has a workspace for each of two threads
    kept = 2 * cublas_workspace(torch.cuda.get_device_capability()) if card_device == "cuda:0" else 0
    assert all(100_000 < peak - kept < 16 * 2**20 for peak in peaks), peaks


def test_a_learned_reward_lies_beside_the_policy_or_on_the_cpu(card, card_device):
    runs = {name: run_of(card, f"learned-{name}") for name in ("cpu", "card", "aside")}
    placed = {name: run.plan()["rewards"]["classifier"] for name, run in runs.items()}
    assert {name: one["device"] for name, one in placed.items()} == {"cpu": "cpu", "card": card_device, "aside": "cpu"}
    assert "fit beside the policy" in placed["card"]["reason"] and placed["aside"]["reason"] == "set in the recipe"
    expected = learned(runs["cpu"])
    for name in ("card", "aside"):
        got = learned(runs[name])
        for one, other in zip(expected["samples"], got["samples"], strict=True):
            assert one["completion"] == other["completion"]
            assert one["rewards"] == pytest.approx(other["rewards"], abs=1e-6)
        assert distance(expected["adapter"], got["adapter"]) < 1e-4


def with_critic(run: RunDirectory) -> dict[str, torch.Tensor]:
    """Return all that PPO trained: the policy's adapter, the critic's, and the value head."""
    folder = run.path / "adapter"
    found = {}
    for file in ("adapter_model.safetensors", "critic/adapter_model.safetensors", "critic/head.safetensors"):
        found |= {f"{file} {name}": tensor for name, tensor in load_file(folder / file).items()}
    return found


def test_ppo_with_all_roles_on_the_card_equals_the_cpus(card, card_device):
    cpu, there = (run_of(card, f"ppo-float32-{device}") for device in ("cpu", "card"))
    assert there.plan()["device"]["torch_device"] == card_device
    expected, got = learned(cpu), learned(there)
    assert len(got["metrics"]) == 2
    for one, other in zip(expected["samples"], got["samples"], strict=True):
        assert one["completion"] == other["completion"]
        assert one["rewards"] == pytest.approx(other["rewards"], rel=1e-5, abs=1e-6)
    for one, other in zip(expected["metrics"], got["metrics"], strict=True):
        assert one.pop("sampling/logp_difference") < 1e-2 and other.pop("sampling/logp_difference") < 1e-2
        assert other["policy/approx_kl_first"] < 1e-9 < other["policy/approx_kl"]
        assert other == pytest.approx(one, rel=1e-5, abs=1e-6)
    assert got["metrics"][0]["kl"] == 0 != got["metrics"][1]["kl"]
    assert distance(with_critic(cpu), with_critic(there)) < 1e-4


def test_ppo_on_a_card_without_bf16_scales_its_loss(card):
    run = run_of(card, "ppo-float16-card")
    rows = learned(run)["metrics"]
    for row in rows:
        assert all(math.isfinite(value) for value in row.values()), row
        assert row["sampling/logp_difference"] < 2e-2 and row["policy/approx_kl_first"] < 1e-3
        assert row["loss_scale/skipped_steps"] == 0 and row["grad_norm"] > 0
    (_, folder) = run.latest_checkpoint()  # type: ignore[misc]
    assert json.loads((folder / "state.json").read_text())["optimizer"]["scaler"]["scale"] > 1
    # unscaled before the optimizer: the weights are those of float32 to rounding
    assert distance(with_critic(run_of(card, "ppo-float32-cpu")), with_critic(run)) < 0.02


@pytest.mark.parametrize(
    ("case", "phase"),
    [
        ("oom-in-rollout", "rollout"),
        ("oom-in-capture", "rollout"),
        ("oom-beside-graphs", "update"),
        ("oom-in-update", "update"),
        ("oom-in-offloaded-update", "update"),
        ("oom-in-optimizer", "update|optimizer"),  # where the norm is taken, or where the moments are made
    ],
)
def test_a_step_that_runs_out_of_memory_is_taken_again(card, case, phase):
    run, facts = run_of(card, case), card[1][case]
    assert facts["code"] == 0, facts
    assert re.search(rf"memory ran out in the ({phase}) phase; trying once more", facts["out"])
    undisturbed, survived = learned(run_of(card, "oom-nowhere")), learned(run)
    assert undisturbed["samples"] == survived["samples"]
    assert distance(undisturbed["adapter"], survived["adapter"]) < 1e-4


@pytest.mark.parametrize(
    ("case", "sentence", "kept"),
    [
        ("hopeless-rollout", "ran out in the rollout phase even with hardware.rollout_batch_size=1", 1),
        ("hopeless-update", "ran out in the update phase even with hardware.micro_batch_tokens=64", 1),
    ],
)
def test_hopeless_memory_ends_the_run_with_one_sentence(card, case, sentence, kept):
    run, facts = run_of(card, case), card[1][case]
    assert facts["code"] == 1
    assert facts["err"].startswith("error: ") and sentence in facts["err"] and facts["err"].count("\n") == 1
    latest = run.latest_checkpoint()
    assert (latest and latest[0]) == kept


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_checkpoints_in_host_memory_leave_the_card_and_change_no_gradient(card, card_device, precision):
    facts = card[1][f"offloaded-{precision}"]
    assert "error" not in facts, facts
    # on a real card sums are taken in an order that changes from pass to pass, checkpoints or not
    rounding = 0.0 if card_device == "vcard:0" else {"float32": 1e-6, "bfloat16": 1e-2}[precision]
    assert facts["norm"] > 0 and max(facts["apart"]) <= rounding * facts["norm"], facts
    assert facts["failed"] == 5, "memory was to run out five times"
    assert facts["left"] == 0, "what the failed passes held was to be given back"
    peaks, checkpoint = facts["peaks"], facts["checkpoint_bytes"]
    # six checkpoints are on the card when the last layer is recomputed; its own is there in both cases
    assert 4.5 * checkpoint <= peaks["here"] - peaks["there"] <= 6.5 * checkpoint, facts
    assert peaks["there"] < peaks["here"] < peaks["kept"]
    assert peaks["again"] == peaks["there"]


def test_nothing_is_made_on_the_default_device(tiny_model, tmp_path):
    """A tensor made without its device would be a meta tensor here, which meets the model's in no operation."""
    hardware = {"compute_dtype": "bfloat16"}
    first, longer = (tiny_recipe(tiny_model, hardware=hardware, training={"max_steps": n}) for n in (1, 2))
    plain = train(longer, tmp_path / "plain")
    with torch.device("meta"):
        train(first, tmp_path / "meta")
        resumed = train(longer, tmp_path / "meta", resume=True)
    expected, got = learned(plain), learned(resumed)
    assert got["metrics"] == expected["metrics"] and got["samples"] == expected["samples"]
    assert all(torch.equal(expected["adapter"][key], got["adapter"][key]) for key in expected["adapter"])
