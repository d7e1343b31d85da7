"""Tokenizers and tiny models of the case tests, made by name: what is odd about each stands beside it."""

from functools import cache
from pathlib import Path
from typing import Any

from chat_families import CHATML, SMOLLM, new_tokenizer

IM = ("<|im_start|>", "<|endoftext|>")
TAGS = ("<think>", "</think>")
GOES_ON = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
TURN = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
EACH = "{% for m in messages %}" + TURN + "{% endfor %}"
THOUGHT = "m.content.split('</think>')[0].split('<think>')[-1].strip('\n')"
SAID = "m.content.split('</think>')[-1].lstrip('\n')"
# Reasoning of earlier turns is left out, and the last turn has a block for it in any case.
THINKS = (
    "{% for m in messages %}{% if m.role != 'assistant' %}" + TURN + "{% elif loop.last %}"
    "{{ '<|im_start|>assistant\n<think>\n' + (" + THOUGHT + " if '</think>' in m.content else '') + "
    "'\n</think>\n\n' + " + SAID + " + '<|im_end|>\n' }}{% else %}"
    "{{ '<|im_start|>assistant\n' + " + SAID + " + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% if enable_thinking is defined and not "
    "enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
# Reasoning is cut from every answer.
FORGETS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ '<|im_start|>assistant\n' + m.content.split('</think>')[-1] + '<|im_end|>\n' }}{% else %}"
    + TURN
    + "{% endif %}{% endfor %}"
    + GOES_ON
)
TOOLS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}{% for c in m.tool_calls or [] %}"
    "{{ '<call>' + c.function.name }}{% for key, value in c.function.arguments|items %}"
    "{{ ' ' + key + '=' + value|string }}{% endfor %}{{ '</call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    + GOES_ON
)
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('there is no system role here') }}{% endif %}" + CHATML
)
# A system text of the template's own where the given one is empty.
INSISTS = (
    "{% if messages[0].role != 'system' or not messages[0].content %}"
    "{{ '<|im_start|>system\nYou are a small helper<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{% if m.role != 'system' or m.content %}" + TURN + "{% endif %}{% endfor %}" + GOES_ON
)

TEMPLATES: dict[str, str | None] = {
    "chatml": CHATML,
    "thinks": THINKS,
    "forgets": FORGETS,
    "forgets_and_opens": FORGETS.replace(GOES_ON, GOES_ON.replace("assistant\n", "assistant\n<think>\n")),
    "tools": TOOLS,
    "no_system": NO_SYSTEM,
    "own_system": SMOLLM,
    "insists": INSISTS,
    "plain": None,
}


@cache
def tokenizer_named(name: str) -> Any:
    """Return a tokenizer with one of `TEMPLATES`, ending in ``<|im_end|>``, or one of these.

    ``adds_eos`` puts the end behind every text, ``adds_both`` a beginning too; ``base`` has a chat template whose
    turns end in another token than its texts; ``tools_added`` has two tokens more than the model's embedding.
    """
    if name == "adds_eos":
        return new_tokenizer(None, "<|im_end|>", None, IM, adds_eos=True)
    if name == "adds_both":
        return new_tokenizer(None, "</s>", "<s>", adds_eos=True)
    if name == "base":
        return new_tokenizer(CHATML, "<|endoftext|>", None, ("<|im_start|>", "<|im_end|>"))
    if name == "tools_added":
        return new_tokenizer(CHATML, "<|im_end|>", None, (*IM, "<tool>", "</tool>"))
    return new_tokenizer(TEMPLATES[name], "<|im_end|>", None, IM, TAGS)


def with_template(template: str) -> Any:
    """Return a tokenizer with this chat template."""
    return new_tokenizer(template, "<|im_end|>", None, IM, TAGS)


def save_model(name: str, folder: Path) -> Path:
    """Write a random two-layer Llama with the tokenizer of that name."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from lowmem_rlhf.engine.load import quiet

    tokenizer = tokenizer_named(name)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(tokenizer) - (2 if name == "tools_added" else 0),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    with quiet():
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
