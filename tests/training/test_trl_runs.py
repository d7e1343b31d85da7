"""Whole runs with TRL's trainers: what they leave, resuming, chat, plan and dry run, and input that is refused."""

import dataclasses
import importlib
import json
import re
import sys
import warnings

import pytest
import torch
import yaml
from peft import PeftModel
from reports import data_of
from safetensors.torch import load_file
from training_cases import save_model
from transformers import AutoModelForCausalLM, TrainingArguments
from trl_cases import LABELLED, PAIRS, loop_of, trl_recipe, write_rows

from lowmem_rlhf import cli
from lowmem_rlhf.algorithms.trl.plan import LOGITS_BYTES, plan_trl
from lowmem_rlhf.algorithms.trl.spec import TRL_TRAINERS
from lowmem_rlhf.algorithms.trl.update import TRLLoop
from lowmem_rlhf.display.format import evaluation_rows
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.planning.run_plan import plan_recipe
from lowmem_rlhf.recipe.field_roles import fields_with
from lowmem_rlhf.recipe.loading import validate_recipe
from lowmem_rlhf.recipe.names import DECIDED
from lowmem_rlhf.recipe.sections import HardwareConfig
from lowmem_rlhf.run.directory import RunDirectory
from lowmem_rlhf.session.train import train
from lowmem_rlhf.training.intervals import wilson

HELD_OUT = [{"prompt": "5+1= ", "chosen": "6", "rejected": "ef"}, {"prompt": "b a? ", "chosen": "b", "rejected": "44"}]
KIND = {"trl/kto": {"chosen": None, "rejected": None, "label": "label"}}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("trl") / "llama")


def run_recipe(model, folder, algorithm="trl/dpo", **sections):
    """Return a recipe with held-out rows, of the kind that the algorithm learns from first."""
    data = {"train": str(write_rows(folder, LABELLED if algorithm == "trl/kto" else PAIRS))}
    held_out = HELD_OUT
    if algorithm == "trl/kto":
        held_out = [
            {"prompt": row["prompt"], "completion": row[key], "label": key == "chosen"}
            for row in HELD_OUT
            for key in ("chosen", "rejected")
        ]
    data |= {"eval": str(write_rows(folder, held_out, "eval.jsonl")), "eval_size": 8, **KIND.get(algorithm, {})}
    sections["data"] = data | sections.get("data", {})
    sections["training"] = {"max_steps": 6, "learning_rate": 5e-3} | sections.get("training", {})
    return trl_recipe(model, algorithm, folder / "rows.jsonl", **sections)


@pytest.fixture(scope="module")
def runs(model, tmp_path_factory):
    """Return a run of each trainer."""
    found = {}
    for algorithm in TRL_TRAINERS:
        folder = tmp_path_factory.mktemp("runs")
        recipe = run_recipe(model, folder, algorithm, training={"prompts_per_step": 4, "save_steps": 3})
        found[algorithm] = train(recipe, folder / "run")
    return found


def command(monkeypatch, capsys, *arguments):
    """Run the program in this process; return its exit code and what it printed."""
    monkeypatch.setattr(sys, "argv", ["lowmem-rlhf", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code, *capsys.readouterr()


@pytest.mark.parametrize("algorithm", TRL_TRAINERS)
def test_a_run_learns_and_leaves_what_every_run_leaves(algorithm, runs, model):
    run = runs[algorithm]
    rows, evaluation = run.metrics(), run.evaluation()
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    common = {"loss", "grad_norm", "learning_rate", "tokens/trained", "time/step", "time/update", "memory/peak_bytes"}
    trls = {"rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"}
    own = {"trl/kto": {"kl", "entropy"}, "trl/dpo": {"entropy", "accuracy"}}.get(algorithm, {"accuracy", "nll_loss"})
    assert all(common | trls | own <= row.keys() for row in rows)
    assert not {"logits/chosen", "logits/rejected", "mean_token_accuracy"} & rows[0].keys()  # not measured, so not said
    assert all(row["score/margin"] == row["rewards/margins"] for row in rows)
    assert evaluation["after"]["loss"] < evaluation["before"]["loss"]
    assert evaluation["after"]["rewards/margins"] > evaluation["before"]["rewards/margins"]
    assert evaluation["after"]["problems"] == (4 if algorithm == "trl/kto" else 2)
    assert 0 <= evaluation["before"]["logps/accuracy"] <= evaluation["after"]["logps/accuracy"] <= 1
    if TRL_TRAINERS[algorithm].reference:  # the policy is its reference at first
        before = evaluation["before"]
        assert before["accuracy"] is None and before["rewards/chosen"] == before["rewards/rejected"] == 0
    if algorithm != "trl/kto":  # shown also where there is none before
        assert evaluation_rows(evaluation)[0][0] == "accuracy" and evaluation["after"]["accuracy"] >= 0.5
        assert evaluation["after"]["intervals"]["accuracy"] == list(wilson(evaluation["after"]["accuracy"], 2))
    names = {"recipe.yaml", "plan.json", "metrics.jsonl", "samples.jsonl", "evaluation.json", "report.html", "adapter"}
    assert {path.name for path in run.path.iterdir()} == names | {
        *("checkpoints", "inputs.json", "local.json", "hashes.json", ".lock")
    }
    assert [step for step, _ in run.checkpoints()] == [3, 6]
    assert "rewards/margins" in data_of(run.path / "report.html")["columns"]["columns"]
    saved = validate_recipe(yaml.safe_load((run.path / "recipe.yaml").read_text()))
    assert saved.algorithm == algorithm and saved.trl == {"max_length": 32, "beta": 0.3}
    state = load_file(run.path / "adapter" / "adapter_model.safetensors")
    assert {x.dtype for x in state.values()} == {torch.float32} and any(x.abs().max() > 0 for x in state.values())
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), run.path / "adapter")
    assert stock.peft_config["default"].r == 4


@pytest.mark.parametrize("algorithm", ["trl/dpo", "trl/kto"])
def test_an_interrupted_run_goes_on_as_the_uninterrupted_one(algorithm, runs, model, tmp_path, monkeypatch):
    recipe = run_recipe(model, tmp_path, algorithm, training={"prompts_per_step": 4, "save_steps": 3})
    take = TRLLoop.one_step

    def interrupted(self, view):
        if self.step == 2:
            raise KeyboardInterrupt
        return take(self, view)

    monkeypatch.setattr(TRLLoop, "one_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "run")
    assert [step for step, _ in RunDirectory(tmp_path / "run").checkpoints()] == [2]
    monkeypatch.undo()
    changed = recipe.model_copy(update={"trl": {**recipe.trl, "beta": 0.5}})
    with pytest.raises(UserError, match=r"trl\.beta: was 0\.3, is now 0\.5"):
        train(changed, tmp_path / "run", resume=True)
    run, whole = train(recipe, tmp_path / "run", resume=True), runs[algorithm]
    drop = ("time/", "memory/")
    rows = [[{k: v for k, v in row.items() if not k.startswith(drop)} for row in r.metrics()] for r in (whole, run)]
    assert rows[0] == rows[1] and len(rows[0]) == 6
    assert whole.evaluation() == run.evaluation()
    one, other = (load_file(r.path / "adapter" / "adapter_model.safetensors") for r in (whole, run))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_epoch_is_all_pairs_once_and_kto_takes_pairs_apart(model, tmp_path):
    recipe = run_recipe(model, tmp_path, training={"num_train_epochs": 3, "prompts_per_step": 2})
    assert loop_of(recipe, tmp_path).recipe.training.max_steps == 6
    recipe = run_recipe(model, tmp_path, "trl/kto", training={"num_train_epochs": 3, "prompts_per_step": 2})
    recipe = trl_recipe(model, "trl/kto", write_rows(tmp_path, PAIRS), training=recipe.training.model_dump())
    loop = loop_of(recipe, tmp_path)
    assert loop.recipe.training.max_steps == 12
    assert sum(one.good for one in loop.stream.examples) == 4 and len(loop.stream.examples) == 8


def test_the_trained_policy_answers_in_chat_and_goes_on_in_another_stage(runs, model, monkeypatch, capsys, tmp_path):
    run = runs["trl/dpo"].path
    code, out, _ = command(
        monkeypatch, capsys, "chat", run, "--prompt", "1+2= ", "--compare", "--max-tokens", 4, "--json"
    )
    reply = json.loads(out)
    assert code == 0 and {"policy", "reference"} <= reply.keys()
    first = train(run_recipe(model, tmp_path, adapter=str(run), training={"max_steps": 1}), tmp_path / "next")
    before = first.evaluation()["before"]
    assert before["rewards/chosen"] == 0 and before["logps/chosen"] == pytest.approx(
        runs["trl/dpo"].evaluation()["after"]["logps/chosen"], rel=1e-5
    )


def test_rewards_of_a_recipe_judge_held_out_answers(model, tmp_path):
    recipe = run_recipe(
        model,
        tmp_path,
        rewards=[{"function": "length", "options": {"target": 6}}],
        data={"max_prompt_length": 16},
        generation={"max_completion_length": 6},
        training={"max_steps": 1},
    )
    after = train(recipe, tmp_path / "run").evaluation()["after"]
    assert {"reward/length", "completion/mean_length", "rewards/margins"} <= after.keys()


def test_the_plan_counts_both_answers_and_full_logits(model, tmp_path):
    hardware = {"micro_batch_tokens": "auto", "logits_tile_tokens": "auto", "profile": "rtx-2080-ti"}
    sections = {"trl": {"max_length": 100}, "hardware": hardware, "training": {"prompts_per_step": 6}}
    plans = {name: plan_recipe(run_recipe(model, tmp_path, name, **sections)) for name in TRL_TRAINERS}
    assert all(plan.fits and plan.settings.micro_batch_tokens >= 200 for plan in plans.values())
    assert "full_logits" not in plans["trl/dpo"].memory["phases"]["update"]
    logits = plans["trl/orpo"].memory["phases"]["update"]["full_logits"]
    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    assert logits == LOGITS_BYTES * plans["trl/orpo"].settings.micro_batch_tokens * vocabulary
    assert plans["trl/orpo"].memory["budget_bytes"] == plans["trl/dpo"].memory["budget_bytes"]
    # what is said to help does, on a card that is just too small for one pair
    freed = dict.fromkeys(fields_with(HardwareConfig, trl_advises_auto=True), "auto")
    left = {**sections, "hardware": {**hardware, **freed}}
    recipe, budget = run_recipe(model, tmp_path, "trl/orpo", **left), plans["trl/orpo"].memory["peak_bytes"]
    error = ""
    while not error:
        budget = round(0.97 * budget)
        spare = plans["trl/orpo"].memory["budget_bytes"] - budget
        device = plans["trl/orpo"].device
        device = dataclasses.replace(device, free_bytes=device.free_bytes - round(spare / 0.96))
        try:
            plan_trl(recipe, device, "")
        except UserError as refused:
            error = str(refused)
    advice = re.search(r"the update phase needs .* try trl\.max_length=(\d+)$", error)
    assert advice and int(advice[1]) < 100, error
    assert plan_trl(recipe.model_copy(update={"trl": {"max_length": int(advice[1])}}), device, "").fits
    low = {"micro_batch_tokens": 150}
    with pytest.raises(UserError, match=r"got 150, but an example may have 200 tokens .* lower trl.max_length"):
        plan_recipe(run_recipe(model, tmp_path, **{**sections, "hardware": hardware | low}))
    with pytest.raises(UserError, match=r"trl\.max_length 500 makes 500 tokens, but .* has only 128 positions"):
        plan_recipe(run_recipe(model, tmp_path, **{**sections, "trl": {"max_length": 500}}))


def test_a_shipped_recipe_is_planned_for_a_card(monkeypatch, capsys, model, tmp_path):
    file = tmp_path / "dpo.yaml"
    file.write_text(run_recipe(model, tmp_path).to_yaml())
    card = [f"hardware.{key}=auto" for key in ("compute_dtype", "quantization", "micro_batch_tokens")]
    card.append("hardware.profile=rtx-2080-ti")
    code, out, _ = command(monkeypatch, capsys, "plan", file, *card, "--json")
    plan = json.loads(out)
    assert code == 0 and plan["fits"] and plan["settings"]["compute_dtype"] == "float16"
    code, out, _ = command(monkeypatch, capsys, "train", file, "--dry-run", "--output", tmp_path / "none")
    assert code == 0 and "algorithm: trl/dpo" in out and "fits" in out and not (tmp_path / "none").exists()
    code, _, error = command(monkeypatch, capsys, "plan", file, *card, "--vram", "140MB")
    assert code == 2 and "the plan does not fit" in error and "Traceback" not in error


@pytest.mark.parametrize("algorithm", TRL_TRAINERS)
def test_the_installed_trl_has_the_trainer_and_every_key_is_allowed_or_decided(algorithm):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = importlib.import_module(TRL_TRAINERS[algorithm].module)
    assert isinstance(getattr(module, TRL_TRAINERS[algorithm].trainer), type)
    fields = {f.name for f in dataclasses.fields(getattr(module, TRL_TRAINERS[algorithm].config))}
    own = fields - {f.name for f in dataclasses.fields(TrainingArguments)} - DECIDED.keys()
    known = {"beta", "loss_type", "max_length", "label_smoothing", "loss_weights", "ld_alpha", "discopop_tau"}
    known |= {"f_divergence_type", "f_alpha_divergence_coef", "desirable_weight", "undesirable_weight"}
    assert own <= known | {"alpha", "cpo_alpha", "simpo_gamma"}  # a new one of TRL's is to be looked at


REFUSED = {
    "no such trainer": ({"algorithm": "trl/dop"}, r"TRL has no such trainer .* did you mean 'trl/dpo'\?"),
    "a bare name": ({"algorithm": "dpo"}, r"algorithm: got 'dpo'; it is TRL's, write trl/dpo"),
    "our own": ({"algorithm": "trl/sft"}, r"this package has its own, algorithm: sft"),
    "a loss": ({"algorithm": "trl/simpo"}, r"a loss of another trainer: algorithm: trl/cpo with trl.loss_type: simpo"),
    "one that samples": ({"algorithm": "trl/online_dpo"}, r"cannot run here: it samples while it trains"),
    "a key of ours": ({"trl": {"learning_rate": 1e-5}}, r"trl\.learning_rate: .*; set training\.learning_rate"),
    "precision": ({"trl": {"bf16": True}}, r"trl\.bf16: .*; set hardware\.compute_dtype"),
    "batch": ({"trl": {"per_device_train_batch_size": 2}}, r"training\.prompts_per_step"),
    "transformers": ({"trl": {"neftune_noise_alpha": 1.0}}, r"neftune_noise_alpha: is one of transformers' training"),
    "unknown": ({"trl": {"betta": 0.2}}, r"betta: unknown key; did you mean 'beta'\? \(allowed: beta, discopop_tau,"),
    "a wrong type": ({"trl": {"beta": "much"}}, r"beta: got 'much'; it should be a valid number"),
    "two at once": ({"trl": {"betta": 1, "beta": None}}, r"(?s)beta: got None.*betta: unknown"),
    "length": ({"trl": {"max_length": None}}, r"trl\.max_length: got None; it should be a whole number from 2 to"),
    "weights": (
        {"trl": {"loss_type": ["sigmoid", "hinge"], "loss_weights": [1.0]}},
        r"DPOConfig refuses",
    ),
    "loss": ({"trl": {"loss_type": "sigmoit"}}, r"TRL cannot compute its loss .*: Unknown loss type: sigmoit"),
    "exo": ({"trl": {"loss_type": "exo_pair"}}, r"DPOTrainer refuses these settings: Label smoothing must be greater"),
    "of another": ({"algorithm": "grpo", "rewards": ["length"]}, r"trl: is for the algorithms trl/dpo"),
    "margin": ({"data": {"margin": "m"}}, r"data\.margin: is for reward_model"),
    "labels": ({"data": {"label": "label"}}, r"labelled answers are for trl/kto"),
    "columns": ({"data": {"chosen": "better"}}, r"data\.chosen: .* has no column 'better'"),
    "too long": ({"trl": {"max_length": 8}}, r"trl\.max_length is 8 .* raise trl\.max_length to"),
    "kto: no label": (
        {"algorithm": "trl/kto", "data": {"label": "good", "chosen": None, "rejected": None}},
        r"data\.completion: .* has no column 'completion'",
    ),
    "kto: alone": ({"algorithm": "trl/kto", "training": {"prompts_per_step": 1}}, r"needs at least 2"),
    "kto: both": ({"algorithm": "trl/kto", "data": {"label": "good", "chosen": "chosen"}}, r"one kind of them"),
    "kto: loss": (
        {"algorithm": "trl/kto", "trl": {"loss_type": "ktto"}},
        r"one of kto, apo_zero_unpaired; did you",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_input_is_one_clear_message(case, model, tmp_path):
    changes, message = REFUSED[case]
    rest = {key: value for key, value in changes.items() if key != "algorithm"}
    with pytest.raises(UserError) as error:
        recipe = trl_recipe(model, changes.get("algorithm", "trl/dpo"), write_rows(tmp_path, PAIRS), **rest)
        train(recipe, tmp_path / "run")
    assert re.search(message, str(error.value)), str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{**LABELLED[0], "label": "yes"}, *LABELLED[1:]],
            r"row 1: column 'label' must hold true or false",
        ),
        ([row for row in LABELLED if row["label"]], r"all 4 answers are good ones; KTO learns from both"),
        ([{"prompt": "1", "completion": "2"}], r"data\.label: .* has no column 'label'"),
    ],
)
def test_labels_that_are_none(rows, message, model, tmp_path):
    recipe = trl_recipe(model, "trl/kto", write_rows(tmp_path, rows), data={"label": "label"})
    with pytest.raises(UserError, match=message):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_pairs_with_the_same_answer_are_refused(model, tmp_path):
    rows = [*PAIRS, {"prompt": "1", "chosen": "2", "rejected": "2"}]
    with pytest.raises(UserError, match="row 5: columns 'chosen' and 'rejected' hold the same answer"):
        train(trl_recipe(model, "trl/dpo", write_rows(tmp_path, rows)), tmp_path / "run")


@pytest.mark.parametrize("algorithm", ["trl/dpo", "trl/kto"])
def test_eval_says_which_answer_of_a_pair_each_role_finds_likelier(algorithm, runs, monkeypatch, capsys):
    run = runs[algorithm]
    code, out, _ = command(monkeypatch, capsys, "eval", run.path, "--json")
    assert code == 0
    found = json.loads((run.path / "evaluations.jsonl").read_text().splitlines()[-1])
    assert "pair" in json.dumps(found) and "accuracy" in out
    kept = run.evaluation()
    assert json.dumps(kept["after"]["logps/accuracy"]) in json.dumps(found)
    code, _, err = command(monkeypatch, capsys, "eval", run.path, "data.eval_size=1")
    assert code == (0 if algorithm == "trl/dpo" else 2) and ("no pair" in err) == (algorithm == "trl/kto")
