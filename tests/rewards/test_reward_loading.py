import sys
from pathlib import Path

import pytest

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.recipe.loading import load_recipe, shipped_recipes
from lowmem_rlhf.recipe.sections import REWARD_OPTIONS, RewardConfig
from lowmem_rlhf.rewards import check_reward_columns, load_rewards
from lowmem_rlhf.rewards.functions import gsm8k_answer
from lowmem_rlhf.rewards.shipped import SHIPPED

USERS_FILE = """
import re
from neighbour import BONUS

NUMBER = 3

class CompletionEvaluator:
    pass

def with_answer(prompts, completions, answer, bonus=0.0, **kwargs):
    return [bonus + BONUS for _ in completions]

def strict(completions):
    return [1.0 for _ in completions]

def plain(texts, **kwargs):
    return [1.0 for _ in texts]
"""


@pytest.fixture
def users_file(tmp_path):
    (tmp_path / "neighbour.py").write_text("BONUS = 0.5\n", encoding="utf-8")
    path = tmp_path / "my_rewards.py"
    path.write_text(USERS_FILE, encoding="utf-8")
    return path


def load(function, **options):
    return load_rewards([RewardConfig(function=str(function), options=options)])[0]


def refused(message, function, **options):
    with pytest.raises(UserError, match=message) as caught:
        load(function, **options)
    assert "\n" not in str(caught.value)


def test_shipped_names():
    rewards = load_rewards([RewardConfig(function="gsm8k_answer", weight=2.0), RewardConfig(function="think_format")])
    assert [(one.name, one.weight) for one in rewards] == [("gsm8k_answer", 2.0), ("think_format", 1.0)]
    assert rewards[0].function is gsm8k_answer


def test_the_rewards_of_every_shipped_recipe_load():
    """But those that are another run's model, or come from the Hub."""
    loaded = 0
    for name in shipped_recipes():
        here = [reward for reward in load_recipe(name).rewards if reward.function not in REWARD_OPTIONS]
        loaded += len(load_rewards(here))
    assert loaded > 4


def test_a_users_function(users_file):
    reward = load(f"{users_file}:with_answer", bonus=1.0)
    assert reward.name == "with_answer"
    assert reward.function(prompts=["p"], completions=["c"], answer=["a"], **reward.options) == [1.5]


def test_refused_names():
    names = ", ".join([*SHIPPED, "classifier", "similarity", "reward_adapter"])
    refused(rf"got 'gsm8k_anwser'; give path.py:function or one of {names}; did you mean", "gsm8k_anwser")
    refused(r"got 'clasifier'; .*; did you mean 'classifier'\?", "clasifier")
    refused("'rewards.py'; a function of your own is written path.py:function", "rewards.py")
    refused("written path.py:function", "rewards:mine")
    refused("written path.py:function", "rewards.py:")
    refused("there is no file no_such.py", "no_such.py:mine")


def test_refused_functions(users_file):
    refused(r"defines no 'with_anwser'; did you mean 'with_answer'\? \(it has: .*strict", f"{users_file}:with_anwser")
    refused("is an int, not a reward function", f"{users_file}:NUMBER")
    refused("is a class, not a reward function", f"{users_file}:CompletionEvaluator")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def f(:\n", "cannot be imported: SyntaxError: .*line 1"),
        ("import no_such_module\n", "cannot be imported: ModuleNotFoundError: No module named 'no_such_module'"),
        ("raise ValueError('two\\nlines')\n", "cannot be imported: ValueError: two lines"),
        ("raise SystemExit\n", "cannot be imported: SystemExit: no message"),
    ],
)
def test_a_file_that_fails(tmp_path, code, message):
    path = tmp_path / "broken.py"
    path.write_text(code, encoding="utf-8")
    refused(message, f"{path}:f")


def test_options(users_file):
    assert load("length", target=50, unit="characters").options == {"target": 50, "unit": "characters"}
    refused("length needs the option 'target'", "length")
    refused("option target: got 0; give a number above 0", "length", target=0)
    refused("option unit: got 'words'; give 'tokens' or 'characters'", "length", target=5, unit="words")
    refused("option prefer: got 'above'", "length", target=5, prefer="above")
    refused(
        r"length has no option 'targt'; did you mean 'target'\? \(its options: target, unit, prefer\)",
        "length",
        targt=5,
    )
    refused("gsm8k_answer has no option 'answer' .its options: none", "gsm8k_answer", answer="5")
    refused("has no option 'bonus' .its options: none", f"{users_file}:strict", bonus=1)
    refused("has no option 'completions'", f"{users_file}:with_answer", completions=1)
    refused("has no option 'texts'", f"{users_file}:plain", texts=["a"])
    assert load(f"{users_file}:with_answer", texts=1).options == {"texts": 1}
    assert load(f"{users_file}:with_answer", anything=1).options == {"anything": 1}


def test_columns_that_rewards_need(users_file):
    check_reward_columns([load("gsm8k_answer"), load("length", target=5)], ["answer"])
    check_reward_columns([load(f"{users_file}:strict"), load(f"{users_file}:plain")], [])
    with pytest.raises(UserError, match=r"gsm8k_answer needs a column 'answer', .* did you mean 'answers'\?"):
        check_reward_columns([load("gsm8k_answer")], ["answers"])
    with pytest.raises(UserError, match=r"reasoning_gym_answer needs a column 'task', .*its columns: none"):
        check_reward_columns([load("reasoning_gym_answer")], [])


def test_a_file_that_is_imported_changes_nothing_but_the_path(tmp_path, monkeypatch):
    import torch

    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "vandal.py"
    file.write_text(
        "import os, sys, torch\nos.chdir('/')\ntorch.set_default_dtype(torch.float64)\nsys.path.append('lib')\n"
        "def mine(completions, **_):\n    return [0.0 for _ in completions]\n"
    )
    load_rewards([RewardConfig(function=f"{file}:mine")])
    assert Path.cwd() == tmp_path and torch.get_default_dtype() == torch.float32 and "lib" in sys.path


def test_timeout_and_policy_are_read():
    (default,) = load_rewards([RewardConfig(function="arithmetic_answer")])
    assert (default.timeout, default.on_error) == (1800.0, "fail")
    (other,) = load_rewards([RewardConfig(function="arithmetic_answer", timeout=None, on_error="skip")])
    assert (other.timeout, other.on_error) == (None, "skip")
