"""Modelfiles: the chat format is found by what a template writes, and Go renders the same text."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from chat_families import FAMILIES, family_tokenizer
from tiny_models import byte_tokenizer, tiny_config

from lowmem_rlhf.display.lines import Lines
from lowmem_rlhf.export.ollama.formats import FORMATS
from lowmem_rlhf.export.ollama.write import PROBE, SYSTEM, detect_format, modelfile, write_ollama
from lowmem_rlhf.progress import shown_by

GO = shutil.which("go") or os.environ.get("GO")
LAST = "{% if add_generation_prompt %}"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    + LAST
    + "<|im_start|>assistant\n{% endif %}"
)
DEFAULT = "{% if messages[0].role != 'system' %}<|im_start|>system\nBe good<|im_end|>\n{% endif %}" + CHATML
GEMMA_TURNS = (
    "{% for m in rest %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ first if loop.first }}{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    + LAST
    + "<start_of_turn>model\n{% endif %}"
)
REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
GEMMA2 = "{{ bos_token }}" + REFUSES + "{% set rest = messages %}{% set first = '' %}" + GEMMA_TURNS
GEMMA3 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}" + GEMMA_TURNS
)
_HEADER = "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}<|eot_id|>{% endfor %}"
_ANSWER = LAST + "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
LLAMA3 = "{{ bos_token }}{% for m in messages %}" + _HEADER + _ANSWER
LLAMA31 = (
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{{ bos_token }}"
    "{% if messages[0].role == 'system' %}{% set s = messages[0].content %}{% set messages = messages[1:] %}"
    "{% else %}{% set s = '' %}{% endif %}<|start_header_id|>system<|end_header_id|>\n\n"
    "Cutting Knowledge Date: December 2023\nToday Date: {{ date_string }}\n\n{{ s }}<|eot_id|>"
    "{% for m in messages %}" + _HEADER + _ANSWER
)
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set s = messages[0].content %}{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}{% if loop.first and s is defined %}"
    "{% set c = '<<SYS>>\n' + s + '\n<</SYS>>\n\n' + m.content %}{% else %}{% set c = m.content %}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + c + ' [/INST]' }}"
    "{% else %}{{ ' ' + c + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set s = messages[0].content %}"
    "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% if loop.last and s is defined %}{{ '[INST] ' + s + '\n\n' + m.content + '[/INST]' }}"
    "{% else %}{{ '[INST] ' + m.content + '[/INST]' }}{% endif %}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content + eos_token }}\n{% endfor %}"
    + LAST
    + "{{ '<|assistant|>' }}\n{% endif %}"
)
PHI4 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>{% endfor %}"
    + LAST
    + "<|im_start|>assistant<|im_sep|>{% endif %}"
)
OWN = "{% for m in messages %}{{ m.role }} says {{ m.content }}. {% endfor %}"


def tokenizer(template):
    made = byte_tokenizer()
    made.chat_template = template
    return made


@pytest.mark.parametrize(
    ("template", "name", "system", "has_place"),
    [
        (CHATML, "ChatML", "", True),
        (DEFAULT, "ChatML", "Be good", True),
        (GEMMA2, "Gemma", "", False),
        (GEMMA3, "Gemma", "", True),
        (LLAMA3, "Llama 3", "", True),
        (LLAMA31, "Llama 3.1", "", True),
        (LLAMA2, "Llama 2", "", True),
        (MISTRAL, "Mistral 0.3", "", False),  # before the last turn, where no format here has it
        (ZEPHYR, "Zephyr", "", True),
        (PHI4, "Phi 4", "", True),
    ],
)
def test_a_format_is_found_by_what_the_template_writes(template, name, system, has_place):
    found = detect_format(tokenizer(template))
    assert (found.format.name, found.system) == (name, system)
    assert bool(found.format.system or found.format.merged) == has_place


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("qwen3_5_think", "ChatML, thinking"),
        ("qwen3_5_nothink", "ChatML, no thought"),
        ("qwen3_6", "ChatML, thinking"),
        ("gemma4_v2", "Gemma 4"),
        ("gemma4_v5", "Gemma 4"),
        ("granite", "Granite"),
        ("lfm2_2_5_v2", "ChatML"),
        ("phi4_mini", "Phi 4 mini"),
        ("mistral_v7", "Mistral Nemo"),
    ],
)
def test_the_format_of_a_makers_template_is_found(family, name):
    found = detect_format(family_tokenizer(FAMILIES[family]))
    assert found.format.name == name and found.system == ""


@pytest.mark.parametrize("template", [OWN, None, CHATML.replace("<|im_end|>\n", "<|im_end|>", 1)])
def test_a_template_that_writes_another_text_is_not_known(template):
    assert detect_format(tokenizer(template)) is None


def test_go_renders_the_same_text(tmp_path):
    if GO is None:
        pytest.skip("no Go compiler: install one, or name it in $GO")
    chats = [PROBE, [SYSTEM, *PROBE], PROBE[:1], [SYSTEM, *PROBE[:1]]]
    jobs = [
        {
            "template": one.template(),
            "system": "".join(m["content"] for m in chat if m["role"] == "system"),
            "messages": chat,
        }
        for one in FORMATS
        for chat in [*chats, PROBE[:2]]
    ]
    source = Path(__file__).with_name("ollama_template.go")
    env = {**os.environ, "GOCACHE": str(tmp_path), "GOPATH": str(tmp_path), "GO111MODULE": "off", "GOFLAGS": "-p=1"}
    done = subprocess.run([GO, "run", source], input=json.dumps(jobs), capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    said = iter(json.loads(done.stdout))
    for one in FORMATS:
        for chat in chats:
            assert next(said) == one.render(chat), one.name
        begun = one.render(PROBE[:1]).removesuffix(one.begin) + one.assistant[0] + "A1"
        assert next(said) == begun, "an answer that is begun is gone on with"


def test_a_modelfile_has_the_weights_the_template_stops_and_parameters():
    given = {"temperature": 0.7, "num_predict": 64, "min_p": None}
    text, said = modelfile("m.gguf", tokenizer(DEFAULT), given, ["</s>", "<|im_end|>"])
    assert text.startswith('FROM ./m.gguf\nTEMPLATE """') and said == "the chat template is ChatML's"
    assert text.endswith(
        'SYSTEM """Be good"""\nPARAMETER temperature 0.7\nPARAMETER num_predict 64\n'
        'PARAMETER stop "<|im_end|>"\nPARAMETER stop "</s>"\n'
    )
    text, said = modelfile("m.gguf", tokenizer(OWN), {}, ["</s>"])
    assert text == 'FROM ./m.gguf\nPARAMETER stop "</s>"\n' and "Ollama reads the GGUF's" in said
    text, said = modelfile("m.gguf", tokenizer(None), {}, [])
    assert 'TEMPLATE """{{ .Prompt }}"""' in text and "has no chat template" in said
    assert "a system text has no place in it" in modelfile("m.gguf", tokenizer(GEMMA2), {}, [])[1]


def test_a_modelfile_has_the_stop_strings_of_the_run():
    """Ollama's parser keeps line feeds and tabs within quotes, and quotes within three of them."""
    strings = ["\n\n", "Q:", 'say "no" now', "</s>", 'ends in "', "bell\x07"]
    text, said = modelfile("m.gguf", tokenizer(OWN), {}, ["</s>"], strings)
    assert text == (
        'FROM ./m.gguf\nPARAMETER stop "</s>"\nPARAMETER stop "\n\n"\nPARAMETER stop "Q:"\n'
        'PARAMETER stop """say "no" now"""\n'
    )
    assert said.endswith("; a Modelfile cannot hold the stop strings 'ends in \"', 'bell\\x07', which are left out")


def test_the_weights_are_linked_and_not_copied(tmp_path, capfd):
    folder, target, weights = tmp_path / "merged", tmp_path / "ollama", tmp_path / "w.gguf"
    tokenizer(CHATML).save_pretrained(folder)
    tiny_config("llama", eos_token_id=[3, 2]).save_pretrained(folder)
    weights.write_bytes(b"GGUF")
    for gguf in (weights, target / "w.gguf"):  # the second time it lies there already
        with shown_by(Lines()):
            write_ollama(folder, gguf, target, {"temperature": 1.0})
        assert sorted(path.name for path in target.iterdir()) == ["Modelfile", "w.gguf"]
        assert (target / "w.gguf").stat().st_ino == weights.stat().st_ino
    text = (target / "Modelfile").read_text()
    assert "PARAMETER num_ctx 128\nPARAMETER temperature 1.0\n" in text
    assert 'stop "<|im_end|>"\nPARAMETER stop "</s>"\nPARAMETER stop "<s>"\n' in text
    assert capfd.readouterr().err.count("the chat template is ChatML's\n") == 2
