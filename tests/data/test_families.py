"""Chat template families: what is learned of a conversation is what its template writes, or the difference is said.

One piece is the conversation rendered and tokenized as a whole, which is what the model was trained on by its makers.
"""

import re
from dataclasses import dataclass

import pytest
from building import learned_runs, names_row, prompts, refusal, sft, talk, turn, warnings_of
from chat_families import FAMILIES, Family, family_stops, family_tokenizer

from lowmem_rlhf.errors import UserError

ASKED, ANSWERED = "Name a lake.", "It is Como."
THOUGHT = "<think>\nA lake, they ask.\n</think>\n\nIt is Como."
SYSTEM = "Be brief and kind."
PLAIN = talk(ASKED, ANSWERED)
LONG = talk(ASKED, ANSWERED, "And a sea?", "The Baltic.", "And a hill?", "The Brocken.")
# Templates whose prompt, or whose tokens at the prompt's end, are others than those of an answered conversation.
REWRITTEN = {"deepseekv3", "deepseek_r1_distill", "nemotron_3_nano", "qwen3_5_think", "qwen3_6"}
# ... and those that write a given thought in another way, or leave it out.
RETHOUGHT = {"deepseekv3", "deepseek_r1_distill", "qwen3_5_nothink", "glm4moe"}
SWITCHED = [name for name, family in FAMILIES.items() if family.switch]


@dataclass
class Room:
    """A family with its tokenizer and stops."""

    name: str
    family: Family
    tokenizer: object
    stops: frozenset

    def rendered(self, messages, **options):
        return self.tokenizer.apply_chat_template(messages, tokenize=False, **options)

    def one_piece(self, messages, **options):
        return self.tokenizer(self.rendered(messages, **options), add_special_tokens=False)["input_ids"]

    def only_ends(self, ids):
        """Whether tokens hold nothing but whitespace and special tokens."""
        special = {*self.tokenizer.all_special_ids, *self.stops}
        return not self.tokenizer.decode([one for one in ids if one not in special]).strip()


@pytest.fixture(scope="module")
def rooms():
    made = {}

    def get(name):
        if name not in made:
            tokenizer = family_tokenizer(FAMILIES[name])
            made[name] = Room(name, FAMILIES[name], tokenizer, family_stops(FAMILIES[name], tokenizer))
        return made[name]

    return get


def as_in_one_piece(room, ids, whole):
    """Whether ids are those of one piece, without what stands behind the stop; or with one where a turn has no end."""
    if ids == whole[: len(ids)]:
        return room.only_ends(whole[len(ids) :])
    return ids[:-1] == whole and ids[-1] in room.stops


def of_a_difference(messages):
    """Return those of some messages that tell of one between what was given and what is learned.

    What a template writes before every answer (an empty thought, a channel) is said too, and is none.
    """
    return [one for one in messages if re.search("template|token|render", one) and "before the answer" not in one]


def built_all(room, messages, caplog, **settings):
    """Return the conversation's examples, or none where it is refused by a sentence that names its row."""
    caplog.clear()
    try:
        return sft(room.tokenizer, [{"messages": messages}], stops=room.stops, **settings)
    except UserError as error:
        assert names_row(str(error), 1), error
        assert "template" in str(error) or "special token" in str(error), error
        return []


def built(room, messages, caplog, **settings):
    """Return the conversation's one example, or None where it is refused."""
    examples = built_all(room, messages, caplog, **settings)
    assert len(examples) < 2
    return examples[0] if examples else None


def check_counts(said):
    """Check that no more rows are counted than there are."""
    for count, of in re.findall(r"(\d+) of (\d+) rows", " ".join(said)):
        assert int(count) <= int(of), said


def check_run(room, run, answer, others, said):
    """Check one learned stretch: it ends with its only stop, holds the answer last, and none of the other texts."""
    assert run[-1] in room.stops
    assert [one for one in run if one in room.stops] == [run[-1]]
    text = room.tokenizer.decode(run[:-1])
    assert text.rstrip().endswith(answer) or of_a_difference(said), text
    assert not [other for other in others if other in text], text


def check_last(room, messages, caplog, exact, **settings):
    """Check the example of a conversation whose last answer is learned; ``exact``: nothing may differ."""
    example = built(room, messages, caplog, **settings)
    said = warnings_of(caplog)
    check_counts(said)
    if example is None:
        assert not exact
        return
    runs = learned_runs(example)
    assert len(runs) == 1 and runs[0] == example.completion_ids
    answer = messages[-1]["content"]
    whole = example.prompt_ids + example.completion_ids
    same = as_in_one_piece(room, whole, room.one_piece(messages, **settings.get("chat_template_kwargs", {})))
    assert same or (of_a_difference(said) and not exact), (room.tokenizer.decode(whole), said)
    # a thought may have been opened by the prompt
    check_run(room, runs[0], answer.split("<think>\n")[-1], [one["content"] for one in messages[:-1]], said)
    given = room.tokenizer.decode(whole[:-1]).rstrip().endswith(answer)
    assert given or (of_a_difference(said) and not exact), (room.tokenizer.decode(whole), said)
    if exact:
        assert not of_a_difference(said)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_answer_is_learned_as_in_one_piece(rooms, name, caplog):
    check_last(rooms(name), PLAIN, caplog, exact=name not in REWRITTEN)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_is_that_of_rollouts_and_ends_in_no_stop(rooms, name, caplog):
    room = rooms(name)
    for messages in (PLAIN, LONG, [*LONG[:-1], turn("assistant", THOUGHT)]):
        (prompt,) = prompts(room.tokenizer, [{"messages": messages}])
        assert prompt.prompt_ids == room.one_piece(messages[:-1], add_generation_prompt=True)
        assert prompt.prompt_ids[-1] not in room.stops
        example = built(room, messages, caplog)
        assert example is None or example.prompt_ids == prompt.prompt_ids


@pytest.mark.parametrize("name", FAMILIES)
def test_with_a_system_message(rooms, name, caplog):
    room = rooms(name)
    given = [turn("system", SYSTEM), *PLAIN]
    if room.family.drops_system:
        for make, messages, system in ((sft, given, None), (prompts, given, None), (sft, PLAIN, SYSTEM)):
            message = refusal(make, room.tokenizer, [{"messages": messages}], system=system)
            assert names_row(message, 1) and "ystem" in message
        return
    check_last(room, given, caplog, exact=name not in REWRITTEN)
    (in_the_row,) = prompts(room.tokenizer, [{"messages": given}])
    (in_the_recipe,) = prompts(room.tokenizer, [{"messages": PLAIN}], system=SYSTEM)
    assert in_the_row.prompt_ids == in_the_recipe.prompt_ids
    assert SYSTEM in room.tokenizer.decode(in_the_row.prompt_ids)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_last_answer_of_several_turns(rooms, name, caplog):
    check_last(rooms(name), LONG, caplog, exact=name not in REWRITTEN)


@pytest.mark.parametrize("name", FAMILIES)
def test_each_answer_of_several_turns(rooms, name, caplog):
    room = rooms(name)
    examples = built_all(room, LONG, caplog, learn="all")
    said = warnings_of(caplog)
    if not examples:
        assert name in REWRITTEN
        return
    runs = [run for example in examples for run in learned_runs(example)]
    if len(examples) == 1:
        whole = examples[0].prompt_ids + examples[0].completion_ids
        assert as_in_one_piece(room, whole, room.one_piece(LONG)) or of_a_difference(said)
    else:  # one an answer, behind its own prompt
        assert of_a_difference(said)
        for place, example in enumerate(examples):
            (prompt,) = prompts(room.tokenizer, [{"messages": LONG[: 2 * place + 2]}])
            assert example.prompt_ids == prompt.prompt_ids
    check_counts(said)
    answers = [one["content"] for one in LONG if one["role"] == "assistant"]
    asked = [one["content"] for one in LONG if one["role"] == "user"]
    assert len(runs) == len(answers)
    for place, (run, answer) in enumerate(zip(runs, answers, strict=True)):
        last = place == len(answers) - 1
        if last or room.family.turn_end is not None:
            between = room.family.middle_end  # ends a turn, and the conversation goes on
            if not last and between is not None and run[-1] == room.tokenizer.convert_tokens_to_ids(between):
                run = [*run[:-1], min(room.stops)]
            check_run(room, run, answer, [*asked, *(other for other in answers if other != answer)], said)
        else:
            assert answer in room.tokenizer.decode(run)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_answer_that_thinks_first(rooms, name, caplog):
    check_last(rooms(name), talk(ASKED, THOUGHT), caplog, exact=name not in RETHOUGHT)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    "thought",
    [
        "<think>A lake.</think>It is Como.",
        "<think>\n\n  A lake.\n\n</think>\n\n\nIt is Como.",
        "A lake.\n</think>\n\nIt is Como.",
        "<think>\nA lake.\n</think>\n\nNo: <think>\nComo.\n</think>\n\nIt is Como.",
        "<think>\nIt is Como.",
    ],
)
def test_thoughts_in_other_forms_are_learned_as_given_or_it_is_said(rooms, name, thought, caplog):
    room = rooms(name)
    example = built(room, talk(ASKED, thought), caplog)
    if example is None:
        return
    whole = example.prompt_ids + example.completion_ids
    assert whole[-1] in room.stops and example.completion_ids.count(whole[-1]) == 1
    kept = room.tokenizer.decode(whole[:-1]).rstrip().endswith(thought)
    assert kept or of_a_difference(warnings_of(caplog)), room.tokenizer.decode(whole)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("answer", ["\nComo.", "\n\nComo.\n", "  Como.", "Como. ", "'s lake", "\tComo"])
def test_white_space_around_an_answer_is_learned_or_it_is_said(rooms, name, answer, caplog):
    room = rooms(name)
    messages = talk(ASKED, answer)
    example = built(room, messages, caplog)
    if example is None:
        return
    whole = example.prompt_ids + example.completion_ids
    differs = of_a_difference(warnings_of(caplog))
    assert room.tokenizer.decode(whole[:-1]).endswith((answer, answer + room.family.pads)) or differs, whole
    assert as_in_one_piece(room, whole, room.one_piece(messages)) or differs, room.tokenizer.decode(whole)


@pytest.mark.parametrize("name", FAMILIES)
def test_thoughts_of_earlier_answers_are_learned_or_it_is_said(rooms, name, caplog):
    room = rooms(name)
    messages = talk(ASKED, THOUGHT, "And a sea?", "<think>\nA sea.\n</think>\n\nThe Baltic.")
    examples = built_all(room, messages, caplog, learn="all")
    runs = [run for example in examples for run in learned_runs(example)]
    assert len(runs) == (2 if examples else 0)
    for run, thought in zip(runs, ("A lake, they ask.", "A sea."), strict=False):
        assert thought in room.tokenizer.decode(run) or of_a_difference(warnings_of(caplog))
        assert [one for one in run if one in room.stops] == run[-1:]


@pytest.mark.parametrize("name", SWITCHED)
def test_keyword_arguments_change_all_prompts_alike(rooms, name, caplog):
    room = rooms(name)
    switch = {"chat_template_kwargs": room.family.switch}
    for messages in (PLAIN, LONG):
        rows = [{"messages": messages}]
        (without,) = prompts(room.tokenizer, rows)
        (prompt,) = prompts(room.tokenizer, rows, **switch)
        assert prompt.prompt_ids == room.one_piece(messages[:-1], add_generation_prompt=True, **room.family.switch)
        assert prompt.prompt_ids != without.prompt_ids
        thinks = name == "qwen3_5_nothink"  # where the arguments open a thought that the answer lacks
        check_last(room, messages, caplog, exact=not thinks, **switch)
        example = built(room, messages, caplog, **switch)
        assert example is None or example.prompt_ids == prompt.prompt_ids


def test_keyword_arguments_that_a_template_does_not_read_change_nothing(rooms):
    room = rooms("chatml")
    (without,) = prompts(room.tokenizer, [{"messages": PLAIN}])
    (prompt,) = prompts(room.tokenizer, [{"messages": PLAIN}], chat_template_kwargs={"enable_thinking": False})
    assert prompt.prompt_ids == without.prompt_ids


@pytest.mark.parametrize("name", FAMILIES)
def test_the_end_of_a_turn_is_a_stop(rooms, name):
    room = rooms(name)
    end = room.family.turn_end
    if end is not None:
        assert room.tokenizer.convert_tokens_to_ids(end) in room.stops
    written = [token for token in room.family.markers if token not in room.family.stops and token != end]
    assert not room.stops.intersection(room.tokenizer.convert_tokens_to_ids(written))


@pytest.mark.parametrize("name", FAMILIES)
def test_no_text_of_the_user_is_read_as_a_special_token_unsaid(rooms, name, caplog):
    room = rooms(name)
    end = room.family.turn_end or room.family.eos
    messages = talk(f"What does {end} mean in a template?", ANSWERED)
    example = built(room, messages, caplog)
    said = warnings_of(caplog)
    plain = built(room, talk("What does a tag like <b> or <|x|> mean in a template?", ANSWERED), caplog)
    assert not [one for one in warnings_of(caplog) if "special" in one]
    if example is not None and not said:
        token = room.tokenizer.convert_tokens_to_ids(end)
        assert plain is not None
        assert example.prompt_ids.count(token) == plain.prompt_ids.count(token)
