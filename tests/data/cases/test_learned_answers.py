"""Which of a conversation's answers are learned, and that it is said."""

import pytest
from building import learned_runs, names_row, prompts, refusal, sft, talk, turn

TALK = talk("Hi", "Hello there.", "Name a river.", "The Elbe.", "And a port?", "Kiel.")
ENDS = "<|im_end|>"


def learned(tokenizer, rows, **settings):
    """Return what is learned of each row that has an example of its own."""
    return [[tokenizer.decode(run) for run in learned_runs(one)] for one in sft(tokenizer, rows, **settings)]


def test_the_last_is_learned_and_that_is_said(tokenizer, said):
    assert learned(tokenizer("chatml"), [{"messages": TALK}] * 2) == [[f"Kiel.{ENDS}"]] * 2
    assert len([one for one in said() if "last" in one and "3" in one and "sft.learn" in one]) == 1


def test_all_are_learned(tokenizer, said):
    assert learned(tokenizer("chatml"), [{"messages": TALK}], learn="all") == [
        [f"Hello there.{ENDS}", f"The Elbe.{ENDS}", f"Kiel.{ENDS}"]
    ]
    (example,) = sft(tokenizer("chatml"), [{"messages": TALK}], learn="all")
    whole = tokenizer("chatml").decode(example.prompt_ids + example.completion_ids)
    assert whole == tokenizer("chatml").apply_chat_template(TALK, tokenize=False).removesuffix("\n")
    assert tokenizer("chatml").decode(example.prompt_ids) == f"<|im_start|>user\nHi{ENDS}\n<|im_start|>assistant\n"


@pytest.mark.parametrize("name", ["chatml", "base", "own_system", "insists", "tools"])
@pytest.mark.parametrize(
    ("messages", "answers"),
    [
        (talk("Hi", "Hello."), ["Hello."]),
        (talk("Hi", "Hello.", "Hi", "Hello."), ["Hello.", "Hello."]),  # the same text twice
        (talk("Say Hello.", "Hello.", "Again: Hello.", "Hello. Hello."), ["Hello.", "Hello. Hello."]),
        (talk("Hi", "Hello.", system="Be brief."), ["Hello."]),
        ([*talk("Hi", "Hello."), turn("user", "You"), turn("user", "there?"), turn("assistant", "Yes.")],
         ["Hello.", "Yes."]),
        ([*talk("Weather?", "I look."), turn("tool", "rain"), turn("assistant", "Rain.")], ["I look.", "Rain."]),
        (talk("assistant", "user", "<b>", "assistant\nuser"), ["user", "assistant\nuser"]),
    ],
)  # fmt: skip
def test_only_answers_are_learned(tokenizer, name, messages, answers):
    runs = learned(tokenizer(name), [{"messages": messages}], learn="all")
    assert runs == [[f"{answer}{ENDS}" for answer in answers]]
    assert learned(tokenizer(name), [{"messages": messages}])[0][-1] == f"{answers[-1]}{ENDS}"


def test_one_answer_each_says_nothing(tokenizer, said):
    rows = [{"messages": talk("Hi", "Hello.")}, {"messages": talk("Hi", "Hello.", system="Be brief.")}]
    sft(tokenizer("chatml"), rows)
    assert not [one for one in said() if "sft.learn" in one]


def test_a_prompt_and_completion_have_one_answer(tokenizer):
    rows = [{"prompt": talk("Hi", "Hello.", "Name a port."), "completion": "Kiel."}]
    for learn in ("last", "all"):
        assert learned(tokenizer("chatml"), rows, learn=learn)[0][-1] == f"Kiel.{ENDS}"


def test_the_first_prompt_is_that_of_a_rollout(tokenizer):
    (example,) = sft(tokenizer("chatml"), [{"messages": TALK}], learn="all")
    (prompt,) = prompts(tokenizer("chatml"), [{"messages": TALK[:2]}])
    assert example.prompt_ids == prompt.prompt_ids


def test_an_answer_whose_thought_a_later_turn_drops(tokenizer, said):
    from lowmem_rlhf.errors import UserError

    messages = talk("Hi", "<think>\nA greeting.\n</think>\n\nHello.", "A port?", "<think>\nNorth.\n</think>\n\nKiel.")
    for name in ("thinks", "forgets"):
        try:
            made = learned(tokenizer(name), [{"messages": messages}], learn="all")
            runs = [run for one in made for run in one]
        except UserError as error:
            assert "row 1" in str(error)
            continue
        assert len(runs) == 2 and all(run.count(ENDS) == 1 for run in runs)
        assert ("A greeting." in runs[0] and "North." in runs[1]) or [one for one in said() if "row 1" in one], runs
    (runs,) = learned(tokenizer("chatml"), [{"messages": messages}], learn="all")
    assert "A greeting." in runs[0] and "North." in runs[1]


def test_a_message_between_an_answer_and_the_stop_is_not_learned(tokenizer):
    """As GLM-4 has it: a turn ends where the user's begins, and the system's mark is no stop."""
    made = tokenizer(
        "{% for m in messages %}{{ ('<|im_end|>' if m.role == 'user' else '[' + m.role + ']') + m.content }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
    )
    messages = [*talk("Hi", "Hello."), turn("system", "Be brief now."), *talk("A port?", "Kiel.")]
    runs = [run for one in learned(made, [{"messages": messages}], learn="all") for run in one]
    assert runs == [f"Hello.{ENDS}", f"Kiel.{ENDS}"]


REASONS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.reasoning_content and loop.last %}"
    "{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("template", [REASONS, REASONS.replace(" and loop.last", "")])
def test_the_reasoning_of_every_answer_is_learned(tokenizer, template):
    messages = [
        turn("user", "A lake?"), turn("assistant", "Como.", reasoning_content="Italy."),
        turn("user", "A sea?"), turn("assistant", "Baltic.", reasoning_content="North."),
    ]  # fmt: skip
    runs = [run for one in learned(tokenizer(template), [{"messages": messages}], learn="all") for run in one]
    assert runs == [f"<think>Italy.</think>Como.{ENDS}", f"<think>North.</think>Baltic.{ENDS}"]


def test_a_stop_inside_an_earlier_answer(tokenizer):
    made = tokenizer("chatml")
    stops = frozenset(made.convert_tokens_to_ids([ENDS, "<|endoftext|>"]))
    rows = [{"messages": talk("Hi", "Hello<|endoftext|> there.", "A port?", "Kiel.")}]
    message = refusal(sft, made, rows, learn="all", stops=stops)
    assert names_row(message, 1) and "<|endoftext|>" in message


def test_two_answers_in_a_row_are_not_learned_as_one(tokenizer):
    messages = [*talk("Hi", "Well."), turn("assistant", "Hello."), *talk("A port?", "Kiel.")]
    assert names_row(refusal(sft, tokenizer("chatml"), [{"messages": messages}], learn="all"), 1)
    assert learned(tokenizer("chatml"), [{"messages": messages}]) == [[f"Kiel.{ENDS}"]]


def test_tokens_that_are_others_in_one_piece_are_pointed_at(tokenizer, said):
    """A prompt that ends in one newline, and answers that begin with another: two newlines are one token."""
    made = tokenizer(
        "{% for m in messages %}{{ m.role + '\n' + ('\n' if m.role == 'assistant' else '') + m.content + eos_token }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
    )
    (example,) = sft(made, [{"messages": TALK}], learn="all")
    ids = example.prompt_ids + example.completion_ids
    one_piece = made(made.apply_chat_template(TALK, tokenize=False), add_special_tokens=False)["input_ids"]
    assert made.decode(ids) == made.decode(one_piece) and ids != one_piece
    assert [one for one in said() if "in one piece" in one and names_row(one, 1)]
