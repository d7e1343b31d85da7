"""Whole runs with reward functions that do what they should not: the run is the one that it would have been."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from tiny_runs import learned, tiny_recipe

import lowmem_rlhf as lm
from lowmem_rlhf.errors import RunError
from lowmem_rlhf.report import html
from lowmem_rlhf.session.train import train

REWARDS = '''
import os, random, signal, sys, warnings

import numpy, torch

calls = []


def clean(completions, completion_ids, **columns):
    return [len(ids) / 12 for ids in completion_ids]


def vandal(prompts, completions, completion_ids, prompt_ids, trainer_state, **columns):
    """Ends as `clean` does, having changed all that it can reach."""
    values = [len(ids) / 12 for ids in completion_ids]
    random.seed(0), numpy.random.seed(0), torch.manual_seed(0)
    os.chdir("/"), os.environ.pop("HOME", None), sys.path.clear(), warnings.simplefilter("error")
    torch.set_grad_enabled(False), torch.set_default_dtype(torch.float64), torch.set_default_device("meta")
    torch.set_num_threads(2), torch.use_deterministic_algorithms(True), torch.set_autocast_enabled("cpu", True)
    signal.signal(signal.SIGINT, signal.SIG_IGN), numpy.seterr(all="raise"), sys.setrecursionlimit(200)
    for ids in (*completion_ids, *prompt_ids):
        ids[:] = [5]
    object.__setattr__(trainer_state, "global_step", 99)
    for given in (prompts, completions, completion_ids, prompt_ids, *columns.values()):
        if isinstance(given, list):
            given.clear()
    print("printed by a reward")
    sys.stdout.close()
    sys.stdout = None
    return values


def odd_calls_fail(completions, **columns):
    calls.append(1)
    if len(calls) % 2:
        raise SystemExit("not now")
    return [float("nan"), *[0.25 for _ in completions[1:]]]


def always_fails(completions, log_metric, **columns):
    log_metric("step", 7)
    log_metric("own", 3)
    raise KeyboardInterrupt
'''


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr(html, "write_report", lambda run: None)


@pytest.fixture
def rewards(tmp_path) -> Path:
    file = tmp_path / "rewards.py"
    file.write_text(REWARDS, encoding="utf-8")
    return file


def same(one, other):
    assert one["metrics"] == other["metrics"] and one["samples"] == other["samples"]
    assert one["evaluation"] == other["evaluation"]
    assert all(torch.equal(weight, other["adapter"][name]) for name, weight in one["adapter"].items())


def test_a_run_with_a_vandal_is_the_run_without(tiny_model, tmp_path, rewards, lowmem_rlhf, capsys):
    runs = {}
    for name in ("clean", "vandal"):
        recipe = tiny_recipe(tiny_model, rewards=[{"function": f"{rewards}:{name}", "name": "r"}])
        runs[name] = train(recipe, tmp_path / name)
    same(*map(learned, runs.values()))
    capsys.readouterr()

    outcomes = []
    for name, run in runs.items():
        done = lowmem_rlhf("eval", run.path, "--json")
        assert done.code == 0, done.err
        outcomes.append(json.loads(done.out)["results"])  # what a reward prints is not a part of it
        assert ("printed by a reward" in done.err) == (name == "vandal")
    assert outcomes[0] == outcomes[1]


def test_a_vandal_of_a_program_changes_nothing_either(tiny_model, tmp_path, rewards):
    space: dict = {}
    exec(REWARDS, space)
    runs = [
        lm.train(
            tiny_recipe(tiny_model, training={"max_steps": 2}).model_dump(exclude={"rewards", "evaluation"}),
            rewards=[{"function": space[name], "name": "r"}],
            output=tmp_path / name,
            progress=None,
        )
        for name in ("clean", "vandal")
    ]
    assert [row["reward/mean"] for row in runs[0].metrics()] == [row["reward/mean"] for row in runs[1].metrics()]
    assert [row["loss"] for row in runs[0].metrics()] == [row["loss"] for row in runs[1].metrics()]


@pytest.mark.parametrize(("policy", "instead"), [("skip", None), ("zero", 0.0)])
def test_a_reward_that_fails_now_and_then_is_counted(tiny_model, tmp_path, rewards, policy, instead):
    """Evaluation before training is the first call, so that step 1 has the second."""
    functions = [
        {"function": f"{rewards}:clean"},
        {"function": f"{rewards}:odd_calls_fail", "on_error": policy},
    ]
    run = train(tiny_recipe(tiny_model, rewards=functions), tmp_path / "run")
    rows = run.metrics()
    counts = [(row["reward/odd_calls_fail/errors"], row["reward/odd_calls_fail/timeouts"]) for row in rows]
    assert counts == [(1, 0), (16, 0), (1, 0)]
    assert rows[1]["reward/odd_calls_fail"] == instead
    assert not [key for row in rows for key in row if key.startswith("reward/clean/")]
    assert run.samples()[0]["rewards"]["odd_calls_fail"] == instead
    assert run.samples()[1]["rewards"]["odd_calls_fail"] == 0.25


def test_a_reward_that_always_fails_is_the_cause_that_is_named(tiny_model, tmp_path, rewards):
    recipe = tiny_recipe(tiny_model, rewards=[{"function": f"{rewards}:always_fails", "on_error": "skip"}])
    with pytest.raises(RunError) as caught:
        train(recipe, tmp_path / "run")
    assert re.match(
        r"nothing was learned: reward always_fails failed in each of its 4 calls, so .*: reward function always_fails "
        r"failed in .*rewards\.py, line \d+: KeyboardInterrupt: no message; .*mend the function",
        str(caught.value),
    )
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["own"], row["reward/mean"]) for row in rows] == [(n, 3.0, None) for n in (1, 2, 3)]


def test_a_reward_that_always_fails_beside_one_that_does_not_is_told(tiny_model, tmp_path, rewards, lowmem_rlhf):
    functions = [{"function": f"{rewards}:clean"}, {"function": f"{rewards}:always_fails", "on_error": "zero"}]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(tiny_recipe(tiny_model, rewards=functions).to_yaml())
    done = lowmem_rlhf("train", recipe, "--output", tmp_path / "run")
    assert done.code == 0, done.err
    assert done.out.count("reward always_fails failed in each of its 4 calls") == 1
    assert done.out.count("this is said once") == 1


def test_a_resume_may_change_what_is_done_about_faults(tiny_model, tmp_path, rewards):
    plain = {"function": f"{rewards}:clean"}
    recipe = tiny_recipe(tiny_model, rewards=[plain], training={"max_steps": 2})
    train(recipe, tmp_path / "run")
    saved = tmp_path / "run" / "recipe.yaml"
    values = yaml.safe_load(saved.read_text())
    for key in ("timeout", "on_error"):  # as in runs that were made before there were these keys
        del values["rewards"][0][key]
    saved.write_text(yaml.safe_dump(values))
    (tmp_path / "run" / "hashes.json").unlink()
    longer = tiny_recipe(tiny_model, rewards=[{**plain, "timeout": 5, "on_error": "skip"}], training={"max_steps": 3})
    run = train(longer, tmp_path / "run", resume=True)
    assert [row["step"] for row in run.metrics()] == [1, 2, 3] and run.metrics()[2]["reward/clean/errors"] == 0
