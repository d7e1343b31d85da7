"""Which of a conversation's answers are learned, and that it is said."""

import pytest
from building import learned_runs, prompts, sft, talk, turn

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
