"""How texts begin and turns end in what leaves: as the run was trained."""

import json

import pytest
import torch
import yaml
from gguf import GGUFReader, GGUFWriter
from tiny_models import byte_tokenizer, tiny_model
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowmem_rlhf.display.lines import Lines
from lowmem_rlhf.export.framing import end_turns, framing, keep_controls, keep_template_options
from lowmem_rlhf.export.gguf.converter import set_frame
from lowmem_rlhf.export.gguf.tokenizer import ADD_BOS, ADD_EOS, describe_tokenizer
from lowmem_rlhf.export.gguf.write import second_stop
from lowmem_rlhf.progress import shown_by
from lowmem_rlhf.recipe.sections import DataConfig, GenerationConfig

TURNS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
BEGUN = "{{ bos_token }}" + TURNS
CHOSEN = "{% if begin is defined and begin %}{{ bos_token }}{% endif %}" + TURNS
REPEATED = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + TURNS
NEVER = "{{ raise_exception('never') }}"


def tokenizer_of(template, frame="$A", bos="<s>"):
    """Return a tokenizer that frames texts as said: its own <s> is 2, its </s> 3."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.bos_token = bos
    known = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>", "<|im_start|>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=frame, special_tokens=known)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("template", "frame", "data", "bos", "note"),
    [
        (TURNS, "<s> $A", {}, False, "add_bos_token=false: the chats that were trained on begin without <s>"),
        (NO_SYSTEM, "<s> $A", {"system": "Be good."}, False, "begin without <s>"),
        (CHOSEN, "<s> $A", {}, False, "begin without <s>"),
        (CHOSEN, "<s> $A", {"chat_template_kwargs": {"begin": True}}, True, ""),
        (BEGUN, "<s> $A", {}, True, ""),
        (REPEATED, "<s> $A", {}, True, ""),
        (BEGUN, "$A", {}, True, "add_bos_token=true: the chats that were trained on begin with <s>"),
        (TURNS, "$A", {}, False, ""),
        (TURNS, "<s> $A", {"chat": False}, True, ""),
        (BEGUN, "$A", {"chat": False}, False, ""),
        (None, "<s> $A", {}, True, ""),
        (TURNS, "<s> $A", {"text": "t"}, True, ""),
        (NEVER, "<s> $A", {}, True, ""),
        (TURNS, "<s> $A </s>", {}, False, "add_eos_token=false"),
    ],
)
def test_a_text_begins_as_the_run_was_trained(template, frame, data, bos, note):
    tokenizer = tokenizer_of(template, frame)
    found = framing(tokenizer, DataConfig(train="-", **data))
    assert found.add_bos is bos and note in " ".join(found.notes) and bool(found.notes) == bool(note)
    assert found.facts() == {"add_bos_token": bos, "add_eos_token": False, "notes": list(found.notes)}
    keys = describe_tokenizer(tokenizer, 262, add_bos=found.add_bos)
    assert (keys[ADD_BOS], keys[ADD_EOS], keys["tokenizer.ggml.bos_token_id"]) == (bos, False, 2)


def test_a_token_that_marks_roles_is_not_put_first_once_more():
    """SmolLM2's BOS is the token that begins each turn."""
    found = framing(tokenizer_of(TURNS, bos="<|im_start|>"), DataConfig(train="-"))
    assert (found.add_bos, found.notes) == (False, ())


@pytest.mark.parametrize("add_bos", [True, False, None])
def test_the_users_own_converter_is_corrected(tmp_path, add_bos, capsys):
    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_bool(ADD_BOS, True)
    writer.add_bool(ADD_EOS, True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with shown_by(Lines()):
        set_frame(tmp_path / "m.gguf", add_bos)
    fields = GGUFReader(tmp_path / "m.gguf").fields
    assert [fields[key].contents() for key in (ADD_BOS, ADD_EOS)] == [add_bos is not False, add_bos is None]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("content", ["", "GGUF?", "written by another version"])
def test_a_converters_file_that_says_nothing_is_spoken_of(tmp_path, content, capsys):
    path = tmp_path / "m.gguf"
    path.write_text(content + " ", encoding="utf-8")
    with shown_by(Lines()):
        set_frame(path, False)
    assert "cannot be read here" in capsys.readouterr().err
    writer = GGUFWriter(path, "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with shown_by(Lines()):
        set_frame(path, False)
    assert f"has no {ADD_BOS}, which should be false" in capsys.readouterr().err


def folder_of(path, template, generation=None, frame="<s> $A"):
    tokenizer = tokenizer_of(template, frame)
    model = tiny_model("llama", vocab_size=262, hidden_size=64, intermediate_size=128, max_position_embeddings=1024)
    model.save_pretrained(path)
    (path / "generation_config.json").unlink()
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("template", "generation", "ends"),
    [
        (TURNS, None, {"bos_token_id": 2, "eos_token_id": [3, 261], "pad_token_id": 0}),
        (TURNS, {"eos_token_id": [3, 9], "top_k": 5}, {"eos_token_id": [3, 9, 261], "top_k": 5}),
        (TURNS, {"eos_token_id": 261}, {"eos_token_id": 261}),
        (TURNS, {"top_k": 5}, {"eos_token_id": [3, 261], "top_k": 5}),
        (None, {"eos_token_id": 3}, {"eos_token_id": 3}),
        (REPEATED, {"eos_token_id": 3}, {"eos_token_id": 3}),
    ],
)
def test_a_merged_model_ends_turns_as_its_template_does(tmp_path, template, generation, ends):
    notes = end_turns(folder_of(tmp_path, template, generation))
    assert json.loads((tmp_path / "generation_config.json").read_text(encoding="utf-8")) == ends
    assert bool(notes) == (generation != ends) and all("<|im_end|>" in note for note in notes)


def test_a_merged_model_generates_as_the_run_did(tmp_path):
    """The controls of the run are in a generation config that transformers takes; without any it stays as it is."""
    saved = {"_from_model_config": True, "eos_token_id": 3, "top_k": 5}
    model, config = folder_of(tmp_path, None, saved), tmp_path / "generation_config.json"
    before = config.read_text(encoding="utf-8")
    assert keep_controls(tmp_path, GenerationConfig()) == () and config.read_text(encoding="utf-8") == before
    given = {"repetition_penalty": 1.5, "min_new_tokens": 3, "stop_strings": ["7", "\n\n"]}
    notes = keep_controls(tmp_path, GenerationConfig(**given))
    stops = {"stop_strings": given.pop("stop_strings")}  # in the file, generate would not go without the tokenizer
    assert json.loads(config.read_text(encoding="utf-8")) == {"eos_token_id": 3, "top_k": 5} | given
    assert len(notes) == 2 and 'stop_strings=["7", "\\n\\n"], tokenizer=tokenizer' in notes[1]
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    assert loaded.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, do_sample=False).shape == (1, 5)
    out = loaded.generate(torch.tensor([[5, 6, 7]]), tokenizer=tokenizer, max_new_tokens=8, do_sample=False, **stops)
    stated = {**given, **stops, "eos_token_id": 3, "pad_token_id": 0}
    plain = tiny_model("llama", vocab_size=262, hidden_size=64, intermediate_size=128, max_position_embeddings=1024)
    want = plain.generate(torch.tensor([[5, 6, 7]]), tokenizer=tokenizer, max_new_tokens=8, do_sample=False, **stated)
    assert torch.equal(out, want)
    config.unlink()
    keep_controls(tmp_path, GenerationConfig(min_new_tokens=2))
    assert json.loads(config.read_text(encoding="utf-8"))["eos_token_id"] == 3
    made = config.read_bytes()
    for damaged in ("{", "[1]"):  # which keeps no model from being loaded
        config.write_text(damaged, encoding="utf-8")
        keep_controls(tmp_path, GenerationConfig(min_new_tokens=2))
        assert config.read_bytes() == made


def test_the_second_stop_of_a_gguf_is_the_one_of_the_template(tmp_path):
    config = tiny_model("llama").config
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 7, 8]}', encoding="utf-8")
    assert second_stop(tmp_path, config, tokenizer_of(TURNS)) == 261
    assert second_stop(tmp_path, config, tokenizer_of(None)) == 7


def test_an_export_says_how_its_texts_begin(lowmem_rlhf, tmp_path, monkeypatch):
    """The chats of the run begin without the token that the tokenizer puts before every text."""
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path / "model", TURNS, {"eos_token_id": 3})
    rows = [{"question": f"What is {n}+1?", "answer": str(n + 1)} for n in range(6)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    values = {
        "name": "t",
        "algorithm": "sft",
        "model": "model",
        "hardware": {"device": "cpu", "quantization": "none", "compute_dtype": "float32"},
        "lora": {"r": 4},
        "data": {"train": "d.jsonl", "prompt": "question", "completion": "answer", "eval_size": 0},
        "training": {"max_steps": 1, "prompts_per_step": 2, "save_steps": 1, "learning_rate": 0.01},
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    done = lowmem_rlhf("train", "r.yaml", "--output", "run")
    assert done.code == 0, done.err
    done = lowmem_rlhf("export", "run", "--format", "ollama", "--quantize", "f16")
    assert done.code == 0, done.err
    assert "add_bos_token=false: the chats that were trained on begin without <s>" in done.out
    export = tmp_path / "run" / "export" / "ollama"
    [file] = export.glob("*.gguf")
    fields = {key: field.contents() for key, field in GGUFReader(file).fields.items() if "ggml" in key}
    assert (fields[ADD_BOS], fields[ADD_EOS]) == (False, False)
    assert fields["tokenizer.ggml.eot_token_id"] == 261
    assert json.loads((export / "export.json").read_text(encoding="utf-8"))["add_bos_token"] is False
    assert 'PARAMETER stop "<|im_end|>"' in (export / "Modelfile").read_text(encoding="utf-8")


@pytest.mark.parametrize("in_config", [True, False])
def test_template_options_of_the_run_are_the_defaults_of_what_leaves(tmp_path, in_config):
    template = "{{ messages[0].content }}{% if not thinking %}<no>{% else %}{{ style }}{% endif %}"
    tokenizer_of(template).save_pretrained(tmp_path)
    if in_config:
        (tmp_path / "chat_template.jinja").unlink()
        path = tmp_path / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    options = {"thinking": True, "style": 'a "quoted" one', "tools": None}
    (said,) = keep_template_options(tmp_path, options)
    assert "thinking=true" in said and "tools=none" in said
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    asked = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(asked, tokenize=False) == 'hia "quoted" one'
    assert tokenizer.apply_chat_template(asked, tokenize=False, thinking=False) == "hi<no>"
    assert keep_template_options(tmp_path, {}) == ()
