"""The shipped rewards of texts and tokens: their values, also beside TRL's, and what they refuse."""

import random
import time

import pytest

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.recipe.sections import RewardConfig
from lowmem_rlhf.rewards import check_reward_columns, load_rewards, score
from lowmem_rlhf.rewards.shipped import FACTORIES


def load(function, **options):
    return load_rewards([RewardConfig(function=function, options=options)])[0]


def chat(text):
    return [{"role": "assistant", "content": text}]


def scored(function, texts, columns=None, ids=None, prompts=None, prompt_texts=None, **options):
    """Return a reward's values as a run gets them: of chat completions, which must be those of plain ones."""
    count, reward = len(texts), [load(function, **options)]
    ids, prompts, prompt_texts = ids or [[1]] * count, prompts or ["p"] * count, prompt_texts or ["p"] * count
    plain, of_chat = (
        score(reward, prompts, completions, ids, columns or {}, prompt_texts=prompt_texts).total
        for completions in (texts, [chat(text) for text in texts])
    )
    assert plain == of_chat
    return plain


def refused(message, function, **options):
    with pytest.raises(UserError, match=message) as caught:
        load(function, **options)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("rewards: ")


def test_exact_match():
    texts = ["Paris", " Paris\n", "paris", "New  York", ""]
    assert scored("exact_match", texts, {"answer": ["Paris"] * 5}) == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert scored("exact_match", texts, {"answer": ["Paris"] * 5}, strip=False) == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert scored("exact_match", texts[:3], {"city": ["PARIS"] * 3}, column="city", ignore_case=True) == [1.0] * 3
    assert scored("exact_match", texts[3:4], {"answer": ["New York"]}, whitespace="collapse") == [1.0]
    assert scored("exact_match", ["Rome", "7", "7"], {"answer": [["Paris", "Rome"], 7, 7.0]}) == [1.0, 1.0, 0.0]


def test_a_row_without_a_reference_has_no_value():
    for function, options in (("exact_match", {}), ("contains", {"column": "answer"})):
        reward = load(function, **options)
        assert reward.function(["a", "a"], answer=[None, []]) == [None, None]


def test_contains():
    texts = ["a cat and a dog", "concatenate", "DOG", ""]
    assert scored("contains", texts, words=["cat", "dog"]) == [1.0, 1.0, 0.0, 0.0]
    assert scored("contains", texts, words=["cat", "dog"], match="all") == [1.0, 0.0, 0.0, 0.0]
    assert scored("contains", texts, words=["dog"], ignore_case=True) == [1.0, 0.0, 1.0, 0.0]
    rows = {"words": [["dog", "cow"], "cat", "dog", "x"]}
    assert scored("contains", texts, rows, column="words") == [1.0, 1.0, 0.0, 0.0]


def test_keywords():
    texts = ["Cat cat dog", "concatenate", "a cat.", "cats, dog!"]
    assert scored("keywords", texts, words=["cat", "dog"]) == [1.0, 0.0, 0.5, 0.5]
    assert scored("keywords", texts, words=["cat", "dog"], count="all", cap=4) == [0.75, 0.0, 0.25, 0.25]
    assert scored("keywords", texts, words=["cat", "dog"], ignore_case=False, cap=1) == [1.0, 0.0, 1.0, 1.0]
    assert scored("keywords", ["C++ is (not) C"], words=["c++", "(not)", "C", "c"]) == [1.0]


def test_regex():
    texts = ["so 12 it is", "12", "x", "1\n2"]
    assert scored("regex", texts, pattern=r"\d+") == [1.0, 1.0, 0.0, 1.0]
    assert scored("regex", texts, pattern=r"\d+", full=True) == [0.0, 1.0, 0.0, 0.0]
    assert scored("regex", texts, pattern=r"(?s)\d.2", full=True) == [0.0, 0.0, 0.0, 1.0]
    assert scored("regex", texts, pattern="IT", ignore_case=True) == [1.0, 0.0, 0.0, 0.0]


def test_a_pattern_that_would_be_tried_for_ever_ends():
    """2^40 ways; Python's re would hold the lock that a time limit needs."""
    start = time.monotonic()
    assert scored("regex", ["aaa", "a" * 40 + "b"], pattern="(a|a)+$") == [1.0, 0.0]
    assert time.monotonic() - start < 10


def test_the_time_limit_of_a_reward_ends_a_slow_pattern():
    config = RewardConfig(function="regex", options={"pattern": "(a|a)+$"}, timeout=0.3, on_error="skip")
    slow = ["a" * 40 + "b"] * 8
    start = time.monotonic()
    scores = score(load_rewards([config]), ["p"] * 8, slow, [[1]] * 8, {})
    assert scores.failures == {"regex": (0, 8)} and time.monotonic() - start < 6  # all of them take 8 seconds


def test_json_valid():
    texts = ['{"a": 1}', " [1, 2]\n", 'Here:\n```json\n{"a": [true, null]}\n```\nDone.', "{'a': 1}", "", "NaN"]
    texts += ["```\n{}\n```\nor\n```json\n{]\n```", "[" * 100_000, "9" * 10_000, '{"a": Infinity}', "so {}"]
    assert scored("json_valid", texts) == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]


def test_json_valid_by_a_schema():
    pytest.importorskip("jsonschema")
    schema = {
        "type": "object",
        "properties": {"age": {"$ref": "#/$defs/age"}},
        "required": ["age"],
        "$defs": {"age": {"type": "integer", "minimum": 0}},
    }
    texts = ['{"age": 3}', '{"age": -3}', '{"age": "3"}', "{}", "[]", '```\n{"age": 0}\n```', "age"]
    assert scored("json_valid", texts, schema=schema) == [1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    refused("option schema: is no JSON Schema .*'objekt' is not valid", "json_valid", schema={"type": "objekt"})
    refused("option schema: refers to 'http://a/b'", "json_valid", schema={"not": [{}, {"$ref": "http://a/b"}][1]})
    refused("option schema: cannot be followed .*mend its", "json_valid", schema={"$ref": "#/$defs/none"})


def test_json_schema_needs_its_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "jsonschema", None)
    refused("needs the package jsonschema, .*pip install jsonschema", "json_valid", schema={})
    assert scored("json_valid", ["{}"]) == [1.0]


def test_tags():
    texts = ["<think>a</think> <answer>b</answer>", "<answer>b</answer><think>a</think>", "<think>a</think>b"]
    texts += ["<think>a<think></think><answer>b</answer>", "x<think>\n</think>y<answer></answer>z"]
    texts += ["<think>a<answer>b</answer></think>"]
    assert scored("tags", texts) == [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    assert scored("tags", texts[2:3], tags=["think"]) == [1.0]


def test_tags_that_the_prompt_opens():
    text = "a</think><answer>b</answer>"
    assert scored("tags", [text], prompt_texts=["<|assistant|><think>\n"]) == [1.0]
    assert scored("tags", [text], prompts=[[{"role": "assistant", "content": "<think>so: "}]]) == [1.0]
    assert scored("tags", [text]) == [0.0]


def drawn_ids():
    draw = random.Random(0)
    return [[draw.randrange(6) for _ in range(draw.randrange(40))] for _ in range(300)]


@pytest.mark.parametrize(("longest", "cache"), [(20, 8), (20, 0), (20, 20), (1, 1)])
def test_soft_overlong_is_trls(longest, cache):
    from trl.rewards import get_soft_overlong_punishment

    ids, options = drawn_ids(), {"max_completion_len": longest, "soft_punish_cache": cache}
    values = scored("soft_overlong", [""] * 300, ids=ids, **options)
    assert values == get_soft_overlong_punishment(**options)(ids) and {-1.0, 0.0} <= set(values)


@pytest.mark.parametrize(("size", "penalty"), [(3, -1.0), (1, -0.5), (2, 0.0)])
def test_repetition_is_trls(size, penalty):
    from trl.rewards import get_repetition_penalty_reward

    ids, options = drawn_ids(), {"ngram_size": size, "max_penalty": penalty}
    values = scored("repetition", [""] * 300, ids=ids, **options)
    assert values == get_repetition_penalty_reward(**options)(ids)


def test_repetition_of_words():
    texts = ["a b A b a b", "a b c", "a", ""]
    assert scored("repetition", texts, ngram_size=2, unit="words") == [-0.6, 0.0, 0.0, 0.0]


def test_trls_rewards_by_name():
    from trl import rewards

    ids = [[1, 1, 1, 1, 1], [1, 2, 3]]
    texts = [r"<think>so</think> \boxed{18}", r"\boxed{19}"]
    solution = {"solution": ["$18$", "$18$"]}
    assert scored("trl.rewards:accuracy_reward", texts, solution) == [1.0, 0.0]
    assert scored("trl.rewards:reasoning_accuracy_reward", texts, solution) == [1.0, 0.0]
    other = scored("trl.rewards:reasoning_accuracy_reward", texts, solution, reasoning_delimiters=["."])
    assert other == [0.0, 0.0]
    assert scored("trl.rewards:think_format_reward", texts) == [1.0, 0.0]
    values = scored("trl.rewards:get_repetition_penalty_reward", texts, ids=ids, ngram_size=2)
    assert values == rewards.get_repetition_penalty_reward(ngram_size=2)(ids) == [-0.75, 0.0]
    values = scored("trl.rewards:get_cosine_scaled_reward", texts, solution, ids=ids, max_len=10)
    assert values == rewards.get_cosine_scaled_reward(10)([chat(t) for t in texts], ["$18$"] * 2, ids)
    assert load("trl.rewards:accuracy_reward").name == "accuracy_reward"
    with pytest.raises(UserError, match="accuracy_reward needs a column 'solution'"):
        check_reward_columns([load("trl.rewards:accuracy_reward")], ["answer"])


def test_columns_and_options_of_one_name_do_not_meet():
    columns = {"pattern": ["x"], "strip": [True], "column": ["c"], "words": ["w"], "tags": [["t"]], "unit": ["u"]}
    assert scored("regex", ["12"], columns, pattern="12") == [1.0]
    assert scored("exact_match", ["True"], columns, column="strip") == [0.0]
    assert scored("exact_match", ["true"], columns, column="strip") == [1.0]
    assert scored("tags", ["<think></think><answer></answer>"], columns) == [1.0]
    with pytest.raises(UserError, match="exact_match needs a column 'city', which the data lacks"):
        check_reward_columns([load("exact_match", column="city")], ["answer"])


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        ("regex", {"pattern": "(a"}, r"regex: option pattern: got '\(a', which is no regular expression \(missing \)"),
        ("regex", {}, "regex needs the option 'pattern'"),
        ("regex", {"pattern": 5}, "option pattern: got 5; give a text"),
        ("regex", {"pattern": "a", "ful": True}, r"no option 'ful'; did you mean 'full'\? \(its options: pattern, "),
        ("exact_match", {"ignore_case": "yes"}, "option ignore_case: got 'yes'; give true or false"),
        ("exact_match", {"whitespace": "drop"}, "option whitespace: got 'drop'; give 'keep' or 'collapse'"),
        ("exact_match", {"column": ""}, "option column: got ''; name a column"),
        ("contains", {}, "option words: got None, with column None; give one of the two"),
        ("contains", {"words": "cat"}, "option words: got 'cat'; give a list of texts or null"),
        ("contains", {"words": []}, "option words: got .*give a list of one or more texts"),
        ("keywords", {"words": ["a", " "]}, "option words: got .*none of them empty"),
        ("keywords", {"words": ["a"], "cap": 0}, "option cap: got 0; give a whole number of at least 1"),
        ("keywords", {"words": ["a"], "cap": True}, "option cap: got True; give a whole number or null"),
        ("json_valid", {"schema": "x"}, "option schema: got 'x'; give keys with values or null"),
        ("tags", {"tags": ["<think>"]}, "option tags: got '<think>'; give a name such as 'think'"),
        ("tags", {"tags": ["a", "a"]}, "option tags: got .*each once"),
        ("soft_overlong", {"max_completion_len": 0, "soft_punish_cache": 0}, "option max_completion_len: got 0"),
        ("soft_overlong", {"max_completion_len": 5, "soft_punish_cache": 6}, "option soft_punish_cache: got 6"),
        ("soft_overlong", {"max_completion_len": 5.5, "soft_punish_cache": 1}, "got 5.5; give a whole number"),
        ("repetition", {"ngram_size": 0}, "option ngram_size: got 0"),
        ("repetition", {"max_penalty": 1}, "option max_penalty: got 1; give a number of at most 0"),
        ("length", {"target": "ten"}, "option target: got 'ten'; give a number"),
        ("trl.rewards:acuracy_reward", {}, r"the installed TRL has accuracy_reward, .* did you mean 'accuracy_reward'"),
        ("trl.rewards:accuracy_reward", {"solution": "5"}, "no option 'solution' .its options: none"),
        ("trl.rewards:get_cosine_scaled_reward", {}, "needs the option 'max_len'"),
        ("trl.rewards:get_cosine_scaled_reward", {"max_len": "a"}, "option max_len: got 'a'; give a whole number"),
        ("trl.rewards:get_repetition_penalty_reward", {"max_penalty": 1.0}, "option max_penalty 1.0 should not be"),
    ],
)
def test_refused_options(function, options, message):
    refused(message, function, **options)


def test_every_factory_says_what_it_is_in_one_line():
    for name, factory in FACTORIES.items():
        assert factory.__doc__ and factory.__doc__.split("\n\n")[0].count("\n") <= 1, name


def test_odd_texts_never_raise():
    draw = random.Random(0)
    pieces = ["```", "```json\n", "{", "}", "[", '"', "<think>", "</think>", "<answer>", "\n", "\x00", "\ud800", "é"]
    odd = ["".join(draw.choices(pieces, k=draw.randrange(30))) for _ in range(2000)]
    options = {"keywords": {"words": ["é", "["]}, "regex": {"pattern": r"\{.*\}"}, "contains": {"words": ['"']}}
    for name in ("keywords", "regex", "contains", "json_valid", "tags"):
        assert set(scored(name, odd, **options.get(name, {}))) <= {0.0, 0.5, 1.0}, name
