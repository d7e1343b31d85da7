"""One room imports what a recipe names as path.py:NAME, for rewards, losses and algorithms."""

import os

import pytest

from lowmem_rlhf.algorithms.grpo.losses import load_loss
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.recipe.sections import RewardConfig
from lowmem_rlhf.rewards.loading import load_rewards
from lowmem_rlhf.user_code import import_file, load_function

WORDS = ("rewards", "a reward function", "(prompts, completions, **columns)")
BOTH = """\
from beside import SCALE

def reward(completions, **columns):
    return [SCALE] * len(completions)

def loss(inputs):
    return SCALE * inputs.logps / inputs.tokens
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "beside.py").write_text("SCALE = 2.0\n")
    path = tmp_path / "both.py"
    path.write_text(BOTH)
    return path


def test_a_file_of_a_reward_and_a_loss_is_imported_once(file):
    file.write_text(BOTH + "\nimported = open('imported.txt', 'a').write('once ')\n")
    (reward,) = load_rewards([RewardConfig(function="both.py:reward")])
    loss = load_loss("both.py:loss")
    assert reward.function.__globals__ is loss.function.__wrapped__.__globals__
    assert (file.parent / "imported.txt").read_text() == "once "


def test_a_file_that_changed_is_imported_again(file):
    before = load_function("both.py:reward", *WORDS)
    assert load_function("both.py:reward", *WORDS) is before
    file.write_text(BOTH.replace("[SCALE]", "[1.0]"))
    after = load_function("both.py:reward", *WORDS)
    assert (before([""]), after([""])) == ([2.0], [1.0])


def test_a_file_that_failed_is_tried_again_at_the_same_time_stamp(file):
    file.write_text("import beside\n1 / 0\n")
    for _ in range(2):
        with pytest.raises(UserError, match=r"^algorithm: both\.py, line 2, cannot be imported: ZeroDivisionError: "):
            import_file(file, "both.py", "algorithm")
    times = file.stat()
    file.write_text("x = 1  # longer!\n\n\n")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert import_file(file, "both.py", "algorithm").x == 1
