"""What ends a turn, rows without a token, tokens without a row."""

from pathlib import Path

import pytest
import torch
import trl
from tiny_models import CPU, byte_tokenizer, tiny_model

from lowmem_rlhf.algorithms.sft.settings import SFTSettings
from lowmem_rlhf.architecture.stops import stop_ids_of, text_ids, turn_end, written_text
from lowmem_rlhf.architecture.vocabulary import check_ids, missing_rows
from lowmem_rlhf.data.supervised import build_supervised
from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.ladder import RolloutLimits
from lowmem_rlhf.engine.packing import Group
from lowmem_rlhf.engine.roles import POLICY
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.recipe.sections import DataConfig
from lowmem_rlhf.rollout.engine import wave_engine
from lowmem_rlhf.rollout.sampling import Sampling, draw
from lowmem_rlhf.rollout.stream import stream

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LIMITS = RolloutLimits(64, 64, 16)


def with_template(template, *tokens, **special):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    for name, token in special.items():
        setattr(tokenizer, name, token)
    tokenizer.chat_template = template
    return tokenizer


def ends(tokenizer, **kwargs):
    return {tokenizer.convert_ids_to_tokens(index) for index in turn_end(tokenizer, **kwargs)}


@pytest.mark.parametrize(
    ("family", "tokens", "end"),
    [
        ("llama3", "<|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|>", "<|eot_id|>"),
        ("gemma", "<bos> <start_of_turn> <end_of_turn>", "<end_of_turn>"),
        ("gemma3", "<bos> <start_of_turn> <end_of_turn>", "<end_of_turn>"),
        ("phi3", "<|system|> <|user|> <|assistant|> <|end|> <|endoftext|>", "<|end|>"),
        ("qwen2_5", "<|im_start|> <|im_end|>", "<|im_end|>"),
        ("qwen3", "<|im_start|> <|im_end|> <think> </think>", "<|im_end|>"),
        ("llava_next", "[INST] [/INST] </s>", "</s>"),
        # the reasoning of a turn is followed by <|end|>, and only then comes the answer
        ("gptoss", "<|start|> <|channel|> <|message|> <|end|> <|return|>", "<|return|>"),
        ("glm4moe", "[gMASK] <sop> <|system|> <|user|> <|assistant|>", "<|user|>"),
        ("cohere", "<|START_OF_TURN_TOKEN|> <|END_OF_TURN_TOKEN|> <|USER_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
        (
            "deepseekv3",
            "<｜begin▁of▁sentence｜> <｜User｜> <｜Assistant｜> <｜end▁of▁sentence｜>",
            "<｜end▁of▁sentence｜>",
        ),
        ("smolvlm", "<|im_start|> <end_of_utterance>", "<end_of_utterance>"),
    ],
)
def test_the_token_that_ends_a_turn_in_real_templates(family, tokens, end):
    tokenizer = with_template((TEMPLATES / f"{family}.jinja").read_text(encoding="utf-8"), *tokens.split())
    assert ends(tokenizer) == {end}


def test_of_several_tokens_behind_an_answer_the_tokenizers_own_is_the_end():
    template = (TEMPLATES / "cohere2.jinja").read_text(encoding="utf-8")
    names = ["<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>"]
    assert ends(with_template(template, *names, eos_token=names[1])) == {"<|END_OF_TURN_TOKEN|>"}
    assert ends(with_template(template, *names)) == {"<|END_RESPONSE|>"}


STRICT = "{% if messages[0].role == 'system' or messages|length % 2 %}{{ raise_exception('no') }}{% endif %}" + CHATML
PARTS = CHATML.replace("m.content", "m.content[0].text|trim")
ONE_TURN = "{% if messages|length > 2 %}{{ raise_exception('one turn') }}{% endif %}" + CHATML
SYSTEM_FIRST = "{% if messages[0].role != 'system' %}{{ raise_exception('system') }}{% endif %}" + CHATML
CHOSEN = "{% if kind is defined %}" + CHATML + "{% else %}{{ raise_exception('which?') }}{% endif %}"


@pytest.mark.parametrize("template", [CHATML, STRICT, PARTS, ONE_TURN, SYSTEM_FIRST])
def test_templates_that_insist_on_something_are_asked_in_their_way(template):
    assert ends(with_template(template, "<|im_start|>", "<|im_end|>")) == {"<|im_end|>"}


def test_a_templates_arguments_are_given():
    tokenizer = with_template(CHOSEN, "<|im_start|>", "<|im_end|>")
    assert (ends(tokenizer), ends(tokenizer, kind="x")) == (set(), {"<|im_end|>"})


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{{ raise_exception('never') }}",
        "{{ messages[0].nothing.at.all }}",
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
        "{% for m in messages %}{{ '<s>' + m.role + m.content }}{% endfor %}",  # a beginning is no end
        "{% for m in messages %}{{ m.content | length }}{% endfor %}",
    ],
)
def test_no_end_where_the_template_has_none(template):
    assert ends(with_template(template)) == set()


def test_an_unknown_word_is_no_end():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "user": 1, "assistant": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    tokenizer.chat_template = CHATML
    assert ends(tokenizer) == set()
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    assert ends(tokenizer) == {"<|im_end|>"}


def base_of(tokenizer, rows, **changes):
    """Return the base of a tiny model that ends a text in </s> alone, as its configurations have it."""
    model = tiny_model("llama", vocab_size=rows, eos_token_id=3, **changes)
    return SharedBase(model, tokenizer, "tiny/llama", r=4)


def states_of(base, prompt, completion):
    """Return the hidden states (L, H) that a completion's tokens are predicted from."""
    batch = base.layout.lay_out([Group(prompt, [completion], [0])], CPU)
    return base.states(batch).index_select(0, batch.predict)


@torch.no_grad()
def answer_with(base, token, prompt):
    """Let a base begin every answer to a prompt with a token."""
    with base.role(POLICY):
        [state] = states_of(base, prompt, [0])
    base.head.module.weight[token] = 40.0 * state / state.square().sum()


def test_rollouts_and_what_sft_learns_end_at_the_token_that_ends_a_turn():
    """A base model with a chat template: its tokenizer calls the end of a document its end."""
    tokenizer = with_template(CHATML, "<|im_start|>", "<|im_end|>")
    end, eos = tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id
    base = base_of(tokenizer, len(tokenizer))
    assert base.stop_ids == {end, eos} == stop_ids_of(tokenizer, base.model.config, None)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "How many?"}], add_generation_prompt=True, return_dict=False
    )
    answer_with(base, end, prompt)
    with base.role(POLICY):
        [drawn] = wave_engine(base).generate([prompt], 4, 6, Sampling(), LIMITS, seed=0)
        assert list(stream(base, prompt, 6, Sampling(), 0, 16)) == []
    assert [(one.ids, one.truncated) for one in drawn] == [([end], False)] * 4
    data = DataConfig(train="-", prompt="q", completion="a", answer=None)
    [learned] = build_supervised([{"q": "How many?", "a": "5"}], data, SFTSettings(), tokenizer, base.stop_ids)
    assert learned.completion_ids == [tokenizer.convert_tokens_to_ids("5"), end]


def test_another_tokenizer_or_template_has_another_end():
    base = base_of(with_template(None, "<|im_start|>", "<|im_end|>"), 262)
    assert base.stop_ids == {3}
    base.tokenizer.chat_template = CHATML
    assert base.stop_ids == {3, 261}
    base.tokenizer.chat_template = "{% if style is not defined %}{{ raise_exception('style?') }}{% endif %}" + CHATML
    assert base.stop_ids == {3}, "the template takes no conversation without its style"
    base.chat_template_kwargs = {"style": "brief"}
    assert base.stop_ids == {3, 261}


PADDED = {"rows behind the tokenizer's": (300, set(range(260, 300))), "a hole": (261, {7, 100})}


@pytest.mark.parametrize("case", PADDED)
@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(0.7, top_k=5), Sampling(top_p=0.5, min_p=0.1), Sampling(0.0)]
)
def test_rows_without_a_token_are_never_drawn(case, sampling, monkeypatch):
    """They have nearly all of the probability; the log-probs stay those of the whole vocabulary, as in training."""
    rows, without = PADDED[case]
    tokenizer = with_template(None, *(["<x>"] if case == "a hole" else []))
    vocab = {token: index for token, index in tokenizer.get_vocab().items() if index not in without}
    monkeypatch.setattr(type(tokenizer), "get_vocab", lambda self: vocab)
    base = base_of(tokenizer, rows, tie_word_embeddings=False)
    assert set(missing_rows(tokenizer, rows)) == without == set(base.missing.nonzero()[:, 0].tolist())
    assert base.missing is base.missing
    with torch.no_grad():
        base.head.module.weight[sorted(without)] *= 300.0
    prompts = [[40, 41, 42], [50, 51]]
    with base.role(POLICY):
        drawn = [one for own in wave_engine(base).generate(prompts, 8, 5, sampling, LIMITS, seed=1) for one in own]
        assert not set(stream(base, prompts[0], 5, sampling, 1, 16)) & without
        whole = full_logps(base, prompts, drawn, sampling.temperature or 1.0)
    assert not {index for one in drawn for index in one.ids} & without
    torch.testing.assert_close(torch.tensor([x for one in drawn for x in one.logps]), whole, rtol=1e-4, atol=1e-3)
    assert whole.mean() < -5


@torch.no_grad()
def full_logps(base, prompts, drawn, temperature):
    """Return the log-probs of completions, eight a prompt, over the whole vocabulary."""
    found = []
    for row, one in enumerate(drawn):
        logits = base.head.logits(states_of(base, prompts[row // 8], one.ids))
        found.append((logits / temperature).log_softmax(-1).gather(-1, torch.tensor(one.ids)[:, None])[:, 0])
    return torch.cat(found)


def test_a_mask_of_what_has_no_weight_changes_no_draw():
    """The tokens are drawn in the proportions that they have among themselves."""
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(0))
    missing = torch.zeros(12, dtype=torch.bool)
    missing[[2, 11]] = True
    uniforms = torch.rand(1, 4000, generator=torch.Generator().manual_seed(1))
    tokens, logps = draw(logits, uniforms, Sampling(), missing)
    want = logits[0].masked_fill(missing, -torch.inf).softmax(-1)
    counts = torch.bincount(tokens[0], minlength=12) / 4000
    assert float((counts - want).abs().max()) < 0.03
    torch.testing.assert_close(logps, logits.log_softmax(-1).gather(-1, tokens))
    least = logits.masked_fill(missing, 0.0).clone()
    least[:, missing] = -torch.inf  # rows that have no probability anyhow
    assert torch.equal(draw(least, uniforms, Sampling(), missing)[0], draw(least, uniforms, Sampling())[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_mask_is_right_in_every_dtype(dtype):
    logits = torch.full((3, 40), 1.0, dtype=dtype)
    logits[:, 30:] = 60000.0 if dtype == torch.float16 else 1e30
    missing = torch.arange(40) >= 30
    for sampling in (Sampling(), Sampling(0.0), Sampling(0.5, top_k=3, top_p=0.9, min_p=0.1)):
        tokens, logps = draw(logits, torch.tensor([0.0, 0.5, 1 - 2**-24]), sampling, missing)
        assert int(tokens.max()) < 30
        assert bool((logps < -1e4).all())


def test_a_vocabulary_whose_every_row_has_a_token_has_no_mask():
    assert base_of(with_template(None), 260).missing is None


def test_ids_beyond_the_embedding_are_refused_where_they_are_used():
    tokenizer = with_template(CHATML, "<tool>", "</tool>")
    rows = len(tokenizer) - 2
    check_ids(tokenizer, rows, tokenizer(["What is 2+2?", ""])["input_ids"])  # unused, as Gemma 3's last token is
    check_ids(tokenizer, len(tokenizer), tokenizer(["<tool>"])["input_ids"])
    with pytest.raises(UserError, match=r"the tokenizer has 262 tokens, the embedding 260 rows: .* <tool>, </tool>, "):
        check_ids(tokenizer, rows, tokenizer(["plain", "Call <tool>x</tool>."])["input_ids"])
    with pytest.raises(UserError, match="use </tool>, for"):
        check_ids(tokenizer, rows, [[40, 261], [40]])
    many = with_template(None, *(f"<{n}>" for n in range(9)))
    with pytest.raises(UserError, match="269 tokens, the embedding 260 rows: the texts use <0>, <1>, <2> and 6 more"):
        check_ids(many, 260, iter([list(range(255, 269))]))


def test_a_prompt_goes_on_without_the_end_that_a_tokenizer_puts_behind_texts():
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer()
    plain = tokenizer("to be")["input_ids"]
    parts = [("<s>", 2), ("</s>", 3)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=parts)
    assert tokenizer("to be")["input_ids"] == [2, *plain, 3]
    assert text_ids(tokenizer, "to be", frozenset([3])) == [2, *plain]
    assert text_ids(tokenizer, "to be</s>", frozenset([3])) == [2, *plain, 3]
    assert text_ids(byte_tokenizer(), "to be</s>", frozenset([3])) == [*plain, 3]


def test_what_was_written_is_the_text_of_all_tokens_but_the_stop():
    tokenizer = with_template(CHATML, "<think>", "<|im_start|>", "<|im_end|>")
    stops = frozenset([tokenizer.convert_tokens_to_ids("<|im_end|>"), 3])
    ids = tokenizer("<think> a , b <s> 's</s><|im_end|>")["input_ids"]
    assert written_text(tokenizer, ids, stops) == "<think> a , b <s> 's</s>"
    assert written_text(tokenizer, ids[:-1], stops) == "<think> a , b <s> 's"
    assert written_text(tokenizer, ids[:-2], stops) == "<think> a , b <s> 's"
    assert written_text(tokenizer, [], stops) == ""
