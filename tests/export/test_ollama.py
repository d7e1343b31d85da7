"""Modelfiles: the chat format is found by what the template writes, and the Go template stands for the same text."""

import re

import pytest
from tiny_models import byte_tokenizer

from lowmem_rlhf.export.ollama import FORMATS, PROBE, SYSTEM, find_format, modelfile, write_ollama

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DEFAULT_SYSTEM = "{% if messages[0].role != 'system' %}<|im_start|>system\nBe good<|im_end|>\n{% endif %}" + CHATML
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
OWN = "{% for m in messages %}{{ m.role }} says {{ m.content }}. {% endfor %}"


def tokenizer(template):
    made = byte_tokenizer()
    made.chat_template = template
    return made


@pytest.mark.parametrize(
    ("template", "name"),
    [
        (CHATML, "ChatML"),
        (DEFAULT_SYSTEM, "ChatML"),
        (GEMMA, "Gemma"),
        (LLAMA3, "Llama 3"),
        (OWN, None),
        (None, None),
    ],
)
def test_a_format_is_found_by_what_the_template_writes(template, name):
    found = find_format(tokenizer(template))
    assert (found.name if found else None) == name


def go(template, messages):
    """Render what the Go templates here consist of: one range over messages, and what depends on a system text."""
    system = next((m["content"] for m in messages if m["role"] == "system"), "")
    head, loop = template.split("{{- range $i, $_ := .Messages }}")
    body, tail = loop.split("{{- end }}{{- end }}")
    head = re.sub(r"\{\{- if \.System \}\}(.*?)\{\{ end \}\}", lambda m: m[1] if system else "", head, flags=re.S)
    user, assistant = body.split('{{- else if eq .Role "assistant" }}')
    user = user.removeprefix('{{- if eq .Role "user" }}')
    text = head.replace("{{ .System }}", system)
    for i, message in enumerate(m for m in messages if m["role"] != "system"):
        part = user if message["role"] == "user" else assistant
        shown = system if i == 0 else ""
        part = re.sub(r"\{\{ if and .*?\}\}(.*?)\{\{ end \}\}", lambda m, s=shown: m[1] if s else "", part, flags=re.S)
        text += part.replace("{{ $.System }}", shown).replace("{{ .Content }}", message["content"])
    return text + tail


@pytest.mark.parametrize("one", FORMATS, ids=lambda one: one.name)
@pytest.mark.parametrize("messages", [PROBE, [SYSTEM, *PROBE]], ids=["plain", "system"])
def test_the_go_template_writes_the_same_text(one, messages):
    assert go(one.template(), messages) == one.render(messages)


def test_a_modelfile_has_the_weights_the_template_stops_and_parameters():
    text, said = modelfile("m.gguf", tokenizer(CHATML), {"temperature": 0.7, "num_predict": 64})
    assert text.startswith("FROM ./m.gguf\n") and "ChatML" in said and 'TEMPLATE """' in text
    assert "PARAMETER temperature 0.7\nPARAMETER num_predict 64\n" in text
    assert 'PARAMETER stop "<|im_end|>"' in text and 'PARAMETER stop "</s>"' in text
    text, said = modelfile("m.gguf", tokenizer(OWN), {})
    assert "TEMPLATE" not in text and "reads the GGUF's own" in said


def test_the_weights_are_linked_and_not_copied(tmp_path):
    folder, target = tmp_path / "merged", tmp_path / "ollama"
    tokenizer(CHATML).save_pretrained(folder)
    target.mkdir()
    weights = tmp_path / "w.gguf"
    weights.write_bytes(b"GGUF")
    write_ollama(folder, weights, target, {"temperature": 1.0})
    assert (target / "w.gguf").stat().st_ino == weights.stat().st_ino
    assert (target / "Modelfile").read_text().startswith("FROM ./w.gguf")
