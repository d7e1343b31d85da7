"""`chat`: what it answers, how it shows it, what it keeps, and how it refuses."""

import io
import json
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from tiny_models import byte_tokenizer
from tiny_runs import SYMBOLS, tiny_recipe

from lowmem_rlhf.architecture.stops import written_text
from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.ladder import RolloutLimits
from lowmem_rlhf.hardware.device import Device
from lowmem_rlhf.inference import opening
from lowmem_rlhf.inference.chat.show import interact, show
from lowmem_rlhf.inference.chat.talk import ChatOptions, Prompts, Reply, Talk, TextStream
from lowmem_rlhf.inference.open_run import OpenRun
from lowmem_rlhf.recipe.sections import DataConfig
from lowmem_rlhf.rollout import stream as stream_module
from lowmem_rlhf.rollout.engine import wave_engine
from lowmem_rlhf.rollout.sampling import Sampling
from lowmem_rlhf.run.directory import RunDirectory
from lowmem_rlhf.session.train import train

CHAT = (
    "{% for m in messages %}{{ {'system': 'c', 'user': 'a', 'assistant': 'b'}[m['role']] }}{{ m['content'] }}."
    "{% endfor %}"
    "{% if add_generation_prompt %}b{% endif %}"
)


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory) -> RunDirectory:
    """Return a run of three steps with checkpoints 2 and 3, whose finished adapter was then made large."""
    run = train(tiny_recipe(tiny_model), tmp_path_factory.mktemp("chat") / "run")
    file = run.path / "adapter" / "adapter_model.safetensors"
    generator = torch.Generator().manual_seed(0)
    big = {name: torch.randn(one.shape, generator=generator) for name, one in load_file(file).items()}
    save_file(big, file, metadata={"format": "pt"})
    file.with_name("hashes.json").unlink()  # it is not what was written
    return run


@pytest.fixture
def chat(lowmem_rlhf) -> Callable[..., Any]:
    """Return a function that runs `chat` in this process, with lines on its standard input."""
    return partial(lowmem_rlhf, "chat")


@pytest.fixture(scope="module")
def opened(trained):
    run = OpenRun(trained)
    return opening.open_policy(run), run.recipe


def expected(base: SharedBase, role: str, prompt: str, sampling: Sampling | None = None, length=12, seed=0) -> str:
    """Return the text that a rollout of a prompt has."""
    ids = base.tokenizer(prompt)["input_ids"]
    with base.role(role):
        [[completion]] = wave_engine(base).generate(
            [ids], 1, length, sampling or Sampling(0.0), RolloutLimits(1, 64, 4), seed
        )
    return written_text(base.tokenizer, completion.ids, base.stop_ids)


def test_a_prompt_is_answered_by_the_trained_policy(chat, trained, opened):
    done = chat(trained.path, "--prompt", "3+4")
    assert done.code == 0, done.err
    want = expected(opened[0], "policy", "3+4=")  # through the recipe's template
    assert want.strip()
    assert done.out == want + "\n"
    assert done.out != expected(opened[0], "reference", "3+4=") + "\n"
    assert "loading" in done.err


def test_length_temperature_and_seed_are_those_of_a_rollout(chat, trained, opened):
    done = chat(trained.path, "--prompt", "3+4", "--max-tokens", 30, "--temperature", 1.5, "--seed", 7)
    assert done.out == expected(opened[0], "policy", "3+4=", Sampling(1.5), 30, 7) + "\n"
    assert done.out != chat(trained.path, "--prompt", "3+4", "--max-tokens", 30, "--temperature", 1.5).out


def test_compare_shows_reference_and_policy_from_one_base(chat, trained, opened):
    done = chat(trained.path, "--prompt", "3+4", "--compare")
    base = opened[0]
    reference, policy = expected(base, "reference", "3+4="), expected(base, "policy", "3+4=")
    assert reference != policy
    assert done.out == f"reference:\n{reference}\n\npolicy:\n{policy}\n"


@pytest.mark.parametrize("compare", [False, True])
def test_json_is_one_object(chat, trained, opened, compare):
    done = chat(trained.path, "--prompt", "3+4", "--json", *["--compare"][:compare])
    got, base = json.loads(done.out), opened[0]
    roles = ["policy", "reference"][: 1 + compare]
    assert list(got) == ["prompt", *roles, "tokens"]
    assert got["prompt"] == "3+4"
    assert [got[role] for role in roles] == [expected(base, role, "3+4=") for role in roles]
    assert list(got["tokens"]) == ["prompt", *roles]
    assert got["tokens"]["prompt"] == 4
    assert 0 < got["tokens"]["policy"] <= 12


def test_lines_on_the_standard_input_are_answered_until_an_empty_one(chat, trained, opened):
    answers = [expected(opened[0], "policy", f"{text}=") + "\n" for text in ("3+4", "5-2", "1+1")]
    done = chat(trained.path, lines="3+4\n5-2\n/reset\n1+1\n\n8+8\n")
    assert done.code == 0, done.err
    assert done.out == "".join(answers)
    assert "each prompt stands alone" in done.err and "{question}=" in done.err and "forgotten" in done.err
    assert chat(trained.path, lines="3+4\n/quit\n5-2\n").out == answers[0]
    assert chat(trained.path, lines="3+4").out == answers[0]
    assert chat(trained.path).out == ""


def test_a_checkpoint_answers_instead_of_the_finished_adapter(trained):
    for step in (2, 3):
        run = OpenRun(trained, step)
        base, recipe = opening.open_policy(run), run.recipe
        saved = load_file(trained.path / "checkpoints" / f"step-{step}" / "adapter_model.safetensors")
        state = base.adapter_state()
        assert state.keys() == saved.keys() and all(torch.equal(state[name], saved[name]) for name in saved)
        assert recipe.name == "tiny"


def test_the_reference_of_a_run_that_continued_an_adapter_is_that_adapter(chat, trained, tmp_path, opened):
    copy = copied(trained, tmp_path)
    text = (copy / "recipe.yaml").read_text().replace("adapter: null", f"adapter: {trained.path}")
    (copy / "recipe.yaml").write_text(text)
    got = json.loads(chat(copy, "--prompt", "3+4", "--step", 3, "--compare", "--json").out)
    assert got["reference"] == expected(opened[0], "policy", "3+4=")
    assert got["policy"] != got["reference"]
    (copy / "recipe.yaml").write_text(text.replace(str(trained.path), "gone"))
    assert chat(copy, "--prompt", "3+4").code == 0  # only the comparison needs it
    done = chat(copy, "--prompt", "3+4", "--compare")
    assert done.code == 2 and "'gone' does not exist" in done.err


def copied(trained: RunDirectory, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained.path, tmp_path / "copy"))


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["nowhere", "--prompt", "1"], ["nowhere does not exist", "runs/NAME"]),
        (["RUN", "--step", "7"], ["--step 7", "there is 2, 3"]),
        (["RUN", "--json"], ["--prompt TEXT"]),
        (["RUN", "--prompt", " "], ["the prompt is empty"]),
        (["RUN", "--prompt", "1" * 256], ["has 257 tokens", "only 256 positions", "shorten it"]),
        (["RUN", "--device", "gpu!"], ["device 'gpu!' is not a device"]),
        (["RUN", "--max-tokens", "0"], ["--max-tokens"]),
    ],
    ids=lambda value: " ".join(value)[:30],
)
def test_wrong_input_is_one_sentence_and_exit_code_2(chat, trained, arguments, parts):
    done = chat(*[trained.path if argument == "RUN" else argument for argument in arguments])
    assert done.code == 2, done
    assert "Traceback" not in done.err
    assert all(part in done.err for part in parts), done.err


def test_a_run_without_an_adapter_says_what_to_do(chat, trained, tmp_path):
    copy = copied(trained, tmp_path)
    shutil.rmtree(copy / "adapter")
    done = chat(copy, "--prompt", "1")
    assert done.code == 2
    assert "no adapter yet" in done.err and "--resume" in done.err and "--step (2, 3)" in done.err
    shutil.rmtree(copy / "checkpoints")
    done = chat(copy, "--prompt", "1")
    assert "--resume" in done.err and "--step" not in done.err
    assert "there is none" in chat(copy, "--prompt", "1", "--step", 2).err


def test_torn_files_are_said(chat, trained, tmp_path):
    copy = copied(trained, tmp_path)
    (copy / "adapter" / "adapter_model.safetensors").write_bytes(b"torn")
    done = chat(copy, "--prompt", "1")
    assert done.code == 2 and "cannot be read" in done.err and "--step" in done.err
    (copy / "plan.json").unlink()
    done = chat(copy, "--prompt", "1")
    assert done.code == 2 and "no plan.json" in done.err


def test_a_run_of_a_reward_model_gives_no_answers(chat, trained, tmp_path):
    copy = copied(trained, tmp_path)
    text = (copy / "recipe.yaml").read_text().replace("algorithm: grpo", "algorithm: reward_model")
    (copy / "recipe.yaml").write_text(text)
    done = chat(copy, "--prompt", "1")
    assert done.code == 2 and "a reward model" in done.err


def test_a_device_without_the_run_s_dtype_is_refused(chat, trained, tmp_path, monkeypatch):
    copy = copied(trained, tmp_path)
    (copy / "plan.json").write_text((copy / "plan.json").read_text().replace('"float32"', '"bfloat16"'))
    old = Device("cuda:0", "Old Card", 8 << 30, 8 << 30, (7, 5), bf16=False)
    monkeypatch.setattr(opening, "detect", lambda device: old)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    done = chat(copy, "--prompt", "1")
    assert done.code == 2 and "computes in bfloat16, which Old Card does not; take --device cpu" in done.err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = chat(copy, "--prompt", "1")
    assert done.code == 2 and "cannot use it; take --device cpu" in done.err


def test_the_room_for_an_answer_ends_with_the_model_s_positions(opened):
    base, recipe = opened
    [reply] = Talk(base, recipe, ChatOptions(max_tokens=100)).ask("1" * 250)
    list(reply.pieces())
    assert reply.prompt_tokens == 251 and reply.tokens <= 5


# Conversations of a chat model


@pytest.fixture
def talk(opened, monkeypatch) -> Callable[..., Talk]:
    """Return a maker of conversations with a tokenizer that has a chat template."""
    base, recipe = opened
    monkeypatch.setattr(base.tokenizer, "chat_template", CHAT)
    data = recipe.data.model_copy(update={"system": "de"})

    def make(**options) -> Talk:
        return Talk(base, recipe.model_copy(update={"data": data}), ChatOptions(**options))

    return make


@pytest.fixture
def prompts_seen(monkeypatch, opened) -> list[str]:
    """Return the list of the prompts that are answered from now on, as text."""
    seen: list[str] = []
    original = stream_module.stream

    def noted(base, ids, *args, **kwargs):
        seen.append("".join(SYMBOLS[i] for i in ids))
        return original(base, ids, *args, **kwargs)

    monkeypatch.setattr(stream_module, "stream", noted)
    return seen


def say(talk: Talk, text: str) -> list[str]:
    replies = talk.ask(text)
    show(replies, Console(file=io.StringIO()))
    talk.remember(text, replies)
    return [reply.text for reply in replies]


def test_each_role_keeps_its_own_conversation(talk, prompts_seen):
    talk = talk(compare=True, max_tokens=5)
    reference, policy = say(talk, "1+2")
    assert reference != policy
    say(talk, "3+4")
    begin = "cde.a1+2=."
    assert prompts_seen == [
        begin + "b",
        begin + "b",
        f"{begin}b{reference}.a3+4=.b",
        f"{begin}b{policy}.a3+4=.b",
    ]
    talk.forget()
    say(talk, "5")
    assert prompts_seen[-2:] == ["cde.a5=.b"] * 2


def test_a_conversation_that_is_too_long_goes_on_after_reset(talk, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"1\n{'2' * 250}\n/reset\n3\n"))
    interact(talk(max_tokens=4))
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 2
    assert "only 256 positions; forget the conversation with /reset" in captured.err
    assert "kept until /reset" in captured.err


def test_ctrl_c_ends_an_answer_and_not_the_conversation(talk, monkeypatch, capsys, prompts_seen):
    pieces, calls = Reply.pieces, []

    def interrupted(self):
        calls.append(1)
        for number, piece in enumerate(pieces(self)):
            if len(calls) == 1 and number == 2:
                raise KeyboardInterrupt
            yield piece

    monkeypatch.setattr(Reply, "pieces", interrupted)
    monkeypatch.setattr(sys, "stdin", io.StringIO("1\n2\n"))
    interact(talk(max_tokens=6))
    assert len(calls) == 2 and len(capsys.readouterr().out.splitlines()) == 2
    assert prompts_seen[1].startswith("cde.a1=.b") and prompts_seen[1].endswith(".a2=.b")


def test_ctrl_c_at_the_prompt_ends(talk, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda prompt: (_ for _ in ()).throw(KeyboardInterrupt))
    interact(talk())


def test_later_answers_have_other_random_numbers(talk):
    talk = talk(temperature=2.0, max_tokens=20)
    first = say(talk, "1")
    talk.forget()
    assert say(talk, "1") != first


# Prompts


@pytest.mark.parametrize(
    ("data", "template", "turn"),
    [
        ({"template": "What is {question}? {{x}}"}, CHAT, "What is 1? {x}"),
        ({"template": "{a} or {b}"}, CHAT, "1"),
        ({"template": "always this"}, CHAT, "1"),
        ({}, CHAT, "1"),
        ({"template": "{question}="}, None, "1="),
    ],
)
def test_the_recipe_s_template_takes_the_text_where_it_has_one_place(data, template, turn):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    prompts = Prompts(DataConfig(train="x", system="sys", **data), tokenizer)
    assert prompts.turn("1") == turn
    assert prompts.keeps_messages == (template is not None)
    text = tokenizer.decode(prompts.ids(turn, []))
    assert text == (f"csys.a{turn}.b" if template else f"sys\n\n{turn}")


def test_a_model_of_plain_texts_gets_plain_prompts():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    for data in (DataConfig(train="x", text="text"), DataConfig(train="x", chat=False)):
        prompts = Prompts(data, tokenizer)
        assert not prompts.keeps_messages
        assert tokenizer.decode(prompts.ids("once", [{"role": "user", "content": "no"}])) == "once"


def test_half_a_character_of_the_command_line_is_replaced():
    assert Prompts(DataConfig(train="x"), byte_tokenizer()).turn("a\udce9") == "a?"


# Text as it comes


@pytest.mark.parametrize(
    "text", ["plain", "naïve café", "日本語 🙂👍🏽!", "", "\N{REPLACEMENT CHARACTER} kept", "a\n\nb"]
)
def test_characters_of_several_tokens_appear_whole(text):
    tokenizer = byte_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(text.encode())
    stream = TextStream(tokenizer)
    pieces = [stream.add(token) for token in ids]
    assert "".join(pieces) + stream.rest() == text
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert [piece for piece in pieces if piece] == list(text)


def test_a_character_that_was_cut_is_shown_at_the_end():
    tokenizer = byte_tokenizer()
    stream = TextStream(tokenizer)
    pieces = [stream.add(token) for token in tokenizer("a🙂", add_special_tokens=False)["input_ids"][:-1]]
    assert pieces == ["a", "", "", ""]
    assert stream.rest() == "\N{REPLACEMENT CHARACTER}"


def replies(reference: str, policy: str) -> list[Reply]:
    tokenizer = byte_tokenizer()
    ids = {"reference": reference, "policy": policy}
    return [
        Reply(role, 1, iter(tokenizer(text, add_special_tokens=False)["input_ids"]), tokenizer)
        for role, text in ids.items()
    ]


def shown(width: int, terminal: bool, reference: str, policy: str) -> str:
    out = io.StringIO()
    show(
        replies(reference, policy),
        Console(file=out, width=width, height=10, force_terminal=terminal, color_system=None),
    )
    return out.getvalue()


def test_two_columns_on_a_wide_terminal():
    last = shown(120, True, "word " * 30, "[b]term[/b] " * 150)
    final = last[last.rindex("reference") :].splitlines()
    assert final[0].split() == ["policy"] or final[0].split() == ["reference", "policy"]
    assert final[1].startswith("word word") and "[b]term[/b]" in final[1][60:]
    assert sum(line.count("word") for line in final) == 30
    assert sum(line.count("[b]term[/b]") for line in final) == 150  # more lines than the terminal has


@pytest.mark.parametrize(("width", "terminal"), [(80, True), (200, False)])
def test_one_below_the_other_on_a_narrow_terminal_or_in_a_pipe(width, terminal):
    text = "words " * 40
    assert shown(width, terminal, text, "é") == f"reference:\n{text}\n\npolicy:\né\n"


def test_the_help_says_what_there_is(chat):
    done = chat("--help")
    assert done.code == 0
    for option in ("--prompt", "--compare", "--max-tokens", "--temperature", "--seed", "--device", "--step", "--json"):
        assert option in done.out
