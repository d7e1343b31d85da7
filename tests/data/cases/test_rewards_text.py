"""What rewards are given, what the shipped ones can read, and what a run says of rewards that teach nothing."""

import json
from dataclasses import replace

import pytest
import torch
import yaml
from tiny_models import byte_tokenizer, tiny_model

from lowmem_rlhf.data.prompts import build_examples
from lowmem_rlhf.data.values import JsonFloat, JsonInt, Row
from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.errors import RunError, UserError
from lowmem_rlhf.inference.chat.talk import ChatOptions, Prompts, Reply, Talk, TextStream
from lowmem_rlhf.recipe.loading import validate_recipe
from lowmem_rlhf.recipe.sections import DataConfig, RewardConfig
from lowmem_rlhf.rewards.functions import arithmetic_answer, gsm8k_answer, think_format
from lowmem_rlhf.rewards.loading import Reward, load_rewards
from lowmem_rlhf.rewards.references import check_references, check_run_references
from lowmem_rlhf.rewards.scoring import score
from lowmem_rlhf.rollout.rollout import Completion
from lowmem_rlhf.training.evaluate import TrainerState, reward_completions

TAGS = ["<think>", "</think>", "<answer>", "<tool>"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PREFILLED = CHATML.replace("assistant\\n' }}{% endif", "assistant\\n<think>\\n' }}{% endif")
VALUES = {"name": "t", "model": "m", "data": {"train": "-"}, "rewards": [{"function": "gsm8k_answer"}]}
STATE = TrainerState(0, 1)


def tokenizer_of(template):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", *TAGS]})
    tokenizer.chat_template = template
    return tokenizer


def save(folder, template=CHATML, weight=1.0):
    """Write a tiny model whose tags are special tokens; the larger the weight, the more often it writes them."""
    tokenizer = tokenizer_of(template)
    model = tiny_model(
        "llama", vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, max_position_embeddings=1024
    )
    with torch.no_grad():
        model.lm_head.weight[[tokenizer.convert_tokens_to_ids(tag) for tag in TAGS]] *= weight
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save(tmp_path_factory.mktemp("tags") / "model", weight=10.0)


@pytest.fixture(scope="module")
def base():
    tokenizer = tokenizer_of(CHATML)
    return SharedBase(tiny_model("llama", vocab_size=len(tokenizer)), tokenizer, "tiny/llama", r=4)


def examples(template, chat, system=None):
    data = DataConfig(train="-", prompt="q", answer=None, chat=chat, system=system)
    return build_examples([{"q": "How many?"}], data, tokenizer_of(template))


WRITTEN = [
    ("<think>\nTwo and three.\n</think>\n5<|im_end|>", "<think>\nTwo and three.\n</think>\n5"),
    ("<answer>5</s>", "<answer>5"),
    ("<tool>add</s> , 2 's<|im_start|>", "<tool>add</s> , 2 's<|im_start|>"),  # cut off: nothing ends it
    ("<|im_end|>", ""),
    ("plain", "plain"),
]


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize(("written", "text"), WRITTEN)
def test_rewards_see_all_that_was_written_but_the_stop(base, chat, written, text):
    ids = base.tokenizer(written, add_special_tokens=False)["input_ids"]
    given = []

    def reward(completions, prompt_texts, **_):
        given.extend([completions, prompt_texts])
        return [1.0]

    [example] = examples(CHATML, chat)
    done = Completion(ids, [0.0] * len(ids), ids[-1] not in base.stop_ids)
    _, texts = reward_completions([Reward("r", reward)], base, [example], [done], STATE)
    assert texts == [text]
    prompt = "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n" if chat else "How many?"
    assert given == [[[{"role": "assistant", "content": text}]] if chat else [text], [prompt]]
    shown = TextStream(base.tokenizer)
    drawn = ids[:-1] if ids[-1] in base.stop_ids else ids
    assert "".join(shown.add(one) for one in drawn) + shown.rest() == text
    reply = Reply("policy", 3, iter(drawn), base.tokenizer)
    assert "".join(reply.pieces()) == reply.text == text


def test_tags_stay_in_a_conversations_history(base):
    """What was answered is what the model reads again, tag for tag."""
    answer = "<tool>add</s> 5"
    prompts = Prompts(DataConfig(train="-"), base.tokenizer)
    history = [{"role": "user", "content": "Go"}, {"role": "assistant", "content": answer}]
    text = base.tokenizer.decode(prompts.ids("And?", history))
    assert text == (
        f"<|im_start|>user\nGo<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
        "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert base.tokenizer.convert_tokens_to_ids("<tool>") in prompts.ids("And?", history)


def test_a_typed_token_that_the_model_has_no_row_for_is_refused():
    tokenizer = tokenizer_of(CHATML)
    base = SharedBase(tiny_model("llama", vocab_size=len(tokenizer) - 1), tokenizer, "tiny/llama", r=4)
    recipe = validate_recipe({**VALUES, "generation": {"max_completion_length": 4}})
    talk = Talk(base, recipe, ChatOptions())
    assert [reply.prompt_tokens > 4 for reply in talk.ask("Use the tool")] == [True]
    with pytest.raises(UserError, match="has 266 tokens, the embedding 265 rows: the texts use <tool>, for"):
        talk.ask("Use <tool>")


GOOD, OWN = "Two and three.\n</think>\n\n5", "<think>\nTwo and three.\n</think>\n\n5"


@pytest.mark.parametrize(
    ("prompt", "completion", "value"),
    [
        ("<|im_start|>assistant\n<think>\n", GOOD, 1.0),
        ("a plain prompt <think>", GOOD, 1.0),
        ("...<think>\n\n \t", GOOD, 1.0),
        ("<think>\n", OWN, 0.0),  # the tag twice
        ("<think>\n", "no end", 0.0),
        ("<think>a</think>", GOOD, 0.0),
        ("<think> about it", GOOD, 0.0),
        ("", GOOD, 0.0),
        ("", OWN, 1.0),
    ],
)
def test_think_format_counts_a_tag_that_the_prompt_has_opened(prompt, completion, value):
    for one in (completion, [{"role": "assistant", "content": completion}]):
        assert think_format([one], [prompt]) == think_format(completions=[one], prompt_texts=[prompt]) == [value]
    if not prompt:
        assert think_format([completion]) == [value]


@pytest.mark.parametrize(
    ("begun", "completion", "value"),
    [
        ("<think>\n", GOOD, 1.0),
        ("<think>\nTwo", " and three.\n</think>\n\n5", 1.0),
        ("<think>\nTwo and three.\n</think>\n\n", "5", 1.0),
        ("<think>\nTwo", "5", 0.0),
        ("The answer is", OWN, 0.0),
    ],
)
def test_think_format_judges_an_answer_with_its_begun_part(begun, completion, value):
    prompt = [{"role": "user", "content": "2+3?"}, {"role": "assistant", "content": begun}]
    answer = [{"role": "assistant", "content": completion}]
    assert think_format([answer], [f"assistant\n{begun}"], [prompt]) == [value]
    assert think_format([answer], ["assistant\n<think>"], [prompt[:1]]) == think_format([answer], ["<think>"])


@pytest.mark.parametrize(("template", "value"), [(PREFILLED, 1.0), (CHATML, 0.0), (None, 0.0)])
def test_think_format_of_a_template_that_opens_the_tag(base, template, value):
    ids = base.tokenizer(GOOD, add_special_tokens=False)["input_ids"]
    rewards = load_rewards([RewardConfig(function="think_format")])
    done = Completion([*ids, base.tokenizer.eos_token_id], [0.0] * (len(ids) + 1), False)
    scores, _ = reward_completions(rewards, base, examples(template, "auto"), [done], STATE)
    assert scores.by_name == {"think_format": [value]}


# Reference answers


def rewards_of(*functions):
    return load_rewards([RewardConfig(function=function) for function in functions])


def rows_of(*answers):
    return [Row({"q": "?", "answer": answer}, number) for number, answer in enumerate(answers, start=1)]


DATA = DataConfig(train="-")


@pytest.mark.parametrize(
    ("function", "answers", "message"),
    [
        ("gsm8k_answer", ["B", "A"], r"gsm8k_answer reads none of the 2 reference answers \(first, row 1: 'B'\); "),
        ("arithmetic_answer", [None, "", "Paris"], r"reads none of the 1 reference answers \(first, row 3: 'Paris'\)"),
        ("gsm8k_answer", ["7 apples", "#### B"], r"none of the 2 reference answers \(first, row 1: '7 apples'\)"),
        ("arithmetic_answer", [[5], {"value": 5}, True], r"none of the 3 reference answers \(first, row 1: \[5\]\)"),
        ("gsm8k_answer", [None, float("nan"), " "], "no reference answer to read: column 'answer' is empty in all 3"),
        ("arithmetic_answer", ["x" * 999], r"row 1: 'x{59}\.\.\.\)"),
    ],
)
def test_a_reward_that_reads_no_reference_answer_is_refused_by_name(function, answers, message):
    with pytest.raises(UserError, match=message) as caught:
        check_references(rewards_of("think_format", function), rows_of(*answers), DATA)
    assert str(caught.value).startswith(f"rewards: {function} ") and caught.value.exit_code == 2


def test_a_reward_that_reads_some_says_how_many():
    said = check_references(rewards_of("gsm8k_answer"), rows_of("so\n#### 1,000", "B", None, JsonInt("5"), "C"), DATA)
    assert said == [
        "rewards: gsm8k_answer reads 2 of the 4 reference answers and does not apply to the others (first, row 2: 'B')"
    ]


@pytest.mark.parametrize(
    "answers", [["007", "-1,000"], [5, 1.5, JsonFloat("1e3"), JsonFloat("1.50"), JsonInt("-0")], [r"\frac{1}{2}", None]]
)
def test_what_is_read_is_not_spoken_of(answers):
    assert check_references(rewards_of("arithmetic_answer", "gsm8k_answer"), rows_of(*answers), DATA) == []


def test_numbers_are_compared_as_they_are_written_or_by_value():
    references = [JsonFloat("1e3"), JsonFloat("0.10"), JsonInt("-0"), JsonFloat("12345678901234567890.0"), 7.0]
    stated = ["#### 1000", "#### 0.1", "#### 0", "#### 12345678901234567890", "#### 7"]
    for reward in (arithmetic_answer, gsm8k_answer):
        assert reward(stated, references) == [1.0] * 5
        assert reward(["#### 12345678901234567891"], references[3:4]) == [0.0]


def test_the_column_is_the_one_that_the_recipe_names():
    rows = [{"answer": "5", "meta": {"key": "B"}}, {"answer": "6", "meta": {"key": "C"}}]
    assert check_references(rewards_of("gsm8k_answer"), rows, DATA) == []
    dotted = DATA.model_copy(update={"answer": "meta.key"})
    with pytest.raises(UserError, match="first, row 1: 'B'"):
        check_references(rewards_of("gsm8k_answer"), rows, dotted)
    similar = [replace(rewards_of("gsm8k_answer")[0], name="similarity", function=len, columns=("wanted",))]
    assert check_references(similar, [{"wanted": "any text"}, {"wanted": None}], DATA) == []
    with pytest.raises(UserError, match="similarity has no reference answer to read: column 'wanted'"):
        check_references(similar, [{"wanted": ""}], DATA)


def test_users_functions_are_left_alone():
    own = Reward("gsm8k_answer", lambda completions, answer: [None] * len(completions))
    assert check_references([own], rows_of("B"), DATA) == []


def test_problems_of_reasoning_gym_must_be_whole():
    pytest.importorskip("reasoning_gym", reason="the optional package reasoning-gym is not installed")
    from lowmem_rlhf.data.tasks import generate

    rows = generate("reasoning_gym/chain_sum", {}, "train", 0, 3, 0)
    assert check_references(rewards_of("reasoning_gym_answer"), rows, DATA) == []
    texts = [{**row, "entry": json.dumps(row["entry"])} for row in rows]  # as a table of texts has them
    with pytest.raises(UserError, match="reasoning_gym_answer reads none of the 3 reference answers"):
        check_references(rewards_of("reasoning_gym_answer"), texts, DATA)
    assert "reads 1 of the 3" in check_references(rewards_of("reasoning_gym_answer"), rows[:1] + texts[1:], DATA)[0]


def test_which_rows_are_judged():
    """Training that samples judges its rows, any other the held-out ones alone."""
    recipe = validate_recipe(VALUES)
    rewards, good, bad = rewards_of("gsm8k_answer"), rows_of("5"), rows_of("B")
    assert check_run_references(rewards, recipe, good, good) == []
    with pytest.raises(UserError, match="none of the 1 held-out reference answers"):
        check_run_references(rewards, recipe, good, bad)
    with pytest.raises(UserError, match="none of the 1 reference answers"):
        check_run_references(rewards, recipe, bad)
    assert check_run_references(rewards, recipe.model_copy(update={"algorithm": "sft"}), bad, good) == []


# A reward that raises

FAILING = """\
import json

def helper(text):
    return {}["x"]

def tags(completions, **_):
    return [helper(one) for one in completions]

def lazy(completions, **_):
    for one in completions:
        yield 1.0
        yield json.loads("no")

async def later(completions, **_):
    raise ValueError("two\\nlines")

def leaves(completions, **_):
    raise SystemExit(3)

def wrong(nothing):
    return []
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tags", "reward function tags failed in rew.py, line 4: KeyError: 'x'"),
        ("lazy", "reward function lazy failed in rew.py, line 12: JSONDecodeError: "),
        ("later", "reward function later failed in rew.py, line 15: ValueError: two lines"),
        ("leaves", "reward function leaves failed in rew.py, line 18: SystemExit: 3"),
        ("wrong", "reward function wrong failed: TypeError: "),
    ],
)
def test_a_reward_that_raises_names_its_file_and_line(tmp_path, monkeypatch, name, message):
    (tmp_path / "rew.py").write_text(FAILING, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError) as caught:
        score(rewards_of(f"rew.py:{name}"), ["p"] * 2, ["a", "b"], [[1], [2]], {})
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("\n\nimport no_such_module\n", "rew.py, line 3, cannot be imported: ModuleNotFoundError: "),
        ("def f():\n    raise OSError\n\nf()\n", "rew.py, line 2, cannot be imported: OSError: no message"),
        ("x = 1\ndef f(:\n", "rew.py, line 2, cannot be imported: SyntaxError: "),
        ("import failing_neighbour\n", "rew.py, line 1, cannot be imported: ZeroDivisionError: "),
    ],
)
def test_a_file_that_cannot_be_imported_names_the_line(tmp_path, monkeypatch, code, message):
    (tmp_path / "rew.py").write_text(code, encoding="utf-8")
    (tmp_path / "failing_neighbour.py").write_text("\n\n1 / 0\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        rewards_of("rew.py:f")
    assert str(caught.value).startswith(f"rewards: {message}")


# Whole runs

REWARDS = """\
import json
from pathlib import Path

def tags(completions, completion_ids, **_):
    texts = [one[0]["content"] for one in completions]
    Path("seen.json").write_text(json.dumps([texts, completion_ids]))
    return [float(text.count("think>") + 0.01 * n) for n, text in enumerate(texts)]

def silent(completions, **_):
    return [None] * len(completions)

def once(completions, trainer_state, **_):
    if trainer_state.global_step == 0:
        return [1.0] * len(completions)
    if not Path("go").exists():
        raise OSError("stopped")
    return [None] * len(completions)
"""


@pytest.fixture
def train(lowmem_rlhf, tmp_path, monkeypatch, model):
    """Return a function that trains one step by the command line on two questions, with changes of the recipe."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rew.py").write_text(REWARDS, encoding="utf-8")

    def run(*arguments, rewards, answers=("5", "4"), steps=1, **generation):
        rows = [{"question": f"What is {n}?", "answer": answer} for n, answer in enumerate(answers)]
        (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        values = {
            "name": "t",
            "algorithm": "grpo",
            "model": str(model),
            "hardware": {"device": "cpu", "quantization": "none", "compute_dtype": "float32"},
            "lora": {"r": 4},
            "data": {"train": "d.jsonl", "eval_size": 0},
            "generation": {"num_generations": 2, "max_completion_length": 12, **generation},
            "training": {"max_steps": steps, "prompts_per_step": 2, "save_steps": 1},
            "rewards": [{"function": rewards}],
        }
        (tmp_path / "g.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
        return lowmem_rlhf("train", "g.yaml", "--output", "run", *arguments)

    return run


def test_tags_that_are_special_tokens_reach_rewards_and_samples(train, tmp_path):
    done = train(rewards="rew.py:tags")
    assert done.code == 0, done.err
    texts, ids = json.loads((tmp_path / "seen.json").read_text())
    written = [sum(index in (262, 263) for index in one) for one in ids]
    assert sum(written) > 4 and [text.count("think>") for text in texts] == written
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [row["completion"] for row in samples] == texts[::2]


def test_answers_that_the_reward_cannot_read_stop_the_run_before_it_begins(train, tmp_path):
    done = train(rewards="gsm8k_answer", answers=("B", "A"))
    assert (
        done.code == 2 and "rewards: gsm8k_answer reads none of the 2 reference answers (first, row 1: 'B')" in done.err
    )
    assert not (tmp_path / "run").exists() and "loading" not in done.out
    done = train(rewards="gsm8k_answer", answers=("B", "4"))
    assert "gsm8k_answer reads 1 of the 2 reference answers and does not apply to the others (first, row 1" in done.out


def test_a_silent_reward_is_named_in_the_first_step_and_at_the_end(train):
    done = train(rewards="rew.py:silent", max_completion_length=40)
    assert done.code == 1
    assert "reward silent gave None for all 4 completions of step 1" in done.out
    assert "no reward applied to any completion" in done.err and "reference answers" in done.err
    assert "same reward" not in done.err


def test_a_run_whose_every_completion_was_cut_says_so(train):
    done = train(rewards="think_format", max_completion_length=1)
    assert done.code == 1 and "gave None" not in done.out
    assert "every completion was cut at 1 tokens" in done.err and "generation.max_completion_length" in done.err
    assert "same reward" not in done.err and "no reward applied" not in done.err


def test_what_was_seen_before_a_resume_counts(train, tmp_path):
    """The first step had rewards, all the same; those after the resume have none."""
    done = train(rewards="rew.py:once", steps=2, max_completion_length=150, temperature=5.0)
    assert done.code == 1 and "reward function once failed in rew.py, line 16: OSError: stopped" in done.err
    (tmp_path / "go").touch()
    done = train("--resume", rewards="rew.py:once", steps=2, max_completion_length=150, temperature=5.0)
    assert done.code == 1 and "going on after step 1" in done.out
    assert "same reward" in done.err and "no reward applied" not in done.err


def test_completions_that_are_all_the_same_teach_nothing_whatever_their_rewards(train):
    """Advantages that sum to zero over one and the same text cancel: that is no fault of the adapter."""
    done = train(rewards="rew.py:tags", temperature=1e-4, max_completion_length=150)
    assert done.code == 1
    assert "all completions of each prompt were the same text" in done.err and "temperature" in done.err
    assert "did not change the adapter" not in done.err
