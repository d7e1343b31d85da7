"""Chat template families: the templates that trl ships and small ones written down here, each with its own tokens.

A tokenizer is a byte-level BPE trained on the license's text, whose pre-tokenizer keeps newlines together as Llama 3's
and Qwen's do (so that two of them become one token), or one that puts a space before every text as SentencePiece does.
"""

import json
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[2]
WORDS = r"'(?i:s|t|re|ve|m|ll|d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMOLLM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a small helper<|im_end|>\n' }}{% endif %}"
    + CHATML
)
# The system text goes into the first user turn, as Mistral 7B v0.3 and Llama 2 have it.
MISTRAL = (
    "{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}{{ bos_token }}{% for m in rest %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('After the optional system message, roles must alternate user/assistant') }}{% endif %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + (first if loop.first else '') + m.content + '[/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL_V7 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ '[SYSTEM_PROMPT]' + m.content + "
    "'[/SYSTEM_PROMPT]' }}{% elif m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ m.content + eos_token }}"
    "{% else %}{{ raise_exception('Only user, system and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0].content %}"
    "{% else %}{% set rest = messages %}{% set system = false %}{% endif %}{% for m in rest %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate') }}"
    "{% endif %}{% if loop.first and system %}{% set text = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m.content %}"
    "{% else %}{% set text = m.content %}{% endif %}{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}{% else %}{{ ' ' + text.strip() + ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
PHI4_MINI = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)
GRANITE = (
    "{% for m in messages %}{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content + '<|end_of_text|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"
)
ALPACA = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '### Instruction:\n' + m.content + '\n\n' }}"
    "{% elif m.role == 'assistant' %}{{ '### Response:\n' + m.content + eos_token + '\n\n' }}"
    "{% else %}{{ m.content + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)
VICUNA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content + ' ' }}{% elif m.role == 'user' %}"
    "{{ 'USER: ' + m.content + ' ' }}{% else %}{{ 'ASSISTANT: ' + m.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# Neither the end of a turn nor the end of the text is written: roles are words, a turn ends where the next one begins.
FALCON = (
    "{% for m in messages %}{% if not loop.first %}{{ '\n' }}{% endif %}{{ {'system': 'System', 'user': 'User', "
    "'assistant': 'Falcon'}[m.role] + ': ' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\nFalcon:' }}{% endif %}"
)


Space = Literal["", "first", "every"]


@dataclass(frozen=True)
class Family:
    """A template with its tokens, and what is known of it.

    Attributes:
        template: the template, or the name of a file among trl's without its ending.
        markers: special tokens beside ``eos`` and ``bos``.
        tags: tokens that are no special ones.
        turn_end: what the template writes behind an assistant's turn; None: nothing that is a token of its own.
        stops: tokens that the model's generation config names as stops.
        switch: keyword arguments that change the prompt.
        drops_system: the template refuses a system message.
        opens_thought: the prompt ends in an open ``<think>`` that a plain answer does not continue.
        middle_end: what it writes there while the conversation goes on, where that is another token.
        pads: what the template puts between an answer and the end of its turn.
        space: where the tokenizer puts a space as SentencePiece does: before the ``first`` text alone, before ``every``
            text that follows a special token, or nowhere.
    """

    template: str
    eos: str
    bos: str | None = None
    markers: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    turn_end: str | None = None
    stops: tuple[str, ...] = ()
    switch: dict[str, Any] = field(default_factory=dict)
    drops_system: bool = False
    opens_thought: bool = False
    middle_end: str | None = None
    pads: str = ""
    space: Space = ""


LLAMA3 = ("<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>")
IM = ("<|im_start|>", "<|endoftext|>")
THINK = ("<think>", "</think>")
GEMMA = ("<start_of_turn>", "<end_of_turn>")
GEMMA4 = ("<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|think|>")
PHI = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
COHERE = ("<|START_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>")
DEEPSEEK = ("<｜User｜>", "<｜Assistant｜>")
GLM = ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
HARMONY = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|call|>")
NO_THOUGHT, A_THOUGHT = {"enable_thinking": False}, {"enable_thinking": True}

FAMILIES = {
    "llama3": Family("llama3", "<|eot_id|>", "<|begin_of_text|>", LLAMA3, turn_end="<|eot_id|>"),
    "llama3_2": Family(
        "llama3_2", "<|eot_id|>", "<|begin_of_text|>", LLAMA3, turn_end="<|eot_id|>",
        switch={"date_string": "1 May 2020"},
    ),
    "qwen2_5": Family("qwen2_5", "<|im_end|>", None, IM, turn_end="<|im_end|>"),
    "qwen2_5_base": Family("qwen2_5", "<|endoftext|>", None, ("<|im_start|>", "<|im_end|>"), turn_end="<|im_end|>"),
    "qwen3": Family("qwen3", "<|im_end|>", None, IM, THINK, turn_end="<|im_end|>", switch=NO_THOUGHT),
    "qwen3_instruct_2507": Family("qwen3_instruct_2507", "<|im_end|>", None, IM, THINK, turn_end="<|im_end|>"),
    "qwen3_5_think": Family("qwen3_5_think", "<|im_end|>", None, IM, THINK, turn_end="<|im_end|>", switch=NO_THOUGHT),
    "qwen3_5_nothink": Family(
        "qwen3_5_nothink", "<|im_end|>", None, IM, THINK, turn_end="<|im_end|>", switch=A_THOUGHT
    ),
    "qwen3_6": Family("qwen3_6", "<|im_end|>", None, IM, THINK, turn_end="<|im_end|>", switch=NO_THOUGHT),
    "gemma": Family("gemma", "<eos>", "<bos>", GEMMA, turn_end="<end_of_turn>", drops_system=True),
    "gemma3": Family("gemma3", "<eos>", "<bos>", GEMMA, turn_end="<end_of_turn>"),
    "gemma4_v2": Family("gemma4_v2", "<eos>", "<bos>", GEMMA4, turn_end="<turn|>", switch=A_THOUGHT),
    "gemma4_v5": Family("gemma4_v5", "<eos>", "<bos>", GEMMA4, turn_end="<turn|>", switch=A_THOUGHT),
    "phi3": Family("phi3", "<|endoftext|>", None, PHI, turn_end="<|end|>"),
    "phi3_5": Family("phi3_5", "<|endoftext|>", None, PHI, turn_end="<|end|>"),
    "cohere": Family("cohere", "<|END_OF_TURN_TOKEN|>", "<BOS_TOKEN>", COHERE, turn_end="<|END_OF_TURN_TOKEN|>"),
    "deepseekv3": Family(
        "deepseekv3", "<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>", DEEPSEEK, THINK,
        turn_end="<｜end▁of▁sentence｜>", opens_thought=True,
    ),
    "deepseek_r1_distill": Family(
        "deepseek_r1_distill", "<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>", DEEPSEEK, THINK,
        turn_end="<｜end▁of▁sentence｜>", opens_thought=True,
    ),
    "glm4moe": Family(
        "glm4moe", "<|endoftext|>", None, GLM, THINK, stops=("<|endoftext|>", "<|user|>", "<|observation|>"),
        switch=NO_THOUGHT,
    ),
    "gptoss": Family(
        "gptoss", "<|return|>", "<|startoftext|>", HARMONY, turn_end="<|return|>", middle_end="<|end|>",
        switch={"reasoning_effort": "high"},
    ),
    "lfm2": Family("lfm2", "<|im_end|>", "<|startoftext|>", IM, turn_end="<|im_end|>"),
    "lfm2_v2": Family("lfm2_v2", "<|im_end|>", "<|startoftext|>", IM, turn_end="<|im_end|>"),
    "lfm2_2_5_v2": Family("lfm2_2_5_v2", "<|im_end|>", "<|startoftext|>", IM, THINK, turn_end="<|im_end|>"),
    "lfm2_2_5": Family("lfm2_2_5", "<|im_end|>", "<|startoftext|>", IM, THINK, turn_end="<|im_end|>"),
    "nemotron_3_nano": Family(
        "nemotron_3_nano", "<|im_end|>", None, IM, THINK, turn_end="<|im_end|>", switch=NO_THOUGHT, opens_thought=True
    ),
    "chatml": Family(CHATML, "<|im_end|>", None, IM, turn_end="<|im_end|>"),
    "smollm2": Family(SMOLLM, "<|im_end|>", "<|im_start|>", IM[1:], turn_end="<|im_end|>"),
    "mistral": Family(MISTRAL, "</s>", "<s>", ("[INST]", "[/INST]"), turn_end="</s>", space="first"),
    "mistral_v7": Family(
        MISTRAL_V7, "</s>", "<s>", ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"), turn_end="</s>"
    ),
    "llama2": Family(LLAMA2, "</s>", "<s>", turn_end="</s>", pads=" ", space="every"),
    "phi4_mini": Family(PHI4_MINI, "<|endoftext|>", None, PHI, turn_end="<|end|>"),
    "zephyr": Family(ZEPHYR, "</s>", "<s>", turn_end="</s>", space="every"),
    "granite": Family(
        GRANITE, "<|end_of_text|>", None, ("<|start_of_role|>", "<|end_of_role|>"), turn_end="<|end_of_text|>"
    ),
    "alpaca": Family(ALPACA, "</s>", "<s>", turn_end="</s>"),
    "vicuna": Family(VICUNA, "</s>", "<s>", turn_end="</s>", space="every"),
    "falcon": Family(FALCON, "<|endoftext|>"),
}  # fmt: skip


def template_of(family: Family) -> str:
    """Return the template's text, read from the installed trl where it is one of its files."""
    if "{" in family.template:
        return family.template
    trl = find_spec("trl")
    assert trl is not None and trl.origin is not None
    return (Path(trl.origin).parent / "chat_templates" / f"{family.template}.jinja").read_text(encoding="utf-8")


@cache
def _learned_vocabulary(space: Space) -> str:
    """Return a tokenizer file's content: a BPE of a few hundred merges."""
    text = (ROOT / "LICENSE").read_text(encoding="utf-8").splitlines(keepends=True)
    texts = ["".join(text), *text, "What is the answer? It is a lake. Yes, and the sea is not a lake, says the user."]
    if space:
        trained = Tokenizer(models.BPE())
        trained.pre_tokenizer = pre_tokenizers.Metaspace()
        trained.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=700, show_progress=False))
        found = json.loads(trained.to_str())["model"]
        symbols = ["<unk>", *(f"<0x{n:02X}>" for n in range(256)), *sorted(found["vocab"], key=found["vocab"].get)]
        vocab = {symbol: place for place, symbol in enumerate(s for s in symbols if s != "\n")}
        merges = [tuple(pair) for pair in found["merges"] if "\n" not in "".join(pair)]
        made = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        if space == "every":
            made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        else:
            made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        made.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        return made.to_str()
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False))
    return made.to_str()


def new_tokenizer(
    template: str | None,
    eos: str | None,
    bos: str | None = None,
    markers: tuple[str, ...] = (),
    tags: tuple[str, ...] = (),
    space: Space = "",
    adds_bos: bool = True,
    adds_eos: bool = False,
) -> PreTrainedTokenizerFast:
    """Return a tokenizer with these special tokens (``tags`` are added as plain ones) and this chat template."""
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_learned_vocabulary(space)), clean_up_tokenization_spaces=False
    )
    named = {"bos_token": bos, "eos_token": eos, "pad_token": eos}
    made.add_special_tokens({key: token for key, token in named.items() if token is not None})
    made.add_special_tokens({"additional_special_tokens": list(markers)})
    made.add_tokens(list(tags))
    first = f"{bos} " if bos and adds_bos else ""
    last = f" {eos}" if eos and adds_eos else ""
    if first or last:
        ids = [(token, made.convert_tokens_to_ids(token)) for token in {bos, eos} if token is not None]
        made.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first}$A{last}", special_tokens=ids
        )
    made.chat_template = template
    return made


def family_tokenizer(family: Family) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a family."""
    return new_tokenizer(template_of(family), family.eos, family.bos, family.markers, family.tags, family.space)


def family_stops(family: Family, tokenizer: Any) -> frozenset[int]:
    """Return what the package takes as the stops of a model of the family, whose generation config names ``stops``."""
    from lowmem_rlhf.architecture.stops import stop_ids_of

    named = [tokenizer.convert_tokens_to_ids(token) for token in family.stops or (family.eos,)]
    config = LlamaConfig(eos_token_id=tokenizer.eos_token_id)
    return frozenset(stop_ids_of(tokenizer, config, GenerationConfig(eos_token_id=named)))
