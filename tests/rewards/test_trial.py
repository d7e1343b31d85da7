"""The list of rewards, and a reward tried on texts: from Python and as `rewards` and `rewards try`."""

import json
import math

import pytest

from lowmem_rlhf.errors import RunError, UserError
from lowmem_rlhf.recipe.sections import REWARD_OPTIONS
from lowmem_rlhf.rewards.catalogue import described_rewards
from lowmem_rlhf.rewards.shipped import SHIPPED
from lowmem_rlhf.rewards.trial import try_reward


def values(name, texts, *options, **keys):
    return try_reward(name, texts, options, **keys).values


def test_the_list_has_every_reward_with_its_options():
    known = described_rewards()
    assert list(known) == [*SHIPPED, *REWARD_OPTIONS]
    assert {one.kind for name, one in known.items() if name in SHIPPED} == {"function"}
    assert all(one.description and "\n" not in one.description for one in known.values())
    length = known["length"].options
    assert length["target"].required and length["target"].type == "a number"
    assert length["unit"].default == "tokens" and not length["unit"].required
    assert known["contains"].options["words"].type == "a list of texts or null"
    assert known["classifier"].options["model"].required and known["similarity"].options["column"].default == "answer"
    assert known["gsm8k_answer"].columns == ["answer"] and known["exact_match"].columns == []
    json.dumps({name: one.to_dict() for name, one in known.items()})


def test_values_of_options_are_read_as_their_types_ask():
    assert values("regex", ["12", "[0-9]"], "pattern=[0-9]", "full=true") == [0.0, 0.0]
    assert values("regex", ["1", "x"], "pattern=1") == [1.0, 0.0]
    assert values("contains", ["a=b", "c"], "words=a=b,d") == [1.0, 0.0]
    assert values("contains", ["7", "c"], 'words=[7, "a,b"]') == [1.0, 0.0]
    assert values("length", ["abcd", "ab"], "target=4", "unit=characters") == [1.0, 0.5]
    assert values("tags", ["<a></a>", "<b></b>"], "tags=a") == [1.0, 0.0]
    pytest.importorskip("jsonschema")
    assert values("json_valid", ["1", '"a"'], "schema={type: integer}") == [1.0, 0.0]


def test_columns_are_for_all_texts_or_one_each():
    assert values("exact_match", ["1", "2"], columns=["answer=1"]) == [1.0, 0.0]
    assert values("exact_match", ["1", "2"], columns=["answer=1", "answer=2"]) == [1.0, 1.0]
    assert values("exact_match", ["1", "2"], columns=["answer=[1, 2]"]) == [1.0, 1.0]
    assert values("arithmetic_answer", ["4", "5"], columns=["answer=2+2", "answer=5"]) == [None, 1.0]
    assert values("trl.rewards:accuracy_reward", [r"\boxed{5}"], columns=["solution=$5$"]) == [1.0]


def test_tokens_are_counted_by_a_tokenizer(tmp_path):
    from tiny_runs import save_tiny_model

    model = str(save_tiny_model(tmp_path / "tiny"))
    options = ["max_completion_len=4", "soft_punish_cache=2"]
    assert values("soft_overlong", ["12", "123", "1234", "12345"], *options, tokenizer=model) == [0.0, -0.5, -1.0, -1.0]
    assert values("repetition", ["aaaa"], "ngram_size=1", tokenizer=model) == [-0.75]
    with pytest.raises(UserError, match="soft_overlong counts tokens, which needs a tokenizer; give --tokenizer MODEL"):
        values("soft_overlong", ["a"], *options)


def test_a_users_function(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "def short(completions, answer, most=2, log_metric=None):\n"
        "    log_metric('seen', len(completions))\n"
        "    return [float(len(c[0]['content']) <= most) for c in completions]\n"
    )
    trial = try_reward(f"{file}:short", ["ab", "abc"], ["most=3"], ["answer=x"], chat=True)
    assert trial.to_dict() == {
        "reward": "short",
        "scored": [{"text": "ab", "value": 1.0}, {"text": "abc", "value": 1.0}],
        "metrics": {"seen": 2.0},
    }
    with pytest.raises(UserError, match="short reads a column 'answer'; give --column answer=VALUE"):
        try_reward(f"{file}:short", ["ab"])
    with pytest.raises(RunError, match=r"short failed in .*mine.py, line 3: TypeError"):
        try_reward(f"{file}:short", ["ab"], columns=["answer=x"])


def test_a_learned_reward_is_tried_with_its_own_model(tmp_path):
    from tiny_classifiers import save_classifier

    model = save_classifier(tmp_path / "bert")
    (value,) = values("classifier", ["a"], f"model={model}", "label=1")
    assert value is not None and 0 < value < 1 and math.isfinite(value)


def test_the_command_lists_and_tries(lowmem_rlhf):
    listed, plain = lowmem_rlhf("rewards", "--json"), lowmem_rlhf("rewards")
    assert set(json.loads(listed.out)) == {*SHIPPED, *REWARD_OPTIONS}
    assert all(name in plain.out for name in SHIPPED) and listed.code == plain.code == 0
    arguments = ["rewards", "try", "json_valid", "--text", "-", "--text", "no"]
    assert json.loads(lowmem_rlhf(*arguments, "--json", lines='{"a":\n1}\n').out) == {
        "reward": "json_valid",
        "scored": [{"text": '{"a":\n1}\n', "value": 1.0}, {"text": "no", "value": 0.0}],
        "metrics": {},
    }
    assert lowmem_rlhf(*arguments, lines='{"a":\n1}\n').out == '       1  {"a": 1}\n       0  no\n'
    refused = lowmem_rlhf("rewards", "--json", "try", "json_valid", "--text", "1")
    assert refused.code == 2 and "rewards try ... --json" in refused.err
