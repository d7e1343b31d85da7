"""Several tasks in one run: the recipe, the mixture, and whole runs of a tiny model."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import learned, save_tiny_chat_model, tiny_values, write_jsonl

from lowmem_rlhf.api.request import request_of
from lowmem_rlhf.data.curriculum import stream_of
from lowmem_rlhf.data.prompts import Example
from lowmem_rlhf.data.stream import MixedStream, PromptStream
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.recipe.loading import load_recipe, validate_recipe
from lowmem_rlhf.recipe.tasks import MixingConfig
from lowmem_rlhf.report import html
from lowmem_rlhf.rollout.scores import Scores, joined
from lowmem_rlhf.run.directory import RunDirectory
from lowmem_rlhf.session.train import train
from lowmem_rlhf.training.online import Trainer

REWARDS = """
def few(completions, answer, **_):
    return [1.0 - len(one) / 12 for one in completions]

def even(completions, color, log_metric, **_):
    log_metric("colors", len(set(color)))
    return [float(len(one) % 2 == 0) for one in completions]
"""


@pytest.fixture(scope="module")
def tasks_model(tmp_path_factory) -> Path:
    return save_tiny_chat_model(tmp_path_factory.mktemp("tasks-model"))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "own.py").write_text(REWARDS)
    write_jsonl(folder / "colors.jsonl", [{"ask": f"{a}{b}", "color": a} for a in "abcdef" for b in "0123456789"])
    return folder


def values(model: Path, files: Path, **changes: Any) -> dict[str, Any]:
    """Return a recipe of sums, and of a file with other columns, another reward and shorter answers."""
    own = tiny_values(model)
    own["data"] = {"eval_size": 4, "max_prompt_length": 16, "chat": False}
    own["rewards"] = [{"function": f"{files}/own.py:few"}]
    own["tasks"] = [
        {"name": "sums", "weight": 3, "data": {"train": "arithmetic", "train_size": 16, "template": "{question}="}},
        {
            "name": "colors",
            "data": {"train": f"{files}/colors.jsonl", "prompt": "ask", "answer": None, "eval_size": 6, "chat": True},
            "rewards": [{"function": f"{files}/own.py:even"}, {"function": "length", "options": {"target": 5}}],
            "generation": {"max_completion_length": 5},
        },
    ]
    return {**own, **changes}


@pytest.fixture(scope="module", autouse=True)
def bare_runs() -> Iterator[None]:
    """Runs without report.html, which is not what they test, on the one thread that the tests have."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(html, "write_report", lambda run: None)
        torch.set_num_threads(1)
        yield


@pytest.fixture(scope="module")
def run(tasks_model, files, tmp_path_factory, bare_runs) -> RunDirectory:
    return train(validate_recipe(values(tasks_model, files)), tmp_path_factory.mktemp("tasks-run") / "run")


# The recipe


def test_a_task_has_what_it_lacks_from_the_recipe_and_a_written_recipe_is_the_same(tasks_model, files, tmp_path):
    recipe = validate_recipe(values(tasks_model, files))
    sums, colors = recipe.by_task.values()
    assert (sums.data.max_prompt_length, sums.data.eval_size, colors.data.eval_size) == (16, 4, 6)
    assert [one.name for one in sums.rewards] == ["few"] and sums.evaluation.accuracy == "few"
    assert [one.name for one in colors.rewards] == ["even", "length"] and colors.evaluation.accuracy == "even"
    assert (sums.generation.max_completion_length, colors.generation.max_completion_length) == (12, 5)
    assert (sums.data.chat, colors.data.chat, sums.tasks) == (False, True, [])
    assert recipe.data.eval_size == 10 and [one.name for one in recipe.rewards] == ["few", "even", "length"]
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())
    again = load_recipe(str(tmp_path / "again.yaml"))
    assert again.to_yaml() == recipe.to_yaml() and again == recipe
    longer = load_recipe(str(tmp_path / "again.yaml"), ["tasks[1].data.eval_size=2"])
    assert [own.data.eval_size for own in longer.by_task.values()] == [4, 2]


def test_a_recipe_without_tasks_is_its_own_only_task_and_is_written_as_ever(tasks_model):
    recipe = validate_recipe(tiny_values(tasks_model))
    assert recipe.by_task == {"": recipe} and not {"tasks", "mixing"} & recipe.model_dump().keys()


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("tasks.0.name", "a/b", "tasks[0].name: got 'a/b'; a task's name is a part of its metrics"),
        ("tasks.0.name", "colors", "two tasks have the same name (colors, colors); each needs its own"),
        ("tasks.0.data.promt", "x", "tasks[0].data.promt: unknown key; did you mean 'prompt'?"),
        ("tasks.0.weight", 0, "tasks[0].weight: got 0; it should be greater than 0"),
        ("tasks.1.generation.max_completion_length", 13, "got 13, above the limit of all tasks"),
        ("tasks.1.accuracy", "evn", "tasks[1].accuracy: got 'evn', which is no reward"),
        ("data", "rows.jsonl", "data: got 'rows.jsonl'; it should hold keys"),
        ("trl", {"beta": 0.1}, "trl: is for the algorithms"),
        ("data.train", "x.jsonl", "data.train: every task has its own; set that of one, for example tasks[0].data"),
        ("evaluation.accuracy", "even", "evaluation.accuracy: is for a recipe without tasks"),
        ("algorithm", "reward_model", "tasks: reward_model learns from one data set; leave them out"),
        ("tasks.1.data.chat_template_kwargs", {"a": 1}, "data.chat_template_kwargs are of the tokenizer"),
        ("mixing.by", "wieght", "mixing.by: got 'wieght'; it should be 'weight' or 'size'"),
    ],
)
def test_what_is_wrong_with_tasks_is_one_sentence(tasks_model, files, key, value, words):
    recipe = values(tasks_model, files)
    here: Any = recipe
    *above, last = key.split(".")
    for part in above:
        here = here[int(part)] if part.isdecimal() else here.setdefault(part, {})
    here[last] = value
    with pytest.raises(UserError) as caught:
        validate_recipe(recipe)
    lines = str(caught.value).splitlines()
    assert any(words in line for line in lines), lines


# The mixture


def test_shares_follow_weights_and_sizes():
    assert MixingConfig().shares([3, 1], [10, 1000]) == [0.75, 0.25]
    assert MixingConfig(by="size").shares([1, 1], [10, 30]) == [0.25, 0.75]
    assert MixingConfig(by="size", temperature=2).shares([1, 1], [10, 90]) == pytest.approx([0.25, 0.75])
    assert MixingConfig(by="size", temperature=100).shares([1, 1], [10, 90]) == pytest.approx([0.5, 0.5], abs=0.01)
    assert MixingConfig(by="size").shares([3, 1], [10, 30]) == [0.5, 0.5]


def mixed(tasks, shares) -> MixedStream[Any]:
    return MixedStream([PromptStream(examples, 1, seed=3) for examples in tasks], shares, 4)


@pytest.mark.parametrize("shares", [(0.75, 0.25), (0.5, 0.3, 0.2), (1.0,), (0.05, 0.9, 0.05)])
def test_every_task_has_its_share_and_its_own_order_whatever_step_is_asked_for_first(shares):
    tasks = [[(task, n) for n in range(7 + task)] for task in range(len(shares))]
    whole, steps = mixed(tasks, shares), 60
    batches = [whole.batch(step) for step in range(steps)]
    for step in (59, 0, 17):
        assert mixed(tasks, shares).batch(step) == batches[step]
    flat = [one for batch in batches for one in batch]
    for count in range(1, len(flat) + 1):
        had = Counter(task for task, _ in flat[:count])
        assert all(abs(had[task] - share * count) < len(shares) for task, share in enumerate(shares))
    for task, examples in enumerate(tasks):
        own = [one for one in flat if one[0] == task]
        alone: PromptStream[tuple[int, int]] = PromptStream(examples, 1, 3)
        assert own == [alone.batch(number)[0] for number in range(len(own))]


def test_one_task_alone_is_a_run_without_tasks(tasks_model, files):
    recipe = validate_recipe(values(tasks_model, files))
    one = recipe.model_copy(update={"tasks": recipe.tasks[:1]})
    examples = [Example(str(n), [n], {}, task="sums") for n in range(9)]
    mixed, plain = stream_of(examples, one), stream_of(examples, recipe.by_task["sums"])
    assert [mixed.batch(step) for step in range(9)] == [plain.batch(step) for step in range(9)]
    with pytest.raises(UserError, match="there is no prompt to train on"):
        stream_of(examples, recipe)


# Whole runs


def test_each_completion_is_judged_by_its_own_task_and_kept_to_its_length(run):
    rows = run.samples()
    assert {row["task"] for row in rows} == {"sums", "colors"}
    for row in rows:
        names = {name for name, value in row["rewards"].items() if value is not None}
        own, most = ({"few"}, 12) if row["task"] == "sums" else ({"even", "length"}, 5)
        assert names == own and row["tokens"] <= most, row
        assert isinstance(row["prompt"], str) == (row["task"] == "sums"), row
    for row in run.metrics():
        assert (row["task/sums/prompts"], row["task/colors/prompts"]) == (3, 1)
        assert row["task/colors/completion/mean_length"] <= 5 and row["colors"] == 1.0
        assert row["reward/few"] == row["task/sums/reward/few"] and "task/sums/reward/even" not in row
        parts = [row["task/sums/reward/mean"], row["task/colors/reward/mean"]]
        assert row["reward/mean"] == pytest.approx((3 * parts[0] + parts[1]) / 4, abs=1e-6)


def test_the_evaluation_has_each_task_beside_the_totals(run):
    for when in ("before", "after"):
        result = run.evaluation()[when]
        sums, colors = result["tasks"]["sums"], result["tasks"]["colors"]
        assert (sums["problems"], colors["problems"], result["problems"]) == (4, 6, 10)
        for key in ("accuracy", "reward/mean", "completion/mean_length"):
            assert result[key] == pytest.approx((4 * sums[key] + 6 * colors[key]) / 10), key
        assert result["reward/even"] == colors["reward/even"] and "reward/even" not in sums
    data = run.inputs()["data"]["tasks"]
    assert (data["sums"]["train"]["rows"], data["colors"]["train"]["rows"], data["colors"]["eval"]["rows"]) == (
        16,
        54,
        6,
    )


def test_a_resumed_run_is_the_uninterrupted_one(run, tasks_model, files, tmp_path, monkeypatch):
    recipe = validate_recipe(values(tasks_model, files))
    rollout = Trainer._rollout

    def stopped(self, progress):
        if self.step == 2:
            raise KeyboardInterrupt
        return rollout(self, progress)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "_rollout", stopped)
        train(recipe, tmp_path / "run")
    again = train(load_recipe(str(tmp_path / "run" / "recipe.yaml")), tmp_path / "run", resume=True)
    ours, whole = learned(again), learned(run)
    assert all((ours["adapter"].pop(name) == tensor).all() for name, tensor in whole.pop("adapter").items())
    assert not ours.pop("adapter") and ours == whole


def test_a_resume_refuses_other_rows_of_one_task(tasks_model, files, tmp_path, monkeypatch):
    own = values(tasks_model, files)
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"ask": f"{n}", "color": "a"} for n in range(9, 40)])
    own["tasks"][1]["data"]["train"] = str(rows)
    own["training"] = {**own["training"], "max_steps": 1, "save_steps": 1}
    train(validate_recipe(own), tmp_path / "run")
    write_jsonl(rows, [{"ask": f"{n}", "color": "a"} for n in range(8, 40)])
    own["training"]["max_steps"] = 2
    with pytest.raises(UserError, match="not those that the run began"):
        train(validate_recipe(own), tmp_path / "run", resume=True)


def test_eval_tells_each_task_and_chat_writes_the_prompts_of_one(run, lowmem_rlhf):
    done = lowmem_rlhf("eval", run.path, "--json", "--trust-run")
    assert done.code == 0, done.err
    found, after = json.loads(done.out), run.evaluation()["after"]
    assert found["counts"] == {"problem": 10} and found["tasks"]["colors"]["counts"] == {"problem": 6}
    for task, own in after["tasks"].items():
        policy = found["tasks"][task]["results"]["policy"]
        assert policy["reward/mean"]["value"] == pytest.approx(own["reward/mean"])
    assert found["results"]["policy"]["reward/mean"]["value"] == pytest.approx(after["reward/mean"])
    assert "colors: reward/even" in lowmem_rlhf("eval", run.path, "--trust-run").out
    fewer = ["tasks[1].data.eval_size=2", "tasks[1].accuracy=length", "--max-tokens", "3", "--json", "--trust-run"]
    done = lowmem_rlhf("eval", run.path, *fewer)
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["counts"] == {"problem": 6}
    assert found["results"]["policy"]["completion/mean_length"]["value"] <= 3
    assert lowmem_rlhf("eval", run.path, "tasks[1].weight=2").code == 2
    answers = []
    for options in ([], ["--task", "sums"], ["--task", "colors"]):
        done = lowmem_rlhf("chat", run.path, "--prompt", "1+1", "--json", *options)
        assert done.code == 0, done.err
        answers.append(json.loads(done.out))
    assert answers[0] == answers[1] and answers[2]["tokens"]["policy"] <= 5 < answers[0]["tokens"]["policy"]
    done = lowmem_rlhf("chat", run.path, "--prompt", "a", "--task", "colour")
    assert done.code == 2 and "task 'colour': the tasks of this run are sums, colors; did you mean" in done.err


def test_data_and_plan_know_the_tasks(tasks_model, files, tmp_path, lowmem_rlhf):
    path = tmp_path / "two.yaml"
    path.write_text(validate_recipe(values(tasks_model, files)).to_yaml())
    done = lowmem_rlhf("data", path, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["tasks"]["colors"]["train"]["rows"] == 54 and found["step"]["completions"] == 16
    assert "colors eval:" in lowmem_rlhf("data", path).out
    done = lowmem_rlhf("data", path, "tasks[1].rewards=[gsm8k_answer]", "tasks[1].accuracy=gsm8k_answer")
    assert done.code == 2 and "task colors: rewards: gsm8k_answer needs a column 'answer'" in done.err
    assert lowmem_rlhf("plan", path, "--json").code == 0


def test_sft_learns_from_several_data_sets(tasks_model, files, tmp_path, lowmem_rlhf):
    own = values(tasks_model, files, algorithm="sft", sft={"max_length": 32}, rewards=[])
    own["tasks"][1]["rewards"] = []
    own["tasks"][1]["data"] |= {"completion": "color", "chat": False}
    own["tasks"][1].pop("generation")
    run = train(validate_recipe(own), tmp_path / "run")
    assert [row["tokens/learned"] > 0 for row in run.metrics()] == [True] * 3
    after = run.evaluation()["after"]
    assert (after["problems"], *(own["problems"] for own in after["tasks"].values())) == (10, 4, 6)
    assert (
        min(own["loss"] for own in after["tasks"].values())
        < after["loss"]
        < max(own["loss"] for own in after["tasks"].values())
    )
    done = lowmem_rlhf("eval", run.path, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)["tasks"]
    for task, own in after["tasks"].items():
        assert found[task]["results"]["policy"]["loss"]["value"] == pytest.approx(own["loss"], rel=1e-5)


def test_a_task_that_holds_nothing_out_is_left_out_of_an_evaluation(tasks_model, files, tmp_path, lowmem_rlhf):
    own = values(tasks_model, files)
    own["tasks"][1]["data"]["eval_size"], own["training"]["max_steps"] = 0, 1
    run = train(validate_recipe(own), tmp_path / "run")
    assert set(run.evaluation()["after"]["tasks"]) == {"sums"}
    done = lowmem_rlhf("eval", run.path, "--json", "--trust-run")
    assert done.code == 0 and "task colors: nothing is held out of it" in done.err, done.err
    assert json.loads(done.out)["counts"] == {"problem": 4}
    done = lowmem_rlhf("eval", tasks_model, "--recipe", run.path / "recipe.yaml", "--json", "hardware.check=auto")
    assert done.code == 0 and "task colors: nothing is held out of it" in done.err, done.err
    assert json.loads(done.out)["counts"] == {"problem": 4}


def test_a_resume_may_change_what_is_done_about_a_fault_in_a_task(tasks_model, files, tmp_path):
    own = values(tasks_model, files)
    own["training"] = {**own["training"], "max_steps": 1, "save_steps": 1}
    train(validate_recipe(own), tmp_path / "run")
    own["training"]["max_steps"] = 2
    own["tasks"][1]["rewards"][0]["timeout"] = 7.0
    assert len(train(validate_recipe(own), tmp_path / "run", resume=True).metrics()) == 2


def test_scores_of_parts_are_put_together():
    first = Scores({"a": [1.0, None]}, [1.0, float("nan")], {"m": 2.0}, {"x": [5, 6]}, {"a": (1, 0)}, [2.0, 3.0])
    second = Scores({"a": [4.0], "b": [0.5]}, [4.5], {"m": 5.0}, {}, {"a": (0, 2)})
    both = joined([([0, 2], first), ([1], second)])
    assert both.by_name == {"a": [1.0, 4.0, None], "b": [None, 0.5, None]} and both.metrics == {"m": 3.0}
    assert both.total[:2] == [1.0, 4.5] and both.total[2] != both.total[2] and both.raw_total == [2.0, 4.5, 3.0]
    assert both.extra == {"x": [5, None, 6]} and both.failures == {"a": (1, 2)}
    assert both.of_rows([1]) == Scores({"a": [4.0], "b": [0.5]}, [4.5], raw=[4.5])


def test_each_task_s_rewards_are_standardised_if_asked(tasks_model, files, tmp_path):
    """Metrics have what the functions gave, advantages what is left of their scale: nothing."""
    own = values(tasks_model, files, mixing={"normalize": True})
    own["grpo"], own["training"] = {"scale_rewards": "none"}, {**own["training"], "max_steps": 1, "log_completions": 4}
    own["tasks"][1]["rewards"][1]["weight"] = 1000.0
    run = train(validate_recipe(own), tmp_path / "run")
    (metrics,) = run.metrics()
    assert abs(metrics["task/colors/reward/mean"]) > 10 * abs(metrics["task/sums/reward/mean"])
    largest = {row["task"]: abs(row["advantage"]) for row in run.samples()}
    assert set(largest) == {"sums", "colors"} and max(largest.values()) < 4


def test_a_recipe_object_with_tasks_can_be_changed_in_python(tasks_model, files):
    recipe = validate_recipe(values(tasks_model, files))
    request = request_of(recipe, overrides=["tasks[0].data.eval_size=2"])
    assert [own.data.eval_size for own in request.recipe.by_task.values()] == [2, 6]
    rows, given = [{"question": f"{n}", "answer": "1"} for n in range(9)], values(tasks_model, files)
    given.pop("rewards")
    given["tasks"][0] |= {"data": {"train": rows}, "rewards": [(lambda completions, **_: [0.5], 2.0)]}
    with pytest.raises(UserError, match="a function without a name of its own was given"):
        request_of(given)

    def half(completions, **columns):
        return [0.5 for _ in completions]

    given["tasks"][0]["rewards"] = [(half, 2.0)]
    request = request_of(given)
    own = request.recipe.by_task["sums"]
    assert (own.data.train, own.rewards[0].function, own.rewards[0].weight) == ("python:sums_train", "python:half", 2.0)
    assert request.objects["python:half"] is half and len(request.objects["python:sums_train"]) == 9
    with pytest.raises(UserError, match="every task has its own"):
        request_of(recipe, data=[{"question": "1", "answer": "1"}])
