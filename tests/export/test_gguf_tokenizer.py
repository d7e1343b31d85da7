"""A GGUF tokenizes as training did: in llama.cpp and as transformers reads it; anything else is refused."""

import json

import pytest
from gguf import GGUFReader
from gguf_cases import SPECIAL, TEXTS, byte_level, llama_cpp, model_folder, sentencepiece, split
from tiny_models import byte_tokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.export.gguf.tokenizer import describe_tokenizer
from lowmem_rlhf.export.gguf.write import write_gguf

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = _WORDS + r"|\p{N}{1,3}|" + _REST
QWEN2 = _WORDS + r"|\p{N}|" + _REST
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = (
    TEKKEN.replace(r"\p{M}]+|", r"\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|")
    .replace(r"\p{M}]*|\p{N}|", r"\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}|")
)  # fmt: skip
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
SMOLLM = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2])
MAKERS = {
    "gpt-2": lambda: byte_level(GPT2),
    "smollm": lambda: byte_level(SMOLLM),
    "llama-bpe": lambda: byte_level(split(LLAMA3), ignore_merges=True),
    "dbrx": lambda: byte_level(split(LLAMA3)),
    "qwen2": lambda: byte_level(split(QWEN2)),
    "tekken": lambda: byte_level(split(TEKKEN), ignore_merges=True),
    "gpt-4o": lambda: byte_level(split(GPT4O)),
    "prefix": lambda: sentencepiece(prefix=True),
    "no-prefix": lambda: sentencepiece(prefix=False),
}


@pytest.fixture(scope="module", params=sorted(MAKERS))
def case(request, tmp_path_factory):
    """Return (llama.cpp's name, tokenizer, GGUF)."""
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer = MAKERS[request.param]()
    write_gguf(model_folder("llama", path / "model", tokenizer), path / "m.gguf", "f16")
    return request.param, AutoTokenizer.from_pretrained(path / "model"), path / "m.gguf"


def test_llama_cpp_has_the_same_ids(case):
    _, tokenizer, gguf = case
    assert llama_cpp(gguf, texts=TEXTS)["ids"] == [tokenizer(text)["input_ids"] for text in TEXTS]


def test_the_kind_is_named(case):
    name, tokenizer, gguf = case
    fields = {key: field.contents() for key, field in GGUFReader(gguf).fields.items() if "ggml" in key}
    if "prefix" in name:
        assert fields["tokenizer.ggml.model"] == "llama"
        assert fields["tokenizer.ggml.add_space_prefix"] == (name == "prefix")
    else:
        assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", name)
    assert fields["tokenizer.ggml.tokens"] == [
        tokenizer.convert_ids_to_tokens(index) for index in range(len(tokenizer))
    ]
    types = fields["tokenizer.ggml.token_type"]
    unknown = 2 if "prefix" in name else 3
    assert types[: len(SPECIAL)] == [unknown, 3, 3, 3] and types[-2:] == [4, 4]


def test_transformers_reads_the_same_ids(case):
    name, tokenizer, gguf = case
    if name in ("smollm", "no-prefix", "prefix"):
        pytest.skip("transformers has no splitting into digits for a GGUF, and makes Llama 2's legacy form of this one")
    again = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    for text in TEXTS:
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_rows_without_a_token_and_tokens_without_a_row(tmp_path):
    tokenizer = byte_level(GPT2)
    keys = describe_tokenizer(tokenizer, len(tokenizer) + 2)
    assert keys["tokenizer.ggml.tokens"][-2:] == [f"[PAD{len(tokenizer)}]", f"[PAD{len(tokenizer) + 1}]"]
    assert keys["tokenizer.ggml.token_type"][-2:] == [5, 5]
    keys = describe_tokenizer(tokenizer, len(tokenizer) - 1)  # </think> is left out
    assert keys["tokenizer.ggml.tokens"][-1] == "<think>"
    with pytest.raises(UserError, match="the embedding only 100 rows"):
        describe_tokenizer(tokenizer, 100)


def test_bos_eos_a_second_stop_and_the_template(tmp_path):
    tokenizer = byte_level(GPT2)
    tokenizer.chat_template = "{{ messages }}"
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": single,
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    framed = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)), bos_token="<s>", eos_token="</s>"
    )
    framed.chat_template = tokenizer.chat_template
    keys = describe_tokenizer(framed, 400, extra_stop=3)
    assert keys["tokenizer.ggml.add_bos_token"] is True and keys["tokenizer.ggml.add_eos_token"] is False
    ids = [keys[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "eot")]
    assert ids == [1, 2, 3] and keys["tokenizer.chat_template"] == "{{ messages }}"
    assert describe_tokenizer(tokenizer, 400)["tokenizer.ggml.add_bos_token"] is False


def test_a_byte_tokenizer_without_merges_loads(tmp_path):
    tokenizer = byte_tokenizer()
    write_gguf(model_folder("llama", tmp_path / "model", tokenizer), tmp_path / "m.gguf", "f16")
    assert llama_cpp(tmp_path / "m.gguf", texts=["Hello ÿ\n"])["ids"] == [tokenizer("Hello ÿ\n")["input_ids"]]


def _unigram():
    return Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0))


def _lowercase():
    tokenizer = byte_level(GPT2).backend_tokenizer
    tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (_unigram, "it is a Unigram tokenizer"),
        (_lowercase, "it rewrites text by Lowercase"),
        (lambda: byte_level(split(r"\p{L}+|\s+")).backend_tokenizer, "splits text in a way that is not in the list"),
        (lambda: byte_level(split(QWEN2), ignore_merges=True).backend_tokenizer, "treats merges otherwise"),
        (lambda: byte_level(pre_tokenizers.ByteLevel(True)).backend_tokenizer, "puts a space before every text"),
    ],
)
def test_a_tokenizer_that_llama_cpp_has_not_is_refused(make, why):
    with pytest.raises(UserError, match=why) as error:
        describe_tokenizer(PreTrainedTokenizerFast(tokenizer_object=make(), eos_token="a"), 500)
    assert "convert_hf_to_gguf.py" in str(error.value)
