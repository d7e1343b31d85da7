"""Stop strings, repetition penalty and least length in a whole run: training, measuring, answering."""

import pytest
from tiny_runs import tiny_recipe

from lowmem_rlhf.api.run import open_run
from lowmem_rlhf.inference.chat.talk import ChatOptions, Talk
from lowmem_rlhf.inference.open_run import OpenRun
from lowmem_rlhf.inference.opening import open_policy
from lowmem_rlhf.session.train import train

STRINGS = ["3", "ab", "+"]
CONTROLS = {"stop_strings": STRINGS, "min_new_tokens": 3, "repetition_penalty": 1.3}


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory):
    recipe = tiny_recipe(
        tiny_model,
        algorithm="ppo",
        generation={**CONTROLS, "num_generations": 1},
        training={"max_steps": 1, "log_completions": 16, "prompts_per_step": 16},
        evaluation={"num_samples": 4},
        ppo={"missing_eos_penalty": 1.0},
    )
    return train(recipe, tmp_path_factory.mktemp("stops") / "run")


def ended(text: str) -> bool:
    return any(string in text for string in STRINGS)


def test_completions_that_a_stop_string_ends_are_whole(run):
    samples = run.samples()
    assert {sample["truncated"] for sample in samples} == {True, False}
    assert any(ended(sample["completion"]) for sample in samples)
    for sample in samples:
        text = sample["completion"]
        assert not any(ended(text[:n]) for n in range(len(text)))  # nothing behind what ends it
        assert not (sample["truncated"] and ended(text))
        assert len(text) >= 3 or ended(text)  # no stop token before the third
    share = sum(sample["truncated"] for sample in samples) / 16
    assert run.metrics()[0]["completion/truncated"] == pytest.approx(share)
    assert all(row["sampling/logp_difference"] < 1e-4 for row in run.metrics())


def test_answers_of_the_run_end_as_in_training(run):
    answers = open_run(run.path).generate(["1+2=", "7+1="], n=8, seed=3)
    texts = [text for own in answers for text in own]
    assert any(map(ended, texts)) and not any(ended(text[:n]) for text in texts for n in range(len(text)))
    opened = OpenRun(run)
    talk = Talk(open_policy(opened), opened.recipe, ChatOptions(temperature=1.5, max_tokens=40))
    replies = ["".join(talk.ask("1+2=")[0].pieces()) for _ in range(6)]
    assert any(map(ended, replies)) and not any(ended(text[:n]) for text in replies for n in range(len(text)))


def test_held_out_answers_are_sampled_in_the_same_way(run):
    after = run.evaluation()["after"]
    assert 0 < after["completion/truncated"] < 1
