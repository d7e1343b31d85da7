"""`eval` on whole tiny runs: GRPO, SFT, a reward model; models by themselves; what is kept, shown and refused."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from reports import data_of
from safetensors.torch import load_file, save_file
from tiny_runs import save_tiny_model, tiny_recipe, tiny_values, write_jsonl
from transformers import AutoModelForCausalLM

from lowmem_rlhf.data.supervised import build_pairs, build_supervised
from lowmem_rlhf.engine.load import load_base
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.evaluation import evaluate as evaluate_module
from lowmem_rlhf.evaluation import measure as measure_module
from lowmem_rlhf.evaluation.problems import held_out_rows
from lowmem_rlhf.recipe.loading import load_recipe
from lowmem_rlhf.report.html import write_report
from lowmem_rlhf.run.directory import RunDirectory
from lowmem_rlhf.run.evaluations import read_evaluations
from lowmem_rlhf.session.train import train
from lowmem_rlhf.training.intervals import pass_at_k, wilson

REWARDS = (
    "def exact(prompts, completions, answer, **_):\n    return [float(a in c) for a, c in zip(answer, completions)]\n"
)


@pytest.fixture(scope="module")
def grpo(eval_model, tmp_path_factory, no_report) -> RunDirectory:
    """Return a run of three steps that judges answers by whether they hold the sum."""
    folder = tmp_path_factory.mktemp("grpo")
    (folder / "exact.py").write_text(REWARDS)
    rewards = [{"function": f"{folder / 'exact.py'}:exact"}, {"function": "length", "options": {"target": 12}}]
    evaluation = {"num_samples": 2}
    data = {"eval_size": 24, "train_size": 40, "options": {"low": 1, "high": 9}}
    return train(tiny_recipe(eval_model, rewards=rewards, evaluation=evaluation, data=data), folder / "run")


@pytest.fixture(scope="module")
def sft(eval_model, tmp_path_factory, no_report) -> RunDirectory:
    recipe = tiny_recipe(eval_model, algorithm="sft", sft={"max_length": 32}, data={"eval_size": 12}, rewards=[])
    return train(recipe, tmp_path_factory.mktemp("sft") / "run")


@pytest.fixture(scope="module")
def reward_model(eval_model, tmp_path_factory, no_report) -> RunDirectory:
    folder = tmp_path_factory.mktemp("rm")
    pairs = [{"prompt": f"{a}+{b}=", "chosen": "12", "rejected": "abc"} for a in range(8) for b in range(4)]
    file = write_jsonl(folder / "pairs.jsonl", pairs)
    data = {"train": str(file), "template": None, "train_size": None, "prompt": "prompt", "answer": None}
    short = {"reward_model": {"max_length": 32}, "data": {**data, "eval_size": 8}, "rewards": []}
    return train(tiny_recipe(eval_model, algorithm="reward_model", **short), folder / "run")


def outcome(done) -> dict:
    assert done.code == 0, done.err
    return json.loads(done.out)


def test_both_roles_give_exactly_what_training_measured(lowmem_rlhf, grpo):
    """One base, the same problems and random numbers: the means are those of evaluation.json."""
    got = outcome(lowmem_rlhf("eval", grpo.path, "--json"))
    measured = grpo.evaluation()
    assert measured["before"] != measured["after"]
    for role, when in (("reference", "before"), ("policy", "after")):
        for name in ("accuracy", "reward/mean", "reward/exact", "completion/mean_length", "completion/truncated"):
            assert got["results"][role][name]["value"] == pytest.approx(measured[when][name], rel=1e-12), (role, name)
            bounds = [got["results"][role][name][end] for end in ("low", "high")]
            assert measured[when]["intervals"][name] == pytest.approx(bounds, rel=1e-12), (role, name)
    assert got["counts"] == {"problem": 24} and got["samples"] == 2 and got["steps"] == 3
    assert got["headline"] == measured["after"]["headline"] == "accuracy"
    for name, difference in got["difference"].items():
        reference, policy = (got["results"][role][name]["value"] for role in ("reference", "policy"))
        assert difference["value"] == pytest.approx(policy - reference)
        assert difference["low"] <= difference["value"] <= difference["high"]


def test_the_model_is_loaded_once(lowmem_rlhf, grpo, monkeypatch):
    calls = []
    monkeypatch.setattr("lowmem_rlhf.engine.base.load_base", lambda *a, **k: calls.append(a) or load_base(*a, **k))
    outcome(lowmem_rlhf("eval", grpo.path, "--json", "data.eval_size=4"))
    assert len(calls) == 1


def test_pass_at_k_and_accuracy_follow_from_the_answers(lowmem_rlhf, grpo, monkeypatch):
    seen = []
    sample = measure_module.sample
    monkeypatch.setattr(measure_module, "sample", lambda *a, **k: seen.append(sample(*a, **k)) or seen[-1])
    got = outcome(lowmem_rlhf("eval", grpo.path, "--json", "--samples", 6, "--temperature", 1.5, "data.eval_size=20"))
    assert len(seen) == 2
    assert got["temperature"] == 1.5 and got["samples"] == 6
    for done, role in zip(seen, ("reference", "policy"), strict=True):
        correct = [sum(map(bool, done.correct("exact")[i : i + 6])) for i in range(0, 120, 6)]
        results = got["results"][role]
        assert [name for name in results if name.startswith("pass@")] == ["pass@2", "pass@4", "pass@6"]
        for k in (2, 4, 6):
            want = sum(pass_at_k(6, c, k) for c in correct) / 20
            assert results[f"pass@{k}"]["value"] == pytest.approx(want)
        assert results["accuracy"]["value"] == pytest.approx(sum(correct) / 120)
        assert 0 < results["accuracy"]["value"] <= results["pass@2"]["value"] <= results["pass@6"]["value"]


def test_a_larger_change_is_seen_and_a_checkpoint_can_be_measured(lowmem_rlhf, grpo, tmp_path):
    copy = RunDirectory(Path(shutil.copytree(grpo.path, tmp_path / "run")))
    file = copy.path / "adapter" / "adapter_model.safetensors"
    generator = torch.Generator().manual_seed(0)
    save_file({n: torch.randn(t.shape, generator=generator) for n, t in load_file(file).items()}, file)
    file.with_name("hashes.json").unlink()  # an adapter of somewhere else
    moved = outcome(lowmem_rlhf("eval", copy.path, "--json"))
    before = outcome(lowmem_rlhf("eval", grpo.path, "--json"))
    assert moved["results"]["reference"] == before["results"]["reference"]
    assert moved["results"]["policy"] != before["results"]["policy"]
    at_two = outcome(lowmem_rlhf("eval", copy.path, "--step", 2, "--json"))
    assert at_two["steps"] == 2 and at_two["results"]["policy"] != moved["results"]["policy"]
    assert [one["steps"] for one in read_evaluations(copy.path)][-2:] == [3, 2]


def test_results_are_kept_beside_evaluation_json_and_shown(lowmem_rlhf, grpo, tmp_path):
    copy = RunDirectory(Path(shutil.copytree(grpo.path, tmp_path / "run")))
    (copy.path / "evaluations.jsonl").unlink(missing_ok=True)
    done = lowmem_rlhf("eval", copy.path, "--max-tokens", 5)
    assert done.code == 0, done.err
    assert copy.evaluation() == grpo.evaluation()
    [one] = read_evaluations(copy.path)
    assert one["max_completion_length"] == 5 and "Wilson" in one["method"]
    assert "reference" in done.out and "difference" in done.out and "24 held-out problems" in done.out
    assert str(copy.path / "evaluations.jsonl") in done.out
    value = one["results"]["policy"]["completion/mean_length"]
    assert f"[{value['low']:.3g}, {value['high']:.3g}]" in done.out
    assert data_of(write_report(copy))["run"]["later"] == [one]
    assert data_of(write_report(without_evaluations(copy, tmp_path)))["run"]["later"] == []


def without_evaluations(run: RunDirectory, tmp_path: Path) -> RunDirectory:
    """Return a copy without later evaluations."""
    copy = Path(shutil.copytree(run.path, tmp_path / "bare"))
    (copy / "evaluations.jsonl").unlink()
    return RunDirectory(copy)


def test_an_sft_run_gives_the_loss_of_stock_transformers(lowmem_rlhf, sft, eval_model):
    got = outcome(lowmem_rlhf("eval", sft.path, "--json"))
    recipe = load_recipe(str(sft.path / "recipe.yaml"))
    model, tokenizer = load_base(str(eval_model), "none", "float32", torch.device("cpu"))
    rows = held_out_rows(recipe, recipe)
    examples = build_supervised(rows, recipe.data, recipe.sft, tokenizer, frozenset({1}))
    sums, tokens = 0.0, 0
    for one in examples:
        ids = torch.tensor([one.prompt_ids + one.completion_ids])
        logps = model(ids).logits[0, len(one.prompt_ids) - 1 : -1].log_softmax(-1)
        sums -= float(logps.gather(-1, torch.tensor(one.completion_ids)[:, None]).sum())
        tokens += len(one.completion_ids)
    reference, policy = got["results"]["reference"], got["results"]["policy"]
    assert reference["loss"]["value"] == pytest.approx(sums / tokens, rel=1e-5)
    assert policy["loss"]["value"] == pytest.approx(sft.evaluation()["after"]["loss"], rel=1e-6)
    assert reference["loss"]["low"] < reference["loss"]["value"] < reference["loss"]["high"]
    assert reference["perplexity"]["high"] == pytest.approx(math.exp(reference["loss"]["high"]))
    assert got["difference"]["loss"]["value"] < 0
    assert "accuracy" not in policy and "samples" not in got and got["counts"] == {"example": 12}


def test_a_reward_model_gives_pairs_in_order_with_wilson_s_interval(lowmem_rlhf, reward_model, eval_model):
    got = outcome(lowmem_rlhf("eval", reward_model.path, "--json"))
    measured = reward_model.evaluation()["after"]
    [(role, results)] = got["results"].items()
    assert role == "policy" and "difference" not in got
    assert results["accuracy"]["value"] == measured["accuracy"]
    assert (results["accuracy"]["low"], results["accuracy"]["high"]) == pytest.approx(wilson(measured["accuracy"], 8))
    assert results["score/margin"]["value"] == pytest.approx(measured["score/margin"], rel=1e-6)
    recipe = load_recipe(str(reward_model.path / "recipe.yaml"))
    _, tokenizer = load_base(str(eval_model), "none", "float32", torch.device("cpu"))
    pairs = build_pairs(held_out_rows(recipe, recipe), recipe.data, 32, tokenizer, frozenset({1}))
    assert got["counts"] == {"pair": len(pairs)}


def test_models_are_evaluated_alone_and_against_each_other(lowmem_rlhf, grpo, eval_model, tmp_path):
    other = save_tiny_model(tmp_path / "other", seed=5)
    recipe = grpo.path / "recipe.yaml"
    alone = outcome(lowmem_rlhf("eval", eval_model, "--recipe", recipe, "--json", "hardware.compute_dtype=float32"))
    base = outcome(lowmem_rlhf("eval", grpo.path, "--json"))["results"]["reference"]
    [(name, results)] = alone["results"].items()
    assert name == eval_model.name and results == base  # the same model, problems and random numbers
    both = outcome(lowmem_rlhf("eval", other, "--recipe", recipe, "--against", eval_model, "--json"))
    assert list(both["results"]) == [eval_model.name, "other"]
    assert both["results"][eval_model.name] == base and both["results"]["other"] != base
    assert not (eval_model / "evaluations.jsonl").exists()
    shutil.copy(recipe, other / "recipe.yaml")  # an export has its recipe beside its weights
    assert "exact.py (rewards[0].function)" in lowmem_rlhf("eval", other, "--json").err  # whoever put it there
    trusted = outcome(lowmem_rlhf("eval", other, "--json", "--trust-run"))
    assert trusted["results"]["other"] == both["results"]["other"]


def test_a_model_by_itself_has_the_format_of_its_data_recognised_as_training_does(lowmem_rlhf, eval_model, tmp_path):
    """Only the evaluation file has to be there, and its columns are told by what they are called."""
    data = {"train": "nowhere.jsonl", "eval": str(tmp_path / "own.jsonl"), "eval_size": 4, "max_prompt_length": 24}
    write_jsonl(tmp_path / "own.jsonl", [{"problem": f"{n} + 1", "answer": str(n + 1)} for n in range(4)])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({**tiny_values(eval_model), "data": data}))  # JSON is YAML
    done = lowmem_rlhf("eval", eval_model, "--recipe", recipe, "--json")
    assert outcome(done)["counts"] == {"problem": 4}
    assert "data.prompt='problem'" in done.err


@pytest.mark.parametrize(("stored", "held"), [("float16", "float32"), ("bfloat16", "bfloat16"), ("float32", "float32")])
def test_a_model_is_held_as_it_is_stored_and_not_as_the_recipe_quantizes(
    lowmem_rlhf, grpo, eval_model, tmp_path, stored, held
):
    folder = Path(shutil.copytree(eval_model, tmp_path / stored))
    AutoModelForCausalLM.from_pretrained(eval_model, dtype=getattr(torch, stored)).save_pretrained(folder)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text((grpo.path / "recipe.yaml").read_text().replace("quantization: none", "quantization: nf4"))
    done = lowmem_rlhf("eval", folder, "--recipe", recipe, "data.eval_size=4")
    assert done.code == 0 and f"(unquantized, {held})" in done.err
    done = lowmem_rlhf("eval", folder, "--recipe", recipe, "data.eval_size=4", "hardware.quantization=nf4")
    assert f"(nf4, {held})" in done.err


def test_fewer_problems_are_a_part_of_those_held_out_and_other_data_is_taken_whole(lowmem_rlhf, grpo, tmp_path):
    source = str(grpo.path / "recipe.yaml")
    trained = load_recipe(source)
    every = held_out_rows(trained, trained)
    some = held_out_rows(trained, load_recipe(source, ["data.eval_size=7"]))
    assert len(some) == 7 and all(row in every for row in some)
    rows = [{"question": f"{n} + 1", "answer": str(n + 1)} for n in range(5)]
    file = write_jsonl(tmp_path / "own.jsonl", rows)
    got = outcome(lowmem_rlhf("eval", grpo.path, f"data.eval={file}", "--json"))
    assert got["counts"] == {"problem": 5} and got["data"] == str(file)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["nowhere"], ["nowhere is no run", "--recipe", "--lm-eval"]),
        (["nowhere", "--recipe", "quickstart"], ["'nowhere'"]),
        (["RUN", "model=x"], ["'model=x'", "evaluation.temperature", "data.eval_size"]),
        (["RUN", "training.seed=1"], ["'training.seed=1'"]),
        (["RUN", "data.eval_size=25"], ["got 25", "held 24 problems", "data.eval=FILE"]),
        (["RUN", "data.eval_size=0"], ["holds nothing out"]),
        (["RUN", "evaluation.num_sample=2"], ["num_sample", "num_samples"]),
        (["RUN", "--step", "9"], ["--step 9", "3"]),
        (["RUN", "--recipe", "quickstart"], ["--recipe", "is a run"]),
        (["RUN", "--against", "MODEL"], ["--against", "is a run"]),
        (["RUN", "--limit", "3"], ["--limit", "--lm-eval"]),
        (["RUN", "--lm-eval", "arc_easy", "--samples", "2"], ["leave --samples out"]),
        (["MODEL", "--step", "2"], ["--step", "is for a RUN"]),
        (["MODEL"], ["is no run", "--recipe"]),
        (["SFT", "--samples", "3"], ["--samples", "no rewards"]),
        (["RUN", "--samples", "0"], ["--samples"]),
        (["RUN", "--max-tokens", "255"], ["255", "only 256 positions", "--max-tokens"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_wrong_input_is_one_sentence_and_exit_code_2(lowmem_rlhf, grpo, sft, eval_model, arguments, parts):
    names = {"RUN": grpo.path, "SFT": sft.path, "MODEL": eval_model}
    done = lowmem_rlhf("eval", *[names.get(argument, argument) for argument in arguments])
    assert done.code == 2, done
    assert "Traceback" not in done.err and all(part in done.err for part in parts), done.err


def test_lm_eval_is_asked_for_where_it_is_missing(lowmem_rlhf, grpo, monkeypatch):
    find = evaluate_module.importlib.util.find_spec
    monkeypatch.setattr(
        evaluate_module.importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name)
    )
    done = lowmem_rlhf("eval", grpo.path, "--lm-eval", "arc_easy")
    assert done.code == 2 and "`pip install lm-eval`" in done.err


def test_rows_that_were_trained_on_are_never_evaluated_on(tmp_path):
    rows = [{"question": str(n), "answer": str(n)} for n in range(40)]
    train_file, eval_file = write_jsonl(tmp_path / "t.jsonl", rows), write_jsonl(tmp_path / "e.jsonl", rows[:6])
    apart = tiny_recipe("m", data={"train": str(train_file), "eval": str(eval_file), "eval_size": 6})
    assert len(held_out_rows(apart, apart)) == 6
    without = apart.model_copy(update={"data": apart.data.model_copy(update={"eval": None})})
    with pytest.raises(UserError, match="trained on all of"):
        held_out_rows(apart, without)
