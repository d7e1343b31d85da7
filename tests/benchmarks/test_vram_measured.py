"""The memory model against live tensors: tiny models' steps here, many more in the benchmark itself."""

import json
from dataclasses import replace

import pytest
import torch
import vram_measured
from vram_cases import FAMILIES, FOLLOWS, MODELS, NAMED, SMOLLM, Case, cases, write_model

from lowmem_rlhf.hardware.capabilities import CPU_PROCESS_BYTES
from lowmem_rlhf.hardware.cpu_device import cpu_device
from lowmem_rlhf.planning.inputs import MARGIN
from lowmem_rlhf.planning.plan import make_plan
from lowmem_rlhf.planning.run_plan import planned

SIZES = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4}
TINY = [
    Case("llama", "ppo", checkpointing=1, prompt=270, length=9, prompts=1, vocabulary=512),
    Case("gpt2", "grpo", "none", checkpointing=False, prompt=40, length=9, vocabulary=512, more=FOLLOWS),
    Case("gpt2", "reward_model", "int8", prompt=40, length=24, vocabulary=4096),
]
NAMES = [f"{case.family} {case.algorithm}" for case in TINY]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return a function that gives the folder of a case's model."""
    made = {}

    def folder_of(case):
        key = (case.family, case.vocabulary)
        if key not in made:
            made[key] = write_model(*key, tmp_path_factory.mktemp("model"), **SIZES)
        return made[key]

    return folder_of


@pytest.fixture(scope="module")
def measured(folders):
    """Return a function that gives a case's recipe, plan and measured peaks by phase."""
    from lowmem_rlhf.bench.trainer_step import Measured

    found = {}

    def measure(case):
        if case not in found:
            recipe = case.recipe(folders(case))
            plan = make_plan(recipe, cpu_device(), "cpu")
            found[case] = recipe, plan, Measured(recipe, plan).peaks
        return found[case]

    return measure


@pytest.mark.parametrize("case", TINY, ids=NAMES)
def test_every_phase_of_a_step_is_predicted(measured, case):
    _, plan, peaks = measured(case)
    online = case.algorithm in ("grpo", "ppo")
    found = vram_measured.compare(plan.memory["phases"], peaks, case.algorithm == "reward_model")
    assert list(found) == (["rollout", "score", "update", "step"] if online else ["update", "step"])
    assert max(abs(phase["error"]) for phase in found.values()) < 0.03
    assert found["step"]["measured"] == max(peaks.values())


def test_tensors_of_others_in_the_process_are_not_counted(folders, measured):
    from lowmem_rlhf.bench.trainer_step import Measured

    recipe, plan, peaks = measured(TINY[2])
    others = torch.zeros(50_000_000, dtype=torch.uint8)
    assert Measured(recipe, plan).peaks["update"] == pytest.approx(peaks["update"], rel=0.01)
    assert others.numel()


def test_tensors_of_others_may_end_during_the_step(folders, measured, monkeypatch):
    from lowmem_rlhf.bench import trainer_step

    recipe, plan, peaks = measured(TINY[2])
    others = [torch.zeros(50_000_000, dtype=torch.uint8)]

    def load(*arguments, whole=trainer_step.load):
        others.clear()
        return whole(*arguments)

    monkeypatch.setattr(trainer_step, "load", load)
    assert trainer_step.Measured(recipe, plan).peaks["update"] == pytest.approx(peaks["update"], rel=0.01)
    assert not others


@pytest.mark.parametrize("case", TINY, ids=NAMES)
def test_a_plan_that_just_fits_takes_no_more_than_its_margin(measured, case):
    recipe, plan, peaks = measured(case)

    def with_room_for(peak):
        free = int((peak + CPU_PROCESS_BYTES) / (1 - MARGIN))
        kept = ("micro_batch_tokens", "score_batch_tokens", "rollout_batch_size", "rollout_weights", "optim")
        hardware = recipe.hardware.model_copy(update={key: getattr(plan.settings, key) for key in kept})
        pinned = planned(recipe, plan).model_copy(update={"hardware": hardware})
        return make_plan(pinned, replace(cpu_device(), free_bytes=free), "cpu")

    largest = plan.memory["peak_bytes"]
    assert with_room_for(1.001 * largest).fits
    assert not with_room_for(0.999 * largest).fits
    assert max(peaks.values()) <= (1 + MARGIN) * largest


def test_compare_takes_the_largest_of_the_parts_of_a_phase():
    predicted = {
        "rollout": {"a": 90, "b": 10},
        "scoring": {"a": 70},
        "update": {"a": 50},
        "optimizer": {"a": 60},
        "export": {"a": 1000},
    }
    found = vram_measured.compare(predicted, {"rollout": 125, "score": 70, "update": 50})
    assert [found[name]["predicted"] for name in found] == [100, 70, 60, 100]
    assert found["rollout"]["error"] == pytest.approx(-0.2) and found["update"]["error"] == pytest.approx(0.2)
    assert (found["step"]["measured"], found["step"]["error"]) == (125, pytest.approx(-0.2))
    assert found["rollout"]["components"] == {"a": 90, "b": 10}
    pairs = vram_measured.compare(predicted, {"update": 70}, pairs=True)
    assert (pairs["update"]["predicted"], pairs["step"]["error"]) == (70, 0)


def row(family: str, update: float, rollout: float) -> dict:
    phases = {"update": update, "rollout": rollout, "step": update}
    return {
        "case": {"family": family},
        "label": "grpo",
        "phases": {name: {"predicted": 1e6 * (1 + e), "measured": 1e6, "error": e} for name, e in phases.items()},
    }


def test_summary_tables_and_promises(capsys):
    rows = [row("llama", 0.01, -0.03), row("gpt2", -0.04, 0.02)]
    found = vram_measured.report(rows)
    assert found["total"]["phases"] == {"mean": pytest.approx(0.025), "worst": -0.04, "signed": pytest.approx(-0.01)}
    assert found["total"]["step"] == {"mean": pytest.approx(0.025), "worst": -0.04, "signed": pytest.approx(-0.015)}
    assert found["by_family"]["llama"]["phases"]["worst"] == -0.03
    assert found["machine"]["cores"] and found["machine"]["versions"]["torch"]
    json.dumps(found)
    assert vram_measured.misses(found) == []
    assert vram_measured.misses(vram_measured.report([row("llama", 0.09, 0.0)])) == [
        "mean error of phases: 4.5% is above 3%",
        "worst error of phases: 9.0% is above 8%",
        "mean error of step: 9.0% is above 3%",
        "worst error of step: 9.0% is above 8%",
    ]
    vram_measured.print_tables(found)
    text = capsys.readouterr().out
    assert "rollout    0.97     1.00  -3.00%" in text and "gpt2 (1 cases)" in text and "all (2 cases)" in text


def test_the_cases_are_what_is_promised():
    every = list(cases())
    assert len(set(every)) == len(every) == len({(case.family, case.label) for case in every})
    assert {case.family for case in every} == set(FAMILIES)
    for family in NAMED:
        own = [case for case in every if case.family == family]
        assert {case.algorithm for case in own} >= {"sft", "grpo", "ppo"}
        assert {case.quantization for case in own} == {"nf4", "int8", "none"}
        assert {True, False} <= {bool(case.checkpointing) for case in own}
        if family != SMOLLM:
            assert len({case.vocabulary for case in own}) == 2
            assert min(case.prompt + case.length for case in own) < 100 < 500 < max(c.prompt + c.length for c in own)
    assert {case.family for case in cases(quick=True)} == set(FAMILIES)
    assert len(list(cases(("gpt2",), quick=True))) == 2
    with pytest.raises(SystemExit):
        vram_measured.options().parse_args(["--families", "bert"])


@pytest.mark.parametrize("family", MODELS)
def test_the_recipes_of_the_cases_are_valid(tmp_path, family):
    for case in cases((family,)):
        assert case.recipe(tmp_path).algorithm == case.algorithm
