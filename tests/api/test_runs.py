"""A run as an object: measures, pictures, answers, evaluation and export."""

import json

import pytest

import lowmem_rlhf as lm


def longer(completions, **columns):
    return [float(len(one)) for one in completions]


@pytest.fixture
def run(recipe, rows) -> lm.Run:
    recipe["data"] = {key: value for key, value in recipe["data"].items() if key != "train_size"}
    return lm.train(recipe, data=rows, rewards=[longer], overrides=["training.max_steps=2"], progress=None)


def test_a_run_says_what_it_measured_and_answers(run, lowmem_rlhf, tmp_path, capsys):
    assert [row["step"] for row in run.metrics()] == [1, 2]
    assert run.samples()[0]["rewards"].keys() == {"longer"}
    assert run.plan.fits and "peak" in repr(run.plan)
    run.plot(tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes()[:4] == b"\x89PNG" and run.report().is_file()
    with run:
        one = run.generate("1+2", max_tokens=5)
        assert len(one) == 1 and isinstance(one[0], str)
        many = run.generate(["1+2", "3+3"], n=3, compare=True, max_tokens=5, seed=4)
        assert {role: [len(texts) for texts in lists] for role, lists in many.items()} == {
            "policy": [3, 3],
            "reference": [3, 3],
        }
        assert many["policy"] == run.generate(["1+2", "3+3"], n=3, max_tokens=5, seed=4)
    chat = lowmem_rlhf("chat", run.path, "--prompt", "1+2", "--max-tokens", 5, "--json")
    assert json.loads(chat.out)["policy"] == one[0]


def test_a_run_is_evaluated_with_its_objects_and_exported(run):
    outcome = run.evaluate(["evaluation.num_samples=2"])
    assert outcome["samples"] == 2 and "longer" in json.dumps(outcome["results"])
    again = lm.open_run(run.path, progress=None)
    with pytest.raises(lm.UserError, match="was given by a Python program and is not here"):
        again.evaluate()
    folder = again.export("merged", output="merged", dtype="float32")["folder"]
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(folder).num_parameters() > 0
    with pytest.raises(lm.UserError, match=r"there is no option 'quantise'; did you mean 'quantize'"):
        again.export("gguf", quantise="q8_0")


def test_a_prompt_that_cannot_be_answered_is_a_sentence(run):
    for prompt, sentence in (("", "an empty one"), ([], "no prompt"), ("1" * 400, "positions")):
        with pytest.raises(lm.UserError, match=sentence):
            run.generate(prompt)
    with pytest.raises(lm.UserError, match="both are whole numbers of at least 1"):
        run.generate("1+1", n=0)


def test_a_folder_that_holds_no_run_is_the_command_lines_sentence(tmp_path, lowmem_rlhf):
    with pytest.raises(lm.UserError) as error:
        lm.open_run(tmp_path / "gone")
    assert lowmem_rlhf("report", tmp_path / "gone").err == f"error: {error.value}\n"


def test_a_plan_is_a_table_and_a_picture(lowmem_rlhf):
    plan = lm.plan("grpo_gsm8k", profile="rtx-2080-ti")
    assert plan.fits and plan.settings["quantization"] == "none" and plan.reasons["quantization"]
    assert plan.to_dict() == json.loads(lowmem_rlhf("plan", "grpo_gsm8k", "--profile", "rtx-2080-ti", "--json").out)
    assert "micro_batch_tokens" in repr(plan) and plan._repr_png_()[:4] == b"\x89PNG"
    small = lm.plan("grpo_gsm8k", model="Qwen/Qwen2.5-7B-Instruct", vram="3GB", profile="rtx-2080-ti")
    assert not small.fits and small.advice in repr(small)
    with pytest.raises(lm.UserError, match="did you mean"):
        lm.plan("grpo_gsm8k", profile="rtx-2080-tii")


def test_recipes_are_listed():
    assert "quickstart" in lm.recipes() and all(lm.recipes().values())
