"""`data --measure-difficulty`: what it writes is what the rewards give, and a stopped one goes on as if it were not."""

import json
import shlex
from collections import defaultdict

import pytest
import yaml
from tiny_runs import save_tiny_model, tiny_values, write_jsonl

from lowmem_rlhf.data.curriculum import CurriculumStream, stream_of
from lowmem_rlhf.data.examples import read_tasks
from lowmem_rlhf.data.sources import load_tasks
from lowmem_rlhf.engine.tokenizer import load_tokens
from lowmem_rlhf.recipe.loading import load_recipe
from lowmem_rlhf.rewards import load_rewards, score
from lowmem_rlhf.training import evaluate

REWARD = "def has(texts, answer, **_):\n    return [float(a in t) for a, t in zip(answer, texts)]\n"
DIGITS = [{"ask": f"{n}+1", "answer": str((n + 1) % 10), "weight": [1.5, {"n": n}]} for n in range(9)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("difficulty-model"))


@pytest.fixture
def recipe(model, tmp_path):
    """Return a function that writes a recipe of a file of ten rows, the fourth of which is too long."""

    def write(**changes):
        (tmp_path / "has.py").write_text(REWARD)
        text = "".join(json.dumps(row).replace("1.5", "1.50") + "\n" for row in DIGITS[:3])
        text += json.dumps({"ask": "1" * 40, "answer": "1"}) + "\n"
        (tmp_path / "rows.jsonl").write_text(text + "".join(json.dumps(row) + "\n" for row in DIGITS[3:]))
        values = tiny_values(model)
        values["data"] = {"train": str(tmp_path / "rows.jsonl"), "template": "{ask}=", "eval_size": 0}
        values["data"] |= {"long_prompts": "drop", "max_prompt_length": 16}
        length = {"function": "length", "options": {"target": 9}, "weight": 0.5}
        values["rewards"] = [{"function": f"{tmp_path / 'has.py'}:has"}, length]
        (path := tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**values, **changes}))
        return path

    return write


@pytest.fixture
def seen(monkeypatch):
    """Return what was sampled, by prompt: the texts and their tokens."""
    sampled, scored = defaultdict(list), evaluate.reward_completions

    def recording(rewards, base, examples, completions, *rest):
        scores, texts = scored(rewards, base, examples, completions, *rest)
        for example, text, completion in zip(examples, texts, completions, strict=True):
            sampled[example.prompt].append((text, completion.ids))
        return scores, texts

    monkeypatch.setattr(evaluate, "reward_completions", recording)
    return sampled


def measure(lowmem_rlhf, recipe, output, *options, samples=3):
    return lowmem_rlhf("data", recipe, "--measure-difficulty", samples, "--output", output, *options)


def test_the_file_has_the_rows_and_what_score_gives_on_the_same_samples(lowmem_rlhf, recipe, seen, tmp_path):
    path, out = recipe(), tmp_path / "hard.jsonl"
    done = measure(lowmem_rlhf, path, out, "--json")
    assert done.code == 0, done.err
    told, lines = json.loads(done.out), out.read_text().splitlines()
    rewards = load_rewards(load_recipe(str(path)).rewards)
    means, correct = [], []
    for line, source in zip(lines, DIGITS, strict=True):  # the row that is too long is left out
        row, prompt = json.loads(line), f"{source['ask']}="
        texts, ids = zip(*seen[prompt], strict=True)
        assert len(texts) == 3
        given = score(rewards, [prompt] * 3, texts, ids, {"answer": [source["answer"]] * 3})
        means.append(sum(given.total) / 3)
        correct.append(sum(given.by_name["has"]))
        assert row == {**source, "measured_reward": means[-1], "measured_difficulty": 1 - means[-1]}
    assert len(set(means)) > 3 and "1.50" in lines[0] and "1.50" not in lines[5]
    assert told["prompts"] == 9 and told["samples"] == 3 and told["mean_reward"] == pytest.approx(sum(means) / 9)
    assert told["solved"] == correct.count(3) and told["hopeless"] == correct.count(0) and 0 < told["hopeless"] < 9
    assert not list(tmp_path.glob("*.part"))

    changes = [f"data.train={out}", "data.curriculum={column: measured_difficulty, start: 0.3}"]
    later = load_recipe(str(path), changes)
    stream = stream_of(read_tasks(later, load_tasks(later), load_tokens(later.model)).train, later)
    assert isinstance(stream, CurriculumStream)
    easiest = sorted(means)[-3:]
    assert {one.columns["measured_reward"] for one in stream.batch(0)} <= set(easiest)


def test_a_stopped_measurement_goes_on_and_gives_the_same_file(lowmem_rlhf, recipe, seen, tmp_path, monkeypatch):
    path, whole, out = recipe(), tmp_path / "whole.jsonl", tmp_path / "hard.jsonl"
    assert measure(lowmem_rlhf, path, whole).code == 0
    once, counted = evaluate.reward_completions, []

    def stops(*arguments):
        if counted:
            raise KeyboardInterrupt
        counted.append(1)
        return once(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "reward_completions", stops)
        done = measure(lowmem_rlhf, path, out)
    assert done.code == 130 and "5 of 9 prompts are kept, the same command goes on from there" in done.err
    assert not out.exists()
    part = out.with_name("hard.jsonl.part")
    kept = part.read_bytes().splitlines(keepends=True)
    part.write_bytes(b"".join([*kept[:2], b"{\n", *kept[3:]]))
    damaged = measure(lowmem_rlhf, path, out)
    assert damaged.code == 2 and f"error: {part} is damaged; delete the file, or give another --output\n" in damaged.err
    part.write_bytes(b"".join(kept))
    other = measure(lowmem_rlhf, path, out, samples=2)
    assert other.code == 2 and "holds 5 prompts that were measured with another recipe, model, data" in other.err
    seen.clear()
    done = measure(lowmem_rlhf, path, out)
    assert done.code == 0 and len(seen) == 4 and out.read_bytes() == whole.read_bytes()
    assert f"data.train={out}" in done.out and "9 prompts with 3 samples each, mean reward" in done.out
    torn = tmp_path / "torn.jsonl"  # by a kill within a line of the first five
    torn.with_name("torn.jsonl.part").write_bytes(b"".join(kept[:3]) + kept[3][:9])
    assert measure(lowmem_rlhf, path, torn).code == 0 and torn.read_bytes() == whole.read_bytes()
    again = measure(lowmem_rlhf, path, out)
    assert again.code == 2 and "hard.jsonl is there already; delete it" in again.err


def test_each_task_has_a_file(lowmem_rlhf, recipe, tmp_path):
    own = {"rewards": [{"function": "length", "options": {"target": 5}}], "generation": {"max_completion_length": 6}}
    lengths = {"name": "lengths", "data": {"train": "arithmetic", "train_size": 4, "template": "{question}="}, **own}
    tasks = [{"name": "has", "data": {"train": str(tmp_path / "rows.jsonl"), "template": "{ask}="}}, lengths]
    path = recipe(tasks=tasks, data={"eval_size": 0, "long_prompts": "drop", "max_prompt_length": 16})
    done = measure(lowmem_rlhf, path, tmp_path / "hard.jsonl", samples=2)
    assert done.code == 0, done.err
    found = {one.name: len(one.read_text().splitlines()) for one in tmp_path.glob("hard*")}
    assert found == {"hard-has.jsonl": 9, "hard-lengths.jsonl": 4}
    options = shlex.split(done.out.splitlines()[2].partition(" learn from it with ")[2])
    later = load_recipe(str(path), options)
    assert later.tasks[1].data.train == str(tmp_path / "hard-lengths.jsonl") and later.tasks[1].data.curriculum
    assert "have the same reward in all samples" in done.out  # a length is a degree, neither right nor wrong


def test_what_measuring_refuses(lowmem_rlhf, recipe, model, tmp_path):
    path, out = recipe(), tmp_path / "hard.jsonl"
    for options, said in (
        (["--measure-difficulty", 2], "belong together; give both, or neither"),
        (["--measure-difficulty", 2, "--output", tmp_path / "hard.csv"], "give a file that ends in .jsonl"),
        (["--measure-difficulty", 2, "--output", tmp_path / "no" / "hard.jsonl"], "no is not there; make it"),
        (["algorithm=sft", "rewards=[]", "--measure-difficulty", 2, "--output", out], "sft does not"),
    ):
        done = lowmem_rlhf("data", path, *options)
        assert done.code == 2 and said in done.err, done.err
    assert write_jsonl(out, []).exists() and measure(lowmem_rlhf, path, out).code == 2
